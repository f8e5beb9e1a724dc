"""Construction of the stages of a run from the config, for the training loop."""

import json
import zlib

import numpy as np

from rae_jax.build import data, fine_tuning, objectives, part_weights, provenance
from rae_jax.config import scopes
from rae_jax.config.keys import GENERATORS, flatten, in_steps
from rae_jax.data import pipeline
from rae_jax.errors import UserError
from rae_jax.runtime import sharding
from rae_jax.training.loop import Stage
from rae_jax.weights import safetensors_tree

# Number of the random stream of stages whose runs exist; any other stage has the number _stream computes from its name.
_STREAMS = {"encoder": 0, "judge": 1, "decoder": 2, "statistics": 3, "dit": 4}


def stage(config, name, workdir, mesh):
    """Return the `Stage` of this name; it loads the weights of earlier stages."""
    images = _training_source(config, name, mesh)
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
                f"config.{name}.train.batch_size={batch_size} is more than the number of training images, "
                f"{len(images)}: lower it"
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
    frozen = part_weights.frozen(config, name, lambda part: _load_frozen(config, part, workdir, mesh))
    for part in frozen if "encoder" in frozen else ():
        provenance.check_encoder(config, part, frozen["encoder"])
    init, step = objectives.init_and_step(config, name)
    begin = None if name == "statistics" else fine_tuning.begin(config, name, mesh, images.class_names, frozen)
    return Stage(name, init, step, frozen, batches, batch_size, num_steps, begin)


def _training_source(config, name, mesh):
    if name in GENERATORS and config.data.latents:
        return packed_latents(config, mesh)
    return data.source(config, "train", crop="centre" if name == "statistics" else config[name].train.crop)


def packed_latents(config, mesh):
    """Return the source of config.data.latents. Raises UserError if the config's encoder makes other latents."""
    return data.packed_latents(config, latent_form(config, part_weights.load(config, "encoder", None, mesh)))


def latent_form(config, encoder_params):
    """Return the JSON values that latents depend on, by name: keys of the config, and a digest of the weights."""
    keys = scopes.select(flatten(json.loads(config.to_json())), scopes.LATENTS)
    return {
        **{f"config.{key}": value for key, value in keys.items()},
        "the encoder's weights": safetensors_tree.digest(encoder_params),
    }


def stage_seed(config, name):
    """Return a stage's own seed, so that no two stages draw the same random numbers."""
    return int(np.random.SeedSequence((config.seed, _stream(name))).generate_state(1)[0])


def _stream(name):
    return _STREAMS.get(name, zlib.crc32(name.encode()))


def sign_of_best(checkpoint):
    """Return the sign that turns a metric into a score (higher is better), from the section config.checkpoint."""
    match checkpoint.best_is:
        case "highest":
            return 1.0
        case "lowest":
            return -1.0
        case other:
            raise ValueError(f"unknown order of metrics {other!r}")


def _load_frozen(config, part, workdir, mesh):
    """Load a frozen part. Raises UserError, which says how to train without the part if this is possible."""
    train = config.decoder.train
    match part:
        case "lpips":
            found = part_weights.load(config, "lpips", workdir, mesh)
            if found is None:
                raise UserError(
                    f"config.decoder.train.lpips_weight={train.lpips_weight} needs config.lpips.vgg and .linear: "
                    f"set both to LPIPS' weights, or train without it: --config.decoder.train.lpips_weight=0"
                )
            return found
        case "backbone":
            try:
                return part_weights.load(config, "backbone", workdir, mesh)
            except UserError as error:
                raise UserError(
                    f"{error}; or train without a discriminator: --config.decoder.train.adversarial_weight=0"
                ) from error
        case _:
            return part_weights.load(config, part, workdir, mesh)
