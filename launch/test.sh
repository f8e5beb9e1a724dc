#!/usr/bin/env bash
# Run the tests on CPU: bash launch/test.sh [pytest arguments]
#     bash launch/test.sh                          the default tests
#     bash launch/test.sh tests/data -k order      some of them
#     bash launch/test.sh -m "slow and not by_hand"    the slow tests of .ci/run
#     bash launch/test.sh -m by_hand -n 0          tests of many minutes or much memory, one after the other
# The first run makes .venv and installs.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/venv.sh
ensure_venv test

export JAX_PLATFORMS=cpu
exec .venv/bin/python -m pytest -n auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder "$@"
