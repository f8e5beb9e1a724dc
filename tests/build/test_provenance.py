"""Encoder, layers, decoder, statistics and DiT that were not made for each other are refused."""

import importlib
import json

import pytest
from conftest import one_device, random_like, tiny

from rae_jax.build import part_weights, provenance, saved_config
from rae_jax.config import inputs
from rae_jax.errors import UserError
from rae_jax.weights import safetensors_tree

HUB = "nyu-visionx/RAE-collections"


def _config(name):
    return importlib.import_module(f"configs.{name}").get_config()


@pytest.mark.parametrize("name", ["decoder_xl", "decoder_xl_dinov2_s", "decoder_xl_dinov2_l", "dit_xl", "dit_xl_512"])
def test_the_configs_own_files_fit(name):
    config = _config(name)
    for part in provenance.ON_LATENTS:
        provenance.check(config, part, config[part].weights)


@pytest.mark.parametrize(
    "source",
    [
        f"{HUB}:decoders/dinov2/wReg_small/ViTXL_n08/model.pt",
        f"{HUB}:stats/dinov2/wReg_large/imagenet1k/stat.pt",
        f"{HUB}:decoders/mae/base/ViTXL_n08/model.pt",
        f"{HUB}:DiTs/Dinov2/base/ImageNet256/DiTDH-XL/stage2_model.pt",  # without registers
        "/data/RAE/decoders/siglip2/base/ViTXL_n08/model.pt",
        "nyu-visionx/RAE-mae-base-ViTXL-n08",
    ],
)
def test_released_files_of_other_encoders_are_told_by_their_names(source):
    for part in provenance.ON_LATENTS:
        with pytest.raises(UserError, match="by their name these weights are for latents of .*, not of config.encoder"):
            provenance.check(_config("decoder_xl"), part, source)
    provenance.check(_config("decoder_xl"), "encoder", source)


@pytest.mark.parametrize("source", ["/data/mae_base/run", "somebody/dinov2_small_experiments:decoder.pt", ""])
def test_other_names_tell_nothing(source):
    provenance.check(_config("decoder_xl"), "decoder", source)


def test_the_shipped_weights_are_for_the_shipped_encoder():
    provenance.check(_config("quickstart"), "decoder", "small")
    with pytest.raises(UserError, match="for latents of config.encoder.family='small', not 'dinov2'"):
        provenance.check(_config("decoder_xl"), "decoder", "small")


@pytest.fixture
def folder(tmp_path):
    """Folder of a decoder as convert writes it, and its config."""
    config = tiny()
    decoder = random_like(part_weights.shapes(config, "decoder"), seed=0, scale=0.2)
    safetensors_tree.write(tmp_path / "decoder.safetensors", decoder)
    saved_config.write(config, tmp_path, {"decoder": decoder})
    config.stages, config.decoder.weights = (), str(tmp_path)
    return config, tmp_path


@pytest.mark.parametrize(
    "key, value", [("layers", (0, 1)), ("depth", 3), ("num_registers", 0), ("mean", (0.4, 0.5, 0.5))]
)
def test_a_folder_tells_by_its_config(folder, key, value):
    config, path = folder
    assert "blocks" in part_weights.load(config, "decoder", None, one_device())
    config.encoder[key] = value
    with pytest.raises(UserError, match=f"config.decoder.weights='{path}': these weights are for latents of config"):
        part_weights.load(config, "decoder", None, one_device())


def test_a_folder_tells_by_the_digest_of_the_encoder(folder):
    config, path = folder
    encoder = random_like(part_weights.shapes(config, "encoder"), seed=1, scale=0.2)
    (path / "other").mkdir()
    safetensors_tree.write(path / "other" / "encoder.safetensors", encoder)
    config.encoder.weights = str(path / "other")
    mesh = one_device()
    part_weights.load_all(config, ("encoder", "decoder"), None, mesh)  # nothing is recorded
    inputs.record(path, weights={"encoder": safetensors_tree.digest(encoder)})
    part_weights.load_all(config, ("encoder", "decoder"), None, mesh)
    (path / "inputs.json").write_text(json.dumps({"weights": {"encoder": "1234"}}))
    with pytest.raises(UserError, match="config.decoder.weights='.*' are for latents of another encoder's weights: "):
        part_weights.load_all(config, ("encoder", "decoder"), None, mesh)
