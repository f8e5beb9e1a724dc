"""The random streams of the stages, and weights that are changed when they are loaded."""

import encoder_cases
import jax
import numpy as np
from conftest import random_like, tiny
from published_cases import DINO, dino_shapes, write

from rae_jax import build, sharding, stages


def test_each_stage_has_a_stream_of_its_own():
    """By its name and the config's seed. Other numbers would change what an interrupted run computes from there on."""
    config, streams = tiny(), {"encoder": 0, "judge": 1, "decoder": 2, "statistics": 3, "dit": 4}
    for config.seed in (0, 7):
        found = {name: stages.stage_seed(config, name) for name in streams}
        expected = {n: np.random.SeedSequence((config.seed, i)).generate_state(1)[0] for n, i in streams.items()}
        assert found == expected and len(set(found.values())) == len(streams)


def _backbone(folder):
    """A config whose discriminator has a tiny DINO of its own, from a file as it was released."""
    config = tiny()
    config.discriminator.update({"backbone": DINO, "layers": (1, 0)})
    config.discriminator.backbone.weights = str(folder / "dino.safetensors")
    write(folder / "dino.safetensors", encoder_cases.weights(dino_shapes()))
    return config


def test_the_discriminator_s_backbone_has_no_bias_of_its_keys(tmp_path):
    config = _backbone(tmp_path)
    bias = np.asarray(
        stages.load(config, "backbone", "", sharding.make_mesh(config.mesh))["blocks"]["attention"]["qkv"]["bias"]
    )
    released = encoder_cases.weights(dino_shapes())["blocks.1.attn.qkv.bias"]
    assert released.all() and not bias[:, 16:32].any()
    np.testing.assert_array_equal(bias[1], np.where(np.arange(48) // 16 == 1, 0, released))


def test_the_discriminator_s_backbone_sees_images_resized_bilinearly(tmp_path):
    """Without antialiasing: from 48 pixels to 32, each one lies between two, at 1.5 i + 0.25."""
    config = _backbone(tmp_path)
    backbone = build.discriminator(config).backbone
    line = np.zeros((32, 48))
    for i in range(32):
        left = int(np.floor(1.5 * i + 0.25))
        line[i, left], line[i, left + 1] = 1 - (1.5 * i + 0.25 - left), 1.5 * i + 0.25 - left
    images = np.float32(np.random.default_rng(0).uniform(-0.2, 1.2, (2, 48, 48, 3)))
    resized = np.float32(np.einsum("ih,jw,bhwc->bijc", line, line, images))
    params = random_like(stages.part_shapes(config, "backbone"), seed=0, scale=0.3)
    tokens, expected = (jax.jit(backbone)(params, x) for x in (images, resized))
    assert tokens.shape == (2, 2, 16, 16)
    np.testing.assert_allclose(tokens, expected, atol=1e-4)
