"""The launchers: what their dry runs say, what they refuse, and two processes of one run on this machine."""

import contextlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rae_jax.runtime import logs

yaml = pytest.importorskip("yaml")
ROOT = Path(__file__).parents[2]
RUN = ("--", "--config=configs/small.py", "--workdir=gs://BUCKET/run", "--config.name=two words")
TPU = ("--name=b1", "--image=IMAGE", "--accelerator=tpu-v5-lite-podslice", "--topology=4x4")
GPU = ("--name=b1", "--image=IMAGE", "--accelerator=nvidia-h100-80gb", "--gpus=8", "--hosts=2")


def _do(command, *, status=0, **environment):
    """Standard output of a launcher; or its complaint of one line, with status 2."""
    name, *options = command
    command = (
        ["bash", f"launch/{Path(name).name}"] if name.endswith(".sh") else [sys.executable, "-m", f"launch.{name}"]
    )
    environment = {**os.environ, **environment}
    done = subprocess.run([*command, *options], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == status, done.stderr
    return done.stderr if status else done.stdout


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
    """Final: the statuses for which docs/robustness.md does not say 'run the same command again'. A lost node does."""
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
    said = _do(["gke", *TPU, "--env=HF_TOKEN", "--dry_run", *RUN], HF_TOKEN="a-secret")
    assert "HF_TOKEN" in said and "a-secret" not in said
    assert "HF_TOKEN" in _do(["gke", *TPU, "--env=HF_TOKEN", *RUN], status=2, HF_TOKEN="")


def test_secrets_reach_the_cluster_by_standard_input_alone(tmp_path):
    kubectl = tmp_path / "kubectl"
    kubectl.write_text('#!/bin/sh\necho "$@" >> "$FOLDER/asked"; cat >> "$FOLDER/read"\n')
    kubectl.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "FOLDER": str(tmp_path), "HF_TOKEN": "a-secret"}
    said = _do(["gke", *TPU, "--env=HF_TOKEN", "--context=mine", *RUN], **environment)
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
    _do(["gke", *TPU, *RUN], PATH=f"{tmp_path}:{os.environ['PATH']}", FOLDER=str(tmp_path))
    asked = (tmp_path / "asked").read_text().splitlines()
    assert asked.count("--namespace=default delete jobset b1") == times and asked[-1].endswith("apply --filename=-")


@pytest.mark.parametrize(
    "command, complaint",
    [
        (("gke", *TPU, "--gpus=8", *RUN), "not both"),
        (("gke", *GPU, "--slices=2", *RUN), "--slices=2"),
        (("gke", "--name=B_1", *TPU[1:], *RUN), "--name=B_1"),
        (("gke", *TPU[:3], "--topology=4by4", *RUN), "--topology=4by4"),
        (("gke", *TPU, "--chips_per_host=3", *RUN), "--topology=4x4 has 16 chips"),
        (("gke", *TPU[:3], "--topology=3x3", *RUN), "--chips_per_host=4 cannot work: --topology=3x3 has 9 chips"),
        (("gke", *TPU, "--", "--config=configs/small.py"), "--workdir"),
        (("xm", "--title=t", "--sweep=config.seed=0,1", "--", "bash", "launch/local.sh", *RUN), "--workdir"),
        (("local.sh", "--process=2", *RUN), "'--process=2'"),
        (("local.sh", "--processes=two", *RUN), "--processes=two"),
        (("local.sh", "--", "--config=configs/small.py"), "--workdir"),
        (("tpu_vm.sh", "--name=b1", "--zone=here", *RUN), "--type"),
        (("tpu_vm.sh", "--name=b_1", "--zone=here", *RUN), "--name=b_1"),
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
        assert line.endswith(r"--config=configs/small.py --workdir=gs://BUCKET/run '--config.name=two words'")
    assert inside.startswith("srun ") and " -m rae_jax.main " in inside


def test_the_dry_run_on_this_machine():
    (one,) = _do(["local.sh", "--dry_run", *RUN]).splitlines()
    assert "--num_processes" not in one
    two = _do(["local.sh", "--processes=2", "--dry_run", *RUN]).splitlines()
    assert [line.split()[-1] for line in two] == ["--process_id=0", "--process_id=1"]


# Stands in place of a run: ends with the next of the exit statuses that $STATUSES has for this process.
RUN_THAT_ENDS = r"""#!/usr/bin/env bash
[[ $1 == -m ]] || { echo 1234; exit; }
process=${*: -1}
echo >> "$FOLDER/$process"
attempts=($STATUSES)
IFS=, read -ra statuses <<< "${attempts[$(wc -l < "$FOLDER/$process") - 1]}"
exit "${statuses[${process#--process_id=}]}"
"""


@pytest.mark.parametrize(
    "statuses, ended, attempts",
    [
        ("0,0", 0, 1),
        ("75,0 134,75 0,0", 0, 3),
        ("2,0", 2, 1),
        ("75,2", 2, 1),  # what a person must see wins
        ("137,134", 137, 1),
    ],
)
def test_what_is_started_again_on_this_machine(tmp_path, statuses, ended, attempts):
    (tmp_path / "launch").mkdir()
    for name in ("local.sh", "options.sh"):
        shutil.copy(ROOT / "launch" / name, tmp_path / "launch")
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(RUN_THAT_ENDS)
    python.chmod(0o755)
    environment = {**os.environ, "FOLDER": str(tmp_path), "STATUSES": statuses, "RAE_JAX_PAUSE": "0.1"}
    done = subprocess.run(["bash", "launch/local.sh", "--processes=2", *RUN], cwd=tmp_path, env=environment, timeout=60)
    assert done.returncode == ended
    assert [len((tmp_path / f"--process_id={i}").read_text()) for i in (0, 1)] == [attempts] * 2


SMALL = (
    *("--config=configs/small.py", "--config.stages=('judge',)", "--config.judge.widths=(8,)", "--config.log_every=5"),
    *("--config.judge.train.batch_size=16", "--config.data.num_train=256", "--config.data.num_heldout=64"),
    *("--config.dit.weights=", "--config.evaluate.batch_size=16", "--config.evaluate.probe=False"),
)


def _is_whole(workdir, num_steps):
    """True if a run has ended, and its metrics have a row for each log step, once."""
    steps = [row["step"] for row in logs.read(workdir / "metrics" / "judge.jsonl")]
    return (workdir / "report.html").exists() and steps == list(range(5, num_steps + 1, 5))


@pytest.mark.slow
def test_two_processes_on_this_machine_save_on_sigterm_and_go_on(tmp_path):
    flags = (*SMALL, f"--workdir={tmp_path}", "--config.judge.train.num_steps=400")
    launcher = subprocess.Popen(["bash", "launch/local.sh", "--processes=2", "--", *flags], cwd=ROOT)
    while len(logs.read(tmp_path / "metrics" / "judge.jsonl")) < 2:
        assert launcher.poll() is None
        time.sleep(0.1)
    launcher.send_signal(signal.SIGTERM)
    assert launcher.wait(300) == 75
    _do(["local.sh", "--processes=2", "--", *flags])
    assert _is_whole(tmp_path, 400)


@pytest.mark.slow
def test_two_tasks_of_a_slurm_job(tmp_path):
    """Needs a machine on which SLURM runs."""
    if not shutil.which("sinfo") or subprocess.run(["sinfo"], capture_output=True, timeout=60).returncode:
        pytest.skip("SLURM is not running here")
    options = ("--ntasks=2", "--wait", f"--output={tmp_path}/log", f"--chdir={ROOT}")
    flags = (*SMALL, f"--workdir={tmp_path}/run", "--config.judge.train.num_steps=20")
    _do(["slurm.sh", *options, "--", *flags], JAX_PLATFORMS="cpu", XLA_FLAGS="")
    assert _is_whole(tmp_path / "run", 20)
    assert "Rank 1 is connected to 1 peer ranks" in (tmp_path / "log").read_text()


def test_the_dry_run_of_a_sweep():
    """Each work unit's command is what the launcher takes."""
    sweep = ("--title=t", "--sweep=config.seed=0,1", "--sweep=config.log_every=5")
    launcher = ("--", "bash", "launch/local.sh", "--dry_run", "--", "--config=configs/small.py", "--workdir=runs/{}")
    units = _do(["xm", *sweep, "--dry_run", *launcher]).splitlines()
    assert len(units) == 2
    said = _do(shlex.split(units[1])[1:])
    assert said.endswith("--config=configs/small.py --workdir=runs/2 --config.seed=1 --config.log_every=5\n")


# A cloud of two workers, which are folders: it answers as gcloud does, and does here what it is told to do there.
GCLOUD = r"""#!/usr/bin/env bash
set -eu
echo "$*" >> "$CLOUD/asked"
workers=("$CLOUD"/worker?)
for word; do
    case $word in
        --worker=0) workers=("$CLOUD/worker0") ;;
        --command=*) command=${word#--command=} ;;
    esac
done
case "$3 $4" in
    "queued-resources describe") cat "$CLOUD/state" 2>/dev/null || { echo "NOT_FOUND: there is none" >&2; exit 1; } ;;
    "queued-resources create")
        for worker in 0 1; do cp -r "$CLOUD/new" "$CLOUD/worker$worker"; done
        echo ACTIVE > "$CLOUD/state"
        ;;
    "queued-resources delete") rm -r "$CLOUD/state" "$CLOUD"/worker? ;;
    "tpu-vm scp") for worker in "${workers[@]}"; do cp "$5" "$worker/"; done ;;
    "tpu-vm ssh")
        [[ $(cat "$CLOUD/state") == ACTIVE ]]
        for worker in "${workers[@]}"; do (cd "$worker" && HOME=$worker bash -c "$command"); done
        ;;
esac
"""

# Stands where a worker has its Python, in place of a run: ends with 75 at first, runs until it is told to end, is done.
RUN_OF_A_WORKER = r"""#!/usr/bin/env bash
said=$CLOUD/${HOME##*/}.said
echo "$HF_TOKEN $*" >> "$said"
case $(wc -l < "$said") in
    1) exit 75 ;;
    2) trap 'exit 130' INT; echo $$ > "$HOME/runs"; while :; do sleep 0.1; done ;;
esac
"""


@pytest.fixture
def cloud(tmp_path):
    """The cloud's folder, and the command's environment."""
    if not (ROOT / ".git").exists():
        pytest.skip("launch/tpu_vm.sh sends the files that git lists, and this is no git checkout")
    for name, text in (("bin/gcloud", GCLOUD), ("new/rae_jax/.venv/bin/python", RUN_OF_A_WORKER)):
        path = tmp_path / name
        path.parent.mkdir(parents=True)
        path.write_text(text)
        path.chmod(0o755)
    installed = tmp_path / "new/rae_jax/.venv/.installed-tpu,gcs,torch"
    installed.touch()
    os.utime(installed, (4e9, 4e9))  # newer than whatever comes
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    yield tmp_path, {"PATH": path, "CLOUD": str(tmp_path), "RAE_JAX_PAUSE": "0.2", "HF_TOKEN": "a secret"}
    _take_away(tmp_path)


def _take_away(cloud):
    """Kill what runs on a slice, as happens when the slice is given to others."""
    for worker in cloud.glob("worker?"):
        for file, kill in (("rae_jax.pid", os.killpg), ("runs", os.kill)):
            with contextlib.suppress(OSError):
                kill(int((worker / file).read_text()), signal.SIGKILL)


def _start_on_tpu(environment):
    options = ("--name=b1", "--zone=here", "--type=v5litepod-8", "--env=HF_TOKEN")
    command = ["bash", "launch/tpu_vm.sh", *options, *RUN]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env={**os.environ, **environment}, **pipes)


def _wait_until_both_run(cloud, launcher):
    end = time.monotonic() + 60
    while not all((cloud / f"worker{i}" / "runs").exists() for i in (0, 1)):
        assert launcher.poll() is None, launcher.stdout.read()
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_slice_that_is_taken_away_is_made_anew_and_the_run_goes_on(cloud):
    folder, environment = cloud
    launcher = _start_on_tpu(environment)
    _wait_until_both_run(folder, launcher)
    assert (folder / "worker1" / "rae_jax.env").stat().st_mode & 0o777 == 0o600
    (folder / "state").write_text("SUSPENDED\n")
    _take_away(folder)
    said = launcher.communicate(timeout=60)[0]
    assert launcher.returncode == 0, said
    for worker in (0, 1):
        runs = (folder / f"worker{worker}.said").read_text().splitlines()
        assert runs == [f"a secret -m rae_jax.main {' '.join(RUN[1:])}"] * 3
    asked = (folder / "asked").read_text()
    assert [asked.count(f"queued-resources {what}") for what in ("create", "delete")] == [2, 1]
    assert "a secret" not in asked + said and "--node-id=b1 --accelerator-type=v5litepod-8" in asked


def test_a_run_on_a_slice_outlives_its_launcher_and_is_stopped(cloud):
    folder, environment = cloud
    launcher = _start_on_tpu(environment)
    _wait_until_both_run(folder, launcher)
    launcher.send_signal(signal.SIGTERM)
    launcher.wait(30)
    again = _start_on_tpu(environment)  # finds it
    assert "it is running" in again.stdout.readline()
    _do(["tpu_vm.sh", "--name=b1", "--zone=here", "--stop"], **environment)
    assert again.wait(60) == 130
    assert len((folder / "worker0.said").read_text().splitlines()) == 2
    _do(["tpu_vm.sh", "--name=b1", "--zone=here", "--delete"], **environment)
    assert not (folder / "state").exists()


def test_the_dry_run_on_a_tpu_slice(tmp_path):
    options = ("--name=b1", "--zone=here", "--type=v6e-16", "--spot", "--env=HF_TOKEN", "--project=mine", "--dry_run")
    said = _do(["tpu_vm.sh", *options, *RUN], HF_TOKEN="a secret")
    commands = [line for line in said.splitlines() if not line.startswith("#")]
    assert "a secret" not in said and all(line.endswith("--zone=here --project=mine --quiet") for line in commands)
    assert "--accelerator-type=v6e-16 --runtime-version=v2-alpha-tpuv6e --spot" in commands[0]
