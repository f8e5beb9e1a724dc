"""Stages, sizes and counts of a config; and the config.json of a workdir."""

import json

from etils import epath

from rae_jax.errors import UserError
from rae_jax.runtime import atomic_files, processes

STAGES = ("encoder", "judge", "decoder", "statistics", "dit")
ATTENTION_PLATFORMS = {"cudnn": "gpu", "flash": "tpu"}  # kinds of attention that one platform has
TRAINED = ("encoder", "judge", "decoder", "dit")

# A run may be resumed with other values of these keys: no trained weights depend on them.
FREE_KEYS = (
    *("name", "log_every", "wandb", "checkpoint", "health", "mesh"),
    *("unroll", "remat", "attention", "compilation_cache"),
    *("sampler", "guidance", "evaluate", "data.num_threads", "data.num_workers", "dit.average"),
    "dit.train.microbatches",
    "data.on_error",  # with 'stop', a run that exists has read all images so far
)

_COUNTS = ("num_steps", "warmup_steps", "decay_start", "discriminator_start", "adversarial_start")  # by `train.unit`


def check_workdir(config, workdir):
    """Raise UserError if `workdir` holds the run of another config; nothing is written.

    A key that is not in the run's config.json was added by a later version of this package: the run accepts any value.
    """
    path = epath.Path(workdir) / "config.json"
    if not path.exists() or not (epath.Path(workdir) / "checkpoints").exists():
        return
    try:
        theirs = flatten(json.loads(path.read_text()))
    except ValueError as error:
        raise UserError(f"{path} is truncated or not JSON ({error}): restore it, or use another --workdir") from error
    ours = flatten(json.loads(config.to_json()))
    only_measured = () if "decoder" in config.stages else ("lpips",)
    for key in sorted(theirs):
        free = is_free(key) or key.split(".")[0] in only_measured
        if not free and ours.get(key) != theirs[key]:
            raise UserError(
                f"{workdir} holds a run with config.{key}={theirs[key]!r}, not {ours.get(key)!r}: "
                f"use another --workdir, or set the key back"
            )


def is_free(key):
    """Return True if no trained weights depend on a key."""
    return any(key == name or key.startswith(f"{name}.") for name in FREE_KEYS)


def save(config, workdir):
    """Write config.json, in the first process. Raises UserError if the workdir cannot be written."""
    if not processes.is_first():
        return
    folder = epath.Path(workdir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        atomic_files.write_text(folder / "config.json", json.dumps(json.loads(config.to_json()), indent=2) + "\n")
    except OSError as error:
        raise UserError(
            f"cannot write to --workdir={workdir} ({atomic_files.reason(error)}): choose a folder that you may write to"
        ) from error


def section(config, part):
    """Return the section of a config that describes a part of the weights."""
    match part:
        case "backbone":
            return config.discriminator.backbone
        case "guide":
            return config.guidance.dit
        case _:
            return config[part]


def input_size(config, section):
    """Return the size in pixels of the images that the encoder or backbone of a section gets."""
    return section.input_size or config.data.image_size


def is_vae(config):
    """Return whether the autoencoder is Stable Diffusion's VAE, whose decoder is not trained here."""
    return config.encoder.family == "sd_vae"


def fewest_steps(config):
    """Return the smallest config.sampler.num_steps: the published grid counts points, two of which make one step."""
    return 2 if config.sampler.grid == "published" else 1


def encoder_input_size(config):
    """Return the size in pixels of the images that the encoder gets."""
    return input_size(config, config.encoder)


def in_steps(config, stage, num_images):
    """Return the config with the counts of a stage's training in steps.

    The steps of an epoch are the whole batches in `num_images`.
    """
    config = config.copy_and_resolve_references()
    train = config[stage].train
    if train.unit == "epoch":
        counts = {key: train[key] * (num_images // train.batch_size) for key in _COUNTS if key in train}
        train.update({**counts, "unit": "step"})
    return config


def latent_shape(config):
    """Return (h, w, D), the shape of the latent of one image."""
    side = encoder_input_size(config) // config.encoder.patch_size
    return side, side, config.encoder.width


def flatten(tree, prefix=""):
    """Return nested dicts as {'a.b': value}."""
    flat = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat
