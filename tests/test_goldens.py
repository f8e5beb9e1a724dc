"""The authors' PyTorch modules, run on random weights, are the judges of ours (../shared/data/goldens)."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rae_jax import flow, guidance, sampling
from rae_jax.models.decoder import Decoder
from rae_jax.models.dit_dh import DiTDH

GOLDENS = Path(__file__).parents[2] / "shared/data/goldens"
pytestmark = pytest.mark.skipif(not GOLDENS.is_dir(), reason="../shared/data/goldens is not here")


def _load(name):
    torch = pytest.importorskip("torch", reason="the goldens' weights are torch files")
    weights = torch.load(GOLDENS / f"{name}.pt", weights_only=True)
    return {k: v.numpy() for k, v in weights.items()}, np.load(GOLDENS / f"{name}.npz")


def _linear(weights, name):
    return {"kernel": weights[f"{name}.weight"].squeeze().T, "bias": weights[f"{name}.bias"]}


def _stack(blocks):
    return jax.tree.map(lambda *leaves: np.stack(leaves), *blocks)


def _dit_block(w, i):
    linear = {name: _linear(w, f"blocks.{i}.{name}") for name in ("attn.qkv", "attn.proj", "mlp.w12", "mlp.w3")}
    return {
        "norm1": {"scale": w[f"blocks.{i}.norm1.weight"]},
        "norm2": {"scale": w[f"blocks.{i}.norm2.weight"]},
        "attention": {"qkv": linear["attn.qkv"], "proj": linear["attn.proj"]},
        "mlp": {"w12": linear["mlp.w12"], "w3": linear["mlp.w3"]},
        "modulation": {"linear": _linear(w, f"blocks.{i}.adaLN_modulation.1")},
    }


def _dit_params(w, depth, head_depth):
    return {
        "time_embed": {
            "frequencies": w["t_embedder.W"],
            "fc1": _linear(w, "t_embedder.mlp.0"),
            "fc2": _linear(w, "t_embedder.mlp.2"),
        },
        "label_embed": {"table": w["y_embedder.embedding_table.weight"]},
        "trunk_embed": _linear(w, "s_embedder.proj"),
        "head_embed": _linear(w, "x_embedder.proj"),
        "condition_proj": _linear(w, "s_projector"),
        "trunk": _stack([_dit_block(w, i) for i in range(depth)]),
        "head": _stack([_dit_block(w, i) for i in range(depth, depth + head_depth)]),
        "final_layer": {
            "norm": {"scale": w["final_layer.norm_final.weight"]},
            "linear": _linear(w, "final_layer.linear"),
            "modulation": {"linear": _linear(w, "final_layer.adaLN_modulation.1")},
        },
    }


def _decoder_block(w, i):
    name = f"decoder_layers.{i}"
    qkv = [_linear(w, f"{name}.attention.attention.{part}") for part in ("query", "key", "value")]
    return {
        "attention": {
            "qkv": jax.tree.map(lambda *parts: np.concatenate(parts, -1), *qkv),
            "proj": _linear(w, f"{name}.attention.output.dense"),
        },
        "mlp": {"fc1": _linear(w, f"{name}.intermediate.dense"), "fc2": _linear(w, f"{name}.output.dense")},
        "norm1": {"scale": w[f"{name}.layernorm_before.weight"], "bias": w[f"{name}.layernorm_before.bias"]},
        "norm2": {"scale": w[f"{name}.layernorm_after.weight"], "bias": w[f"{name}.layernorm_after.bias"]},
    }


@pytest.fixture(scope="module")
def dit():
    weights, golden = _load("dit_dh_unequal")
    model = DiTDH(width=32, depth=3, num_heads=2, head_width=48, head_depth=2, head_num_heads=3, num_classes=10)
    return model, {"params": jax.tree.map(jnp.asarray, _dit_params(weights, 3, 2))}, golden


def _nhwc(x):
    return jnp.moveaxis(jnp.asarray(x), 1, -1)


def _relative(a, b):
    return float(jnp.abs(a - b).max() / jnp.abs(b).max())


def test_velocity_and_loss_are_the_authors(dit):
    model, params, golden = dit
    x, noise, t = _nhwc(golden["x"]), _nhwc(golden["noise"]), jnp.asarray(golden["t"])
    x_t = flow.interpolate(x, noise, t)
    assert _relative(x_t, _nhwc(golden["x_t"])) < 1e-6
    v = model.apply(params, x_t, t, golden["y"])
    assert _relative(v, _nhwc(golden["v"])) < 1e-5
    v_null = model.apply(params, x_t, t, jnp.full(3, 10))
    assert _relative(v_null, _nhwc(golden["v_null"])) < 1e-5
    loss = jnp.square(v - flow.velocity(x, noise)).mean()
    assert float(loss) == pytest.approx(float(golden["loss"]), rel=1e-5)


def test_gradients_are_the_authors(dit):
    model, params, golden = dit
    x, noise, t = _nhwc(golden["x"]), _nhwc(golden["noise"]), jnp.asarray(golden["t"])

    def loss(params):
        v = model.apply(params, flow.interpolate(x, noise, t), t, golden["y"])
        return jnp.square(v - flow.velocity(x, noise)).mean()

    ours = jax.grad(loss)(params)["params"]
    weights = {k.removeprefix("grad/"): golden[k] for k in golden.files if k.startswith("grad/")}
    weights.setdefault("t_embedder.W", np.zeros(256, np.float32))  # a constant: the authors have no gradient for it
    theirs = _dit_params(weights, 3, 2)
    for (path, a), b in zip(jax.tree.leaves_with_path(ours), jax.tree.leaves(theirs), strict=True):
        assert jnp.abs(a - b).max() <= 1e-4 * jnp.abs(b).max(), jax.tree_util.keystr(path)


def test_published_trajectory_with_guidance(dit):
    model, params, _ = dit
    golden = np.load(GOLDENS / "euler50_cfg.npz")
    factor = flow.shift_factor((4, 4, 24))
    labels = jnp.asarray(golden["y"])
    velocity_fn = guidance.classifier_free(
        lambda x, t: model.apply(params, x, t, labels),
        lambda x, t: model.apply(params, x, t, jnp.full_like(labels, 10)),
        scale=1.7,
        t_min=0.1,
        t_max=0.9,
    )
    assert golden["shift"] == pytest.approx(2.449, abs=1e-3)
    # This latent is smaller than 4096 dimensions: its own factor is below one, the golden's is given.
    assert factor == pytest.approx((4 * 4 * 24 / 4096) ** 0.5)
    z = jax.jit(lambda x: sampling.euler(velocity_fn, x, jnp.asarray(golden["grid"])))(_nhwc(golden["noise"]))
    assert _relative(z, _nhwc(golden["z"])) < 1e-4


def test_decoder_is_the_authors():
    weights, golden = _load("decoder")
    params = {
        "embed": _linear(weights, "decoder_embed"),
        "cls_token": weights["trainable_cls_token"],
        "blocks": _stack([_decoder_block(weights, i) for i in range(3)]),
        "norm": {"scale": weights["decoder_norm.weight"], "bias": weights["decoder_norm.bias"]},
        "pred": _linear(weights, "decoder_pred"),
    }
    decoder = Decoder(width=32, depth=3, num_heads=4, hidden=64, patch_size=8)
    image = decoder.apply({"params": params}, jnp.asarray(golden["z"]).reshape(3, 4, 4, 24))
    assert float(jnp.abs(image - _nhwc(golden["image"])).max()) < 5e-5
