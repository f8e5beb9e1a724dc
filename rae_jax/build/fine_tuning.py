"""Fine-tuning: the initial parameters of a stage from given weights, config.STAGE.train.init.

Parameters of equal shapes are taken over, rows of labels by class, tables of positions resized. Whatever cannot be
taken over keeps its random initial value and is named in one line.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import traverse_util

from rae_jax.build import part_weights, published_weights, saved_config
from rae_jax.config import inputs, run_config
from rae_jax.config.keys import GENERATORS, latent_shape
from rae_jax.errors import UserError, prefixed
from rae_jax.models import resize
from rae_jax.runtime import checkpoint_reader, logs
from rae_jax.weights import hub

# The parameters of each stage whose shapes depend on latents and pixels: they may have other shapes in the weights.
_ENDS = {
    "encoder": ("patch_embed",),
    "decoder": ("embed", "pred"),
    **dict.fromkeys(
        GENERATORS, ("embed", "head_embed", "trunk_embed", "final_layer/linear", "base_final_layer/linear")
    ),
}
_TABLE, _POSITIONS = "label_embed/table", "pos_embed"
_SHOWN = 8  # classes that the line names


def begin(config, stage, mesh, class_names, frozen):
    """Return the function state -> state by which a stage begins.

    `class_names`: those of the data. `frozen`: the stage's frozen parts; a few-step student starts from its DiT.
    The function raises UserError for weights that do not exist or do not fit.
    """
    source = _init(config, stage)

    def from_dit(state):
        logs.say("few_step: starts from the DiT")
        return _with_params(state, stage, state["params"] | jax.tree.map(jnp.copy, frozen["dit"]))

    def from_weights(state):
        params = _initial(config, stage, mesh, class_names, _params(state, stage))
        return _with_params(state, stage, params)

    def from_random(state):
        if config[stage].weights:
            fix = f"; config.{stage}.train.init names weights to start from" if stage in _ENDS else ""
            logs.say(f"{stage}: starts from random weights, config.{stage}.weights is for runs without this stage{fix}")
        return state

    if source:
        return from_weights
    return from_dit if stage == "few_step" else from_random


def check(config, workdir, mesh):
    """Raise UserError if a stage that has not begun has initial weights that do not exist or do not fit."""
    for stage in config.stages:
        begun = checkpoint_reader.latest_step(epath.Path(workdir) / "checkpoints" / stage) is not None
        if _init(config, stage) and not begun:
            with prefixed(f"config.{stage}.train.init={_init(config, stage)!r}"):
                theirs, given, _ = _given(config, stage, mesh)
                _left_out(stage, _flat(given), _flat(part_weights.shapes(config, stage)))


def _init(config, stage):
    return config[stage].train.init if stage in _ENDS else ""


def _initial(config, stage, mesh, class_names, fresh):
    """Return the parameters of config.STAGE.train.init, with `fresh` ones where they cannot be taken over."""
    source = _init(config, stage)
    with prefixed(f"config.{stage}.train.init={source!r}"):
        theirs, given, names = _given(config, stage, mesh)
        left_out = _left_out(stage, _flat(given), _flat(fresh))
    rows = None
    if stage in GENERATORS:
        rows, new = _rows(theirs, config, names, class_names)
        left_out += new
    left_out += _other_settings(stage, theirs, config)
    known = f"; not taken over: {', '.join(left_out)}" if left_out else ""
    logs.say(f"{stage}: starts from the weights of {source}{known}")
    placed = jax.tree.map(lambda leaf: leaf.sharding, fresh)
    return jax.jit(functools.partial(_merged, stage, rows), out_shardings=placed)(given, fresh)


def _given(config, stage, mesh):
    """Return (config of the weights, weights, names of their classes or None)."""
    theirs, workdir, names = _source(config, stage, _init(config, stage))
    try:
        return theirs, part_weights.load(theirs, stage, workdir, mesh), names
    except UserError as error:
        raise UserError(str(error).removeprefix(f"{part_weights.weights_in_words(theirs, stage)}: ")) from error


def _source(config, stage, source):
    """Return (config of the weights, workdir of their run or None, names of their classes or None)."""
    theirs, workdir, names = _found(config, stage, source)
    theirs.attention = "xla"  # no attention is computed, and the run's may be for another machine
    return theirs, workdir, names


def _found(config, stage, source):
    folder = saved_config.folder_of(source, stage)
    if not (folder / run_config.FILE).exists():
        return _described_by_file(config, stage, source), None, None
    theirs = saved_config.read(folder)
    names = inputs.read(folder).get("data", {}).get("class_names")
    if part_weights.has_checkpoints(theirs, folder) and stage in theirs.stages:
        return theirs, folder, names
    theirs.stages = ()
    if (folder / f"{stage}.safetensors").exists() or (folder / hub.DIFFUSERS).exists():
        theirs[stage].weights = str(folder)
    return theirs, None, names


def _described_by_file(config, stage, source):
    """Return the config with the sizes that the shapes in a file tell: classes, positions, patches."""
    theirs = part_weights.untrained(config)
    theirs[stage].weights = source
    shapes = _shapes_in_file(theirs, stage, source)
    if stage in GENERATORS and _TABLE in shapes:
        theirs.dit.class_conditional = shapes[_TABLE][0] > 1
        theirs.data.num_classes = max(shapes[_TABLE][0] - 1, 1)
    if stage in GENERATORS and _POSITIONS in shapes:
        side = math.isqrt(shapes[_POSITIONS][1]) * theirs.dit.patch_size
        theirs.encoder.input_size = side * theirs.encoder.patch_size
    if stage == "encoder" and _POSITIONS in shapes:
        side = math.isqrt(math.prod(shapes[_POSITIONS][:-1]))  # with or without the row of the class token
        theirs.encoder.position_size = side * theirs.encoder.patch_size
    if stage == "decoder" and "pred/bias" in shapes:
        theirs.decoder.patch_size = math.isqrt(shapes["pred/bias"][0] // 3)
    if stage == "decoder" and "decoder_pos_embed" in shapes:
        side = math.isqrt(shapes["decoder_pos_embed"][1] - 1)
        theirs.encoder.input_size = side * theirs.encoder.patch_size
        theirs.data.image_size = side * theirs.decoder.patch_size
    return theirs


def _shapes_in_file(config, stage, source):
    """Return {our path, or the file's own name: shape} of the tensors in a file."""
    path = saved_config.folder_of(source, stage) / f"{stage}.safetensors"
    if path.exists():
        return {name: tensor.shape for name, tensor in hub.open_checkpoint(str(path)).items()}
    found = {}
    tensors = hub.open_checkpoint(source)
    for table in published_weights.tables_of(config, stage):
        short = {name.removeprefix(table.prefix): tensor.shape for name, tensor in tensors.items()}
        ours = {names[0]: path for path, (_, *names) in table.leaves.items()}
        found.update({ours.get(name, name): shape for name, shape in short.items()})
    return found


def _rows(theirs, ours, their_names, our_names):
    """Return (the row of their table of labels for each row of ours, what is not taken over).

    Classes match by name if both sides have names, otherwise by number. Classes without a match, and the null label,
    get the row of their null label.
    """
    null = theirs.data.num_classes if theirs.dit.class_conditional else 0
    names = our_names if ours.dit.class_conditional else ()
    if their_names is not None:
        numbers = {name: number for number, name in enumerate(their_names[:null])}
        rows = [numbers.get(name, null) for name in names]
    else:
        rows = [min(number, null) for number in range(len(names))]
    new = [str(name) for name, row in zip(names, rows, strict=True) if row == null]
    shown = ", ".join(new[:_SHOWN]) + (", ..." if len(new) > _SHOWN else "")
    left_out = [f"{len(new)} of {len(names)} classes, which start as the null label ({shown})"] if new else []
    return np.array([*rows, null]), left_out


def _flat(tree):
    return traverse_util.flatten_dict(tree, sep="/")


def _left_out(stage, given, wanted):
    """Return the paths of parameters that stay random. Raises UserError for weights of another model."""
    for path in sorted(given.keys() ^ wanted.keys()):
        kind = "lack" if path in wanted else "have"
        raise UserError(f"these weights {kind} {path!r}: they are of another model than config.{stage}")
    other = [path for path in wanted if given[path].shape != wanted[path].shape and path not in (_TABLE, _POSITIONS)]
    for path in other:
        if not path.startswith(_ENDS[stage]):
            shapes = given[path].shape, wanted[path].shape
            raise UserError(f"{path!r} has shape {shapes[0]} in these weights, and {shapes[1]} by config.{stage}")
    return other


def _merged(stage, rows, given, fresh):
    """Return the given parameters where they fit, otherwise the fresh ones; pure."""
    given, merged = _flat(given), dict(_flat(fresh))
    for path, leaf in merged.items():
        if path == _TABLE:
            merged[path] = given[path][rows]
        elif path == _POSITIONS and given[path].shape != leaf.shape:
            merged[path] = _resized(given[path], leaf.shape)
        elif given[path].shape == leaf.shape:
            merged[path] = given[path]
    return traverse_util.unflatten_dict(merged, sep="/")


def _resized(table, shape):
    """Return a table of positions [1, (class token +) N, width] for another grid."""
    first = table.shape[1] - math.isqrt(table.shape[1]) ** 2
    old, new = (math.isqrt(size - first) for size in (table.shape[1], shape[1]))
    patches = table[:, first:].reshape(1, old, old, -1)
    patches = resize.bicubic(patches, new, new).reshape(1, new * new, -1)
    return jnp.concatenate([table[:, :first], patches], 1)


def _other_settings(stage, theirs, ours):
    """Return what the weights were trained with in their run, where this one has something else."""
    keys = ("path", "prediction") if stage in GENERATORS else ()
    found = [f"config.dit.{key}={theirs.dit[key]!r}" for key in keys if theirs.dit[key] != ours.dit[key]]
    if stage != "encoder" and latent_shape(theirs) != latent_shape(ours):
        found.append(f"positions of latents {latent_shape(theirs)}")
    if stage == "encoder":
        found.append("the heads for pixels and classes")
    if stage == "decoder" and ours.decoder.train.adversarial_weight:
        found.append("the discriminator")
    return found


def _params(state, stage):
    return state["params"]["encoder"] if stage == "encoder" else state["params"]


def _with_params(state, stage, params):
    """Return the state with other parameters, and all averages equal to them."""
    params = {**state["params"], "encoder": params} if stage == "encoder" else params
    averages = {"ema_params": jax.tree.map(jnp.copy, params)}
    if "more_ema_params" in state:
        averages["more_ema_params"] = [jax.tree.map(jnp.copy, params) for _ in state["more_ema_params"]]
    return {**state, "params": params, **averages}
