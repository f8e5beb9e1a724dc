"""Checks of a config, before anything is computed or written.

Each mistake gives one line that names the key, its value and the fix.
"""

import importlib.util
import math

from etils import epath

from rae_jax.config.glossary import RESULTS
from rae_jax.config.keys import STAGES, TRAINED, fewest_steps, input_size, is_vae
from rae_jax.errors import UserError
from rae_jax.runtime import sharding

_PUBLISHED = ("dino", "dinov2", "siglip2", "mae", "dinov3")
_MLPS = ("gelu", "gelu_tanh", "swiglu")
CHOICES = {
    "dtype": ("float32", "bfloat16"),
    "attention": ("xla", "cudnn", "flash"),
    "remat": ("none", "dots", "full"),
    "data.source": ("shapes", "image_folder", "array_record", "tfds"),
    "data.on_error": ("stop", "skip"),
    "checkpoint.best_is": ("lowest", "highest"),
    "checkpoint.on_error": ("continue", "stop"),
    "encoder.family": ("small", *_PUBLISHED, "sd_vae"),
    "encoder.mlp": _MLPS,
    "discriminator.backbone.family": ("encoder", *_PUBLISHED),
    "discriminator.backbone.mlp": _MLPS,
    "discriminator.loss": ("hinge", "vanilla"),
    "dit.path": ("linear", "cosine", "vp"),
    "dit.prediction": ("velocity", "noise", "data"),
    "dit.train.time": ("logit_normal", "uniform"),
    "sampler.method": ("euler", "heun", "adaptive", "sde"),
    "sampler.grid": ("plain", "published"),
    "sampler.diffusion": ("constant", "score_based", "sigma", "linear", "decreasing", "increasing_decreasing"),
    "sampler.last_step": ("mean", "tweedie", "euler", "none"),
    "guidance.method": ("none", "cfg", "autoguidance"),
}
TRAIN_CHOICES = {  # choices in the section `train` of every stage
    **{"unit": ("step", "epoch"), "crop": ("centre", "random")},
    **{"optimizer": ("adamw", "muon"), "decay": ("cosine", "linear")},
}
_NUMBERS = (  # sequences of numbers, of any length
    *("encoder.layers", "encoder.widths", "judge.widths", "discriminator.layers"),
    *("dit.train.more_ema_decays", "sampler.refresh"),
)
_POSITIVE = (
    *(f"{part}.{size}" for part in ("encoder", "decoder", "dit") for size in ("width", "depth", "num_heads")),
    *("encoder.patch_size", "decoder.hidden"),
    *("log_every", "checkpoint.every", "checkpoint.keep"),
    *("data.image_size", "data.num_classes", "data.num_train", "data.num_heldout"),
    *("decoder.patch_size", "dit.patch_size", "guidance.dit.patch_size"),
    *("dit.train.microbatches", "sampler.num_steps", "sampler.reuse", "sampler.rtol", "sampler.atol"),
    *("evaluate.num_images", "evaluate.batch_size", "statistics.batch_size"),
    *("encoder.mlp_ratio", "dit.train.time_std"),
)
_NOT_NEGATIVE = (
    *("encoder.num_registers", "encoder.train.noise_tau", "decoder.train.noise_tau"),
    *("decoder.train.discriminator_start", "decoder.train.adversarial_start"),
)
_FRACTIONS = ("dit.train.label_dropout", "discriminator.augment.prob", "discriminator.augment.cutout")


def check(config, mesh):
    """Raise UserError for the first value that cannot work, on the devices of `mesh`."""
    for key, choices in CHOICES.items():
        _require(_get(config, key) in choices, config, key, f"choose one of {', '.join(choices)}")
    for key in _NUMBERS:
        numbers = all(isinstance(value, int | float) for value in _get(config, key))
        _require(numbers, config, key, "it must hold numbers, such as (0, 2)")
    for name in config.stages:
        _require(name in STAGES, config, "stages", f"choose from {', '.join(STAGES)}")
    _require(tuple(s for s in STAGES if s in config.stages) == tuple(config.stages), config, "stages", _ORDER)
    for key in _POSITIVE:
        _require(_get(config, key) > 0, config, key, "it must be positive")
    for key in _NOT_NEGATIVE:
        _require(_get(config, key) >= 0, config, key, "it must be 0 or more")
    for key in _FRACTIONS:
        _require(0 <= _get(config, key) <= 1, config, key, "it must be between 0 and 1")
    _require(config.seed >= 0, config, "seed", "it must be 0 or more")
    for key in ("data.num_threads", "data.num_workers"):
        _require(_get(config, key) >= 0, config, key, "it must be positive, or 0 for none")
    _require(config.evaluate.every >= 0, config, "evaluate.every", "it must be positive, or 0 for only at the end")
    installed = not config.wandb or importlib.util.find_spec("wandb") is not None
    _require(installed, config, "wandb", "it needs wandb: pip install -e '.[wandb]', or set it to ''")
    for key in ("checkpoint.keep_every", *(f"health.{name}" for name in config.health)):
        _require(_get(config, key) >= 0, config, key, "it must be positive, or 0 for none")
    evaluated = not config.checkpoint.best or config.evaluate.every
    _require(evaluated, config, "checkpoint.best", "it needs evaluations in training: set config.evaluate.every")
    # Probes are computed only at the end.
    metrics = [name for name in RESULTS if name != "seconds" and not name.startswith("probe")]
    known = config.checkpoint.best in ("", *metrics)
    _require(known, config, "checkpoint.best", f"choose one of {', '.join(metrics)}, or ''")
    reference = config.evaluate.reference
    exists = not reference or epath.Path(reference).exists()
    fix = "name an .npz file or a folder of images that exists, or '' for the held-out images"
    _require(exists, config, "evaluate.reference", fix)
    for stage in TRAINED:
        _check_training(config, f"{stage}.train")
    if config.data.latents:
        _check_latents(config)
    both = bool(config.lpips.vgg) == bool(config.lpips.linear)
    _require(both, config, "lpips.linear", f"set it together with config.lpips.vgg={config.lpips.vgg!r}, or neither")
    used = [f"{stage}.train" if stage in TRAINED else stage for stage in config.stages]
    for section in used:  # the batch size of evaluations is rounded to fit
        sharding.check_batch(_get(config, section).batch_size, mesh, f"config.{section}.batch_size")
    if "dit" in config.stages:
        parts, ways = config.dit.train.microbatches, mesh.shape["data"] * mesh.shape["fsdp"]
        batch_size = config.dit.train.batch_size
        fix = f"a microbatch of config.dit.train.batch_size={batch_size} must be divisible by {ways} devices"
        _require(batch_size % (parts * ways) == 0, config, "dit.train.microbatches", fix)
    _check_shapes(config)
    _check_attention(config, mesh.devices.flat[0])


_DIVIDES = "it must divide the latent grid's {}"
_HEAD_DEPTH = "it must be 0 for a plain DiT, or positive"
_DECAYS = "it must be at least 0 and below 1"
_ORDER = f"name each stage at most once, in the order {', '.join(STAGES)}"


def _check_training(config, section):
    train = _get(config, section)
    for key in ("num_steps", "batch_size", "learning_rate", "final_learning_rate"):
        _require(train[key] > 0, config, f"{section}.{key}", "it must be positive")
    for key in ("warmup_steps", "clip_norm", "weight_decay"):
        _require(train[key] >= 0, config, f"{section}.{key}", "it must be positive, or 0 for none")
    _require(train.decay_start >= 0, config, f"{section}.decay_start", "it must be 0 or more")
    for key in ("ema_decay", "b1", "b2"):
        _require(0.0 <= train[key] < 1.0, config, f"{section}.{key}", _DECAYS)
    for key, choices in TRAIN_CHOICES.items():
        _require(train[key] in choices, config, f"{section}.{key}", f"choose one of {', '.join(choices)}")
    drawn = config.data.source == "shapes"
    fix = "images of shapes are drawn at their size: set it to 'centre'"
    _require(not (drawn and train.crop == "random"), config, f"{section}.crop", fix)


def _check_latents(config):
    fixed = "encoder" not in config.stages
    _require(fixed, config, "data.latents", "they are not of the encoder that this run trains: set it to ''")
    centre = config.dit.train.crop == "centre"
    _require(centre, config, "dit.train.crop", "packed latents are of centre crops: set it to 'centre'")


def _check_shapes(config):
    if is_vae(config):
        _check_sd_vae(config)
    size, patch = config.data.image_size, config.encoder.patch_size
    if "encoder" in config.stages:
        _require(config.encoder.family == "small", config, "encoder.family", "the encoder stage trains only 'small'")
        whole = config.encoder.input_size in (0, size)
        _require(whole, config, "encoder.input_size", f"the encoder stage resizes no images: set it to 0 or {size}")
    key = "encoder.input_size" if config.encoder.input_size else "data.image_size"
    multiple = f"it must be a multiple of config.encoder.patch_size={patch}"
    _require(_get(config, key) > 0 and _get(config, key) % patch == 0, config, key, multiple)
    grid = _get(config, key) // patch
    tokens = config.decoder.grid_size or grid
    _require(size % tokens == 0, config, "data.image_size", f"it must be a multiple of the decoder's {tokens} tokens")
    _require(
        config.decoder.patch_size * tokens == size,
        config,
        "decoder.patch_size",
        f"set it to {size // tokens}, for {size} px images from {tokens}x{tokens} tokens",
    )
    widths = [
        ("encoder", "width", "num_heads", 1),
        ("decoder", "width", "num_heads", 1),
        ("dit", "width", "num_heads", 4),  # rotary embedding rotates pairs of channels along two axes
    ]
    for key in ("mean", "std"):
        colours = config.encoder[key]
        whole = len(colours) == 3 and (key == "mean" or all(colour > 0 for colour in colours))
        _require(whole, config, f"encoder.{key}", "it must hold three numbers, and each std must be positive")
    groups = len(config.judge.widths) > 0 and all(width > 0 and width % 8 == 0 for width in config.judge.widths)
    _require(groups, config, "judge.widths", "each width must be a multiple of the 8 groups of its norm")
    dits = ["dit"]
    if config.guidance.method == "autoguidance":
        dits.append("guidance.dit")
        widths.append(("guidance.dit", "width", "num_heads", 4))
    for section in dits:
        sizes = (
            "width",
            "depth",
            "num_heads",
            *(("head_width", "head_num_heads") if _get(config, section).head_depth else ()),
        )
        for key in sizes:
            _require(_get(config, section)[key] > 0, config, f"{section}.{key}", "it must be positive")
        _require(grid % _get(config, section).patch_size == 0, config, f"{section}.patch_size", _DIVIDES.format(grid))
        _require(_get(config, section).head_depth >= 0, config, f"{section}.head_depth", _HEAD_DEPTH)
        if _get(config, section).head_depth:
            widths.append((section, "head_width", "head_num_heads", 4))
    for section, width, heads, multiple in widths:
        values = _get(config, section)
        fix = f"it must be a multiple of {multiple} times config.{section}.{heads}={values[heads]}"
        _require(values[width] % (multiple * values[heads]) == 0, config, f"{section}.{width}", fix)
    for key in ("decoder.width", *(f"{section}.width" for section in dits)):
        _require(_get(config, key) % 4 == 0, config, key, "the sin-cos position embedding needs a multiple of 4")
    inside = all(isinstance(n, int) and 0 <= n < config.encoder.depth for n in config.encoder.layers)
    _require(inside, config, "encoder.layers", "it must hold numbers of encoder blocks, from 0")
    if "decoder" in config.stages:
        _check_discriminator(config)
    position = config.encoder.position_size
    _require(position >= 0 and position % patch == 0, config, "encoder.position_size", multiple)
    _check_sampling(config)


def _check_attention(config, device):
    match config.attention:
        case "cudnn":
            hopper = device.platform == "gpu" and float(getattr(device, "compute_capability", 0)) >= 9
            fix = f"it needs an NVIDIA GPU from Hopper on, and this is {device.device_kind}: set it to 'xla'"
            _require(hopper, config, "attention", fix)
            half = config.dtype == "bfloat16"
            _require(half, config, "attention", "it needs config.dtype='bfloat16': set this too, or set it to 'xla'")
            for section, prefix in _attending(config):
                width, heads = (_get(config, section)[f"{prefix}{key}"] for key in ("width", "num_heads"))
                fix = f"config.{section}.{prefix}width={width} over {heads} heads is no multiple of 8: set it to 'xla'"
                _require(width // heads % 8 == 0, config, "attention", fix)
        case "flash":
            fix = f"it needs a TPU, and this is {device.device_kind}: set it to 'xla'"
            _require(device.platform == "tpu", config, "attention", fix)


def _attending(config):
    """Yield (section, prefix of its keys) of all models whose attention config.attention computes."""
    if not is_vae(config):
        yield from (("encoder", ""), ("decoder", ""))
    if config.discriminator.backbone.family != "encoder" and "decoder" in config.stages:
        yield "discriminator.backbone", ""
    for section in ("dit", *(("guidance.dit",) if config.guidance.method == "autoguidance" else ())):
        yield section, ""
        if _get(config, section).head_depth:
            yield section, "head_"


def _check_sampling(config):
    train, sampler = config.dit.train, config.sampler
    shift = "it must be positive; 1 is no shift, 0 the shift by the latent's dimension"
    _require(config.dit.time_shift >= 0, config, "dit.time_shift", shift)
    decays = train.more_ema_decays
    _require(all(0.0 <= decay < 1.0 for decay in decays), config, "dit.train.more_ema_decays", _DECAYS)
    number = f"it must be 0, or a number from 1 to the {len(decays)} decays of config.dit.train.more_ema_decays"
    _require(0 <= config.dit.average <= len(decays), config, "dit.average", number)
    whole = train.batch_size % train.microbatches == 0
    _require(whole, config, "dit.train.microbatches", f"it must divide config.dit.train.batch_size={train.batch_size}")
    unbounded = config.dit.prediction == "noise" or (sampler.method == "sde" and sampler.diffusion == "score_based")
    plain = "predicted noise and config.sampler.diffusion='score_based' are unbounded at its start: set it to 'plain'"
    _require(sampler.grid != "published" or not unbounded, config, "sampler.grid", plain)
    reusable = sampler.method == "euler" and config.dit.head_depth > 0
    share = "only euler steps of a DiT^DH can share the trunk's output: set it to"
    _require(reusable or sampler.reuse == 1, config, "sampler.reuse", f"{share} 1")
    _require(reusable or not sampler.refresh, config, "sampler.refresh", f"{share} ()")
    last = sampler.num_steps - fewest_steps(config)
    _require(last >= 0, config, "sampler.num_steps", "it counts points of the grid 'published': set it to 2 or more")
    inside = all(isinstance(step, int) and 0 <= step <= last for step in sampler.refresh)
    _require(inside, config, "sampler.refresh", f"it must hold numbers of steps, from 0 to {last}")
    alone = not sampler.refresh or sampler.reuse == 1
    _require(alone, config, "sampler.reuse", "config.sampler.refresh names the steps already: set it to 1")
    _require(0 < sampler.last_step_size < 1, config, "sampler.last_step_size", "it must be between 0 and 1")
    installed = sampler.method != "adaptive" or importlib.util.find_spec("diffrax") is not None
    _require(installed, config, "sampler.method", "it needs diffrax: pip install -e '.[adaptive]'")
    guidance = config.guidance
    labelled = config.dit.class_conditional or guidance.method != "cfg"
    _require(labelled, config, "guidance.method", "it needs classes: set config.dit.class_conditional=True")
    named = guidance.method != "autoguidance" or bool(guidance.dit.weights)
    _require(named, config, "guidance.dit.weights", "name the weights of the model that config.guidance.dit describes")
    ordered = 0 <= guidance.t_min <= guidance.t_max <= 1
    _require(ordered, config, "guidance.t_min", "0 <= config.guidance.t_min <= config.guidance.t_max <= 1 must hold")
    _require(math.isfinite(guidance.scale), config, "guidance.scale", "it must be a finite number")


def _check_discriminator(config):
    train, d = config.decoder.train, config.discriminator
    for key in ("adversarial_weight", "lpips_weight"):
        _require(train[key] >= 0, config, f"decoder.train.{key}", "it must be positive, or 0 to leave the loss out")
    own = d.backbone.family != "encoder"
    for key in ("width", "depth", "num_heads", "patch_size") if own else ():
        _require(d.backbone[key] > 0, config, f"discriminator.backbone.{key}", "it must be positive")
    depth = d.backbone.depth if own else config.encoder.depth
    inside = len(d.layers) > 0 and all(0 <= layer < depth for layer in d.layers)
    _require(inside, config, "discriminator.layers", f"it must hold numbers of the backbone's {depth} blocks, from 0")
    if not own:
        return
    for key, size in (("input_size", input_size(config, d.backbone)), ("position_size", d.backbone.position_size)):
        fix = f"it must be a multiple of config.discriminator.backbone.patch_size={d.backbone.patch_size}"
        _require(size >= 0 and size % d.backbone.patch_size == 0, config, f"discriminator.backbone.{key}", fix)
    heads = d.backbone.num_heads
    fix = f"it must be a multiple of config.discriminator.backbone.num_heads={heads}"
    _require(d.backbone.width % heads == 0, config, "discriminator.backbone.width", fix)


def _check_sd_vae(config):
    e = config.encoder
    groups = len(e.widths) > 0 and all(width > 0 and width % 32 == 0 for width in e.widths)
    _require(groups, config, "encoder.widths", "each width must be a multiple of the 32 groups of its norm")
    factor = 2 ** (len(e.widths) - 1)
    fix = f"set it to {factor}, the factor by which {len(e.widths)} levels reduce the size of images"
    _require(e.patch_size == factor, config, "encoder.patch_size", fix)
    _require(e.depth > 0, config, "encoder.depth", "it must be positive")
    _require(not e.input_size, config, "encoder.input_size", "the VAE does not resize images: set it to 0")
    _require(not e.layers, config, "encoder.layers", "the VAE has only one latent: set it to ()")
    _require("decoder" not in config.stages, config, "stages", "the VAE's decoder is not trained: leave 'decoder' out")
    named = config.decoder.weights != "small"
    _require(named, config, "decoder.weights", "name the VAE's hub id or folder, as in config.encoder.weights")


def _require(condition, config, key, fix):
    if not condition:
        raise UserError(f"config.{key}={_get(config, key)!r} cannot work: {fix}")


def _get(config, key):
    for part in key.split("."):
        config = config[part]
    return config
