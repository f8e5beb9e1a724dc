"""The random streams, images and steps of the stages."""

import zlib

import numpy as np
import pytest
from conftest import tiny
from PIL import Image

from rae_jax.build import stages
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


def test_a_new_stage_has_a_stream_by_its_name_alone():
    config = tiny()
    found = {name: stages.stage_seed(config, name) for name in (*STREAMS, "few_step", "text")}
    assert len(set(found.values())) == len(found)
    expected = np.random.SeedSequence((config.seed, zlib.crc32(b"few_step"))).generate_state(1)[0]
    assert found["few_step"] == expected


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


def test_a_stage_runs_its_epochs(tiny_config, tmp_path):
    tiny_config.stages = ("judge",)
    tiny_config.judge.train.update({"unit": "epoch", "num_steps": 3, "warmup_steps": 1})
    stage = stages.stage(tiny_config, "judge", tmp_path, sharding.make_mesh(tiny_config.mesh))
    assert stage.num_steps == 3 * (96 // 16)
