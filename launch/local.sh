#!/usr/bin/env bash
# A run on this machine that goes on by itself:
#
#     bash launch/local.sh [--processes=N] [--dry_run] -- --config=configs/dit_b.py --workdir=DIR [--config.KEY=VALUE ...]
#
# The command is started again where it ends as one that can go on (status 75 or 134, docs/robustness.md). Ctrl-C, or a
# SIGTERM to this script, is passed on: all is saved, and it ends. One process uses all GPUs or TPU chips of the machine;
# --processes=N makes N of them on its CPU that are one run.
set -euo pipefail
set -m # without it, bash has what it starts in the background ignore SIGINT

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

# The commands of all processes, one `start` each.
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

# Sets `status`: 0; or that of a process which asks to be started again, unless another one says that it would not help.
wait_for_all() {
    local child one
    status=0
    for child in ${children[@]+"${children[@]}"}; do
        one=0
        wait "$child" || one=$?
        while kill -0 "$child" 2>/dev/null; do # it was a signal to this script that ended the wait
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
    echo "ended with status $status: the same command again in $pause s" >&2
    sleep "$pause" &
    wait $! || true # which a signal ends at once
    [[ $asked ]] && exit "$status"
done
