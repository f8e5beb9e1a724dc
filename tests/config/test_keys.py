"""Steps of epochs."""

import importlib

from conftest import tiny

from rae_jax.config import keys as config_keys


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
