"""The real command in two real processes (Gloo): what one process computes; and how they find and follow each other."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pairs
import pytest
from conftest import tiny
from PIL import Image
from stress import harness

from configs import small
from rae_jax import main
from rae_jax.config import keys as config_keys
from rae_jax.errors import UserError
from rae_jax.runtime import command_line, logs, processes, shutdown

STAGES = ("decoder", "statistics", "dit")


def _command(workdir, mode, count, **changes):
    """The real command for a tiny run of STAGES on the shipped encoder; each kernel is split over all processes."""
    config, plain = tiny(), small.get_config()
    config.stages, config.judge.weights, config.encoder = STAGES, "", plain.encoder
    config.decoder.train.update({"num_steps": 4, "discriminator_start": 1, "adversarial_start": 2})
    config.dit.train.num_steps = 4
    config.mesh.update({"data": 1, "fsdp": count})
    config.unroll = True  # see tests/stress/collectives.py
    config.update(changes)
    wanted, plain = (config_keys.flatten(c.to_dict()) for c in (config, plain))
    options = [f"--config.{key}={value}" for key, value in wanted.items() if plain[key] != value]
    return ["-m", "rae_jax.main", "--config=configs/small.py", f"--workdir={workdir}", f"--mode={mode}", *options]


def _last_step(metrics):
    return max((row["step"] for row in logs.read(metrics)), default=0)


def _results(workdir):
    results = json.loads((workdir / "eval" / "tiny.json").read_text())
    return {name: value for name, value in results.items() if name != "seconds"}


def _assert_rows_close(one, two):
    for stage in STAGES:
        files = [workdir / "metrics" / f"{stage}.jsonl" for workdir in (one, two)]
        rows = [harness.without_perf(logs.read(file)) for file in files]
        assert [r["step"] for r in rows[0]] == [r["step"] for r in rows[1]] and rows[0]
        for a, b in zip(*rows, strict=True):
            assert a.keys() == b.keys()
            for key in a:
                assert a[key] == pytest.approx(b[key], rel=1e-6, abs=1e-7), (stage, key, a, b)


@pytest.mark.parametrize(
    "error, status",
    [
        (
            ValueError("UNKNOWN: Gloo all-reduce failed: Connection reset by peer"),
            command_line.RESTART,
        ),  # as it came once
        (jax.errors.JaxRuntimeError("INTERNAL: no answer"), command_line.RESTART),
        (ValueError("operands could not be broadcast together"), None),
        (jax.errors.JaxRuntimeError("UNAVAILABLE: the coordination service is gone"), command_line.RESTART),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1099511627776 bytes."), None),
        (jax.errors.JaxRuntimeError("INTERNAL: Mosaic failed to compile TPU kernel"), None),
        (jax.errors.JaxRuntimeError("INVALID_ARGUMENT: no valid engine configs"), None),
        (OSError("[Errno 28] No space left on device"), None),
    ],
)
def test_a_lost_process_is_told_from_a_mistake(monkeypatch, error, status):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(command_line.os, "_exit", sys.exit)
    with pytest.raises(SystemExit if status else type(error)) as ended, command_line.peers():
        raise error
    assert getattr(ended.value, "code", None) == status


@pytest.mark.parametrize("lacking", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_what_one_cannot_go_on_with_ends_both_with_its_status(tmp_path, lacking):
    """One has no data where it is: the other is told, and nobody waits or is aborted."""
    (tmp_path / "there" / "one").mkdir(parents=True)
    for number in range(40):
        Image.new("RGB", (32, 32), (6 * number, 0, 0)).save(tmp_path / "there" / "one" / f"{number}.png")
    (tmp_path / "elsewhere").mkdir()
    words = _command(tmp_path / "run", "train", 2, stages=("dit",))
    words += ["--config.data.source=image_folder", "--config.data.path=there", "--config.data.num_classes=1"]
    words[2] = f"--config={pairs.ROOT}/configs/small.py"
    began = time.monotonic()
    places = [tmp_path / "elsewhere" if index == lacking else tmp_path for index in range(2)]
    started = pairs.start(words, places=places)
    said = [process.communicate(timeout=600)[0] for process in started]
    print(f"{time.monotonic() - began:.0f} s")
    assert [process.returncode for process in started] == [2, 2], said
    assert "error: " in said[lacking] and "there" in said[lacking]
    told = said[1 - lacking]
    assert f"process {lacking} of this run ended with status 2 (" in told and "there" in told


@pytest.mark.slow
def test_two_processes_do_what_one_does(tmp_path):
    """Training in three stages, evaluation and samples: numbers, files, and who writes them.

    The one process has as many devices as the two: the program is the same, and a sum of two is the same in any order.
    So the bounds need not allow for another order of sums (training/test_loop_on_meshes.py compares meshes).
    """
    one, two = tmp_path / "one", tmp_path / "two"
    said = pairs.run(_command(one, "train", 2), 1, devices=2)[0]
    first, second = pairs.run(_command(two, "train", 2), 2)
    assert "report:" in said and "report:" in first and "report:" not in second and "psnr" not in second
    _assert_rows_close(one, two)
    results = [_results(one), _results(two)]
    (two / "eval" / "tiny.json").unlink()
    pairs.run(_command(two, "evaluate", 2), 2)
    assert results[0] == pytest.approx(results[1], rel=1e-6) and _results(two) == pytest.approx(results[1], rel=1e-6)
    for workdir, count in ((one, 1), (two, 2)):
        pairs.run([*_command(workdir, "sample", 2), "--num_images=20"], count, devices=2 // count)
    images = [np.load(workdir / "samples" / "samples.npz")["arr_0"] for workdir in (one, two)]
    assert images[0].shape == (20, 32, 32, 3)
    np.testing.assert_array_equal(*images)
    assert sorted(p.name for p in one.rglob("*.png")) == sorted(p.name for p in two.rglob("*.png"))


@pytest.mark.slow
def test_a_signal_to_one_stops_all_and_they_go_on(tmp_path):
    """SIGTERM to the second process alone; both stop at the same step, one process goes on from there."""
    shipped = {"width": 96, "depth": 4, "num_heads": 3, "hidden": 384}
    changes = {"stages": ("dit",), "decoder": shipped, "evaluate": {"num_images": 4}}
    changes["dit"] = {"train": {"num_steps": 3000}}
    metrics = tmp_path / "metrics" / "dit.jsonl"

    def run_for_a_while(count, beyond):
        """Start, send SIGTERM to the last process after that step, and return the step at which all stopped."""
        started = pairs.start(_command(tmp_path, "train", count, **changes), count)
        deadline = time.monotonic() + 1500
        while time.monotonic() < deadline and _last_step(metrics) <= beyond:
            time.sleep(0.2)
        started[-1].send_signal(signal.SIGTERM)
        said = [process.communicate(timeout=1500)[0] for process in started]
        assert len({process.returncode for process in started}) == 1 and started[0].returncode > 0, said
        stopped = {line.split(";")[0] for text in said for line in text.splitlines() if "interrupted at" in line}
        assert len(stopped) == 1, said
        return int(stopped.pop().split("step ")[1].split()[0]), said[0]

    step, _ = run_for_a_while(2, 3)
    assert [path.name for path in (tmp_path / "checkpoints" / "dit").iterdir()] == [str(step)]
    assert logs.read(metrics)[-1]["step"] == step
    further, said = run_for_a_while(1, step)
    assert f"resuming from step {step}" in said and further > step
    assert [row["step"] for row in logs.read(metrics)] == list(range(1, further + 1))


def _agree():
    """In one of several processes: at which steps it learns that the second one wants to stop after its third."""
    os.environ["XLA_FLAGS"] = sys.argv[1]  # not the tests' own
    processes.start()
    step = 0
    agreement = processes.Agreement(lambda: 15 if step >= 3 and jax.process_index() == 1 else None)
    found = []
    for step in range(1, 7):
        agreement.exchange(last=step == 6)
        found.append(agreement.value)
    processes.wait_for_all("agreed")
    # To a file: Gloo talks on the output, in the middle of a line.
    words = json.dumps([jax.process_count(), len(jax.devices()), processes.is_first(), found])
    Path(sys.argv[2], str(jax.process_index())).write_text(words)


def test_all_learn_of_a_signal_after_the_same_step(tmp_path):
    pairs.run([__file__, "--xla_force_host_platform_device_count=2", tmp_path], 2)
    said = [json.loads((tmp_path / str(index)).read_text()) for index in (0, 1)]
    assert said == [[2, 4, index == 0, [None, None, None, 15, 15, 15]] for index in (0, 1)]


def _end():
    """In one of several processes: the second cannot go on, the others look at different times."""
    os.environ["XLA_FLAGS"] = ""
    processes.start()
    with shutdown.end_together(()):
        time.sleep(0.5 * jax.process_index())
        shutdown.watch()
        if jax.process_index() == 1:
            raise SystemExit(2)
        time.sleep(60)


@pytest.mark.slow
def test_all_end_with_the_status_of_the_one_that_cannot_go_on():
    """The first process, which is asked why, waits until all have."""
    said = pairs.run([__file__, "end"], 4, status=2)
    assert sum("process 1 of this run ended with status 2" in text for text in said) == 3


def test_alone_it_is_known_at_once():
    raised = None
    agreement = processes.Agreement(lambda: raised)
    agreement.exchange()
    assert agreement.value is None
    raised = 2
    assert agreement.value == 2


def test_one_process_is_left_alone(monkeypatch):
    for name in (*processes.SETTINGS.values(), "SLURM_STEP_NODELIST", "KUBERNETES_SERVICE_HOST"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("jax.distributed.initialize", lambda **_: pytest.fail("nobody else is there"))
    processes.start()
    monkeypatch.setenv("SLURM_NTASKS", "4")  # a shell next to the job's steps
    processes.start()
    monkeypatch.setenv("SLURM_STEP_NODELIST", "node1")  # the shell itself is a step, of one task
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
    processes.start()
    processes.start("localhost:1", 1, 0)


@pytest.mark.parametrize("devices", [1, 8])
def test_programs_of_several_cpu_devices_are_not_kept(monkeypatch, devices):
    updates = {}
    monkeypatch.setattr("jax.config.update", updates.__setitem__)
    monkeypatch.setattr("jax.device_count", lambda: devices)
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    main._keep_compiled("somewhere")
    kept, not_kept = {"jax_compilation_cache_dir": "somewhere"}, {"jax_enable_compilation_cache": False}
    assert updates == (kept if devices == 1 else not_kept)


@pytest.mark.parametrize(
    "environment, settings",
    [
        ({"SLURM_NTASKS": "4", "SLURM_STEP_NODELIST": "node[1-4]"}, {}),
        ({"SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "node[1-2]"}, {}),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "3"}, {}),
        ({"TPU_WORKER_HOSTNAMES": "a,b", "JAX_PLATFORMS": "tpu"}, {}),
        (
            {"JAX_COORDINATOR_ADDRESS": "node1:1234", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "2"},
            {"coordinator_address": "node1:1234", "num_processes": 4, "process_id": 2},
        ),
    ],
)
def test_several_are_found_by_jax_or_named(monkeypatch, capsys, environment, settings):
    given = []
    monkeypatch.setattr("jax.distributed.initialize", lambda **found: given.append(found))
    monkeypatch.setattr("jax.config.update", lambda *_: None)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    processes.start()
    assert given == [{**settings, "shutdown_timeout_seconds": processes.SHUTDOWN_TIMEOUT}]
    said = capsys.readouterr().err
    assert said.startswith("waiting for the other processes of this run (") and said.count("\n") == 1
    assert any(value in said for value in environment.values()), said


@pytest.mark.parametrize(
    "settings, fix",
    [
        (("node1:1234", None, None), "--num_processes .* is missing"),
        ((None, 2, 0), "--coordinator .* is missing"),
        (("node1", 2, 0), "HOST:PORT"),
        (("node1:1234", 2, 2), "ids are 0 to 1"),
        (("node1:1234", "two", 0), "must be numbers"),
    ],
)
def test_settings_that_cannot_work_are_refused_in_one_line(settings, fix):
    with pytest.raises(UserError, match=fix) as refused:
        processes.start(*settings)
    assert "\n" not in str(refused.value)


if __name__ == "__main__":
    _end() if sys.argv[1:] == ["end"] else _agree()


def test_a_process_that_waits_for_others_ends_on_sigterm(tmp_path):
    command = [sys.executable, "-m", "rae_jax.main", "--config=small", f"--workdir={tmp_path}/run"]
    command += ["--coordinator=localhost:1", "--num_processes=2", "--process_id=1"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2])
    try:
        while "waiting for the other processes of this run (2 in all, this is 1;" not in (
            line := process.stderr.readline()
        ):
            assert line, "it ended"
        time.sleep(1.0)
        process.terminate()
        assert process.wait(20) == -signal.SIGTERM
    finally:
        process.kill()
        process.wait()
