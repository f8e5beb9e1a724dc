"""The code of docs/extend.md works where the page puts it."""

import re
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import encoders
from rae_jax.diffusion import flow
from rae_jax.inference import metrics
from rae_jax.models import conditions
from rae_jax.models.dense import Dense
from rae_jax.models.dit import DiT
from rae_jax.runtime import sharding
from rae_jax.weights import tables

PAGE = Path(__file__).parents[1] / "docs" / "extend.md"


def _added_to(module, first, **more):
    """Return the names of a module after the page's block that begins with `first` was added to it."""
    blocks = map(textwrap.dedent, re.findall(r"^ *```python\n(.*?)^ *```", PAGE.read_text(), re.MULTILINE | re.DOTALL))
    (block,) = [block for block in blocks if block.startswith(first)]
    names = {**vars(module), **more}
    exec(block, names)
    return names


@pytest.mark.parametrize("path", [flow.LINEAR, flow.COSINE], ids=["linear", "cosine"])
def test_the_prediction_is_a_velocity_at_all_times(path):
    names, t = _added_to(flow, "def rotated"), jnp.array([0.0, 0.4, 1.0])
    x, noise = jax.random.normal(jax.random.key(0), (2, 3, 4, 4, 2))
    output, x_t = names["rotated"](x, noise, t, path), flow.interpolate(x, noise, t, path)
    found = names["velocity_from_rotated"](output, x_t, t, path)
    np.testing.assert_allclose(found, flow.velocity(x, noise, t, path), atol=2e-6)


def test_the_encoder_has_a_table_and_values():
    assert set(_added_to(encoders, "def ijepa")["ijepa"]()) == set(encoders.mae("base"))
    assert set(tables.MAE.leaves) - set(_added_to(tables, "IJEPA")["IJEPA"].leaves) == {"cls_token"}


def test_the_condition_is_embedded_and_sharded():
    condition = _added_to(conditions, "def text", Dense=Dense)["text"](num_tokens=7, channels=12)
    dit, x, t = DiT(width=16, depth=1, num_heads=2, embed=condition.embed), jnp.zeros((3, 4, 4, 8)), jnp.ones(3)
    states = {"states": jnp.ones((3, 7, 12)), "mask": jnp.ones((3, 7))}
    params = dit.init(jax.random.key(0), x, t, states)["params"]
    assert params["text_embed"]["linear"]["kernel"].shape == (12, 16)
    assert dit.apply({"params": params}, x, t, states).shape == x.shape
    sharding.shardings(params, sharding.make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1]))
    dropped = condition.with_null(states, jnp.array([True, False, False]))
    assert dropped["mask"].sum(-1).tolist() == [0.0, 7.0, 7.0] and not dropped["states"][0].any()


def test_the_metric_is_one_number_an_image():
    images = jnp.stack([jnp.zeros((8, 8, 3)), jnp.ones((8, 8, 3))])
    assert _added_to(metrics, "def l1")["l1"](images, jnp.full_like(images, 0.25)).tolist() == [0.25, 0.75]
