"""launch/tpu_vm.sh on a TPU slice that is created, taken away, stopped and deleted; gcloud is a script."""

import contextlib
import os
import signal
import subprocess
import time

import pytest
from launch_cases import ROOT, RUN, do

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
    do(["tpu_vm.sh", "--name=b1", "--zone=here", "--stop"], **environment)
    assert again.wait(60) == 130
    assert len((folder / "worker0.said").read_text().splitlines()) == 2
    do(["tpu_vm.sh", "--name=b1", "--zone=here", "--delete"], **environment)
    assert not (folder / "state").exists()


def test_the_dry_run_on_a_tpu_slice(tmp_path):
    options = ("--name=b1", "--zone=here", "--type=v6e-16", "--spot", "--env=HF_TOKEN", "--project=mine", "--dry_run")
    said = do(["tpu_vm.sh", *options, *RUN], HF_TOKEN="a secret")
    commands = [line for line in said.splitlines() if not line.startswith("#")]
    assert "a secret" not in said and all(line.endswith("--zone=here --project=mine --quiet") for line in commands)
    assert "--accelerator-type=v6e-16 --runtime-version=v2-alpha-tpuv6e --spot" in commands[0]
