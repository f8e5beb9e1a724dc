"""Evaluation in training: missing weights, the weights that are evaluated, and the best checkpoint."""

import types

import jax.numpy as jnp
import pytest
from conftest import tiny
from etils import epath
from stress import toy_stage

from rae_jax.cli import train
from rae_jax.errors import UserError
from rae_jax.runtime import checkpoint_reader, sharding

FD = (9.0, 3.0, 7.0, 12.0, 8.0)  # of the first, second, ... evaluation


def _part(number):
    return {"kernel": jnp.full(2, float(number))}


class _Evaluator:
    """Keeps the weights that it is given, and returns the metrics above."""

    def __init__(self):
        self.seen = []

    def weights(self, parts):
        self.seen.append(parts)
        return {"fd": FD[len(self.seen) - 1], "psnr": 20.0}, {}


def _evaluate(config, stage, evaluator):
    """The function that the loop calls, for a stage that has all the weights it needs."""
    frozen = {name: _part(number) for number, name in enumerate(("encoder", "judge", "decoder", "statistics"), 10)}
    stage = types.SimpleNamespace(name=stage, frozen=frozen)
    return train.evaluate_in_training(config, stage, epath.Path("not written"), None, evaluator)


@pytest.mark.parametrize("stage, average, expected", [("decoder", 0, 2), ("dit", 0, 2), ("dit", 1, 3), ("dit", 2, 4)])
def test_in_training_averaged_weights_are_evaluated(tiny_config, stage, average, expected):
    """config.dit.average names them; the other parts are the weights of earlier stages."""
    tiny_config.dit.average, evaluator = average, _Evaluator()
    state = {"params": _part(1), "ema_params": _part(2), "more_ema_params": (_part(3), _part(4))}
    assert _evaluate(tiny_config, stage, evaluator)(state, 6) == {"fd": 9.0, "psnr": 20.0}
    (parts,) = evaluator.seen
    numbers = {name: float(part["kernel"][0]) for name, part in parts.items()}
    before = {"encoder": 10} if stage == "decoder" else {"encoder": 10, "judge": 11, "decoder": 12, "statistics": 13}
    assert numbers == {**before, stage: expected}


@pytest.mark.parametrize("best_is, best", [("lowest", 2), ("highest", 4)])
def test_the_best_checkpoint_is_kept(tiny_config, tmp_path, best_is, best):
    tiny_config.checkpoint.update({"best": "fd", "best_is": best_is})
    evaluate = _evaluate(tiny_config, "dit", _Evaluator())
    how = {"evaluate": lambda state, step: evaluate({"ema_params": state["ema_params"]}, step), "evaluate_every": 1}
    toy_stage.run(epath.Path(tmp_path), 5, keep=1, scored=True, checkpoint_every=100, **how)
    assert checkpoint_reader.steps(epath.Path(tmp_path) / "checkpoints" / "toy") == [best, 5]


@pytest.mark.parametrize("missing", ["decoder.weights", "guidance.dit.weights"])
def test_what_the_evaluation_would_miss_is_missed_before_training(tmp_path, missing):
    config = tiny()
    if missing == "decoder.weights":
        config.stages = ("encoder", "judge", "statistics", "dit")
    else:
        config.guidance.method = "autoguidance"
    config.update_from_flattened_dict({missing: str(tmp_path / "nowhere")})
    with pytest.raises(UserError, match=f"config.{missing}='.*nowhere': "):
        train.run(config, epath.Path(tmp_path), sharding.make_mesh(config.mesh), None)
    assert not (tmp_path / "metrics").exists() and not (tmp_path / "checkpoints").exists()
