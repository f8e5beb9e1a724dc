"""The parts of a run: the stages that train them, and their weights, wherever those come from."""

import json

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from rae_jax.build import models, perceptual_networks, published_weights
from rae_jax.config.keys import flatten, in_steps, input_size, latent_shape, section
from rae_jax.data import pipeline
from rae_jax.errors import UserError
from rae_jax.runtime import checkpoint, sharding
from rae_jax.training import statistics
from rae_jax.training.loop import Stage
from rae_jax.weights import safetensors_tree

SHIPPED = epath.Path(__file__).parents[1] / "weights" / "small"


def stage(config, name, workdir, mesh):
    """Everything the loop needs to run stage `name`; weights of earlier stages are loaded here."""
    from_latents = name == "dit" and config.data.latents
    if from_latents:
        images = packed_latents(config, mesh)
    else:
        images = models.source(config, "train", crop="centre" if name == "statistics" else config[name].train.crop)
    reading = {key: config.data[key] for key in ("num_threads", "num_workers", "on_error")}
    if name == "statistics":
        batch_size = config.statistics.batch_size
        num_steps = pipeline.num_batches(images, batch_size)
        rows = sharding.local_rows(batch_size, mesh)
        batches = pipeline.one_pass(images, batch_size=batch_size, rows=rows, **reading)
    else:
        batch_size = config[name].train.batch_size
        if len(images) < batch_size:
            raise UserError(
                f"config.{name}.train.batch_size={batch_size} is more than the {len(images)} training images: lower it"
            )
        config = in_steps(config, name, len(images))
        train = config[name].train
        num_steps = train.num_steps
        batches = pipeline.training_batches(
            images,
            batch_size=batch_size,
            seed=stage_seed(config, name),
            random_crop=train.crop == "random",
            flip=train.flip,
            rows=sharding.local_rows(batch_size, mesh),
            **reading,
        )
    frozen = {part: load(config, part, workdir, mesh) for part in frozen_parts(config, name)}
    if name == "decoder":
        frozen.update(_opponents(config, frozen["encoder"], workdir, mesh))
    init, step = models.init_and_step(config, name)
    return Stage(name, init, step, frozen, batches, batch_size, num_steps)


def packed_latents(config, mesh):
    """The source of config.data.latents. Raises UserError where the config's encoder would make other ones."""
    return models.packed_latents(config, latent_form(config, load(config, "encoder", "", mesh)))


def latent_form(config, encoder_params):
    """What latents depend on, by name, as JSON has it: keys of the config, and the weights themselves."""
    encoder = {key: value for key, value in config.encoder.to_dict().items() if key not in ("weights", "train")}
    keys = {"encoder": encoder, "data": {"image_size": config.data.image_size}, "dtype": config.dtype}
    form = {**flatten(keys, "config."), "the encoder's weights": safetensors_tree.digest(encoder_params)}
    return json.loads(json.dumps(form))


def _opponents(config, encoder_params, workdir, mesh):
    """What is frozen of the decoder's losses that have a weight. Raises UserError that says how to do without."""
    train, backbone = config.decoder.train, config.discriminator.backbone
    found = {}
    if train.lpips_weight:
        found["lpips"] = perceptual_networks.load(config, "lpips", mesh)
        if found["lpips"] is None:
            raise UserError(
                f"config.decoder.train.lpips_weight={train.lpips_weight} needs config.lpips.vgg and .linear: "
                f"name LPIPS' weights, or train without: --config.decoder.train.lpips_weight=0"
            )
    if not train.adversarial_weight:
        return found
    if backbone.family == "encoder":
        return {**found, "backbone": encoder_params}
    try:
        return {**found, "backbone": load(config, "backbone", workdir, mesh)}
    except UserError as error:
        raise UserError(
            f"config.discriminator.backbone.weights={backbone.weights!r}: {error}; or train without a discriminator: "
            f"--config.decoder.train.adversarial_weight=0"
        ) from error


# What each stage needs of earlier ones.
FROZEN = {
    "encoder": (),
    "judge": (),
    "decoder": ("encoder",),
    "statistics": ("encoder",),
    "dit": ("encoder", "statistics"),
}


def frozen_parts(config, name):
    """Those of FROZEN that a stage's step takes: no encoder, where it reads packed latents."""
    from_latents = name == "dit" and config.data.latents
    return [part for part in FROZEN[name] if not (from_latents and part == "encoder")]


def stage_seed(config, name):
    """A stage's own seed, so that no two stages share their randomness."""
    stream = tuple(FROZEN).index(name)
    return int(np.random.SeedSequence((config.seed, stream)).generate_state(1)[0])


def load(config, name, workdir, mesh, step=None):
    """Weights of one part, on the devices: trained in `workdir` if its stage belongs to the run, else config's.

    Config names ours ('small' or a folder that holds PART.safetensors) or published ones (see published.load). `step`
    picks a checkpoint of the last stage of the run. Raises UserError where there are none. The networks that judge
    images (perceptual_networks.PARTS) are always the published ones.
    """
    if name in perceptual_networks.PARTS:
        return perceptual_networks.load(config, name, mesh)
    folder = epath.Path(workdir) / "checkpoints" / name
    if name in config.stages and _has_checkpoints(config, workdir):
        found = checkpoint.latest_step(folder) if step is None or name != config.stages[-1] else step
        if found is None:
            raise UserError(f"{workdir} has no checkpoint of stage {name!r} yet: train it first (--mode=train)")
        return _from_checkpoint(config, name, folder, found, mesh)
    weights = section(config, name).weights
    if name == "statistics" and weights == "none":
        return None
    if not weights:
        raise UserError(f"config.{name}.weights is empty: train that part first, or name weights that are there")
    path = (SHIPPED if weights == "small" else epath.Path(weights)) / f"{name}.safetensors"
    shapes = part_shapes(config, name)
    placed = sharding.shardings(shapes, mesh)
    if path.exists() or "://" in weights or not published_weights.tables_of(config, name):
        return jax.device_put(safetensors_tree.read(path, shapes), placed)
    params = published_weights.load(config, name, shapes, placed)
    return _without_key_bias(params) if name == "backbone" else params


def _without_key_bias(params):
    """The published discriminator's backbone has none: it would move all logits of a query alike."""
    attention = params["blocks"]["attention"]
    query, key, value = jnp.split(attention["qkv"]["bias"], 3, -1)
    attention["qkv"]["bias"] = jnp.concatenate([query, jnp.zeros_like(key), value], -1)
    return params


def load_guide(config, mesh):
    """Weights of AutoGuidance's weak model."""
    return load(guide_config(config), "dit", "", mesh)


def guide_config(config):
    """A config whose DiT is the weak model that config.guidance.dit describes, trained elsewhere."""
    with config.unlocked():  # so that the copy is, too
        weak = config.copy_and_resolve_references()
        weak.dit.update(config.guidance.dit)
        weak.stages = ()
    return weak


def part_shapes(config, name):
    """Shapes of a part's weights as they are exported."""
    if name in ("encoder", "backbone"):
        e = section(config, name)
        image = jnp.zeros((1, *[input_size(config, e)] * 2, 3))
        return jax.eval_shape(models.encoder(config, e).init, jax.random.key(0), image)["params"]
    if name == "decoder":  # whoever cannot train it, for want of a discriminator, may use it
        latents = jnp.zeros((1, *latent_shape(config)))
        return jax.eval_shape(models.autoencoder(config).decoder.init, jax.random.key(0), latents)["params"]
    return jax.eval_shape(used(config, name), _state_shapes(config, name))


def _state_shapes(config, name):
    return jax.eval_shape(models.init_and_step(config, name)[0], jax.random.key(0))


def used(config, name):
    """Function that takes the weights that others use out of a stage's state."""
    match name:
        case "statistics":
            return statistics.statistics
        case "encoder":
            return lambda state: state["ema_params"]["encoder"]
        case "dit" if config.dit.average:
            return lambda state: state["more_ema_params"][config.dit.average - 1]
        case _:
            return lambda state: state["ema_params"]


def _from_checkpoint(config, name, folder, step, mesh):
    shapes = _state_shapes(config, name)
    averages = {key: shapes[key] for key in ("ema_params", "more_ema_params") if key in shapes}
    wanted = averages or shapes  # statistics have none
    restored = checkpoint.restore_entries(folder, step, sharding.abstract(wanted, mesh))  # a damaged one is said first
    if name == "statistics":
        _refuse_some_of(folder, step)
    return jax.jit(used(config, name))(restored)


def _refuse_some_of(folder, step):
    """Statistics of the first images alone are those of the first classes."""
    at = checkpoint.position(folder, step)
    seen = None if at is None else at["position"] * at["batch_size"]
    if seen is not None and seen < at["num_images"]:
        raise UserError(
            f"{folder} holds statistics of {seen} of the {at['num_images']} images: end that stage (--mode=train)"
        )


def _has_checkpoints(config, workdir):
    return any(checkpoint.latest_step(epath.Path(workdir) / "checkpoints" / s) is not None for s in config.stages)
