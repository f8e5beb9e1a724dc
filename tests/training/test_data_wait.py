"""The logged wait for data: the part of the time in which the devices have nothing to do because of it."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from rae_jax.data import pipeline
from rae_jax.runtime import logs, sharding
from rae_jax.training.loop import Stage, fit


class _Slow:
    """Images that take their time."""

    def __init__(self, seconds):
        self._seconds = seconds

    def __len__(self):
        return 64

    def __getitem__(self, index):
        time.sleep(self._seconds)
        return {"image": np.zeros((2, 2, 3), np.uint8), "label": np.int32(index)}


def _step(num_products):
    """Work of the devices that the host need not wait for."""

    def step(state, frozen, batch, key):
        start = jnp.full((256, 256), batch["label"].sum() * 1e-9)
        product = jax.lax.fori_loop(0, num_products, lambda _, x: jnp.tanh(x @ x), start)
        return {"step": state["step"] + 1}, {"loss": product.mean()}

    return step


def _waits(workdir, step, seconds, *, log_every, num_steps):
    """Return the logged waits if a batch takes `seconds` to read, and no batch is read ahead."""
    options = {"batch_size": 1, "seed": 0, "random_crop": False, "flip": False, "num_threads": 0}
    batches = pipeline.training_batches(_Slow(seconds), **options)
    stage = Stage("slow", lambda key: {"step": jnp.int32(0)}, step, {}, batches, batch_size=1, num_steps=num_steps)
    mesh = sharding.make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1])
    how = {"key": jax.random.key(0), "log_every": log_every, "checkpoint_every": num_steps, "keep": 1}
    fit(stage, workdir=workdir, mesh=mesh, **how)
    return [row["perf/data_wait"] for row in logs.read(workdir / "metrics" / "slow.jsonl")]


@pytest.mark.parametrize("log_every", [1, 3])
def test_slow_reading_is_a_wait(tmp_path, log_every):
    waits = _waits(epath.Path(tmp_path), _step(2), 0.4, log_every=log_every, num_steps=6)
    assert np.median(waits[1:]) > 0.6 and max(waits) < 1, waits


def test_reading_within_a_step_is_no_wait(tmp_path):
    """Although it takes a third of the time. Others may keep the host from its work now and then, but not always."""
    step, seconds = jax.jit(_step(100)), []
    for _ in range(10):
        began = time.monotonic()
        jax.block_until_ready(step({"step": jnp.int32(0)}, {}, {"label": jnp.zeros(1)}, None))
        seconds.append(time.monotonic() - began)
    waits = _waits(epath.Path(tmp_path), _step(100), min(seconds) / 3, log_every=3, num_steps=15)
    assert min(waits[1:]) < 0.1, waits
