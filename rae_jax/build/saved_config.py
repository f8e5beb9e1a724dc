"""Configs in folders of weights: of runs, of rae_jax.convert, and of diffusers."""

import json

from etils import epath
from ml_collections import ConfigDict

from rae_jax.build import published_weights
from rae_jax.errors import UserError

FILE = "config.json"
SHIPPED = epath.Path(__file__).parents[1] / "weights" / "small"  # its config.json holds every key of configs/small.py
_OF_A_MODEL = ("name", "dtype", "unroll", "encoder", "decoder", "statistics", "dit", "sampler", "guidance")


def read(folder):
    """Return the config of the weights in a folder; missing keys have the values of configs/small.py.

    Raises UserError if the folder has no config, or no config of an autoencoder or a DiT.
    """
    path = epath.Path(folder) / FILE
    if not path.exists():
        raise UserError(f"{folder} has no {FILE}: name a run's workdir, or a folder that rae_jax.convert wrote")
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is truncated or not JSON ({error}): download or write it again") from error
    if "_class_name" in found:
        found = published_weights.of_diffusers(found)
    elif "encoder" not in found and "dit" not in found:
        raise UserError(f"{path} describes neither an autoencoder nor a DiT: name another folder")
    return complete(found)


def complete(found):
    """Return a config with every key from a nested dict that may lack keys."""
    return ConfigDict(_merged(json.loads((SHIPPED / FILE).read_text()), found))


def write(config, folder, parts):
    """Write the config's keys of models, without data paths and training, for a folder that holds `parts`.

    A part that the run trained and the folder lacks gets weights='': the run's initial weights must not replace it.
    """
    plain = json.loads(config.to_json())
    kept = {key: _without_training(plain[key]) for key in _OF_A_MODEL if key in plain}
    for part in set(config.stages) - set(parts):
        if part in kept:
            kept[part]["weights"] = ""
    kept["data"] = {key: plain["data"][key] for key in ("image_size", "num_classes")}
    path = epath.Path(folder) / FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**kept, "stages": []}, indent=2) + "\n")


def _without_training(section):
    return {k: v for k, v in section.items() if k != "train"} if isinstance(section, dict) else section


def _merged(base, over):
    """Return `base` with the values of `over` at every depth. Lists become tuples, as in configs."""
    merged = dict(base)
    for key, value in over.items():
        inside = isinstance(value, dict) and isinstance(base.get(key), dict)
        merged[key] = _merged(base[key], value) if inside else value
    return {key: _with_tuples(value) for key, value in merged.items()}


def _with_tuples(value):
    if isinstance(value, dict):
        return {key: _with_tuples(inner) for key, inner in value.items()}
    return tuple(value) if isinstance(value, list) else value
