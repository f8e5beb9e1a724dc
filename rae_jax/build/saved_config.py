"""Configs in folders of weights: of runs, of rae_jax.convert, and of diffusers."""

import json
import os

from etils import epath
from flax import traverse_util

from rae_jax.build import published_weights
from rae_jax.config import keys, run_config, scopes
from rae_jax.errors import UserError
from rae_jax.weights import safetensors_tree


def folder_of(weights, part):
    """Return the folder that a value of a key `weights` names; of a file PART.safetensors of ours, its folder."""
    if weights == "small":
        return run_config.SHIPPED
    path = epath.Path(os.path.expanduser(weights))
    ours = path.name == f"{part}.safetensors" and "://" not in weights and safetensors_tree.is_tree(path)
    return path.parent if ours else path


def read(folder):
    """Return the config of the weights in a folder; missing keys have the values of configs/small.py.

    Raises UserError if the folder has no config, or no config of an autoencoder or a DiT.
    """
    return run_config.complete(read_nested(folder))


def read_nested(folder):
    """Return the keys that the config in a folder has, as nested dicts; otherwise as `read`."""
    path = epath.Path(folder) / run_config.FILE
    if not path.exists():
        raise UserError(
            f"{folder} has no {run_config.FILE}: name a run's workdir, or a folder that rae_jax.convert wrote"
        )
    found = run_config.read_json(path)
    if "_class_name" in found:
        found = published_weights.of_diffusers(found)
    elif "encoder" not in found and "dit" not in found:
        raise UserError(f"{path} describes neither an autoencoder nor a DiT: name another folder")
    return found


def write(config, folder, parts):
    """Write the config's keys of models, without data paths and training, for a folder that holds `parts`.

    A part that the run trained and the folder lacks gets weights='': the run's initial weights must not replace it.
    """
    flat = keys.flatten(json.loads(config.to_json()))
    kept = {key: flat[key] for key in flat if key in ("name", "unroll") or key.endswith(".weights")}
    kept.update({f"{part}.weights": "" for part in set(config.stages) - set(parts)})
    kept.update(scopes.select(flat, scopes.SAMPLES, scopes.LATENTS))
    path = epath.Path(folder) / run_config.FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**traverse_util.unflatten_dict(kept, sep="."), "stages": []}, indent=2) + "\n")
