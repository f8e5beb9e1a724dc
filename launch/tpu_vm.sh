#!/usr/bin/env bash
# Starts a run on a TPU VM slice:
#
#     bash launch/tpu_vm.sh --name=b1 --zone=ZONE --type=v5litepod-16 [--project=PROJECT] [--spot] [--runtime=VERSION] \
#         [--env=HF_TOKEN,WANDB_API_KEY] [--dry_run] -- --config=configs/dit_b.py --config.dtype=bfloat16 \
#         --workdir=gs://BUCKET/b1 --config.data.source=array_record --config.data.path=/home/ME/PACKED
#
# Requests the slice as a queued resource (or uses an existing one of this name), copies this checkout to all workers,
# installs it, starts the run on all workers and shows the log of the first. The run is not a child of this command: Ctrl-C
# here, or a closed laptop, does not end it. The same command shows the log again later, or repeats the missing steps: it
# requests a lost slice again, and the run resumes. It does so by itself as long as it runs, for example in tmux on a
# small machine. It does not copy data: put the data on every worker (docs/launchers.md).
#
#     bash launch/tpu_vm.sh --name=b1 --zone=ZONE --stop      # the run saves its state and ends
#     bash launch/tpu_vm.sh --name=b1 --zone=ZONE --delete    # deletes the slice, which then costs nothing
#
# Values of --env are read from the environment of this command; they go to the workers as a file that only you may read,
# and are not printed. For several workers, ssh-add the key that gcloud uses. For several slices use launch/gke.py.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$root/launch/options.sh"

name='' zone='' type='' project='' spot='' runtime='' env='' stop='' delete=''
take "name zone type project spot runtime env stop delete" "$@"
pause=${RAE_JAX_PAUSE:-30} # seconds between two checks

[[ $name =~ ^[a-z]([-a-z0-9]{0,60}[a-z0-9])?$ ]] || die "--name=$name must be letters from a to z, numbers and -"
[[ $zone ]] || die "--zone is missing: set one such as --zone=us-west4-a"
case $type in
    v5litepod-*) usual=v2-alpha-tpuv5-lite ;;
    v5p-*) usual=v2-alpha-tpuv5 ;;
    v6e-*) usual=v2-alpha-tpuv6e ;;
    *) usual=tpu-ubuntu2204-base ;;
esac
where=(--zone="$zone" ${project:+--project="$project"} --quiet)

queued() { run gcloud compute tpus queued-resources "$@" "${where[@]}"; }

# on WORKERS COMMAND: runs the command by ssh.
on() { run gcloud compute tpus tpu-vm ssh "$name" --worker="$1" --command="$2" "${where[@]}"; }

send() { run gcloud compute tpus tpu-vm scp "$files/$1" "$name:$1" --worker=all "${where[@]}"; }

# Prints the state of the queued resource: ACTIVE, SUSPENDED, ...; NONE when it does not exist; UNKNOWN without an answer.
state() {
    local said
    if [[ $dry_run ]]; then echo NONE; return; fi
    if said=$(gcloud compute tpus queued-resources describe "$name" "${where[@]}" --format='value(state.state)' 2>&1); then
        echo "${said##*$'\n'}"
    elif [[ $said == *NOT_FOUND* ]]; then
        echo NONE
    else
        echo "$said" >&2
        echo UNKNOWN
    fi
}

# Returns when the slice is ACTIVE. Without an answer the command stops, unless the slice was ACTIVE before.
provide() {
    local now before=''
    while now=$(state) && [[ $now != ACTIVE ]]; do
        [[ $now == "$before" ]] || echo "$name: $now" >&2
        before=$now
        case $now in
            UNKNOWN) [[ $was_there ]] || die "gcloud cannot tell the state of $name: its message is above" ;;
            SUSPENDED | FAILED) queued delete "$name" --force || [[ $was_there ]] ;;
            NONE)
                queued create "$name" --node-id="$name" --accelerator-type="$type" \
                    --runtime-version="${runtime:-$usual}" ${spot:+--spot} || [[ $was_there ]]
                ;;
        esac
        if [[ $dry_run ]]; then
            echo "# ... until it is ACTIVE; a SUSPENDED or FAILED slice is deleted and requested again"
            return
        fi
        sleep "$pause"
    done
    was_there=1
}

# Copies, installs and starts the run on all workers where it does not run yet.
start() {
    local command
    printf -v command ' %q' "${flags[@]}"
    command="tar -xzf rae_jax.tar.gz -C rae_jax && bash rae_jax/launch/tpu_worker.sh start$command"
    command="mkdir -p rae_jax && { bash rae_jax/launch/tpu_worker.sh running 2>/dev/null || { $command; }; }"
    pack && send rae_jax.tar.gz && { [[ ! $env ]] || send rae_jax.env; } && on all "$command"
}

# Writes to the folder `files`: the files of this checkout that git does not ignore, and the variables of --env.
pack() {
    if [[ $dry_run ]]; then
        echo "# rae_jax.tar.gz: this checkout${env:+; rae_jax.env: $env, from the environment}"
        return
    fi
    git -C "$root" ls-files -z --cached --others --exclude-standard |
        tar -C "$root" --null --files-from=- --ignore-failed-read -czf "$files/rae_jax.tar.gz" || return
    [[ ! $env ]] || secrets > "$files/rae_jax.env"
}

# Prints the variables of --env as shell commands.
secrets() {
    local one
    umask 077
    for one in ${env//,/ }; do
        [[ ${!one-} ]] || die "--env=$one is not set in this environment: export it"
        printf 'export %s=%q\n' "$one" "${!one}"
    done
}

if [[ $delete ]]; then
    queued delete "$name" --force
    exit
fi
if [[ $stop ]]; then
    on all "bash rae_jax/launch/tpu_worker.sh stop"
    exit
fi

need_a_run
[[ $type ]] || die "--type is missing: set one such as --type=v5litepod-16"
[[ ! $env ]] || secrets > /dev/null
files=. was_there='' failures=0
if [[ ! $dry_run ]]; then
    files=$(mktemp -d)
    trap 'rm -rf "$files"' EXIT
fi
while :; do
    provide
    if start; then
        failures=0
        on 0 "bash rae_jax/launch/tpu_worker.sh follow" || true
        [[ ! $dry_run ]] || exit 0
        # After 75 and 134 the run can resume; a lost worker prints nothing.
        status=$(on 0 "bash rae_jax/launch/tpu_worker.sh status") || status=''
        case $status in '' | 75 | 134 | running) ;; *) break ;; esac
    else
        ((++failures < 10)) || die "the run cannot start on $name: the reason is above"
    fi
    echo "$name: next check in $pause s" >&2
    sleep "$pause"
done
echo "$name: the run ended with status $status. The slice still exists: delete it with --delete" >&2
exit "$status"
