"""The launchers: what their dry runs say, what they refuse, and two processes of one run on this machine."""

import os
import shlex
import shutil
import signal
import subprocess
import time

import pytest
from launch_cases import GPU, ROOT, RUN, TPU, do

from rae_jax.runtime import logs


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
        (("slurm.sh", "--nodes=2", "--", "--config.seed=1"), "--workdir"),
    ],
)
def test_mistakes_are_one_line(command, complaint):
    said = do(command, status=2)
    assert said.startswith("error: ") and said.count("\n") == 1 and complaint in said


def test_the_dry_run_of_a_slurm_job():
    said = do(["slurm.sh", "--nodes=2", "--gpus-per-node=h100:8", "--time=24:00:00", "--dry_run", *RUN])
    submitted, _, inside = said.splitlines()
    assert submitted.startswith("sbatch --nodes=2 --gpus-per-node=h100:8 --ntasks-per-node=8 --time=24:00:00 ")
    for line in (submitted, inside):
        assert line.endswith(r"--config=configs/small.py --workdir=gs://BUCKET/run '--config.name=two words'")
    assert inside.startswith("srun ") and " -m rae_jax.main " in inside


def test_the_dry_run_on_this_machine():
    (one,) = do(["local.sh", "--dry_run", *RUN]).splitlines()
    assert "--num_processes" not in one
    two = do(["local.sh", "--processes=2", "--dry_run", *RUN]).splitlines()
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
    do(["local.sh", "--processes=2", "--", *flags])
    assert _is_whole(tmp_path, 400)


@pytest.mark.slow
def test_two_tasks_of_a_slurm_job(tmp_path):
    """Needs a machine on which SLURM runs."""
    if not shutil.which("sinfo") or subprocess.run(["sinfo"], capture_output=True, timeout=60).returncode:
        pytest.skip("SLURM is not running here")
    options = ("--ntasks=2", "--wait", f"--output={tmp_path}/log", f"--chdir={ROOT}")
    flags = (*SMALL, f"--workdir={tmp_path}/run", "--config.judge.train.num_steps=20")
    do(["slurm.sh", *options, "--", *flags], JAX_PLATFORMS="cpu", XLA_FLAGS="")
    assert _is_whole(tmp_path / "run", 20)
    assert "Rank 1 is connected to 1 peer ranks" in (tmp_path / "log").read_text()


def test_the_dry_run_of_a_sweep():
    """Each work unit's command is what the launcher takes."""
    sweep = ("--title=t", "--sweep=config.seed=0,1", "--sweep=config.log_every=5")
    launcher = ("--", "bash", "launch/local.sh", "--dry_run", "--", "--config=configs/small.py", "--workdir=runs/{}")
    units = do(["xm", *sweep, "--dry_run", *launcher]).splitlines()
    assert len(units) == 2
    said = do(shlex.split(units[1])[1:])
    assert said.endswith("--config=configs/small.py --workdir=runs/2 --config.seed=1 --config.log_every=5\n")
