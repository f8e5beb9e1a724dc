#!/usr/bin/env bash
# The tests, on CPU: bash launch/test.sh [pytest arguments], for instance `-k sampling`; or `-m "slow and not by_hand"`: those
# that take longer, as .ci/run does; or `-m by_hand -n 0`: those that take minutes and much memory, one after the other.
# Makes .venv and installs on the first run.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/venv.sh
ensure_venv test

export JAX_PLATFORMS=cpu
exec .venv/bin/python -m pytest -n auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder "$@"
