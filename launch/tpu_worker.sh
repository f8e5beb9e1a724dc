#!/usr/bin/env bash
# What launch/tpu_vm.sh has each worker of a slice do, in the checkout that it copied there:
#
#     bash launch/tpu_worker.sh running        says so where there is a run, and fails where not
#     bash launch/tpu_worker.sh start FLAGS    installs, and starts the run
#     bash launch/tpu_worker.sh follow         shows its log until it ends
#     bash launch/tpu_worker.sh status         its exit status, or "running"; nothing where it never was
#     bash launch/tpu_worker.sh stop           has it save and end
#
# Beside the checkout lie rae_jax.log, rae_jax.pid, rae_jax.status and rae_jax.env.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
files=$(cd .. && pwd)/rae_jax

# The run's process, where there is one. Process ids are given anew.
process() {
    local id
    id=$(cat "$files.pid" 2>/dev/null) && grep -qs tpu_worker.sh "/proc/$id/cmdline" && echo "$id"
}

install() {
    source launch/venv.sh
    if ! python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' && [[ ! -e .venv ]]; then # the images' is older
        python3 -m pip install -q --user uv
        python3 -m uv python install -q 3.12
        PYTHON=$(python3 -m uv python find 3.12)
    fi
    ensure_venv tpu,gcs,torch # workdirs on gs:// take gcs; released files torch
}

case $1 in
    running) process >/dev/null && echo "it is running" ;;
    start)
        shift
        [[ ! -e $files.env ]] || chmod 600 "$files.env"
        install
        rm -f "$files.status" "$files.pid"
        # In a session of its own, which no connection that ends takes along; and not deaf to SIGINT, as what is started
        # in the background is.
        setsid nohup env --default-signal=INT bash launch/tpu_worker.sh run "$@" >> "$files.log" 2>&1 < /dev/null &
        until [[ -s $files.pid ]]; do sleep 0.1; done
        ;;
    run)
        shift
        echo $$ > "$files.pid"
        [[ ! -e $files.env ]] || source "$files.env"
        # A machine that goes down sends SIGTERM to every process: the command gets its own, and none besides from here.
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
