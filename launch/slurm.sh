#!/usr/bin/env bash
# Starts a run as a SLURM job, with one process for each GPU:
#
#     bash launch/slurm.sh --nodes=2 --gpus-per-node=8 --time=24:00:00 [options of sbatch] [--dry_run] \
#         -- --config=configs/dit_b.py --workdir=DIR [--config.KEY=VALUE ...]
#
# Options before -- go to sbatch; WORKDIR must be on a file system that all nodes share. 300 s before the time limit, and
# when the job is preempted, all processes get SIGTERM, save and end; the job is queued again and resumes. The log is
# rae_jax_JOB.log in the folder where you submit the job; scancel JOB ends it after saving.
#SBATCH --job-name=rae_jax
#SBATCH --output=rae_jax_%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=TERM@300
set -euo pipefail

most_restarts=100 # stops a run that fails at once each time

if [[ ${1-} != --in_job ]]; then
    root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
    source "$root/launch/options.sh"
    options=() dry_run=
    while (($#)) && [[ $1 != -- ]]; do
        case $1 in
            --dry_run) dry_run=1 ;;
            # In a process of a SLURM job, JAX uses one GPU.
            --gpus-per-node=*) options+=("$1" "--ntasks-per-node=${1##*[=:]}") ;;
            *) options+=("$1") ;;
        esac
        shift
    done
    (($#)) && shift
    flags=("$@")
    need_a_run
    run sbatch ${options[@]+"${options[@]}"} "$root/launch/slurm.sh" --in_job "$root" "${flags[@]}"
    [[ ! $dry_run ]] || { echo "# and in the job, on all nodes:" && show srun --kill-on-bad-exit=0 "$python" -m rae_jax.main "${flags[@]}"; }
    exit
fi

root=$2
shift 2
source "$root/launch/options.sh" # SLURM runs a copy of this file
status=0
# The end of one process must not end the others, which may still be saving.
srun --kill-on-bad-exit=0 "$python" -m rae_jax.main "$@" || status=$?
case $status in
    75 | 134)
        if ((${SLURM_RESTART_COUNT:-0} < most_restarts)); then
            echo "ended with status $status: queued again" >&2
            scontrol requeue "$SLURM_JOB_ID"
        fi
        ;;
esac
exit "$status"
