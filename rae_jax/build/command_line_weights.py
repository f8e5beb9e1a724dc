"""Values of an encoder whose weights the command line names: the description of the weights sets them."""

import sys

from etils import epath

from rae_jax.build import encoder_description
from rae_jax.config import run_config
from rae_jax.config.keys import flatten, input_size, value_of
from rae_jax.errors import UserError, prefixed

BACKBONE = "discriminator.backbone"
_GELUS = {"gelu", "gelu_tanh"}
_LIKE_THE_RUN = "name weights like the run's, or use another --workdir"
_KEYS = (  # keys that a description sets, in the order of the checks
    *("family", "widths", "width", "depth", "num_heads", "mlp", "mlp_ratio"),
    *("patch_size", "position_size", "num_registers", "mean", "std"),
)


def complete(config, given, run=None, *, resumed=False):
    """Set the keys that the encoder's and the backbone's weights describe, if their key `weights` is in `given`.

    `given`: the keys of the command line. `run`: a folder that may hold a run; if it has the same weights, its
    config.json has the values, and no description is read. `resumed`: `config` is this config.json. Raises UserError
    for weights that contradict a key of the command line, or a key of the resumed run.
    """
    for name in ("encoder", BACKBONE):
        trained = name == "encoder" and "encoder" in config.stages  # the stage does not use the weights
        if f"{name}.weights" in given and not trained:
            with prefixed(f"config.{name}.weights={value_of(config, name).weights!r}"):
                _complete(config, name, given, run, resumed)


def _complete(config, name, given, run, resumed):
    section = value_of(config, name)
    given = {key for key in section if f"{name}.{key}" in given}
    values = _of_run(run, name, section.weights, resumed)
    if values is None:
        # Weights may be in the hub's cache without their description; their tensors are checked in any case.
        values = encoder_description.read(section.weights, optional=True)
        if values is None:
            return
        if name == BACKBONE and _keeps_its_gelu(section, values, "mlp" in given or resumed):
            values["mlp"] = section.mlp
        for key in [key for key in _KEYS if key in values and (key in given or (resumed and key in section))]:
            fix = f"leave out --config.{name}.{key}"
            _check(config, name, key, values, fix if key in given else _LIKE_THE_RUN)
        if resumed:
            return
        values.setdefault("input_size", _input_size(config, name, values["patch_size"], "patch_size" in given))
    changed = {
        key: values[key] for key in values if key in section and key not in given and section[key] != values[key]
    }
    if changed:
        words = ", ".join(f"{key}={value!r} (not {section[key]!r})" for key, value in changed.items())
        print(f"config.{name}.weights={section.weights!r} sets config.{name}: {words}", file=sys.stderr)
        section.update(changed)


def _of_run(run, name, weights, resumed):
    """Return the values of the section in the config.json of a run; None without a run, or if it has other weights."""
    path = epath.Path(run or "") / run_config.FILE
    if not run or not path.exists() or not (resumed or (path.parent / "checkpoints").exists()):
        return None
    saved = flatten(run_config.read_json(path))
    if saved.get(f"{name}.weights") != weights:
        return None
    found = {key: saved[f"{name}.{key}"] for key in (*_KEYS, "input_size") if f"{name}.{key}" in saved}
    return {key: tuple(value) if isinstance(value, list) else value for key, value in found.items()}


def _keeps_its_gelu(section, values, fixed):
    """Return whether the backbone's kind of GELU stays: the paper's DINO was trained without the tanh and has it."""
    return {section.mlp, values.get("mlp")} == _GELUS and (fixed or section.family == values["family"])


def _check(config, name, key, values, fix):
    """Raise UserError if the value of a key contradicts the description."""
    section = value_of(config, name)
    ours, theirs = section[key], values[key]
    match key:
        case "mlp_ratio":
            same = round(ours * values["width"]) == round(theirs * values["width"])
        case "position_size":
            size = input_size(config, section)
            same = (ours or size) == (theirs or size)
        case _:
            same = ours == theirs
    if not same:
        raise UserError(f"config.{name}.{key}={ours!r} does not fit these weights, which have {theirs!r}: {fix}")


def _input_size(config, name, patch, was_given):
    """Return the input size for a patch size: the config's, unless the patch size forces another one.

    An encoder gives the decoder as many tokens as before. A backbone takes images of any number of patches.
    """
    section, decoder = value_of(config, name), config.decoder
    size = input_size(config, section)
    if name == BACKBONE:
        wanted = max(size // patch, 1) * patch
    elif section.patch_size == patch and not was_given:
        wanted = size
    elif decoder.grid_size or decoder.patch_size <= 0:
        wanted = size // section.patch_size * patch
    else:
        wanted = config.data.image_size // decoder.patch_size * patch
    return section.input_size if wanted == size else wanted
