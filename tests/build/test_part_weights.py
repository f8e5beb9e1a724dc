"""Weights that are found, refused, or changed when they are loaded; and the discriminator's backbone."""

import re

import encoder_cases
import jax
import numpy as np
import pytest
from conftest import one_device, random_like, tiny
from published_cases import DINO, dino_shapes, write

from configs import small
from rae_jax.build import models, part_weights
from rae_jax.config import keys as config_keys
from rae_jax.errors import UserError
from rae_jax.runtime import sharding


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
    """Also if the run has the stage 'statistics', and no checkpoint yet."""
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
    with pytest.raises(UserError, match=f"^{re.escape(key)}='' names no weights") as error:
        part_weights.load(tiny_config, part, "", sharding.make_mesh(tiny_config.mesh))
    assert ("train this part first" in str(error.value)) == (part == "decoder")


@pytest.mark.parametrize("part", ["decoder", "backbone", "guide"])
def test_weights_that_do_not_exist_name_their_key(tmp_path, part):
    config = _backbone(tmp_path)
    config_keys.section(config, part).weights = str(tmp_path / "nowhere")
    key = {"backbone": "discriminator.backbone", "guide": "guidance.dit"}.get(part, part)
    with pytest.raises(UserError, match=f"^config.{key}.weights='{tmp_path}/nowhere': ") as error:
        part_weights.load(config, part, "", sharding.make_mesh(config.mesh))
    assert "\n" not in str(error.value)


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


def test_without_a_workdir_the_current_folder_is_no_run(tmp_path, monkeypatch):
    (tmp_path / "checkpoints" / "encoder" / "6").mkdir(parents=True)
    (tmp_path / "checkpoints" / "encoder" / "6" / "_CHECKPOINT_METADATA").write_text("{}")
    config = small.get_config()
    assert part_weights.has_checkpoints(config, tmp_path)
    monkeypatch.chdir(tmp_path)
    for workdir in (None, ""):
        assert not part_weights.has_checkpoints(config, workdir)
        assert part_weights.load(config, "encoder", workdir, one_device())["pos_embed"].shape == (1, 65, 64)


@pytest.mark.parametrize(
    "objective, parts",
    [
        ("distillation", {"encoder", "statistics", "dit", "guide"}),
        ("finetuning", {"encoder", "statistics", "dit"}),  # without a teacher, whose guide is not needed either
        ("trajectories", {"statistics", "dit", "guide"}),  # from noise, without images
    ],
)
def test_the_student_s_training_takes_what_its_objective_needs(tiny_config, objective, parts):
    tiny_config.few_step.objective, tiny_config.guidance.method = objective, "autoguidance"
    assert part_weights.frozen(tiny_config, "few_step", lambda part: part).keys() == parts
