"""launch/gke.py: the manifest of a JobSet, what becomes of its pods, and secrets."""

import os
import re
from pathlib import Path

import pytest
from launch_cases import GPU, ROOT, RUN, TPU, do

yaml = pytest.importorskip("yaml")


def _manifest(*options):
    return yaml.safe_load(do(["gke", *options, "--dry_run", *RUN], HF_TOKEN="a-secret"))


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
    """A status is final if docs/robustness.md does not say 'run the same command again'. A lost node is not final."""
    rows = re.findall(
        r"^\| (\d+)(?: \(\w+\))? \|.*\| (.*) \|$", (ROOT / "docs" / "robustness.md").read_text(), re.MULTILINE
    )
    again = {int(status) for status, what in rows if what == "run the same command again"}
    spec = _manifest(*TPU)["spec"]
    lost, final = spec["replicatedJobs"][0]["template"]["spec"]["podFailurePolicy"]["rules"]
    assert lost["action"] == "Count" and lost["onPodConditions"][0]["type"] == "DisruptionTarget"
    assert again == {75, 134} and set(final["onExitCodes"]["values"]) == {int(row[0]) for row in rows} - again - {0}
    assert final["onExitCodes"]["operator"] == "In"
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
    said = do(["gke", *TPU, "--env=HF_TOKEN", "--dry_run", *RUN], HF_TOKEN="a-secret")
    assert "HF_TOKEN" in said and "a-secret" not in said
    assert "HF_TOKEN" in do(["gke", *TPU, "--env=HF_TOKEN", *RUN], status=2, HF_TOKEN="")


def test_secrets_reach_the_cluster_by_standard_input_alone(tmp_path):
    kubectl = tmp_path / "kubectl"
    kubectl.write_text('#!/bin/sh\necho "$@" >> "$FOLDER/asked"; cat >> "$FOLDER/read"\n')
    kubectl.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "FOLDER": str(tmp_path), "HF_TOKEN": "a-secret"}
    said = do(["gke", *TPU, "--env=HF_TOKEN", "--context=mine", *RUN], **environment)
    delete, create, ended, apply = (tmp_path / "asked").read_text().splitlines()
    assert "get jobset b1 " in ended
    assert create == "--context=mine --namespace=default create secret generic b1-env --from-env-file=/dev/stdin"
    assert "delete secret b1-env" in delete and apply.endswith("apply --filename=-")
    secret, manifest = (tmp_path / "read").read_text().split("\n", 1)
    assert secret == "HF_TOKEN=a-secret" and yaml.safe_load(manifest)["kind"] == "JobSet"
    assert "a-secret" not in said + delete + create + apply + manifest


@pytest.mark.parametrize("state, times", [("", 0), ("Failed", 1)])
def test_a_jobset_that_has_ended_is_made_anew(tmp_path, state, times):
    kubectl = tmp_path / "kubectl"
    kubectl.write_text(
        f'#!/bin/sh\necho "$@" >> "$FOLDER/asked"; [ "$3" != jobset ] || [ "$2" != get ] || echo "{state}"\n'
    )
    kubectl.chmod(0o755)
    do(["gke", *TPU, *RUN], PATH=f"{tmp_path}:{os.environ['PATH']}", FOLDER=str(tmp_path))
    asked = (tmp_path / "asked").read_text().splitlines()
    assert asked.count("--namespace=default delete jobset b1") == times and asked[-1].endswith("apply --filename=-")
