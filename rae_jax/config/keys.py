"""Stages, sizes and counts of a config; values by key, and the message about a value that cannot work."""

from rae_jax.errors import UserError

STAGES = ("encoder", "judge", "decoder", "statistics", "dit", "few_step")
TRAINED = ("encoder", "judge", "decoder", "dit", "few_step")
GENERATORS = ("dit", "few_step")  # the parts that images are drawn from; their stages may read packed latents

_COUNTS = (
    "num_steps",
    "warmup_steps",
    "decay_start",
    "decay_end",
    "discriminator_start",
    "adversarial_start",
)  # by `train.unit`


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


def generator(config):
    """Return the part that config.sampler draws from: the few-step student or the DiT."""
    return "few_step" if config.sampler.method == "mean_velocity" else "dit"


def drawing_from(config, part):
    """Return the config; if its sampler draws from another part, with one step of the student, or 50 of the DiT."""
    if generator(config) == part:
        return config
    with config.unlocked():
        config = config.copy_and_resolve_references()
    method, num_steps = ("mean_velocity", 1) if part == "few_step" else ("euler", 50)
    config.sampler.update({"method": method, "num_steps": num_steps})
    return config


def fewest_steps(config):
    """Return the smallest config.sampler.num_steps: the published grid counts points, two of which make one step."""
    return 2 if config.sampler.grid == "published" and generator(config) == "dit" else 1


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


def value_of(config, key):
    """Return the value of a key such as 'dit.train.batch_size'."""
    for part in key.split("."):
        config = config[part]
    return config


def require(condition, config, key, fix):
    """Raise UserError that names the key, its value and the fix, unless the condition holds."""
    if not condition:
        raise UserError(f"config.{key}={value_of(config, key)!r} cannot work: {fix}")
