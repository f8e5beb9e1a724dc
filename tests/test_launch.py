"""The launchers: what their dry runs say, what they refuse, and two processes of one run on this machine."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

yaml = pytest.importorskip("yaml")
ROOT = Path(__file__).parents[1]
RUN = ("--", "--config=configs/small.py", "--workdir=gs://BUCKET/run", "--config.name=two words")
TPU = ("--name=b1", "--image=IMAGE", "--accelerator=tpu-v5-lite-podslice", "--topology=4x4")
GPU = ("--name=b1", "--image=IMAGE", "--accelerator=nvidia-h100-80gb", "--gpus=8", "--hosts=2")


def _do(command, *, status=0, **environment):
    """Standard output of a launcher; or its complaint of one line, with status 2."""
    command = ["bash", f"launch/{command[0]}", *command[1:]] if command[0].endswith(".sh") else _module(command)
    environment = {**os.environ, **environment}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == status, done.stderr
    return done.stderr if status else done.stdout


def _module(command):
    return [sys.executable, "-m", f"launch.{command[0]}", *command[1:]]


def _manifest(*options):
    return yaml.safe_load(_do(["gke", *options, "--dry_run", *RUN], HF_TOKEN="a-secret"))


def _pod(manifest):
    return manifest["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]


def test_a_jobset_on_tpus():
    manifest = _manifest(*TPU, "--slices=2", "--queue=line", "--spot", "--env=HF_TOKEN")
    (job,) = manifest["spec"]["replicatedJobs"]
    assert (
        job["replicas"] == 2 and job["template"]["spec"]["parallelism"] == job["template"]["spec"]["completions"] == 4
    )
    assert manifest["metadata"]["labels"] == {"kueue.x-k8s.io/queue-name": "line"}
    pod = _pod(manifest)
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == "4x4"
    (container,) = pod["containers"]
    assert container["resources"]["limits"] == {"google.com/tpu": 4}
    assert container["command"] + container["args"] == ["python", "-m", "rae_jax.main", *RUN[1:]]
    assert container["envFrom"] == [{"secretRef": {"name": "b1-env"}}] and container["env"] == []


def test_a_jobset_on_gpus():
    manifest = _manifest(*GPU)
    assert manifest["spec"]["replicatedJobs"][0]["template"]["spec"]["completions"] == 2
    (container,) = _pod(manifest)["containers"]
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 8}
    environment = {variable["name"]: variable.get("value") for variable in container["env"]}
    assert environment["JAX_NUM_PROCESSES"] == "2"
    assert environment["JAX_COORDINATOR_ADDRESS"].startswith("b1-hosts-0-0.b1:")


def test_which_exit_statuses_end_a_jobset():
    """Those that ask a person; all others, and a lost node before them, start it again (docs/robustness.md)."""
    from rae_jax import command, main

    spec = _manifest(*TPU)["spec"]
    lost, final = spec["replicatedJobs"][0]["template"]["spec"]["podFailurePolicy"]["rules"]
    assert lost["action"] == "Count" and lost["onPodConditions"][0]["type"] == "DisruptionTarget"
    assert set(final["onExitCodes"]["values"]) == {1, 2, main.DIVERGED, main.INTERRUPTED}
    assert command.RESTART not in final["onExitCodes"]["values"] and final["onExitCodes"]["operator"] == "In"
    assert final["onExitCodes"]["containerName"] == _pod({"spec": spec})["containers"][0]["name"]
    (rule,) = spec["failurePolicy"]["rules"]
    assert rule["action"] == "FailJobSet" and rule["onJobFailureReasons"] == ["PodFailurePolicy"]
    assert spec["failurePolicy"]["maxRestarts"] > 10


@pytest.mark.parametrize(
    "options", [TPU, (*TPU, "--spot", "--queue=line", "--env=HF_TOKEN"), GPU], ids=("tpu", "spot", "gpu")
)
def test_the_manifests_fit_the_definition_of_jobsets(options):
    """RAE_JAX_JOBSET_CRD names JobSet's CustomResourceDefinition, which has that of jobs and pods in it."""
    path = os.environ.get("RAE_JAX_JOBSET_CRD")
    if not path:
        pytest.skip("RAE_JAX_JOBSET_CRD does not name JobSet's CustomResourceDefinition")
    jsonschema = pytest.importorskip("jsonschema")
    (version,) = yaml.safe_load(Path(path).read_text())["spec"]["versions"]
    schema = _strict(version["schema"]["openAPIV3Schema"])
    schema["properties"]["metadata"] = {"type": "object"}
    manifest = _manifest(*options)
    jsonschema.validate(manifest, schema)
    manifest["spec"]["replicatedJobs"][0]["template"]["spec"]["backofLimit"] = 0
    with pytest.raises(jsonschema.ValidationError, match="backofLimit"):
        jsonschema.validate(manifest, schema)


def _strict(schema):
    """Fields that the definition does not have are wrong."""
    if isinstance(schema, list):
        return [_strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    strict = {key: _strict(value) for key, value in schema.items()}
    if isinstance(schema.get("properties"), dict) and schema.get("type") == "object":
        strict["additionalProperties"] = False
    return strict


def test_secrets_are_neither_printed_nor_in_the_manifest():
    said = _do(["gke", *TPU, "--env=HF_TOKEN", "--dry_run", *RUN], HF_TOKEN="a-secret")
    assert "HF_TOKEN" in said and "a-secret" not in said
    assert "HF_TOKEN" in _do(["gke", *TPU, "--env=HF_TOKEN", *RUN], status=2, HF_TOKEN="")


@pytest.mark.parametrize(
    "command, complaint",
    [
        (("gke", *TPU, "--gpus=8", *RUN), "not both"),
        (("gke", "--name=B_1", *TPU[1:], *RUN), "--name=B_1"),
        (("gke", *TPU[:3], "--topology=4by4", *RUN), "--topology=4by4"),
        (("gke", *TPU, "--chips_per_host=3", *RUN), "--topology=4x4 has 16 chips"),
        (("gke", *TPU, "--", "--config=configs/small.py"), "--workdir"),
        (("local.sh", "--process=2", *RUN), "'--process=2'"),
        (("local.sh", "--processes=two", *RUN), "--processes=two"),
        (("local.sh", "--", "--config=configs/small.py"), "--workdir"),
        (("slurm.sh", "--nodes=2", "--", "--workdir=DIR"), "--config"),
    ],
)
def test_mistakes_are_one_line(command, complaint):
    said = _do(command, status=2)
    assert said.startswith("error: ") and said.count("\n") == 1 and complaint in said


def test_the_dry_run_of_a_slurm_job():
    said = _do(["slurm.sh", "--nodes=2", "--gpus-per-node=h100:8", "--time=24:00:00", "--dry_run", *RUN])
    submitted, _, inside = said.splitlines()
    assert submitted.startswith("sbatch --nodes=2 --gpus-per-node=h100:8 --ntasks-per-node=8 --time=24:00:00 ")
    for line in (submitted, inside):
        assert line.endswith(r"--config=configs/small.py --workdir=gs://BUCKET/run --config.name=two\ words")
    assert inside.startswith("srun ") and " -m rae_jax.main " in inside


def test_the_dry_run_on_this_machine():
    (one,) = _do(["local.sh", "--dry_run", *RUN]).splitlines()
    assert "--num_processes" not in one
    two = _do(["local.sh", "--processes=2", "--dry_run", *RUN]).splitlines()
    assert [line.split()[-1] for line in two] == ["--process_id=0", "--process_id=1"]
