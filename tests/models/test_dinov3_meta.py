"""DINOv3's weights under Meta's own names: the same latents as under transformers' names."""

import dataclasses

import encoder_cases as cases
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from rae_jax.build import published_weights
from rae_jax.errors import UserError

DEPTH = 24
_TINY = cases.TINY["dinov3"]
CASE = dataclasses.replace(
    _TINY, theirs={**_TINY.theirs, "num_hidden_layers": DEPTH}, ours={**_TINY.ours, "depth": DEPTH}
)
LAYERS = {1: (), 7: tuple(range(11, 24, 2)), 23: tuple(range(1, 24))}


def _in_metas_names(theirs):
    """Tensors of transformers' file as Meta's file has them; its bias of the keys is masked."""
    rng = np.random.default_rng(0)
    width = theirs["embeddings.cls_token"].shape[-1]
    found = {
        "cls_token": theirs["embeddings.cls_token"],
        "storage_tokens": theirs["embeddings.register_tokens"],
        "mask_token": theirs["embeddings.mask_token"].reshape(1, width),
        "patch_embed.proj.weight": theirs["embeddings.patch_embeddings.weight"],
        "patch_embed.proj.bias": theirs["embeddings.patch_embeddings.bias"],
        "rope_embed.periods": np.float32(100.0 ** (np.arange(0, 1, 0.5))),
        "norm.weight": theirs["norm.weight"],
        "norm.bias": theirs["norm.bias"],
    }
    names = {"attention.o_proj": "attn.proj", "mlp.up_proj": "mlp.fc1", "mlp.down_proj": "mlp.fc2"}
    for block in range(DEPTH):
        old, new = f"layer.{block}.", f"blocks.{block}."
        for their, meta in {**names, "norm1": "norm1", "norm2": "norm2"}.items():
            found |= {f"{new}{meta}.{kind}": theirs[f"{old}{their}.{kind}"] for kind in ("weight", "bias")}
        found |= {f"{new}ls{i}.gamma": theirs[f"{old}layer_scale{i}.lambda1"] for i in (1, 2)}
        query, key, value = (theirs[f"{old}attention.{part}_proj.weight"] for part in "qkv")
        found[f"{new}attn.qkv.weight"] = np.concatenate([query, key, value])
        biases = theirs[f"{old}attention.q_proj.bias"], theirs[f"{old}attention.v_proj.bias"]
        found[f"{new}attn.qkv.bias"] = np.concatenate([biases[0], np.float32(rng.normal(size=width)), biases[1]])
        found[f"{new}attn.qkv.bias_mask"] = np.float32(np.repeat([1, 0, 1], width))
    return found


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """(transformers' model, folder of its file, folder of Meta's file, its tensors)."""
    pytest.importorskip("transformers")
    pytest.importorskip("torch")
    theirs, meta = tmp_path_factory.mktemp("theirs"), tmp_path_factory.mktemp("meta")
    model, _ = cases.torch_model(CASE, theirs)
    tensors = _in_metas_names(load_file(theirs / "model.safetensors"))
    save_file(tensors, meta / "model.safetensors")
    return model, theirs, meta, tensors


@pytest.mark.parametrize("number", LAYERS)
def test_both_names_give_transformers_latents(folders, number):
    model, theirs, meta, _ = folders
    pixels, latents = cases.images(24, 24), []
    for folder in (theirs, meta):
        config = cases.config_of(CASE, folder)
        config.encoder.layers = LAYERS[number]
        latents.append(cases.tokens_of(config, cases.load(config), pixels))
    np.testing.assert_array_equal(*latents)
    expected = cases.torch_tokens(CASE, model, pixels, LAYERS[number])
    assert cases.difference(latents[1], expected) <= 5e-5 * np.abs(expected).max()


def test_another_file_under_metas_names_is_refused(folders, tmp_path):
    *_, tensors = folders
    save_file({**tensors, "blocks.24.norm1.weight": np.ones(16, np.float32)}, tmp_path / "model.safetensors")
    config = cases.config_of(CASE, tmp_path)
    with pytest.raises(UserError, match="seems to hold a DINOv3 encoder .Meta's names. of width 16, depth 25"):
        cases.load(config)
    assert len(published_weights.tables_of(config, "encoder")) == 2
