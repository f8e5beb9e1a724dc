"""The random streams and images of the stages, and weights that are changed when they are loaded."""

import re

import encoder_cases
import jax
import numpy as np
import pytest
from conftest import random_like, tiny
from PIL import Image
from published_cases import DINO, dino_shapes, write

from rae_jax.build import models, part_weights, stages
from rae_jax.errors import UserError
from rae_jax.runtime import sharding

STREAMS = {"encoder": 0, "judge": 1, "decoder": 2, "statistics": 3, "dit": 4}


def _seed(config, name):
    return int(np.random.SeedSequence((config.seed, STREAMS[name])).generate_state(1)[0])


def test_each_stage_has_a_stream_of_its_own():
    """By its name and the config's seed. Other numbers would change what an interrupted run computes from there on."""
    config = tiny()
    for config.seed in (0, 7):
        found = {name: stages.stage_seed(config, name) for name in STREAMS}
        assert found == {name: _seed(config, name) for name in STREAMS} and len(set(found.values())) == len(STREAMS)


@pytest.mark.parametrize(
    "name, crop, flip",
    [("encoder", "random", True), ("judge", "centre", True), ("judge", "random", False), ("encoder", "centre", False)],
)
def test_a_stage_s_images_are_those_that_its_section_asks_for(tiny_config, tmp_path, name, crop, flip):
    """In the order, crops and flips that the stage's stream draws, the epoch's number and the image's in it.

    The short side of the images is 1.5 times that of the crops already: random ones are cut out of them as they are.
    """
    pixels = np.random.default_rng(0).integers(0, 256, (20, 24, 36, 3), np.uint8)
    for i, image in enumerate(pixels):  # two of each class
        (tmp_path / str(i // 2)).mkdir(exist_ok=True)
        Image.fromarray(image).save(tmp_path / str(i // 2) / f"{i % 2}.png")
    config = tiny_config
    config.seed = 5
    folders = {"path": str(tmp_path), "heldout_path": str(tmp_path)}
    config.data.update({"source": "image_folder", "image_size": 16, **folders})
    other = {"encoder": "judge", "judge": "encoder"}[name]
    config[name].train.update({"crop": crop, "flip": flip})
    config[other].train.update({"crop": "centre" if crop == "random" else "random", "flip": not flip})
    batch = next(iter(stages.stage(config, name, "", sharding.make_mesh(config.mesh)).batches))

    seed = _seed(config, name)
    order = np.random.default_rng((seed, 0)).permutation(20)[:16]
    np.testing.assert_array_equal(batch["label"], order // 2)
    mirrored = 0
    for index, image in zip(order, batch["image"], strict=True):
        rng = np.random.default_rng((seed, 0, index))
        if crop == "random":
            left, top = rng.integers(36 - 16 + 1), rng.integers(24 - 16 + 1)
            expected = pixels[index, top : top + 16, left : left + 16]
        else:
            small = Image.fromarray(pixels[index]).resize((24, 16), Image.Resampling.BICUBIC)
            expected = np.asarray(small)[:, 4:20]
        turn = flip and rng.random() < 0.5
        np.testing.assert_array_equal(image, expected[:, ::-1] if turn else expected)
        mirrored += turn
    assert 0 < mirrored < 16 if flip else mirrored == 0


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
        part_weights.load(config, "backbone", "", sharding.make_mesh(config.mesh))["blocks"]["attention"]["qkv"]["bias"]
    )
    released = encoder_cases.weights(dino_shapes())["blocks.1.attn.qkv.bias"]
    assert released.all() and not bias[:, 16:32].any()
    np.testing.assert_array_equal(bias[1], np.where(np.arange(48) // 16 == 1, 0, released))


@pytest.mark.parametrize("stages", [(), ("statistics",)])
def test_statistics_may_be_left_out(tiny_config, tmp_path, stages):
    """Also those of a stage that has not run."""
    tiny_config.stages, tiny_config.statistics.weights = stages, "none"
    assert part_weights.load(tiny_config, "statistics", tmp_path, sharding.make_mesh(tiny_config.mesh)) is None


@pytest.mark.parametrize(
    "part, key",
    [
        ("decoder", "config.decoder.weights"),
        ("backbone", "config.discriminator.backbone.weights"),
        ("guide", "config.guidance.dit.weights"),
    ],
)
def test_a_part_without_weights_names_their_key(tiny_config, part, key):
    tiny_config.guidance.method = "autoguidance"
    section = tiny_config
    for name in key.split(".")[1:-1]:
        section = section[name]
    section.weights = ""
    with pytest.raises(UserError, match=f"^{re.escape(key)}='' names no weights"):
        part_weights.load(tiny_config, part, "", sharding.make_mesh(tiny_config.mesh))


def test_the_discriminator_s_backbone_sees_images_resized_bilinearly(tmp_path):
    """Without antialiasing: from 48 pixels to 32, each one lies between two, at 1.5 i + 0.25."""
    config = _backbone(tmp_path)
    backbone = models.backbone(config)
    line = np.zeros((32, 48))
    for i in range(32):
        left = int(np.floor(1.5 * i + 0.25))
        line[i, left], line[i, left + 1] = 1 - (1.5 * i + 0.25 - left), 1.5 * i + 0.25 - left
    images = np.float32(np.random.default_rng(0).uniform(-0.2, 1.2, (2, 48, 48, 3)))
    resized = np.float32(np.einsum("ih,jw,bhwc->bijc", line, line, images))
    params = random_like(part_weights.shapes(config, "backbone"), seed=0, scale=0.3)
    tokens, expected = (jax.jit(backbone)(params, x) for x in (images, resized))
    assert tokens.shape == (2, 2, 16, 16)
    np.testing.assert_allclose(tokens, expected, atol=1e-4)
