"""RAEv2's configs are the paper's (../shared/FOLLOWUPS.md, section 1)."""

import importlib
import math

import jax
import pytest

from configs import raev2_decoder_k7, raev2_decoder_k23, raev2_xl
from rae_jax.build import models, part_weights, provenance
from rae_jax.config import keys as config_keys
from rae_jax.errors import UserError
from rae_jax.models.dit_dh import InContextDiTDH

RELEASED = "nyu-visionx/RAEv2-models"
DECODERS = {7: raev2_decoder_k7, 23: raev2_decoder_k23}


@pytest.mark.parametrize("images", ["imagenet", "general"])
@pytest.mark.parametrize("number", DECODERS)
def test_decoders(number, images):
    config = DECODERS[number].get_config(images)
    assert len(config.encoder.layers) == number and config.encoder.layers[-1] == 23
    assert (config.encoder.family, config.encoder.width, config.encoder.input_size) == ("dinov3", 1024, 256)
    assert models.autoencoder(config).add_mean and not models.autoencoder(config).normalised_output
    folder = f"{RELEASED}:stage1/{images}/dinov3l-k{number}"
    assert (config.decoder.weights, config.statistics.weights) == (f"{folder}/decoder.pt", f"{folder}/stats.pt")
    xl = importlib.import_module("configs.decoder_xl").get_config()
    assert config.decoder.train == xl.decoder.train and config.stages == ("decoder",)
    assert (config.decoder.width, config.decoder.depth, config.decoder.patch_size) == (1152, 28, 16)


def test_the_network_and_its_recipe():
    config = raev2_xl.get_config()
    model = models.dit(config)
    assert isinstance(model, InContextDiTDH) and (model.time_tokens, model.embed(8).tokens) == (4, 8)
    assert (model.width, model.depth, model.num_heads, model.base_depth, model.qk_norm) == (1440, 28, 20, 8, True)
    assert (model.head_width, model.head_depth, model.head_num_heads) == (2048, 2, 16)
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(part_weights.shapes(config, "dit"))) == 875_216_500
    wanted = {"unit": "epoch", "num_steps": 80, "batch_size": 1024, "learning_rate": 2e-4, "final_learning_rate": 2e-5}
    wanted |= {"warmup_steps": 0, "decay_start": 25, "decay_end": 50, "decay": "linear", "optimizer": "muon_all"}
    wanted |= {"b1": 0.9, "b2": 0.95, "weight_decay": 0.0, "clip_norm": 1.0, "ema_decay": 0.9995, "base_weight": 1.0}
    wanted |= {"time": "logit_normal", "time_mean": 0.0, "time_std": 1.0, "label_dropout": 0.1}
    assert {key: config.dit.train[key] for key in wanted} == wanted
    assert (config.dit.prediction, config.dit.time_shift, config_keys.latent_shape(config)) == (
        "data_in_velocity",
        0.0,
        (16, 16, 1024),
    )
    sampler, guidance = config.sampler, config.guidance
    assert (sampler.method, sampler.grid, sampler.num_steps) == ("euler", "plain", 100)
    assert (guidance.method, guidance.scale, guidance.t_min, guidance.t_max) == ("internal", 1.78, 0.1, 1.0)
    assert config.dit.weights == f"{RELEASED}:stage2/imagenet/dinov3l-k7/checkpoint.pt"


def test_the_released_files_are_one_set():
    for config in (raev2_xl.get_config(), *(module.get_config() for module in DECODERS.values())):
        for part in provenance.ON_LATENTS:
            provenance.check(config, part, config[part].weights)
    config = raev2_xl.get_config()
    other = DECODERS[23].get_config()
    for part in ("decoder", "statistics"):
        with pytest.raises(UserError, match="by their name these weights are for latents of 23 layers of dinov3 large"):
            provenance.check(config, part, other[part].weights)
    first = importlib.import_module("configs.dit_xl").get_config()
    first.decoder.output = "image"
    with pytest.raises(UserError, match="for config.decoder.output='normalised', not 'image'"):
        provenance.check(first, "decoder", first.decoder.weights)
    config.decoder.output = "normalised"
    with pytest.raises(UserError, match="for config.decoder.output='image', not 'normalised'"):
        provenance.check(config, "decoder", config.decoder.weights)
