"""Files of others that are wrong or do not exist: one line that names the file and the fix."""

import builtins
import functools
import os
import subprocess
import sys
from pathlib import Path

import dit_cases
import numpy as np
import pytest
from huggingface_hub import constants
from published_cases import KINDS, convert_kind, kind, write

from rae_jax import convert
from rae_jax.build import part_weights, published_weights
from rae_jax.errors import UserError
from rae_jax.runtime import sharding


def _first(arrays):
    """A tensor that is surely wanted."""
    return sorted(key for key in arrays if not key.startswith("norm."))[0]


def _other_shape(arrays):
    key = _first(arrays)
    arrays[key] = np.zeros((*arrays[key].shape, 2), np.float32)


DAMAGE = {
    "lacks tensor": lambda arrays: arrays.pop(_first(set(arrays) - {"mean"})),
    "unknown tensor": lambda arrays: arrays.update({"something.weight": np.zeros(3, np.float32)}),
    "has shape": _other_shape,
    "holds tensors such as 'layer.0.norm1.bias'": lambda arrays: (
        arrays.clear(),
        arrays.update({"layer.0.norm1.bias": np.zeros(3)}),
    ),
}


@functools.cache
def _shapes(name):
    part, config, _ = kind(name)
    shapes = part_weights.shapes(config, part)
    return shapes, sharding.shardings(shapes, sharding.make_mesh(config.mesh))


def _refused(name, source):
    """Return the message to the user."""
    part, config, _ = kind(name)
    config = config.copy_and_resolve_references()
    config[part].weights = str(source)
    with pytest.raises(UserError) as refusal:
        published_weights.load(config, part, *_shapes(name))
    assert "\n" not in str(refusal.value)
    return str(refusal.value)


@pytest.mark.parametrize("name", KINDS)
def test_files_that_are_wrong_are_refused(tmp_path, name):
    path = tmp_path / "file.safetensors"
    for message, damage in DAMAGE.items():
        arrays = dict(kind(name)[2])
        damage(arrays)
        write(path, arrays)
        assert message in _refused(name, path)
    path.write_bytes(path.read_bytes()[:-1])
    assert "not a whole safetensors file" in _refused(name, path)


def test_positions_of_another_model_are_refused(tmp_path):
    arrays = kind("dh_qk_norm")[2]
    other_shape, other_values = (
        (np.zeros((1, 64, 8)), "has shape (1, 64, 8)"),
        (np.ones((1, 16, 8)), "other values than"),
    )
    for positions, message in (other_shape, other_values):
        write(tmp_path / "file.safetensors", {**arrays, "pos_embed": positions.astype(np.float32)})
        assert message in _refused("dh_qk_norm", tmp_path / "file.safetensors")


def test_torch_files_take_torch_and_must_be_whole(tmp_path, monkeypatch):
    real_import = builtins.__import__

    def no_torch(name, *args, **kwargs):
        if name == "torch":
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    (tmp_path / "file.pt").write_bytes(b"damaged")
    write(tmp_path / "whole.safetensors", kind("statistics")[2])
    with monkeypatch.context() as patch:
        patch.setattr(builtins, "__import__", no_torch)
        assert "needs torch: install it" in _refused("decoder", tmp_path / "file.pt")
        with pytest.raises(UserError, match="writing .* needs torch"):
            convert_kind("statistics", tmp_path / "whole.safetensors", tmp_path / "out", "released_pt")
    torch = pytest.importorskip("torch")
    assert "not a whole file" in _refused("decoder", tmp_path / "file.pt")
    torch.save([1, 2], tmp_path / "file.pt")
    assert "holds no dict of tensors: save the state dict" in _refused("decoder", tmp_path / "file.pt")


@pytest.mark.parametrize(
    "source, message",
    [
        ("nyu-visionx/RAE:decoders/model.pt", "download decoders/model.pt of nyu-visionx/RAE, put it in a local"),
        ("nowhere/at/all:model.pt", "'nowhere/at/all' is neither a local folder nor a hub id"),
        ("weights/model.pt", "the file weights/model.pt does not exist"),
    ],
)
def test_sources_that_are_not_there(tmp_path, monkeypatch, source, message):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert message in _refused("decoder", source)


def test_parts_that_nobody_else_has(tmp_path):
    small = dit_cases.config_of(dit_cases.TINY["plain"])
    with pytest.raises(UserError, match="config.dit.weights='' names no weights"):
        convert.export(None, tmp_path, config=small, parts=["dit"])
    with pytest.raises(UserError, match="--parts=vae cannot work"):
        convert.export(None, tmp_path, config=small, parts=["vae"])
    with pytest.raises(UserError, match="leave out --parts"):
        convert.export(None, tmp_path, config=small, parts=["decoder"], form="diffusers")
    with pytest.raises(UserError, match="no published format has the part 'judge'"):
        published_weights.tensors_of(small, "judge", {})


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--config=configs/dit_xl.py", "--parts=statistics"], "download stats/dinov2/wReg_base/imagenet1k/stat.pt of"),
        (["--config=configs/small.py", "--config.dit.weight=x"], "unknown config key"),
    ],
)
def test_the_command_line_says_it_in_one_line(tmp_path, arguments, message):
    command = [sys.executable, "-m", "rae_jax.convert", f"--output={tmp_path / 'out'}", *arguments]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache")}
    root = Path(__file__).parents[2]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, timeout=300, env=environment)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    assert message in done.stderr and not (tmp_path / "out").exists()
