"""Steps of epochs, and the config.json of a run: with which keys the run may be resumed."""

import functools
import importlib
import json

import pytest
from conftest import tiny

from rae_jax.config import keys as config_keys
from rae_jax.errors import UserError


def test_epochs_become_steps_of_the_data_that_is_there():
    """The paper's schedule on ImageNet: 2502 whole batches of 512 an epoch."""
    config = importlib.import_module("configs.decoder_b").get_config()
    train = config_keys.in_steps(config, "decoder", 1_281_167).decoder.train
    counts = ("num_steps", "warmup_steps", "discriminator_start", "adversarial_start", "decay_start")
    assert [train[key] for key in counts] == [16 * 2502, 2502, 6 * 2502, 8 * 2502, 0]
    assert train.unit == "step" and config.decoder.train.num_steps == 16
    train = config_keys.in_steps(config, "dit", 1_281_167).dit.train
    counts = ("num_steps", "warmup_steps", "decay_start")
    assert [train[key] for key in counts] == [800 * 1251, 0, 40 * 1251] and train.unit == "step"
    small_config = tiny()
    assert config_keys.in_steps(small_config, "dit", 96) == small_config


def test_a_run_that_met_an_unreadable_image_goes_on_without_it(tiny_config, tmp_path):
    config_keys.save(tiny_config, tmp_path)
    (tmp_path / "checkpoints").mkdir()
    tiny_config.data.on_error = "skip"
    config_keys.check_workdir(tiny_config, tmp_path)


# What a run computes depends on these sections and keys, but for those that say how much at a time, how to go on after
# an image that cannot be read, or which average is used.
_DECISIVE = (
    *("seed", "dtype", "stages", "data", "encoder", "judge", "decoder", "lpips", "discriminator"),
    *("statistics", "dit"),
)


_NOT_DECISIVE = ("data.num_threads", "data.num_workers", "data.on_error", "dit.train.microbatches", "dit.average")


def test_a_run_goes_on_by_its_own_recipe_alone(tiny_config, tmp_path):
    """Each key that training depends on is refused with another value; all others may be changed."""
    config_keys.save(tiny_config, tmp_path)
    (tmp_path / "checkpoints").mkdir()
    whole = json.loads((tmp_path / "config.json").read_text())
    for key in config_keys.flatten(whole):
        changed = json.loads(json.dumps(whole))
        *path, last = key.split(".")
        functools.reduce(dict.get, path, changed)[last] = "another value"
        (tmp_path / "config.json").write_text(json.dumps(changed))
        if key.split(".")[0] in _DECISIVE and key not in _NOT_DECISIVE:
            with pytest.raises(UserError, match=f"config.{key}='another value'"):
                config_keys.check_workdir(tiny_config, tmp_path)
        else:
            config_keys.check_workdir(tiny_config, tmp_path)


def test_a_run_goes_on_with_keys_that_a_later_version_brought(tiny_config, tmp_path):
    config_keys.save(tiny_config, tmp_path)
    (tmp_path / "checkpoints").mkdir()
    saved = json.loads((tmp_path / "config.json").read_text())
    del saved["data"]["on_error"]
    (tmp_path / "config.json").write_text(json.dumps(saved))
    config_keys.check_workdir(tiny_config, tmp_path)
    tiny_config.data.image_size = 64
    with pytest.raises(UserError, match="config.data.image_size=32, not 64"):
        config_keys.check_workdir(tiny_config, tmp_path)
    (tmp_path / "config.json").write_bytes(b"\xff{")
    with pytest.raises(UserError, match="config.json is truncated or not JSON"):
        config_keys.check_workdir(tiny_config, tmp_path)
