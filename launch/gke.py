"""Start a run on GKE, or on any Kubernetes cluster with JobSet: render launch/jobset.yaml and apply it.

    python -m launch.gke --name=b1 --image=IMAGE --accelerator=tpu-v5-lite-podslice --topology=4x4 \
        -- --config=configs/dit_b.py --config.dtype=bfloat16 --workdir=gs://BUCKET/b1 \
        --config.data.source=array_record --config.data.path=/data/PACKED [--config.KEY=VALUE ...]
    python -m launch.gke --name=b1 --image=IMAGE --accelerator=nvidia-h100-80gb --gpus=8 --hosts=2 -- ...

--dry_run only prints the manifest. --context names a context of kubectl; by default its current context is used. Values
of --env are read from the environment of this command and go to a Secret of the cluster by standard input; the manifest
and the output do not contain them. launch/Dockerfile builds an image; the data must be in the image, or in a volume
that you add to the template. When a node is taken away or a process of the run ends (exit statuses 75, 134 and those of
signals), the pods restart and resume, up to --max_restarts times. The JobSet ends with status 0, and with statuses
that need a person, 1 and 2: docs/robustness.md.
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
FINAL_STATUSES = [1, 2, 130]  # after these a restart does not help
PORT = 1234  # the first process of a run on GPUs listens here


def main(argv):
    """Apply the manifest, or print it."""
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
        print(f"# {' '.join(remove)}  # when a JobSet of this name has ended")
        print(f"# {' '.join(apply)}  # with this input:")
        print(manifest, end="")
        return
    try:
        if given.env:
            subprocess.run(delete, check=True)
            subprocess.run(create, check=True, text=True, input="".join(f"{n}={os.environ[n]}\n" for n in given.env))
        # A JobSet that has ended stays in the cluster, and applying the same manifest would not restart it.
        if subprocess.run(ended, check=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE).stdout.strip():
            subprocess.run(remove, check=True)
        subprocess.run(apply, check=True, text=True, input=manifest)
    except (subprocess.CalledProcessError, FileNotFoundError):
        raise SystemExit("error: kubectl failed: its message is above") from None
    kubectl = " ".join(kubectl)
    print(f"log:  {kubectl} logs --follow --selector=jobset.sigs.k8s.io/jobset-name={given.name}")
    print(f"stop: {kubectl} delete jobset {given.name}  # saves first; the same command as now resumes the run")


def render(given):
    """Return the manifest of a run as YAML text."""
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
    # Each TPU slice is a node pool of its own.
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
    """Return the variables by which processes find each other and the GPU driver; on TPUs GKE sets them."""
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
    parser.add_argument("--name", required=True, help="name of the run in the cluster")
    parser.add_argument("--image", required=True, help="image with this project, built from launch/Dockerfile")
    parser.add_argument("--accelerator", required=True, help="label of the nodes, such as tpu-v5-lite-podslice")
    parser.add_argument("--topology", help="topology of a TPU slice, such as 4x4")
    parser.add_argument("--chips_per_host", type=int, help="TPU chips of a host; default: 4, or the whole slice")
    parser.add_argument("--slices", type=int, default=1, help="number of TPU slices")
    parser.add_argument("--gpus", type=int, help="number of GPUs of a host")
    parser.add_argument("--hosts", type=int, default=1, help="number of GPU hosts")
    parser.add_argument("--spot", action="store_true", help="use spot nodes, which may be taken away")
    parser.add_argument("--max_restarts", type=int, default=100, help="restarts after a lost node or process")
    parser.add_argument("--queue", help="LocalQueue of Kueue")
    parser.add_argument("--service_account", default="default", help="account that may write the workdir")
    parser.add_argument(
        "--env",
        default=[],
        type=lambda names: names.split(","),
        help="variables for the run, such as HF_TOKEN,WANDB_API_KEY",
    )
    parser.add_argument("--namespace", default="default", help="namespace of the cluster")
    parser.add_argument("--context", help="context of kubectl; default: the current one")
    parser.add_argument("--dry_run", action="store_true", help="only print the commands and the manifest")
    given = parser.parse_args(argv, argparse.Namespace(flags=flags))
    for wrong in _mistakes(given):
        parser.exit(2, f"error: {wrong}\n")
    return given


def _mistakes(given):
    """Yield a message for each wrong flag."""
    if not re.fullmatch(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?", given.name):
        yield f"--name={given.name} cannot work: use at most 40 of a to z, 0 to 9 and -, and start with a letter"
    if (given.gpus is None) == (given.topology is None):
        yield "the hardware is unclear: set --topology=4x4 for a TPU slice or --gpus=8 for a host (not both)"
    elif given.gpus is not None and given.slices != 1:
        yield f"--slices={given.slices} cannot work with --gpus: set --hosts=N"
    elif given.topology is not None:
        if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*){1,2}", given.topology):
            yield f"--topology={given.topology} cannot work: use sizes such as 4x4 or 2x2x4"
        elif (chips := math.prod(_topology(given))) % _chips_per_host(given):
            reason = f"--topology={given.topology} has {chips} chips, choose a divisor"
            yield f"--chips_per_host={_chips_per_host(given)} cannot work: {reason}"
    if not any(flag.startswith("--workdir=") for flag in given.flags):  # a run that exists has a config
        yield "--workdir=... is missing: set it after --"
    for name in given.env:
        if not os.environ.get(name):
            yield f"--env={name} is not set in this environment: export it"


if __name__ == "__main__":
    main(sys.argv[1:])
