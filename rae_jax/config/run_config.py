"""The config.json of a run: written, read, and compared with the config of a command."""

import json

from etils import epath
from ml_collections import ConfigDict, FieldReference

from rae_jax.config import scopes
from rae_jax.config.keys import flatten
from rae_jax.errors import UserError
from rae_jax.runtime import atomic_files, processes

FILE = "config.json"
INPUTS = "inputs.json"  # see inputs
# {section: {key that is younger than some runs: value with which they compute what they computed}}, where it is another
# value than in configs/small.py.
_BEFORE = {"few_step": {"balance": 1.0}}
SHIPPED = epath.Path(__file__).parents[1] / "weights" / "small"  # its config.json holds every key of configs/small.py


def save(config, workdir):
    """Write config.json, in the first process. Raises UserError if the workdir cannot be written."""
    if not processes.is_first():
        return
    folder = epath.Path(workdir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        atomic_files.write_text(folder / FILE, json.dumps(json.loads(config.to_json()), indent=2) + "\n")
    except OSError as error:
        raise UserError(
            f"cannot write to --workdir={workdir} ({atomic_files.reason(error)}): choose a folder that you may write to"
        ) from error


def read_json(path):
    """Return the nested dict in a config.json. Raises UserError if the file is damaged."""
    path = epath.Path(path)
    try:
        return dict(json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} is truncated or not JSON ({error}): restore it, or name another folder") from error


def read(workdir):
    """Return the config of the run in a folder. Raises UserError if the folder's config.json is not a run's."""
    folder = epath.Path(workdir)
    found = read_json(folder / FILE)
    weights = any(folder.glob("*.safetensors")) and not (folder / "checkpoints").exists()
    if weights or not {"encoder", "dit", "stages"} <= found.keys():
        kind = "weights" if weights else "the config.json of another program"
        raise UserError(f"{folder} holds {kind}, not a run: name a config by --config")
    return complete(found)


def complete(found):
    """Return the config with the values of a nested dict; keys that the dict lacks have the values of configs/small.py.

    A key that is younger than a run has a value with which the run computes what it computed (_BEFORE).
    """
    whole = _merged(json.loads((SHIPPED / FILE).read_text()), _with_younger_keys(found))
    return ConfigDict({**whole, "unroll": FieldReference(whole["unroll"], field_type=object)})  # True, False or 'auto'


def check(config, workdir, *results):
    """Raise UserError if `workdir` holds a run of another config, as far as the results (see scopes) depend on it.

    A key that is not in the run's config.json was added by a later version of this package: the run accepts any value,
    except for a key of _BEFORE, whose value there is the run's. Places of data and weights may differ if the workdir
    has inputs.json: training images and frozen weights are then compared (see inputs); config.data.heldout_path and
    config.STAGE.train.init are not.
    """
    workdir = epath.Path(workdir)
    path = workdir / FILE
    if not path.exists() or not (workdir / "checkpoints").exists():
        return
    ours, theirs = flatten(json.loads(config.to_json())), flatten(_with_younger_keys(read_json(path)))
    recorded = (workdir / INPUTS).exists()
    for key, value in sorted(scopes.select(theirs, *results).items()):
        if ours.get(key) == value or key.removesuffix(".weights") in config.stages:
            continue
        is_place = scopes.PLACES.fullmatch(key) and bool(ours.get(key)) == bool(value)
        if not (recorded and (is_place or scopes.WEIGHTS.fullmatch(key))):
            raise UserError(
                f"{workdir} holds a run with config.{key}={value!r}, not {ours.get(key)!r}: "
                f"use another --workdir, or set the key back"
            )


def _with_younger_keys(found):
    """Return the nested dict of a config.json with the keys of _BEFORE, in the sections that it has."""
    sections = {name: keys for name, keys in _BEFORE.items() if isinstance(found.get(name), dict)}
    return {**found, **{name: {**keys, **found[name]} for name, keys in sections.items()}}


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
