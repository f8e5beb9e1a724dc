"""Checkpoints of published encoders: in several files, pickled, damaged, of another model, or not there."""

import builtins
import json

import encoder_cases as cases
import numpy as np
import pytest
from huggingface_hub import constants
from safetensors.numpy import save_file

from rae_jax.errors import UserError


def _spoil(folder, name, change):
    arrays = cases.weights(cases.shapes_of(name))
    change(arrays)
    save_file(arrays, folder / "model.safetensors")


def _pop(key):
    return lambda arrays: arrays.pop(key)


def _put(key, *shape):
    return lambda arrays: arrays.update({key: np.zeros(shape, np.float32)})


@pytest.mark.parametrize(
    "change, message",
    [
        (_pop("embeddings.register_tokens"), "lacks tensor 'embeddings.register_tokens'"),
        (_put("encoder.layer.2.norm1.weight", 16), "unknown tensor 'encoder.layer.2.norm1.weight'"),
        (_put("encoder.layer.1.norm1.weight", 24), r"'encoder.layer.1.norm1.weight' has shape \(24,\)"),
        (_put("embeddings.position_embeddings", 1, 17, 16), r"position_embeddings' has shape \(1, 17, 16\)"),
    ],
)
def test_wrong_tensors_are_named(tmp_path, change, message):
    _spoil(tmp_path, "dinov2_registers", change)
    with pytest.raises(UserError, match=message):
        cases.load(cases.config_of(cases.TINY["dinov2_registers"], tmp_path))


def test_a_parameter_that_the_family_never_has_is_named(tmp_path):
    cases.write(tmp_path, cases.shapes_of("dinov3"))
    config = cases.config_of(cases.TINY["dinov3"], tmp_path)
    config.encoder.mlp = "swiglu"
    with pytest.raises(UserError, match="published weights of this kind have no 'blocks/mlp/w"):
        cases.load(config)


def test_another_family_s_file_is_refused(tmp_path):
    cases.write(tmp_path, cases.shapes_of("mae"))
    for name in ("dinov2", "siglip2", "dinov3"):
        with pytest.raises(UserError, match="tensor '.*name another file, or change the config"):
            cases.load(cases.config_of(cases.TINY[name], tmp_path))


def test_a_tensor_under_two_names_is_refused(tmp_path):
    _spoil(tmp_path, "mae", _put("embeddings.cls_token", 1, 1, 16))
    with pytest.raises(UserError, match="'embeddings.cls_token' twice"):
        cases.load(cases.config_of(cases.TINY["mae"], tmp_path))


def test_a_truncated_file_is_refused(tmp_path):
    cases.write(tmp_path, cases.shapes_of("dinov2"))
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match="not a whole safetensors file"):
        cases.load(cases.config_of(cases.TINY["dinov2"], tmp_path))


def _write_shards(folder, *shards):
    names = [f"model-{i}.safetensors" for i in range(len(shards))]
    for name, arrays in zip(names, shards, strict=True):
        save_file(arrays, folder / name)
    index = {key: name for name, arrays in zip(names, shards, strict=True) for key in arrays}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))


def test_a_checkpoint_in_several_files(tmp_path):
    arrays = cases.weights(cases.shapes_of("dinov2"))
    keys = sorted(arrays)
    halves = [{key: arrays[key] for key in part} for part in (keys[:9], keys[9:])]
    _write_shards(tmp_path, *halves)
    config = cases.config_of(cases.TINY["dinov2"], tmp_path)
    tokens = cases.tokens_of(config, cases.load(config), cases.images(24, 24))
    assert cases.difference(tokens, cases.goldens()["dinov2/24x24"]) <= cases.TOLERANCE
    _write_shards(tmp_path, *halves, {keys[0]: arrays[keys[0]]})
    with pytest.raises(UserError, match=f"{keys[0]!r}, which another file"):
        cases.load(config)
    (tmp_path / "model-1.safetensors").unlink()
    with pytest.raises(UserError, match="names model-1.safetensors, which does not exist"):
        cases.load(config)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a')
    with pytest.raises(UserError, match="not a whole index"):
        cases.load(config)


def test_pickled_weights_take_torch(tmp_path, monkeypatch):
    def no_torch(name, *args, **kwargs):
        if name == "torch":
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    (tmp_path / "pytorch_model.bin").write_bytes(b"damaged")
    real_import = builtins.__import__
    with monkeypatch.context() as patch:
        patch.setattr(builtins, "__import__", no_torch)
        with pytest.raises(UserError, match="needs torch: install it"):
            cases.load(cases.config_of(cases.TINY["mae"], tmp_path))
    torch = pytest.importorskip("torch")
    with pytest.raises(UserError, match="not a whole file"):
        cases.load(cases.config_of(cases.TINY["mae"], tmp_path))
    arrays = cases.weights(cases.shapes_of("mae"))
    torch.save({key: torch.from_numpy(value) for key, value in arrays.items()}, tmp_path / "pytorch_model.bin")
    config = cases.config_of(cases.TINY["mae"], tmp_path)
    tokens = cases.tokens_of(config, cases.load(config), cases.images(16, 28))
    assert cases.difference(tokens, cases.goldens()["mae/16x28"]) <= cases.TOLERANCE


@pytest.mark.parametrize(
    "weights, message",
    [
        ("facebook/dinov2-bas", "download model.safetensors of facebook/dinov2-bas, put it in a local folder"),
        ("nowhere/at/all", "neither a local folder nor a hub id"),
    ],
)
def test_weights_that_are_not_there(tmp_path, monkeypatch, weights, message):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=message):
        cases.load(cases.config_of(cases.TINY["dinov2"], weights))


def test_an_empty_folder_is_named(tmp_path):
    with pytest.raises(UserError, match="holds none of model.safetensors"):
        cases.load(cases.config_of(cases.TINY["dinov2"], tmp_path))
