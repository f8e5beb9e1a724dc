#!/usr/bin/env bash
# Starts a run on this machine, and restarts it when it can resume:
#
#     bash launch/local.sh [--processes=N] [--dry_run] -- --config=configs/dit_b.py --workdir=DIR [--config.KEY=VALUE ...]
#
# The command restarts when it ends with a status after which it can resume (75 or 134, docs/robustness.md). Ctrl-C, or a
# SIGTERM to this script, is passed on: the run saves its state and ends. One process uses all GPUs or TPU chips of the
# machine; --processes=N starts a run of N processes on its CPU.
set -euo pipefail
set -m # otherwise background processes of bash ignore SIGINT

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$root/launch/options.sh"

processes=1
take "processes" "$@"
need_a_run
[[ $processes =~ ^[1-9][0-9]*$ ]] || die "--processes=$processes must be a positive number"

pause=${RAE_JAX_PAUSE:-10} # seconds
children=() asked=

pass_on() {
    asked=1
    kill -"$1" ${children[@]+"${children[@]}"} 2>/dev/null || true
}
trap 'pass_on TERM' TERM
trap 'pass_on INT' INT

# Calls `start` for the command of each process.
start_all() {
    local port id
    if ((processes == 1)); then
        start "$python" -m rae_jax.main "${flags[@]}"
        return
    fi
    export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}
    port=$("$python" -c 'import socket; s = socket.socket(); s.bind(("localhost", 0)); print(s.getsockname()[1])')
    for ((id = 0; id < processes; id++)); do
        start "$python" -m rae_jax.main "${flags[@]}" \
            --coordinator="localhost:$port" --num_processes="$processes" --process_id="$id"
    done
}

start() {
    if [[ $dry_run ]]; then show "$@"; return; fi
    "$@" &
    children+=($!)
}

# Sets `status`: 0 when all processes end with 0; a status that asks for a restart, unless another process has a final status.
wait_for_all() {
    local child one
    status=0
    for child in ${children[@]+"${children[@]}"}; do
        one=0
        wait "$child" || one=$?
        while kill -0 "$child" 2>/dev/null; do # a signal to this script ended the wait
            one=0
            wait "$child" || one=$?
        done
        case $one in
            0) ;;
            75 | 134) ((status)) || status=$one ;;
            *) case $status in 0 | 75 | 134) status=$one ;; esac ;;
        esac
    done
}

while :; do
    children=()
    start_all
    wait_for_all
    case $status in 75 | 134) ;; *) exit "$status" ;; esac
    [[ $asked ]] && exit "$status"
    echo "ended with status $status: the command restarts in $pause s" >&2
    sleep "$pause" &
    wait $! || true # a signal ends the wait at once
    [[ $asked ]] && exit "$status"
done
