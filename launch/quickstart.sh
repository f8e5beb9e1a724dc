#!/usr/bin/env bash
# The whole job at small scale on CPU: bash launch/quickstart.sh [WORKDIR] [--config.KEY=VALUE ...]
# Makes .venv and installs on the first run. WORKDIR defaults to runs/quickstart in the checkout.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
case ${1-} in
    "" | --config.*) workdir=$root/runs/quickstart ;;
    -*) echo "usage: bash launch/quickstart.sh [WORKDIR] [--config.KEY=VALUE ...]" >&2; exit 2 ;;
    /* | *://*) workdir=$1; shift ;;
    *) workdir=$PWD/$1; shift ;;  # relative to where the caller stands
esac

cd "$root"
source launch/venv.sh
ensure_venv cpu

export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}
exec .venv/bin/python -m rae_jax.main --config=configs/quickstart.py --workdir="$workdir" "$@"
