"""Steps that are not finite, that leap or stall: reported, with what they were made of; and the heartbeat."""

import dataclasses
import json
import os
import resource
import signal
import threading
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from stress import harness, toy_stage

from rae_jax.errors import UserError
from rae_jax.runtime import atomic_files, checkpoint, checkpoint_reader, health, heartbeat, logs
from rae_jax.runtime.health import DivergedRun
from rae_jax.training import loop
from rae_jax.training.loop import InterruptedRun

PLACES = toy_stage.stage(1).batches.places_of_step
BAD, FIRST = PLACES(3)[1][3], 3  # an image of the third batch, which every epoch shows once


def _incidents(workdir):
    return [json.loads(line) for line in (workdir / "incidents.jsonl").read_text().splitlines()]


def test_each_step_has_a_key_of_its_own(tmp_path):
    """That of the run with the number of steps that are done folded into it, also after an interruption."""

    def step(state, frozen, batch, key):
        return {**state, "step": state["step"] + 1}, {"loss": jax.random.uniform(key)}

    stage, how = dataclasses.replace(toy_stage.stage(4), step=step), {"log_every": 1, "checkpoint_every": 2, "keep": 1}
    for num_steps in (2, 4):  # the second time it goes on
        loop.fit(
            dataclasses.replace(stage, num_steps=num_steps),
            workdir=epath.Path(tmp_path),
            mesh=toy_stage.mesh(),
            key=jax.random.key(5),
            **how,
        )
    expected = [float(jax.random.uniform(jax.random.fold_in(jax.random.key(5), n))) for n in range(4)]
    assert [row["loss"] for row in toy_stage.rows(epath.Path(tmp_path))] == expected


def test_a_step_that_is_not_finite_stops_with_its_batch(tmp_path):
    workdir = epath.Path(tmp_path)
    with pytest.raises(DivergedRun) as stop:
        toy_stage.run(workdir, 20, kind={"nan_image": BAD}, log_every=100, checkpoint_every=1)
    images = PLACES(FIRST)[1]
    assert f"stopped at step {FIRST}, metrics are not finite: " in str(stop.value) and "loss nan" in str(stop.value)
    assert f"images {' '.join(map(str, images))} of epoch 0" in str(stop.value) and "\n" not in str(stop.value)
    assert checkpoint_reader.latest_step(workdir / "checkpoints" / "toy") == (FIRST - 1 or None)
    (incident,) = _incidents(workdir)
    assert incident["kind"] == "not finite" and incident["step"] == FIRST and incident["images"] == images
    assert incident["metrics"] == {"loss": "nan", "grad_norm": "nan"} and incident["stage"] == "toy"


def test_skipped_updates_leave_the_state_alone(tmp_path, capfd):
    """But for the count of steps; and a run that is interrupted just then ends the same."""
    how = {"kind": {"nan_image": BAD}, "health_settings": health.Settings(skip=1), "checkpoint_every": 1, "keep": 50}
    whole, workdir = epath.Path(tmp_path / "whole"), epath.Path(tmp_path / "parts")
    toy_stage.run(whole, 12, **how)
    toy_stage.run(workdir, FIRST, **how)
    toy_stage.run(workdir, 12, **how)
    assert harness.differences(workdir, whole, ["toy"]) == []
    states = [harness.read_state(whole / "checkpoints" / "toy" / str(step)) for step in (FIRST - 1, FIRST, FIRST + 1)]
    assert [int(state["['step']"]) for state in states] == [FIRST - 1, FIRST, FIRST + 1]
    kernels = [state["['params']['kernel']"] for state in states]
    assert (kernels[0] == kernels[1]).all() and (kernels[1] != kernels[2]).any()
    assert all(np.isfinite(value) for row in toy_stage.rows(whole) for value in row.values())
    assert [row["step"] for row in toy_stage.rows(whole)] == list(range(1, 13)) and "loss" not in toy_stage.rows(whole)[
        FIRST - 1
    ]
    assert f"the update of step {FIRST} is skipped" in capfd.readouterr().err
    assert {incident["step"] for incident in _incidents(whole)} == {
        step for step in range(1, 13) if BAD in PLACES(step)[1]
    }


@pytest.mark.parametrize("bad", ["loss", "grad_norm", "parts"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_one_number_that_is_not_finite_is_enough(tmp_path, bad, value):
    """The update is left out, and the step is reported, whichever of the metrics it is in."""
    good = {"loss": jnp.float32(0.5), "grad_norm": jnp.float32(2.0), "parts": jnp.array([1.0, 3.0])}
    state = {"step": jnp.int32(4), "params": jnp.array([3.0, -1.0])}
    stage = types.SimpleNamespace(name="toy", batches=toy_stage.stage(1).batches)
    watch = health.Watch(stage, health.OFF, health.Incidents(epath.Path(tmp_path), "toy"), str)

    def step(state, frozen, batch, key):
        return {"step": state["step"] + 1, "params": 2.0 * state["params"]}, batch

    guarded = health.guarded(step, 1)
    wrong = {**good, bad: good[bad].at[..., -1:].set(value) if bad == "parts" else jnp.float32(value)}
    for metrics, expected in ((good, [6.0, -2.0]), (wrong, [3.0, -1.0])):
        found, _ = guarded(state, None, metrics, None)
        assert int(found["step"]) == 5
        np.testing.assert_array_equal(found["params"], expected)
    for number, metrics in enumerate((good, wrong), 5):
        watch.began(number, {name: metrics[name][..., -1] if name == "parts" else metrics[name] for name in good})
    with pytest.raises(DivergedRun, match="stopped at step 6"):
        watch.ended()


def test_no_more_are_skipped_than_may_be(tmp_path):
    stage = types.SimpleNamespace(name="toy", batches=toy_stage.stage(1).batches)
    watch = health.Watch(stage, health.Settings(skip=2), health.Incidents(epath.Path(tmp_path), "toy"), lambda: "none")
    losses = [1.0, np.nan, np.inf, 1.0, np.nan, np.nan, np.nan]
    for step, loss in enumerate(losses[:-1], 1):
        watch.began(step, {"loss": np.float32(loss)})
    watch.began(7, {"loss": np.float32(losses[-1])})
    with pytest.raises(DivergedRun, match="step 7, .* in 3 steps in a row"):
        watch.ended()


def test_a_loss_that_leaps_is_reported_once(tmp_path, capfd):
    stage = types.SimpleNamespace(name="toy", batches=toy_stage.stage(1).batches)
    watch = health.Watch(stage, health.Settings(spike=10.0), health.Incidents(epath.Path(tmp_path), "toy"), str)
    rng = np.random.default_rng(0)
    for step in range(1, 301):
        loss = 50.0 if step in (150, 151) else -1.0 + 0.1 * rng.normal()  # losses may be negative
        watch.began(step, {"loss": np.float32(loss)})
    watch.ended()
    (incident,) = _incidents(epath.Path(tmp_path))
    assert incident["kind"] == "spike" and incident["step"] == 150 and incident["images"] == PLACES(150)[1]
    assert capfd.readouterr().err.count("loss spike") == 1


def test_the_heartbeat_tells_where_a_run_is(tmp_path):
    seen = []

    def look(state, step):
        time.sleep(0.1)
        seen.append(json.loads((tmp_path / "heartbeat.json").read_text()))
        return {"x": 0.0}

    toy_stage.run(
        epath.Path(tmp_path), 4, health_settings=health.Settings(heartbeat=0.02), evaluate=look, evaluate_every=2
    )
    assert [(s["stage"], s["step"], s["num_steps"], s["doing"]) for s in seen] == [
        ("toy", 2, 4, "evaluating"),
        ("toy", 4, 4, "evaluating"),
    ]
    last = json.loads((tmp_path / "heartbeat.json").read_text())
    assert last["doing"] == "finished" and last["pid"] == os.getpid() and last["memory"]["process"] > 1e7
    assert last["steps_per_second"] > 0 and {"time", "host"} <= last.keys()


def test_a_heartbeat_that_cannot_be_written_ends_nothing(tmp_path):
    (tmp_path / "heartbeat.json").mkdir()
    toy_stage.run(epath.Path(tmp_path), 2, health_settings=health.Settings(heartbeat=0.01))


def test_whatever_a_bucket_raises_training_goes_on(tmp_path, monkeypatch, capfd):
    """Libraries of object stores raise other errors than OSError. Lines are kept until they can be written."""
    append, tries = atomic_files.append_text, []

    def append_sometimes(path, text):
        tries.append(path)
        if 3 <= len(tries) < 5:
            raise RuntimeError("503 Service Unavailable")
        append(path, text)

    monkeypatch.setattr(atomic_files, "append_text", append_sometimes)
    workdir = epath.Path(tmp_path)
    toy_stage.run(workdir, 8)
    told = capfd.readouterr().err
    assert "cannot be written (503 Service Unavailable): training continues" in told and "no line is lost" in told
    assert [row["step"] for row in toy_stage.rows(workdir)] == list(range(1, 9))


def test_a_stalled_step_is_reported_with_its_place(tmp_path, capfd):
    def wait_for_the_disk():
        time.sleep(1.7)

    stage = types.SimpleNamespace(name="toy", num_steps=100)
    beats = heartbeat.Heartbeat(epath.Path(tmp_path), stage, start=0, every=0.02, stalled=5.0, shortest_stall=1.0)
    with beats:
        for step in range(1, 8):
            time.sleep(0.01)
            beats.beat(step)
        wait_for_the_disk()
        beats.beat(8)
        with beats.doing("evaluating"):
            time.sleep(1.2)
    said = [line for line in capfd.readouterr().err.splitlines() if "has taken" in line]
    assert 1 <= len(said) <= 2 and said[0].startswith("toy: step 8 has taken ")
    assert "wait_for_the_disk (test_health.py" in said[0]


@pytest.mark.parametrize("scored", [False, True])
def test_a_run_that_is_to_stop_saves_first_and_evaluates_when_it_goes_on(tmp_path, monkeypatch, scored):
    whole, cut = (epath.Path(tmp_path) / name for name in ("whole", "cut"))
    seen, write, stop_at = [], logs.Metrics.write, [4]
    scores = {2: 0.5, 4: 0.9, 6: 0.1} if scored else {}

    def evaluate(state, step):
        seen.append(step)
        return {"x": float(step), **({"score": scores[step]} if scored else {})}

    how = {"evaluate": evaluate, "evaluate_every": 2, "scored": scored, "checkpoint_every": 100, "keep": 1}
    toy_stage.run(whole, 6, **how)
    assert seen == [2, 4, 6]

    def write_and_stop(self, step, values):
        write(self, step, values)
        if step in stop_at and "loss" in values:
            stop_at.remove(step)
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(logs.Metrics, "write", write_and_stop)
    seen.clear()
    with pytest.raises(InterruptedRun, match="interrupted at step 4"):
        toy_stage.run(cut, 6, **how)
    assert seen == [2] and checkpoint_reader.latest_step(cut / "checkpoints" / "toy") == 4
    toy_stage.run(cut, 6, **how)
    assert seen == [2, 4, 6] and toy_stage.rows(cut) == toy_stage.rows(whole)
    kept = [checkpoint_reader.steps(workdir / "checkpoints" / "toy") for workdir in (whole, cut)]
    assert kept == [[4, 6] if scored else [6]] * 2


def test_a_signal_while_the_last_checkpoint_is_written_is_heeded(tmp_path, monkeypatch):
    save = checkpoint.Checkpoints.save_surely

    def save_while_it_is_told_to_stop(self, *args, **how):
        os.kill(os.getpid(), signal.SIGTERM)
        save(self, *args, **how)

    monkeypatch.setattr(checkpoint.Checkpoints, "save_surely", save_while_it_is_told_to_stop)
    with pytest.raises(InterruptedRun, match="interrupted at step 4"):
        toy_stage.run(epath.Path(tmp_path), 4)
    assert checkpoint_reader.latest_step(epath.Path(tmp_path) / "checkpoints" / "toy") == 4


def test_a_signal_ends_the_tries_to_write_the_last_checkpoint(tmp_path, monkeypatch):
    """Which would go on for ten minutes."""
    monkeypatch.setattr(loop, "STOPPING_PATIENCE", 1.0)

    timer = threading.Timer(2.0, os.kill, (os.getpid(), signal.SIGTERM))

    def no_room(state, step):
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
        timer.start()
        return {"x": 0.0}

    began = time.monotonic()
    try:
        with pytest.raises(UserError, match="the checkpoint of step 4 cannot be written"):
            toy_stage.run(epath.Path(tmp_path), 4, on_error="continue", evaluate=no_room, evaluate_every=3)
    finally:
        timer.cancel()  # it would end the tests if the run failed before it
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert time.monotonic() - began < 60


def test_either_signal_saves_and_says_which(tmp_path):
    for number in (signal.SIGTERM, signal.SIGINT):
        workdir = epath.Path(tmp_path) / number.name
        how = {"evaluate": lambda state, step, n=number: os.kill(os.getpid(), n) or {"x": 0.0}, "evaluate_every": 3}
        with pytest.raises(InterruptedRun) as stop:
            toy_stage.run(workdir, 8, checkpoint_every=100, **how)
        # The evaluation is over when it is seen, and the next step has begun.
        assert stop.value.number == number and checkpoint_reader.latest_step(workdir / "checkpoints" / "toy") == 4
    assert jax.devices()
