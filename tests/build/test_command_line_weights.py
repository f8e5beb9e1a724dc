"""Encoder weights on the command line set the keys that they describe; other keys there, and runs, must agree."""

import json
import shutil

import numpy as np
import pytest
from absl import flags
from conftest import one_device
from huggingface_hub import constants
from ml_collections import config_flags

from configs import dit_b, encoders
from rae_jax.build import command_line_weights, encoder_description
from rae_jax.config import checks, command_flag, run_config
from rae_jax.weights import safetensors_tree

_IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
_DINOV2 = {"image_size": 518, "patch_size": 14, "mlp_ratio": 4, "hidden_act": "gelu", "qkv_bias": True}
_DINOV2.update({"use_swiglu_ffn": False, "layer_norm_eps": 1e-6, "num_channels": 3, "num_register_tokens": 4})
_VIT = {"intermediate_size": 1536, "num_channels": 3, "hidden_act": "gelu", "qkv_bias": True, "layer_norm_eps": 1e-12}
_SMALL = {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6}
CONFIGS = {
    "base": {"model_type": "dinov2_with_registers", "hidden_size": 768, "num_hidden_layers": 12} | _DINOV2,
    "large": {"model_type": "dinov2_with_registers", "hidden_size": 1024, "num_hidden_layers": 24} | _DINOV2,
    "mae": {"model_type": "vit_mae", **_VIT, **_SMALL, "image_size": 224, "patch_size": 16},
    "dino": {"model_type": "vit", **_VIT, **_SMALL, "image_size": 224, "patch_size": 8},
}
CONFIGS["base"]["num_attention_heads"], CONFIGS["large"]["num_attention_heads"] = 12, 16


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """Folders of descriptions, in the current folder; no network."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for name, config in CONFIGS.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        (tmp_path / name / "preprocessor_config.json").write_text(json.dumps(_IMAGENET))
    return tmp_path


def _parsed(*arguments):
    """The config of a command."""
    command, values = ["main", *arguments], flags.FlagValues()
    flag = config_flags.DEFINE_config_file("config", None, "", flag_values=values, sys_argv=command)
    flags.DEFINE_string("workdir", None, "", flag_values=values)
    command_flag.parser(flag, command_line_weights.complete, values)(command)
    return values.config


def _refused(capsys, *arguments):
    """The line on stderr of a command that is refused."""
    with pytest.raises(SystemExit) as stop:
        _parsed(*arguments)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1
    return error


def test_weights_alone_suffice(folders, capsys):
    config = _parsed("--config=dit_b", "--config.encoder.weights=large")
    changed = {"weights": "large", "width": 1024, "depth": 24, "num_heads": 16}
    assert config.encoder.to_dict() == {**dit_b.get_config().encoder.to_dict(), **changed}
    checks.check(config, one_device(), trains=False)
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("config.encoder.weights='large' sets config.encoder: ")
    assert "width=1024 (not 768), depth=24 (not 12), num_heads=16 (not 12)\n" in error
    config = _parsed("--config=dit_b", "--config.encoder.weights=base")  # which describes the config's values
    assert config.encoder.to_dict() == {**dit_b.get_config().encoder.to_dict(), "weights": "base"}
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "arguments, expected",
    [
        ((), 256),
        (("--config.encoder.patch_size=16",), 256),
        (("--config.encoder.input_size=512",), 512),
        (("--config.data.image_size=512",), 512),
        (("--config.decoder.grid_size=16",), 256),
        (("--config.decoder.patch_size=0",), 256),
    ],
)
def test_another_patch_size_keeps_the_decoder_s_number_of_tokens(folders, arguments, expected):
    config = _parsed("--config=dit_b", "--config.encoder.weights=mae", *arguments)
    e = config.encoder
    assert (e.family, e.patch_size, e.position_size, e.num_registers) == ("mae", 16, 224, 0)
    assert e.input_size == expected
    if not arguments:
        checks.check(config, one_device(), trains=False)


def test_images_that_are_not_resized_are_so_only_if_they_must_be(folders):
    config = _parsed("--config=small", "--config.stages=('dit',)", "--config.encoder.weights=dino")
    assert (config.encoder.input_size, config.decoder.patch_size, config.data.image_size) == (64, 4, 32)
    arguments = ("--config.data.image_size=64", "--config.decoder.patch_size=8", "--config.encoder.weights=dino")
    assert _parsed("--config=small", "--config.stages=('dit',)", *arguments).encoder.input_size == 0


@pytest.mark.parametrize(
    "key, value, theirs",
    [
        *(("width", 768, 1024), ("family", "mae", "dinov2"), ("mlp", "gelu_tanh", "gelu"), ("mlp_ratio", 3.0, 4.0)),
        *(("position_size", 0, 518), ("std", (1.0, 1.0, 1.0), (0.229, 0.224, 0.225))),
    ],
)
def test_a_key_that_contradicts_the_weights_is_refused(folders, capsys, key, value, theirs):
    error = _refused(capsys, "--config=dit_b", "--config.encoder.weights=large", f"--config.encoder.{key}={value}")
    words = f"config.encoder.{key}={value!r} does not fit these weights, which have {theirs!r}: leave out"
    assert error == f"error: config.encoder.weights='large': {words} --config.encoder.{key}\n"


def test_a_key_that_agrees_with_the_weights_is_accepted(folders):
    same = ("--config.encoder.width=1024", "--config.encoder.mlp_ratio=4.0001", "--config.encoder.depth=24")
    config = _parsed("--config=dit_b", "--config.encoder.weights=large", *same)
    assert (config.encoder.width, config.encoder.mlp_ratio) == (1024, 4.0001)


@pytest.mark.parametrize("weights", ["", "small", "OWNER/NAME:model.pt", "file.safetensors", "bare", "ours"])
def test_weights_without_a_description_change_nothing(folders, capsys, weights):
    (folders / "file.safetensors").touch()
    (folders / "bare").mkdir()
    safetensors_tree.write(folders / "ours" / "encoder.safetensors", {"kernel": np.zeros(2, np.float32)})
    (folders / "ours" / "config.json").write_text(json.dumps({"encoder": {"width": 16}, "stages": []}))
    config = _parsed("--config=dit_b", f"--config.encoder.weights={weights}")
    assert config.encoder.to_dict() == {**dit_b.get_config().encoder.to_dict(), "weights": weights}
    assert capsys.readouterr().err == ""


def test_an_encoder_that_the_run_trains_is_not_described(folders):
    assert _parsed("--config=small", "--config.encoder.weights=large").encoder.family == "small"


def test_without_weights_on_the_command_line_nothing_is_read(folders, monkeypatch):
    monkeypatch.setattr(encoder_description, "read", None)
    assert _parsed("--config=dit_b", "--config.seed=1").encoder.to_dict() == dit_b.get_config().encoder.to_dict()


def test_a_backbone_keeps_its_size_and_the_gelu_of_the_paper(folders, capsys):
    key = "--config.discriminator.backbone"
    config = _parsed("--config=decoder_xl", f"{key}.weights=dino")
    assert config.discriminator.backbone.to_dict() == {**encoders.dino(), "weights": "dino"}
    assert capsys.readouterr().err == ""
    backbone = _parsed("--config=decoder_xl", f"{key}.weights=mae").discriminator.backbone
    assert (backbone.family, backbone.mlp, backbone.patch_size, backbone.input_size) == ("mae", "gelu", 16, 224)
    backbone = _parsed("--config=small", f"{key}.weights=base").discriminator.backbone
    assert (backbone.family, backbone.width, backbone.input_size) == ("dinov2", 768, 28)
    backbone = _parsed("--config=small", f"{key}.weights=dino", f"{key}.mlp=gelu_tanh").discriminator.backbone
    assert (backbone.family, backbone.mlp, backbone.input_size) == ("dino", "gelu_tanh", 0)
    capsys.readouterr()
    error = _refused(capsys, "--config=decoder_xl", f"{key}.weights=base", f"{key}.width=384")
    assert "config.discriminator.backbone.width=384 does not fit these weights, which have 768: " in error


@pytest.fixture
def run(folders):
    """The workdir of a run on the folder 'large', which does not exist any more."""
    run_config.save(_parsed("--config=dit_b", "--config.encoder.weights=large"), folders / "run")
    (folders / "run" / "checkpoints").mkdir()
    shutil.move(folders / "large", folders / "moved")
    return folders / "run"


def test_a_run_is_resumed_without_its_description(run, monkeypatch, capsys):
    capsys.readouterr()
    for command in ([], ["--config.encoder.weights=large"], ["--config=dit_b", "--config.encoder.weights=large"]):
        with monkeypatch.context() as patched:
            patched.setattr(encoder_description, "read", None)
            config = _parsed(f"--workdir={run}", *command)
        assert (config.encoder.width, config.encoder.depth, config.encoder.weights) == (1024, 24, "large")
        run_config.check(config, run, "dit")
        assert bool(capsys.readouterr().err) == ("--config=dit_b" in command)
    config = _parsed(f"--config={run}/config.json", "--config.encoder.weights=large")
    assert config.encoder.width == 1024


def test_a_run_s_config_without_checkpoints_is_not_resumed(run, capsys):
    (run / "checkpoints").rmdir()
    capsys.readouterr()
    config = _parsed(f"--workdir={run}", "--config=dit_b", "--config.encoder.weights=large")  # which does not exist
    assert config.encoder.width == 768


def test_a_resumed_run_takes_the_same_weights_from_another_place(run, capsys):
    capsys.readouterr()
    config = _parsed(f"--workdir={run}", "--config.encoder.weights=moved")
    assert (config.encoder.width, config.encoder.weights) == (1024, "moved")
    assert capsys.readouterr().err == ""
    error = _refused(capsys, f"--workdir={run}", "--config.encoder.weights=base")
    words = "config.encoder.weights='base': config.encoder.width=1024 does not fit these weights, which have 768: "
    assert f"{words}name weights like the run's, or use another --workdir" in error


def test_a_hub_id_whose_description_cannot_be_fetched_changes_nothing(folders, capsys):
    config = _parsed("--config=dit_b", "--config.encoder.weights=facebook/dinov2-large")
    assert config.encoder.to_dict() == {**dit_b.get_config().encoder.to_dict(), "weights": "facebook/dinov2-large"}
    assert capsys.readouterr().err == ""
