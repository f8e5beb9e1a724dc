"""Weights of the parts of a run, from its checkpoints, the package, a folder or the hub.

A part is the model that one stage trains (keys.STAGES), 'guide' (AutoGuidance's weaker model), 'backbone' (the
discriminator's), or a network of perceptual_networks.PARTS.
"""

import jax
import jax.numpy as jnp
from etils import epath

from rae_jax.build import models, objectives, perceptual_networks, provenance, published_weights, saved_config
from rae_jax.config.keys import GENERATORS, generator, input_size, latent_shape, section
from rae_jax.errors import UserError
from rae_jax.runtime import checkpoint_reader, sharding
from rae_jax.training import statistics
from rae_jax.weights import safetensors_tree

FROZEN = {  # the parts of earlier stages that the step of each stage takes
    "encoder": (),
    "judge": (),
    "decoder": ("encoder",),
    "statistics": ("encoder",),
    "dit": ("encoder", "statistics"),
    "few_step": ("encoder", "statistics", "dit"),
}


def frozen(config, stage, get):
    """Return {part: get(part)} of the frozen parts that a stage's step takes."""
    unencoded = stage in GENERATORS and config.data.latents  # packed latents need no encoder, trajectories no images
    unencoded = unencoded or (stage == "few_step" and config.few_step.objective == "trajectories")
    found = {part: get(part) for part in FROZEN[stage] if not (unencoded and part == "encoder")}
    if stage == "decoder" and config.decoder.train.lpips_weight:
        found["lpips"] = get("lpips")
    if stage == "decoder" and config.decoder.train.adversarial_weight:
        own = config.discriminator.backbone.family != "encoder"
        found["backbone"] = get("backbone") if own else found["encoder"]
    taught = stage == "few_step" and config.few_step.objective != "finetuning"
    if taught and config.few_step.guided and config.guidance.method == "autoguidance":
        found["guide"] = get("guide")
    return found


def parts_of_sampling(config):
    """Return the names of the parts that sampling takes."""
    return ("decoder", "statistics", generator(config), *_guide(config))


def parts_of_evaluation(config):
    """Return the names of the parts that an evaluation takes."""
    return (*_trained_for_evaluation(config), *perceptual_networks.named(config), *_guide(config))


def _trained_for_evaluation(config):
    """Return the stages whose weights an evaluation takes. The judge and the generator are optional."""
    judge = ("judge",) if has_part(config, "judge") else ()
    generates = ("statistics", generator(config)) if has_part(config, generator(config)) else ()
    return ["encoder", *judge, "decoder", *generates]


def _guide(config):
    return ("guide",) if config.guidance.method == "autoguidance" and generator(config) == "dit" else ()


def has_part(config, part):
    """Return whether the run has this part, or will have it after its stages."""
    if part in perceptual_networks.PARTS:
        return part in perceptual_networks.named(config)
    return part in config.stages or bool(config[part].weights)


def load_all(config, parts, workdir, mesh, step=None):
    """Return {part: weights}, each as `load` finds it. Raises UserError for parts that were not made for each other."""
    found = {part: load(config, part, workdir, mesh, step=step) for part in parts}
    for part in found if "encoder" in found else ():
        provenance.check_encoder(config, part, found["encoder"])
    return found


def load(config, part, workdir, mesh, step=None):
    """Return the weights of one part, on the devices; None for statistics if latents are not normalised.

    If `workdir` (None: no run) holds checkpoints, the weights of the run's stages come from there. Otherwise the config
    names them: 'small', a folder with PART.safetensors, 'none' for statistics, or published weights (see
    published_weights.load). `step` selects a checkpoint of the run's last stage. Raises UserError for weights that do
    not exist or do not fit.
    """
    if part in perceptual_networks.PARTS:
        return perceptual_networks.load(config, part, mesh)
    key = _weights_key(part)
    if part == "guide":
        config, part = _guide_config(config), "dit"
    if part in config.stages and has_checkpoints(config, workdir):
        folder = epath.Path(workdir) / "checkpoints" / part
        found = checkpoint_reader.latest_step(folder) if step is None or part != config.stages[-1] else step
        if found is None:
            raise UserError(f"{workdir} has no checkpoint of stage {part!r} yet: train it first (--mode=train)")
        return _from_checkpoint(config, part, folder, found, mesh)
    weights = section(config, part).weights
    if part == "statistics" and weights == "none":
        return None
    if not weights:
        train = "train this part first, or " if key == f"config.{part}.weights" else ""  # no stage trains the others
        raise UserError(f"{key}='' names no weights: {train}set the key to its weights")
    try:
        provenance.check(config, part, weights)
        return _from_files(config, part, weights, mesh)
    except UserError as error:
        if str(error).startswith("config."):  # the message names another key
            raise
        raise UserError(f"{key}={weights!r}: {error}") from error


def weights_in_words(config, part):
    """Return the key and the value that name a part's weights, for messages."""
    if part in perceptual_networks.PARTS:
        return perceptual_networks.weights_in_words(config, part)
    return f"{_weights_key(part)}={section(config, part).weights!r}"


def _weights_key(part):
    place = {"backbone": "discriminator.backbone", "guide": "guidance.dit"}.get(part, part)
    return f"config.{place}.weights"


def shapes_or_none(config, part):
    """Return the shapes of a part's weights after training, or None for statistics that the run leaves out."""
    left_out = part == "statistics" and part not in config.stages and config.statistics.weights == "none"
    return None if left_out else shapes(config, part)


def _from_files(config, part, weights, mesh):
    path = saved_config.folder_of(weights, part) / f"{part}.safetensors"
    tree = shapes(config, part)
    placed = sharding.shardings(tree, mesh)
    if path.exists() or "://" in weights or not published_weights.tables_of(config, part):
        return jax.device_put(safetensors_tree.read(path, tree), placed)
    params = published_weights.load(config, part, tree, placed)
    return _without_key_bias(params) if part == "backbone" else params


def _without_key_bias(params):
    """Return the backbone with zero biases of keys, as published: such a bias shifts all logits of a query alike."""
    attention = params["blocks"]["attention"]
    query, key, value = jnp.split(attention["qkv"]["bias"], 3, -1)
    attention["qkv"]["bias"] = jnp.concatenate([query, jnp.zeros_like(key), value], -1)
    return params


def _guide_config(config):
    """Return a config whose DiT is the weaker model of config.guidance.dit, which another run trained."""
    weak = untrained(config)
    weak.dit.update(config.guidance.dit)
    return weak


def untrained(config):
    """Return an unlocked copy of a config, without stages."""
    with config.unlocked():  # so that the copy is unlocked
        copy = config.copy_and_resolve_references()
    copy.stages = ()
    return copy


def shapes(config, part):
    """Return the tree of shapes of a part's weights."""
    if part in perceptual_networks.PARTS:
        return perceptual_networks.part_shapes(part)
    if part == "guide":
        return shapes(_guide_config(config), "dit")
    if part in ("encoder", "backbone"):
        e = section(config, part)
        image = jnp.zeros((1, *[input_size(config, e)] * 2, 3), jnp.float32)
        return jax.eval_shape(models.encoder(config, e).init, jax.random.key(0), image)["params"]
    if part == "decoder":  # not from its stage, which needs a discriminator
        latents = jnp.zeros((1, *latent_shape(config)), jnp.float32)
        return jax.eval_shape(models.autoencoder(config).decoder.init, jax.random.key(0), latents)["params"]
    return jax.eval_shape(exported(config, part), _state_shapes(config, part))


def _state_shapes(config, stage):
    return jax.eval_shape(objectives.init_and_step(config, stage)[0], jax.random.key(0))


def exported(config, stage):
    """Return the function from a stage's state to the weights that other stages use."""
    match stage:
        case "statistics":
            return statistics.statistics
        case "encoder":
            return lambda state: state["ema_params"]["encoder"]
        case "dit" if config.dit.average:
            return lambda state: state["more_ema_params"][config.dit.average - 1]
        case _:
            return lambda state: state["ema_params"]


def _from_checkpoint(config, stage, folder, step, mesh):
    tree = _state_shapes(config, stage)
    averages = {key: tree[key] for key in ("ema_params", "more_ema_params") if key in tree}
    wanted = averages or tree  # statistics have no averages
    restored = checkpoint_reader.restore_entries(folder, step, sharding.abstract(wanted, mesh))
    if stage == "statistics":
        _refuse_unfinished_statistics(folder, step)
    return jax.jit(exported(config, stage))(restored)


def _refuse_unfinished_statistics(folder, step):
    """Raise UserError for statistics of only the first images, which may hold only the first classes."""
    position = checkpoint_reader.position(folder, step)
    count = None if position is None else position["position"] * position["batch_size"]
    if count is not None and count < position["num_images"]:
        raise UserError(
            f"{folder} holds statistics of {count} of the {position['num_images']} images: "
            f"finish this stage (--mode=train)"
        )


def has_checkpoints(config, workdir):
    """Return whether the workdir holds a checkpoint of any stage of the config; `workdir`: None is no run."""
    return any(is_trained(stage, workdir) for stage in config.stages)


def is_trained(stage, workdir):
    """Return whether the workdir holds a checkpoint of this stage; `workdir`: None is no run."""
    return bool(workdir) and checkpoint_reader.latest_step(epath.Path(workdir) / "checkpoints" / stage) is not None


def check_available(config, mesh):
    """Raise UserError, before training, for weights that the last evaluation needs and that cannot be loaded.

    perceptual_networks.check_available checks LPIPS and Inception. A run without a decoder is not evaluated.
    """
    if not has_part(config, "decoder"):
        return
    for part in (*_trained_for_evaluation(config), *_guide(config)):
        if part not in config.stages:
            try:
                load(config, part, None, mesh)
            except UserError as error:
                optional = part in ("judge", "decoder") and bool(config[part].weights)
                without = f"; or evaluate without it: --config.{part}.weights=''" if optional else ""
                raise UserError(f"{error}{without}") from error


def load_shipped(config, mesh):
    """Return {part: weights} of an evaluation by the config's keys alone, without the run's own checkpoints."""
    shipped = untrained(config)
    return load_all(shipped, parts_of_evaluation(shipped), None, mesh)
