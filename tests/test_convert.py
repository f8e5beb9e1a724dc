"""Weights of others in and out: every kind of file there and back, and what is wrong with files that are wrong."""

import builtins
import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import autoencoder_cases
import dit_cases
import encoder_cases
import jax
import numpy as np
import pytest
from huggingface_hub import constants
from safetensors.numpy import load_file, save_file

from configs import dit_b, encoders
from rae_jax import build, convert, published, sharding
from rae_jax.errors import UserError

DINO = {**encoders.dino(), "width": 16, "depth": 2, "num_heads": 2, "input_size": 32, "position_size": 32}


def _dino_shapes(width=16, depth=2, patch_size=8, tokens=16):
    shapes = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, 1 + tokens, width),
        "patch_embed.proj.weight": (width, 3, patch_size, patch_size),
        "patch_embed.proj.bias": (width,),
        "norm.weight": (width,),
        "norm.bias": (width,),
    }
    sizes = {"attn.qkv": (48, 16), "attn.proj": (16, 16), "mlp.fc1": (64, 16), "mlp.fc2": (16, 64)}
    for i in range(depth):
        for name, size in sizes.items():
            shapes.update({f"blocks.{i}.{name}.weight": size, f"blocks.{i}.{name}.bias": size[:1]})
        for name in ("norm1", "norm2"):
            shapes.update({f"blocks.{i}.{name}.weight": (width,), f"blocks.{i}.{name}.bias": (width,)})
    return shapes


def _dit(name):
    case = dit_cases.TINY[name]
    return "dit", dit_cases.config_of(case), dit_cases.weights(case)


def _statistics(*names):
    """The variances are as small as they get, and larger than one."""
    arrays = encoder_cases.weights(dict.fromkeys(names, (24, 4, 4)))
    return "statistics", dit_cases.config_of(dit_cases.TINY["plain"]), {k: np.abs(v) for k, v in arrays.items()}


def _decoder():
    config = autoencoder_cases.config_of(autoencoder_cases.TINY["mae"])
    return "decoder", config, encoder_cases.weights(autoencoder_cases.decoder_shapes())


def _dino():
    config = autoencoder_cases.config_of(DINO, image_size=8)
    return "encoder", config, encoder_cases.weights(_dino_shapes())


@functools.cache
def _kind(name):
    """(part, config, arrays of a released file) of a kind of file."""
    match name:
        case "plain" | "plain_qk_norm_patch" | "dh_equal" | "dh_qk_norm":
            return _dit(name)
        case "decoder":
            return _decoder()
        case "statistics":
            return _statistics("mean", "var")
        case "statistics_without_mean":
            return _statistics("var")
        case "dino":
            return _dino()


KINDS = ("plain_qk_norm_patch", "dh_qk_norm", "decoder", "statistics", "statistics_without_mean", "dino")


def _write(path, arrays):
    path.parent.mkdir(exist_ok=True)
    if path.suffix == ".safetensors":
        save_file(arrays, path)
    else:
        torch = pytest.importorskip("torch")
        torch.save({k: torch.tensor(v) if isinstance(v, np.ndarray) else v for k, v in arrays.items()}, path)


def _read(path):
    if path.suffix == ".safetensors":
        return load_file(path)
    torch = pytest.importorskip("torch")
    return {k: v.numpy() for k, v in torch.load(path, weights_only=True).items() if v is not None}


def _convert(name, source, output, form="rae_jax"):
    """Convert weights of that kind; returns the written file."""
    part, config, _ = _kind(name)
    config = config.copy_and_resolve_references()
    config[part].weights = str(source)
    (path,) = convert.export(None, output, config=config, parts=[part], form=form)
    return path


@pytest.mark.parametrize("suffix, form", [(".safetensors", "released"), (".pt", "released_pt")])
@pytest.mark.parametrize("name", KINDS)
def test_there_and_back(tmp_path, name, suffix, form):
    arrays = _kind(name)[2]
    _write(tmp_path / f"theirs{suffix}", arrays)
    first = _convert(name, tmp_path / f"theirs{suffix}", tmp_path / "first")
    back = _convert(name, tmp_path / "first", tmp_path / "back", form)
    assert _convert(name, back, tmp_path / "second").read_bytes() == first.read_bytes()
    found = _read(Path(back))
    never_learned = {"pos_embed", "decoder_pos_embed", *(k for k in found if "rope.freqs" in k)}
    assert found.keys() - arrays.keys() <= never_learned and arrays.keys() <= found.keys()
    for key in arrays:
        if key not in ("norm.weight", "norm.bias"):  # DINO's last norm, which nobody uses
            np.testing.assert_array_equal(found[key], arrays[key], err_msg=key)


def test_an_autoencoder_of_diffusers_there_and_back(tmp_path):
    (tmp_path / "theirs").mkdir()
    arrays = autoencoder_cases.write("dinov2", tmp_path / "theirs")
    config = autoencoder_cases.config_of(autoencoder_cases.TINY["dinov2"], tmp_path / "theirs")
    convert.export(None, tmp_path / "ours", config=config, parts=["encoder", "decoder", "statistics"])
    for part in ("encoder", "decoder", "statistics"):
        config[part].weights = str(tmp_path / "ours")
    back, description = convert.export(None, tmp_path / "back", config=config, form="diffusers")
    assert json.loads(description.read_text())["decoder_hidden_size"] == 32
    found = load_file(back)
    assert found.keys() == arrays.keys()
    for key in arrays:
        if key != "encoder.embeddings.mask_token":  # nobody uses it
            np.testing.assert_array_equal(found[key], arrays[key], err_msg=key)


def test_transformers_before_version_5_named_the_encoder_otherwise(tmp_path):
    for folder in ("new", "old"):
        (tmp_path / folder).mkdir()
    arrays = autoencoder_cases.write("dinov2", tmp_path / "new")
    names = {
        "q_proj": "attention.query",
        "k_proj": "attention.key",
        "v_proj": "attention.value",
        "o_proj": "output.dense",
    }
    for key in list(arrays):
        for new, old in names.items():
            if f".attention.{new}." in key:
                arrays[key.replace(new, old)] = arrays.pop(key)
    save_file(arrays, tmp_path / "old" / "diffusion_pytorch_model.safetensors")
    old, new = (
        autoencoder_cases.load(autoencoder_cases.config_of(autoencoder_cases.TINY["dinov2"], tmp_path / f), "encoder")
        for f in ("old", "new")
    )
    jax.tree.map(np.testing.assert_array_equal, old, new)


def test_siglip2_in_an_autoencoder_of_diffusers(tmp_path):
    """Which today's diffusers and transformers cannot build together; older ones named it so."""
    whole = encoder_cases.weights(encoder_cases.shapes_of("siglip2"))
    inside = {f"encoder.{key}": value for key, value in whole.items() if key.startswith("vision_model.")}
    inside |= {"decoder.decoder_norm.bias": np.zeros(3), "encoder_mean": np.zeros(3), "_latents_std": np.ones(1)}
    params = []
    for name, arrays in (("whole", whole), ("inside", inside)):
        _write(tmp_path / name / "model.safetensors", arrays)
        params.append(encoder_cases.load(encoder_cases.config_of(encoder_cases.TINY["siglip2"], tmp_path / name)))
    jax.tree.map(np.testing.assert_array_equal, *params)


def test_dino_has_the_same_weights_by_timm_s_names_and_by_transformers(tmp_path):
    timm = _kind("dino")[2]
    renames = {
        "patch_embed.proj": "embeddings.patch_embeddings.projection",
        "pos_embed": "embeddings.position_embeddings",
        "cls_token": "embeddings.cls_token",
        "blocks.": "encoder.layer.",
        "attn.proj": "attention.output.dense",
        "norm1": "layernorm_before",
        "norm2": "layernorm_after",
        "mlp.fc1": "intermediate.dense",
        "mlp.fc2": "output.dense",
    }
    theirs = {}
    for key, array in timm.items():
        key = "layernorm." + key.removeprefix("norm.") if key.startswith("norm.") else key
        for old, new in renames.items():
            key = key.replace(old, new)
        if "attn.qkv" in key:
            for name, part in zip(("query", "key", "value"), np.split(array, 3), strict=True):
                theirs[key.replace("attn.qkv", f"attention.attention.{name}")] = part
        else:
            theirs[key] = array
    _write(tmp_path / "timm.safetensors", timm)
    _write(tmp_path / "theirs.safetensors", theirs)
    one, other = (_convert("dino", tmp_path / f"{n}.safetensors", tmp_path / n) for n in ("timm", "theirs"))
    assert one.read_bytes() == other.read_bytes()


def test_of_a_training_checkpoint_the_average_is_taken(tmp_path):
    torch = pytest.importorskip("torch")
    arrays = {key: torch.tensor(value) for key, value in _kind("decoder")[2].items()}
    whole = {f"decoder.{key}": value for key, value in arrays.items()} | {"encoder.encoder.layer.0": torch.ones(1)}
    last = {key: value + 1 for key, value in arrays.items()}
    rest = {"optimizer": {"state": {}, "param_groups": [{"lr": 1e-4}]}, "scheduler": None, "step": 3}
    for i, ema in enumerate((arrays, whole)):
        torch.save({"model": last, "ema": ema, **rest}, tmp_path / f"{i}.pt")
    torch.save(arrays, tmp_path / "raw.pt")
    written = [_convert("decoder", tmp_path / f"{n}.pt", tmp_path / n).read_bytes() for n in ("0", "1", "raw")]
    assert written[0] == written[1] == written[2]


def test_the_released_statistics():
    path = Path(__file__).parents[2] / "shared/data/reference/dinov2_wreg_base_stat.pt"
    if not path.exists():
        pytest.skip("../shared/data/reference is not here")
    torch = pytest.importorskip("torch")
    config = dit_b.get_config()
    config.statistics.weights = str(path)
    (statistics,) = autoencoder_cases.load(config, "statistics")
    variance = torch.load(path, weights_only=True)["var"].permute(1, 2, 0).numpy()
    np.testing.assert_array_equal(statistics["var"], variance)
    assert statistics["mean"].shape == (16, 16, 768) and not statistics["mean"].any()


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
    "made for another model": lambda arrays: (arrays.clear(), arrays.update({"layer.0.norm1.bias": np.zeros(3)})),
}


@functools.cache
def _shapes(name):
    part, config, _ = _kind(name)
    shapes = build.part_shapes(config, part)
    return shapes, sharding.shardings(shapes, sharding.make_mesh(config.mesh))


def _refused(name, source):
    """What the user is told."""
    part, config, _ = _kind(name)
    config = config.copy_and_resolve_references()
    config[part].weights = str(source)
    with pytest.raises(UserError) as refusal:
        published.load(config, part, *_shapes(name))
    assert "\n" not in str(refusal.value)
    return str(refusal.value)


@pytest.mark.parametrize("name", KINDS)
def test_files_that_are_wrong_are_refused(tmp_path, name):
    path = tmp_path / "file.safetensors"
    for message, damage in DAMAGE.items():
        arrays = dict(_kind(name)[2])
        damage(arrays)
        _write(path, arrays)
        assert message in _refused(name, path)
    path.write_bytes(path.read_bytes()[:-1])
    assert "not a whole safetensors file" in _refused(name, path)


def test_positions_of_another_model_are_refused(tmp_path):
    arrays = _kind("dh_qk_norm")[2]
    for positions, message in ((np.zeros((1, 64, 8)), "has shape (1, 64, 8)"), (np.ones((1, 16, 8)), "not what this")):
        _write(tmp_path / "file.safetensors", {**arrays, "pos_embed": positions.astype(np.float32)})
        assert message in _refused("dh_qk_norm", tmp_path / "file.safetensors")


def test_torch_files_take_torch_and_must_be_whole(tmp_path, monkeypatch):
    real_import = builtins.__import__

    def no_torch(name, *args, **kwargs):
        if name == "torch":
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    (tmp_path / "file.pt").write_bytes(b"damaged")
    _write(tmp_path / "whole.safetensors", _kind("statistics")[2])
    with monkeypatch.context() as patch:
        patch.setattr(builtins, "__import__", no_torch)
        assert "takes torch: install it" in _refused("decoder", tmp_path / "file.pt")
        with pytest.raises(UserError, match="writing .* takes torch"):
            _convert("statistics", tmp_path / "whole.safetensors", tmp_path / "out", "released_pt")
    torch = pytest.importorskip("torch")
    assert "not a whole file" in _refused("decoder", tmp_path / "file.pt")
    torch.save([1, 2], tmp_path / "file.pt")
    assert "not a whole file" in _refused("decoder", tmp_path / "file.pt")


@pytest.mark.parametrize(
    "source, message",
    [
        ("nyu-visionx/RAE:decoders/model.pt", "download decoders/model.pt of nyu-visionx/RAE, put it in a folder here"),
        ("nowhere/at/all:model.pt", "'nowhere/at/all' is neither a folder here nor a hub id"),
        ("weights/model.pt", "there is no file weights/model.pt"),
    ],
)
def test_sources_that_are_not_there(tmp_path, monkeypatch, source, message):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert message in _refused("decoder", source)


def test_a_file_of_the_hub_is_found_in_its_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    repo = tmp_path / "models--someone--models"
    for folder in ("refs", "snapshots/abc/decoders/xl"):
        (repo / folder).mkdir(parents=True)
    (repo / "refs" / "main").write_text("abc")
    _write(repo / "snapshots/abc/decoders/xl/model.safetensors", _kind("decoder")[2])
    one = _convert("decoder", "someone/models:decoders/xl/model.safetensors", tmp_path / "one")
    other = _convert("decoder", repo / "snapshots/abc/decoders/xl", tmp_path / "other")
    assert one.read_bytes() == other.read_bytes()
    assert "download decoders/s/model.pt" in _refused("decoder", "someone/models:decoders/s/model.pt")


def test_parts_that_nobody_else_has(tmp_path):
    small = dit_cases.config_of(dit_cases.TINY["plain"])
    with pytest.raises(UserError, match="config.dit.weights is empty"):
        convert.export(None, tmp_path, config=small, parts=["dit"])
    with pytest.raises(UserError, match="--parts=vae cannot work"):
        convert.export(None, tmp_path, config=small, parts=["vae"])
    with pytest.raises(UserError, match="leave out --parts"):
        convert.export(None, tmp_path, config=small, parts=["decoder"], form="diffusers")
    with pytest.raises(UserError, match="nobody else has a format for 'judge'"):
        published.tensors_of(small, "judge", {})


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
    root = Path(__file__).parents[1]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, timeout=300, env=environment)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    assert message in done.stderr and not (tmp_path / "out").exists()
