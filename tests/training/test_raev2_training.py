"""Training of RAEv2's network by its recipe: learning, interrupted and resumed, on one device and on eight."""

import pytest
import stage_cases
from conftest import tiny
from etils import epath

STEPS = 6


def _config(folder):
    """A tiny run with all that is RAEv2's: tokens, base output, loss, Muon for all matrices, a decay that ends."""
    config = tiny()
    config.stages, config.encoder.weights, config.statistics.weights = ("dit",), str(folder), "none"
    config.dit.update({"conditioning": "in_context", "depth": 2, "base_depth": 1, "qk_norm": True, "num_heads": 2})
    config.dit.update({"prediction": "data_in_velocity", "time_tokens": 2, "label_tokens": 3})
    config.dit.train.update({"optimizer": "muon_all", "warmup_steps": 0, "decay_start": 2, "decay_end": 4})
    config.dit.train.update({"num_steps": STEPS, "more_ema_decays": (), "learning_rate": 2e-3, "decay": "linear"})
    stage_cases.write_weights(config, folder, ("encoder",), 0.3)
    return config


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(config, rows of metrics, workdir) of a run that nothing interrupts."""
    folder = epath.Path(tmp_path_factory.mktemp("raev2"))
    config = _config(folder)
    return config, stage_cases.train(config, "dit", folder / "whole"), folder / "whole"


def test_the_losses_of_both_outputs_are_logged(whole):
    _, rows, _ = whole
    assert len(rows) == STEPS
    for row in rows:
        assert row["loss"] == pytest.approx(row["full_loss"] + row["base_loss"], rel=1e-6)
    assert rows[-1]["full_loss"] != rows[-1]["base_loss"]  # both outputs begin at zero


def test_a_resumed_run_is_the_same_to_the_last_bit(whole, tmp_path):
    config, rows, workdir = whole
    stage_cases.check_resumed(config, "dit", rows, workdir, epath.Path(tmp_path) / "parts")


@pytest.mark.slow
def test_eight_devices_are_one(whole, tmp_path):
    config, rows, _ = whole
    stage_cases.check_eight_devices(config, "dit", rows, epath.Path(tmp_path) / "eight", 1e-5)
