"""A stage with cheap steps and all that the loop needs: parameters, an average of them, an optimiser, data."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rae_jax.data import pipeline
from rae_jax.runtime import logs, sharding
from rae_jax.training import optim
from rae_jax.training.loop import Stage, fit

from . import harness

OPTIMISER = optax.adam(0.1)


class Labels:
    """A source in which image i has label i; calls `on_read` with every index that is read."""

    def __init__(self, num_images=40, on_read=lambda index: None):
        self._num_images, self._on_read = num_images, on_read

    def __len__(self):
        return self._num_images

    def __getitem__(self, index):
        self._on_read(index)
        return {"image": np.zeros((1, 1, 3), np.uint8), "label": np.int32(index)}


def _init(key):
    return optim.init_state({"kernel": jax.random.normal(key, (16, 8))}, OPTIMISER)


def step(nan_image=None, spike_image=None):
    """Make a step. Its loss is NaN for a batch with `nan_image`, and 1000 times as large with `spike_image`."""

    def loss(params, label, key):
        x = jax.random.normal(key, (label.shape[0], 16)) + 0.01 * label[:, None]
        value = jnp.square(x @ params["kernel"] - 1.0).mean()
        if nan_image is not None:
            value = value * jnp.where((label == nan_image).any(), jnp.nan, 1.0)
        if spike_image is not None:
            value = value * jnp.where((label == spike_image).any(), 1e3, 1.0)
        return value

    def toy_step(state, frozen, batch, key):
        value, grads = jax.value_and_grad(loss)(state["params"], batch["label"], key)
        state, norm = optim.update(state, grads, OPTIMISER, 0.9)
        return state, {"loss": value, "grad_norm": norm}

    return toy_step


def stage(num_steps, *, name="toy", source=None, **options):
    """Make the stage: batches of 8, five batches in an epoch. `options` are those of `step`."""
    reading = {"batch_size": 8, "seed": 0, "random_crop": False, "flip": False, "num_threads": 0}
    batches = pipeline.training_batches(source or Labels(), **reading)
    return Stage(name, _init, step(**options), {}, batches, batch_size=8, num_steps=num_steps)


def mesh(data=1, fsdp=1):
    """Make a mesh of the first data * fsdp devices."""
    sizes = {"data": data, "fsdp": fsdp, "tensor": 1}
    return sharding.make_mesh(sizes, jax.devices()[: data * fsdp])


def run(workdir, num_steps, *, name="toy", on=None, source=None, kind=None, **settings):
    """Train the stage in `workdir`, or resume it. `on`: a mesh; `kind`: options of `step`; `settings`: of `fit`."""
    defaults = {"log_every": 1, "checkpoint_every": 2, "keep": 3, "mesh": on or mesh(), "key": jax.random.key(0)}
    fit(stage(num_steps, name=name, source=source, **(kind or {})), workdir=workdir, **{**defaults, **settings})


def rows(workdir):
    """Return the lines of the metrics without perf/ numbers."""
    return harness.without_perf(logs.read(workdir / "metrics" / "toy.jsonl"))
