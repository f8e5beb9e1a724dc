"""Diffusion transformers: parity with a torch oracle, sizes, initial values, no classes.

The goldens (tests/goldens/dits.npz, by make_dit_goldens.py) stand in for torch where it is absent.
"""

import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dit_cases import TINY, Case, config_of, goldens, inputs, outcome, weights
from flax import traverse_util
from safetensors.numpy import save_file

from configs import dit_b
from rae_jax.build import models, part_weights, published_weights
from rae_jax.config import keys as config_keys
from rae_jax.diffusion import flow
from rae_jax.models import conditions
from rae_jax.models.dit import DiT
from rae_jax.models.dit_dh import DiTDH
from rae_jax.runtime import sharding

AUTHORS = Path(__file__).parents[3] / "shared/data/goldens"


def _ours(case, folder):
    """Our outcome as the oracle's: by the released names, channels first."""
    save_file(weights(case), folder / "dit.pt.safetensors")
    config = config_of(case, folder / "dit.pt.safetensors")
    params = part_weights.load(config, "dit", "", sharding.make_mesh(config.mesh))
    model = models.dit(config)
    x, noise, t, labels = inputs(case)
    x, noise = (jnp.moveaxis(a, 1, -1) for a in (x, noise))
    x_t = flow.interpolate(x, noise, t)

    def loss(params):
        both = jnp.concatenate([labels, jnp.full_like(labels, case.num_classes)])
        v, v_null = jnp.split(model.apply({"params": params}, jnp.tile(x_t, (2, 1, 1, 1)), jnp.tile(t, 2), both), 2)
        value = jnp.square(v - flow.velocity(x, noise, t)).mean()
        return value, {"v": v, "v_null": v_null, "loss": value}

    grads, found = jax.jit(jax.grad(loss, has_aux=True))(params)
    found = {name: np.moveaxis(a, -1, 1) if a.ndim == 4 else a for name, a in found.items()}
    return found | {f"grad/{name}": a for name, a in published_weights.tensors_of(config, "dit", grads).items()}


def _check(ours, theirs):
    """Relative errors of every entry; the oracle has no gradient for the frequencies, ours is zero."""
    assert not ours["grad/t_embedder.W"].any()
    for name, value in theirs.items():
        error = np.abs(ours[name] - value).max() / np.abs(value).max()
        assert error <= (1e-4 if name.startswith("grad/") else 1e-5), (name, error)


@pytest.mark.parametrize("name", TINY)
def test_velocity_loss_and_gradients_are_the_goldens(tmp_path, name):
    golden = {k.removeprefix(f"{name}/"): v for k, v in goldens().items() if k.startswith(f"{name}/")}
    learned = {f"grad/{key}" for key in weights(TINY[name])} - {"grad/t_embedder.W"}
    assert golden.keys() == learned | {"v", "v_null", "loss"}
    _check(_ours(TINY[name], tmp_path), golden)


@pytest.mark.parametrize("name", TINY)
def test_the_goldens_are_the_oracle_s(name):
    pytest.importorskip("torch")
    case = TINY[name]
    for key, value in outcome(case, weights(case), *inputs(case)).items():
        np.testing.assert_allclose(goldens()[f"{name}/{key}"], value, rtol=1e-4, atol=1e-5 * np.abs(value).max())


def test_the_oracle_is_the_authors_model():
    if not AUTHORS.is_dir():
        pytest.skip("../shared/data/goldens is not here")
    torch = pytest.importorskip("torch")
    arrays = {k: v.numpy() for k, v in torch.load(AUTHORS / "dit_dh_unequal.pt", weights_only=True).items()}
    golden = np.load(AUTHORS / "dit_dh_unequal.npz")
    case = Case(trunk=(32, 3, 2), head=(48, 2, 3), num_classes=10)
    arrays = {name: arrays[name] for name in weights(case)}
    found = outcome(case, arrays, *(golden[name] for name in ("x", "noise", "t", "y")))
    for name, value in found.items():
        np.testing.assert_allclose(value, golden[name], rtol=1e-4, atol=2e-6 * np.abs(golden[name]).max(), err_msg=name)


def _shapes(config):
    """{path: shape} of the DiT's parameters, without making them."""
    x = jnp.zeros((1, *config_keys.latent_shape(config)))
    params = jax.eval_shape(models.dit(config).init, jax.random.key(0), x, jnp.ones(1), jnp.ones(1, int))["params"]
    return {path: leaf.shape for path, leaf in traverse_util.flatten_dict(params, sep="/").items()}


def _blocks(width, depth):
    """Parameters of `depth` blocks of that width."""
    hidden = int(2 / 3 * 4 * width)
    attention, mlp = (width + 1) * 4 * width, (width + 1) * 2 * hidden + (hidden + 1) * width
    return depth * (2 * width + attention + mlp + (width + 1) * 6 * width)


def _ends(width, embedded):
    """Parameters of the embeddings of time, label (1000 and null) and 768 channels, and of the final layer."""
    time = 256 + 513 * width + (width + 1) * width
    return time + 1001 * width + 769 * embedded + embedded + (embedded + 1) * (2 * embedded + 768)


@pytest.mark.parametrize("size, millions", [("s", 196.5), ("b", 294), ("l", 621), ("xl", 838)])
def test_parameter_counts(size, millions):
    """Exactly what the equations say, and the published counts, which are rounded this way and that."""
    config = dit_b.get_config()
    config.dit.update(dit_b.DITS[size])
    width, depth = config.dit.width, config.dit.depth
    count = sum(map(math.prod, _shapes(config).values()))
    assert count == pytest.approx(millions * 1e6, rel=1e-3)
    between = 769 * width + (width + 1) * 2048
    assert count == _blocks(width, depth) + _blocks(2048, 2) + _ends(width, 2048) + between

    config.dit.head_depth = 0
    assert sum(map(math.prod, _shapes(config).values())) == _blocks(width, depth) + _ends(width, width)


def _deviations(model):
    """{path: standard deviation} of initial parameters, whose first axis may be depth."""
    key = jax.random.key(0, impl="rbg")  # compiles faster
    params = jax.jit(model.init)(key, jnp.zeros((1, 2, 2, 48)), jnp.ones(1), jnp.ones(1, int))["params"]
    flat = traverse_util.flatten_dict(params, sep="/")
    for path in ("scale", "norm/scale"):
        assert all((value == 1).all() for name, value in flat.items() if name.endswith(path))
    return {name: float(value.std()) for name, value in flat.items() if not name.endswith("scale")}, flat


def _torch_linear(fan_in):
    return (1 / fan_in / 3) ** 0.5  # of U(-1 / sqrt(fan_in), 1 / sqrt(fan_in))


def _xavier(inputs, outputs):
    return (2 / (inputs + outputs)) ** 0.5


def _common():
    return {
        "time_embed/frequencies": 1.0,
        "time_embed/fc1/kernel": 0.02,
        "time_embed/fc2/kernel": 0.02,
        "label_embed/table": 0.02,
        **dict.fromkeys(
            (f"final_layer/{n}/{k}" for n in ("linear", "modulation/linear") for k in ("kernel", "bias")), 0
        ),
    }


def _in_blocks(stack, layers, of):
    """Expected deviations of a stack's layers {name: (inputs, outputs)} by of(inputs, outputs) -> (kernel, bias)."""
    found = {f"{stack}/modulation/linear/{kind}": 0 for kind in ("kernel", "bias")}
    for name, sizes in layers.items():
        found.update(dict(zip((f"{stack}/{name}/kernel", f"{stack}/{name}/bias"), of(*sizes), strict=True)))
    return found


def _layers(width):
    hidden = int(2 / 3 * 4 * width)
    return {
        "attention/qkv": (width, 3 * width),
        "attention/proj": (width, width),
        "mlp/w12": (width, 2 * hidden),
        "mlp/w3": (hidden, width),
    }


LABELS = conditions.labels(200)


def test_initial_values_of_dit_dh():
    model = DiTDH(
        width=64, depth=4, num_heads=2, head_width=96, head_depth=4, head_num_heads=2, embed=LABELS.embed, unroll=False
    )

    def torch(inputs, outputs):
        return (_torch_linear(inputs),) * 2

    expected = {
        **_common(),
        "time_embed/fc1/bias": _torch_linear(512),
        "time_embed/fc2/bias": _torch_linear(64),
        "trunk_embed/kernel": _xavier(48, 64),
        "trunk_embed/bias": 0,
        "head_embed/kernel": _xavier(48, 96),
        "head_embed/bias": 0,
        "condition_proj/kernel": _torch_linear(64),
        "condition_proj/bias": _torch_linear(64),
        **_in_blocks("trunk", _layers(64), torch),
        **_in_blocks("head", _layers(96), torch),
    }
    _check_deviations(model, expected)


def test_initial_values_of_the_plain_dit():
    model = DiT(width=64, depth=4, num_heads=2, embed=LABELS.embed)
    expected = {
        **_common(),
        "time_embed/fc1/bias": 0,
        "time_embed/fc2/bias": 0,
        "embed/kernel": _xavier(48, 64),
        "embed/bias": 0,
        **_in_blocks("blocks", _layers(64), lambda inputs, outputs: (_xavier(inputs, outputs), 0)),
    }
    _check_deviations(model, expected)


def _check_deviations(model, expected):
    found, values = _deviations(model)
    assert found.keys() == expected.keys()
    for path, deviation in expected.items():
        size = values[path].size
        # A sample's deviation is off by about 1 / sqrt(2 n); four times that, of the normal, which is the widest here.
        assert found[path] == pytest.approx(deviation, rel=4 / math.sqrt(2 * size), abs=1e-9), path
    for path in expected:  # and no two blocks of a stack start alike
        if path.split("/")[0] in ("blocks", "trunk", "head") and expected[path]:
            assert float(jnp.abs(values[path][0] - values[path][1]).max()) > 0


def test_without_classes_every_label_is_the_null_one():
    config = config_of(TINY["plain"])
    config.dit.class_conditional = False
    assert _shapes(config)["label_embed/table"] == (1, 16)
    table = {"params": {"table": jnp.arange(4.0)[None]}}
    np.testing.assert_array_equal(conditions.LabelEmbedding(0, 4).apply(table, jnp.array([0, 3])), [np.arange(4.0)] * 2)
