#!/usr/bin/env bash
# A run on a TPU VM slice:
#
#     bash launch/tpu_vm.sh --name=b1 --zone=ZONE --type=v5litepod-16 [--project=PROJECT] [--spot] [--runtime=VERSION] \
#         [--env=HF_TOKEN,WANDB_API_KEY] [--dry_run] -- --config=configs/dit_b.py --config.dtype=bfloat16 \
#         --workdir=gs://BUCKET/b1 --config.data.source=array_record --config.data.path=/home/ME/PACKED
#
# Makes the slice by a queued resource (one of that name that is there is used), copies this checkout to all workers,
# installs, starts the run on all of them and shows the first one's log. The run is no child of this command: Ctrl-C
# here, or a closed laptop, does not end it. The same command shows it again later, or does what is missing: a slice that
# was taken away is made anew, and the run goes on. As long as it is there (in tmux on a small machine, say), it does so
# by itself. Data is not copied: put it on every worker (docs/launchers.md).
#
#     bash launch/tpu_vm.sh --name=b1 --zone=ZONE --stop      # the run ends, with all saved
#     bash launch/tpu_vm.sh --name=b1 --zone=ZONE --delete    # the slice goes, and costs no more
#
# Values of --env come from the environment that this is started in; they go to the workers as a file that only you may
# read, and are not printed. For more than one worker, ssh-add the key that gcloud uses. Several slices: launch/gke.py.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$root/launch/options.sh"

name='' zone='' type='' project='' spot='' runtime='' env='' stop='' delete=''
take "name zone type project spot runtime env stop delete" "$@"
pause=${RAE_JAX_PAUSE:-30} # seconds between two looks at what is not there yet

[[ $name =~ ^[a-z]([-a-z0-9]{0,60}[a-z0-9])?$ ]] || die "--name=$name must be letters from a to z, numbers and -"
[[ $zone ]] || die "no --zone=..., such as us-west4-a"
case $type in
    v5litepod-*) usual=v2-alpha-tpuv5-lite ;;
    v5p-*) usual=v2-alpha-tpuv5 ;;
    v6e-*) usual=v2-alpha-tpuv6e ;;
    *) usual=tpu-ubuntu2204-base ;;
esac
where=(--zone="$zone" ${project:+--project="$project"} --quiet)

queued() { run gcloud compute tpus queued-resources "$@" "${where[@]}"; }

# on WORKERS COMMAND: by ssh.
on() { run gcloud compute tpus tpu-vm ssh "$name" --worker="$1" --command="$2" "${where[@]}"; }

send() { run gcloud compute tpus tpu-vm scp "$files/$1" "$name:$1" --worker=all "${where[@]}"; }

# What queued resources say of the slice: ACTIVE, SUSPENDED, ...; NONE where there is none; UNKNOWN where nobody answers.
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

# Returns when the slice is there. Where nobody answers it ends, but waits once it was there.
provide() {
    local now before=''
    while now=$(state) && [[ $now != ACTIVE ]]; do
        [[ $now == "$before" ]] || echo "$name: $now" >&2
        before=$now
        case $now in
            UNKNOWN) [[ $was_there ]] || die "gcloud cannot say whether $name is there: its message is above" ;;
            SUSPENDED | FAILED) queued delete "$name" --force || [[ $was_there ]] ;;
            NONE)
                queued create "$name" --node-id="$name" --accelerator-type="$type" \
                    --runtime-version="${runtime:-$usual}" ${spot:+--spot} || [[ $was_there ]]
                ;;
        esac
        if [[ $dry_run ]]; then
            echo "# ... until it is ACTIVE; one that is SUSPENDED or FAILED is deleted, and made anew"
            return
        fi
        sleep "$pause"
    done
    was_there=1
}

# Copies, installs and starts the run on all workers; where it is there, nothing.
start() {
    local command
    printf -v command ' %q' "${flags[@]}"
    command="tar -xzf rae_jax.tar.gz -C rae_jax && bash rae_jax/launch/tpu_worker.sh start$command"
    command="mkdir -p rae_jax && { bash rae_jax/launch/tpu_worker.sh running 2>/dev/null || { $command; }; }"
    pack && send rae_jax.tar.gz && { [[ ! $env ]] || send rae_jax.env; } && on all "$command"
}

# What is sent, in the folder `files`: what git does not ignore of this checkout, and what --env names.
pack() {
    if [[ $dry_run ]]; then
        echo "# rae_jax.tar.gz: this checkout${env:+; rae_jax.env: $env, from the environment}"
        return
    fi
    git -C "$root" ls-files -z --cached --others --exclude-standard |
        tar -C "$root" --null --files-from=- --ignore-failed-read -czf "$files/rae_jax.tar.gz" || return
    [[ ! $env ]] || secrets > "$files/rae_jax.env"
}

# What --env names, as commands of a shell.
secrets() {
    local one
    umask 077
    for one in ${env//,/ }; do
        [[ ${!one-} ]] || die "--env names $one, which is not set here"
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
[[ $type ]] || die "no --type=..., such as v5litepod-16"
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
        # 75 and 134 are those of a run that goes on; a worker that is gone says nothing.
        status=$(on 0 "bash rae_jax/launch/tpu_worker.sh status") || status=''
        case $status in '' | 75 | 134 | running) ;; *) break ;; esac
    else
        ((++failures < 10)) || die "the run cannot be started on $name: the reason is above"
    fi
    echo "$name: looking again in $pause s" >&2
    sleep "$pause"
done
echo "$name: ended with status $status. The slice is still there: the same with --delete instead of flags ends it" >&2
exit "$status"
