#!/usr/bin/env bash
# The tests, on CPU: bash launch/test.sh [pytest arguments], for instance `-m slow` or `-k sampling`.
# Makes .venv and installs on the first run.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/venv.sh
ensure_venv test

export JAX_PLATFORMS=cpu
exec .venv/bin/python -m pytest "$@"
