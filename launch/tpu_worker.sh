#!/usr/bin/env bash
# Commands of launch/tpu_vm.sh on each worker of a slice, in the copied checkout:
#
#     bash launch/tpu_worker.sh running        succeeds when a run exists, otherwise fails
#     bash launch/tpu_worker.sh start FLAGS    installs the project and starts the run
#     bash launch/tpu_worker.sh follow         shows the log of the run until it ends
#     bash launch/tpu_worker.sh status         prints its exit status, or "running", or nothing before the first run
#     bash launch/tpu_worker.sh stop           makes it save its state and end
#
# rae_jax.log, rae_jax.pid, rae_jax.status and rae_jax.env are next to the checkout.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
files=$(cd .. && pwd)/rae_jax

# Prints the process id of the run, if it exists. The system may give an old id to another process.
process() {
    local id
    id=$(cat "$files.pid" 2>/dev/null) && grep -qs tpu_worker.sh "/proc/$id/cmdline" && echo "$id"
}

install() {
    source launch/venv.sh
    if ! python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' && [[ ! -e .venv ]]; then # the image's Python is older
        python3 -m pip install -q --user uv
        python3 -m uv python install -q 3.12
        PYTHON=$(python3 -m uv python find 3.12)
    fi
    ensure_venv tpu,gcs,torch # gcs for workdirs on gs://, torch for released files
}

case $1 in
    running) process >/dev/null && echo "it is running" ;;
    start)
        shift
        [[ ! -e $files.env ]] || chmod 600 "$files.env"
        install
        rm -f "$files.status" "$files.pid"
        # A session of its own outlives the connection. Background processes ignore SIGINT by default; this one must not.
        setsid nohup env --default-signal=INT bash launch/tpu_worker.sh run "$@" >> "$files.log" 2>&1 < /dev/null &
        until [[ -s $files.pid ]]; do sleep 0.1; done
        ;;
    run)
        shift
        echo $$ > "$files.pid"
        [[ ! -e $files.env ]] || source "$files.env"
        # A machine that shuts down sends SIGTERM to every process: the command must not get a second one from here.
        trap '' TERM
        trap : INT
        status=0
        bash launch/local.sh -- "$@" || status=$?
        echo "$status" > "$files.status"
        ;;
    follow)
        id=$(process) || exit 0
        tail --lines=20 --follow=name --pid="$id" "$files.log"
        ;;
    status) if process >/dev/null; then echo running; else cat "$files.status" 2>/dev/null || true; fi ;;
    stop) if id=$(process); then kill -INT -- "-$id"; fi ;;
esac
