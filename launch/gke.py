"""A run on GKE, or any Kubernetes with JobSet: renders launch/jobset.yaml and applies it.

    python -m launch.gke --name=b1 --image=IMAGE --accelerator=tpu-v5-lite-podslice --topology=4x4 \
        -- --config=configs/dit_b.py --config.dtype=bfloat16 --workdir=gs://BUCKET/b1 \
        --config.data.source=array_record --config.data.path=/data/PACKED [--config.KEY=VALUE ...]
    python -m launch.gke --name=b1 --image=IMAGE --accelerator=nvidia-h100-80gb --gpus=8 --hosts=2 -- ...

--dry_run prints the manifest and does nothing. It goes to the cluster of kubectl's current context, or of --context.
Values of --env come from the environment that this is started in, and go into a Secret of the cluster, by standard
input: neither the manifest nor what is printed has them. launch/Dockerfile makes an image; the data has to be in it,
or in a volume added to the template. The pods save and go on where a node is taken away, or a process of the run is
gone (exit statuses 75, 134 and those of signals), up to --max_restarts times; with 0 all is done, and with 1 or 2 a
person is asked: docs/robustness.md.
"""

import argparse
import json
import math
import os
import re
import string
import subprocess
import sys
from pathlib import Path

TEMPLATE = Path(__file__).parent / "jobset.yaml"
FINAL_STATUSES = [1, 2, 130]  # that another start would not mend
PORT = 1234  # of the first process of a run on GPUs


def main(argv):
    """Apply the manifest, or show it."""
    given = _parse(argv)
    manifest = render(given)
    kubectl = ["kubectl", *([f"--context={given.context}"] if given.context else []), f"--namespace={given.namespace}"]
    secret = _secret_name(given)
    delete = [*kubectl, "delete", "secret", secret, "--ignore-not-found"]
    create = [*kubectl, "create", "secret", "generic", secret, "--from-env-file=/dev/stdin"]
    apply = [*kubectl, "apply", "--filename=-"]
    ended = [*kubectl, "get", "jobset", given.name, "--ignore-not-found", "--output=jsonpath={.status.terminalState}"]
    remove = [*kubectl, "delete", "jobset", given.name]
    if given.dry_run:
        if given.env:
            print(f"# {' '.join(delete)}\n# {' '.join(create)}  # {', '.join(given.env)} from the environment")
        print(f"# {' '.join(remove)}  # where one of that name has ended")
        print(f"# {' '.join(apply)}  # with this:")
        print(manifest, end="")
        return
    try:
        if given.env:
            subprocess.run(delete, check=True)
            subprocess.run(create, check=True, text=True, input="".join(f"{n}={os.environ[n]}\n" for n in given.env))
        # One that has ended stays, and to apply the same again would change nothing.
        if subprocess.run(ended, check=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE).stdout.strip():
            subprocess.run(remove, check=True)
        subprocess.run(apply, check=True, text=True, input=manifest)
    except (subprocess.CalledProcessError, FileNotFoundError):
        raise SystemExit("error: kubectl did not do it: its message is above") from None
    kubectl = " ".join(kubectl)
    print(f"log:  {kubectl} logs --follow --selector=jobset.sigs.k8s.io/jobset-name={given.name}")
    print(f"stop: {kubectl} delete jobset {given.name}  # saves first; the same command as now goes on")


def render(given):
    """The manifest of a run: text of YAML."""
    return string.Template(TEMPLATE.read_text()).substitute(
        {name: json.dumps(value) for name, value in _values(given).items()}
    )


def _values(given):
    tpu = given.gpus is None
    kind = "google.com/tpu" if tpu else "nvidia.com/gpu"
    count = _chips_per_host(given) if tpu else given.gpus
    hosts = math.prod(_topology(given)) // count if tpu else given.hosts
    selector = {
        "cloud.google.com/gke-tpu-accelerator": given.accelerator,
        "cloud.google.com/gke-tpu-topology": given.topology,
    }
    if not tpu:
        selector = {"cloud.google.com/gke-accelerator": given.accelerator}
    spot = {"cloud.google.com/gke-spot": "true"} if given.spot else {}
    tolerations = [
        {"key": key, "operator": "Equal", "value": value, "effect": "NoSchedule"} for key, value in spot.items()
    ]
    # A slice of TPUs is a node pool of its own.
    exclusive = {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"}
    return {
        **{"name": given.name, "namespace": given.namespace, "image": given.image, "flags": given.flags},
        **{"max_restarts": given.max_restarts, "service_account": given.service_account},
        **{"slices": given.slices, "hosts": hosts, "limits": {kind: count}, "final_statuses": FINAL_STATUSES},
        "labels": {"kueue.x-k8s.io/queue-name": given.queue} if given.queue else {},
        "annotations": exclusive if tpu and hosts > 1 else {},
        **{"selector": {**selector, **spot}, "tolerations": tolerations},
        "env": [] if tpu else _gpu_environment(given),
        "env_from": [{"secretRef": {"name": _secret_name(given)}}] if given.env else [],
    }


def _gpu_environment(given):
    """How the processes find each other, and the node's driver; on TPUs GKE says it itself."""
    index = {"fieldRef": {"fieldPath": "metadata.annotations['batch.kubernetes.io/job-completion-index']"}}
    return [
        {"name": "JAX_COORDINATOR_ADDRESS", "value": f"{given.name}-hosts-0-0.{given.name}:{PORT}"},
        {"name": "JAX_NUM_PROCESSES", "value": str(given.hosts)},
        {"name": "JAX_PROCESS_ID", "valueFrom": index},
        {"name": "LD_LIBRARY_PATH", "value": "/usr/local/nvidia/lib64"},
    ]


def _topology(given):
    return [int(size) for size in given.topology.split("x")]


def _chips_per_host(given):
    return given.chips_per_host or min(4, math.prod(_topology(given)))


def _secret_name(given):
    return f"{given.name}-env"


def _parse(argv):
    flags = []
    if "--" in argv:
        argv, flags = argv[: argv.index("--")], argv[argv.index("--") + 1 :]
    parser = argparse.ArgumentParser(prog="python -m launch.gke", allow_abbrev=False)
    parser.add_argument("--name", required=True, help="of the run in the cluster")
    parser.add_argument("--image", required=True, help="with this project: launch/Dockerfile")
    parser.add_argument("--accelerator", required=True, help="as the nodes' label says, tpu-v5-lite-podslice say")
    parser.add_argument("--topology", help="of a TPU slice, 4x4 say")
    parser.add_argument("--chips_per_host", type=int, help="of the slice's machines; 4, or all of fewer")
    parser.add_argument("--slices", type=int, default=1, help="how many TPU slices")
    parser.add_argument("--gpus", type=int, help="of a host")
    parser.add_argument("--hosts", type=int, default=1, help="how many of those")
    parser.add_argument("--spot", action="store_true", help="nodes that may be taken away")
    parser.add_argument("--max_restarts", type=int, default=100)
    parser.add_argument("--queue", help="Kueue's LocalQueue")
    parser.add_argument("--service_account", default="default", help="that may read and write the workdir")
    parser.add_argument("--env", default=[], type=lambda names: names.split(","), help="HF_TOKEN,WANDB_API_KEY say")
    parser.add_argument("--namespace", default="default")
    parser.add_argument("--context", help="kubectl's; its current one by default")
    parser.add_argument("--dry_run", action="store_true", help="print what would be done")
    given = parser.parse_args(argv, argparse.Namespace(flags=flags))
    for wrong in _mistakes(given):
        parser.exit(2, f"error: {wrong}\n")
    return given


def _mistakes(given):
    """What is wrong with the flags, in words."""
    if not re.fullmatch(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?", given.name):
        yield f"--name={given.name} cannot work: at most 40 of a to z, 0 to 9 and -, a letter first"
    if (given.gpus is None) == (given.topology is None):
        yield "name the hardware: --topology=4x4 of a TPU slice, or --gpus=8 of a host (not both)"
    elif given.gpus is not None and given.slices != 1:
        yield f"--slices={given.slices} is of TPUs: name --hosts=N of GPUs"
    elif given.topology is not None:
        if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*){1,2}", given.topology):
            yield f"--topology={given.topology} cannot work: sizes look like 4x4 or 2x2x4"
        elif (chips := math.prod(_topology(given))) % _chips_per_host(given):
            mend = f"--topology={given.topology} has {chips} chips"
            yield f"--chips_per_host={given.chips_per_host} cannot work: {mend}"
    for name in ("config", "workdir"):
        if not any(flag.startswith(f"--{name}=") for flag in given.flags):
            yield f"no --{name}=... behind --"
    for name in given.env:
        if not os.environ.get(name):
            yield f"--env names {name}, which is not set here"


if __name__ == "__main__":
    main(sys.argv[1:])
