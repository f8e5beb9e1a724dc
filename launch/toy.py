"""A stage that compiles at once and has what the loop cares for: parameters, an average, an optimiser, data."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rae_jax.data import pipeline
from rae_jax.runtime import logs, sharding
from rae_jax.training import optim
from rae_jax.training.loop import Stage, fit

OPTIMISER = optax.adam(0.1)


class Labels:
    """Image i is labelled i; `seen` is called with every index that is read."""

    def __init__(self, num_images=40, seen=lambda index: None):
        self._num_images, self._seen = num_images, seen

    def __len__(self):
        return self._num_images

    def __getitem__(self, index):
        self._seen(index)
        return {"image": np.zeros((1, 1, 3), np.uint8), "label": np.int32(index)}


def _init(key):
    return optim.init_state({"kernel": jax.random.normal(key, (16, 8))}, OPTIMISER)


def step(bad=None, leap=None):
    """A step whose loss is NaN where the batch shows image `bad`, and 1000 times as large where it shows `leap`."""

    def loss(params, label, key):
        x = jax.random.normal(key, (label.shape[0], 16)) + 0.01 * label[:, None]
        value = jnp.square(x @ params["kernel"] - 1.0).mean()
        value = value * jnp.where((label == bad).any(), jnp.nan, 1.0) if bad is not None else value
        return value * jnp.where((label == leap).any(), 1e3, 1.0) if leap is not None else value

    def toy_step(state, frozen, batch, key):
        value, grads = jax.value_and_grad(loss)(state["params"], batch["label"], key)
        state, norm = optim.update(state, grads, OPTIMISER, 0.9)
        return state, {"loss": value, "grad_norm": norm}

    return toy_step


def stage(num_steps, *, name="toy", source=None, **kind):
    """Batches of 8, five to an epoch."""
    how = {"batch_size": 8, "seed": 0, "random_crop": False, "flip": False, "num_threads": 0}
    batches = pipeline.training_batches(source or Labels(), **how)
    return Stage(name, _init, step(**kind), {}, batches, batch_size=8, num_steps=num_steps)


def mesh(data=1, fsdp=1):
    """Of the first so many devices."""
    sizes = {"data": data, "fsdp": fsdp, "tensor": 1}
    return sharding.make_mesh(sizes, jax.devices()[: data * fsdp])


def run(workdir, num_steps, *, name="toy", on=None, source=None, kind=None, **how):
    """Train it in `workdir`, from where it stands."""
    how = {"log_every": 1, "checkpoint_every": 2, "keep": 3, "mesh": on or mesh(), "key": jax.random.key(0), **how}
    fit(stage(num_steps, name=name, source=source, **(kind or {})), workdir=workdir, **how)


def rows(workdir):
    """Metrics without what depends on the machine."""
    found = logs.read(workdir / "metrics" / "toy.jsonl")
    return [{k: v for k, v in row.items() if not k.startswith("perf/")} for row in found]
