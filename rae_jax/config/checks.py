"""Checks of a config, before anything is computed or written.

Each mistake gives one line that names the key, its value and the fix.
"""

from rae_jax.config import generation_checks, machine
from rae_jax.config.glossary import RESULTS
from rae_jax.config.keys import GENERATORS, STAGES, TRAINED, input_size, is_vae, require, value_of

_PUBLISHED = ("dino", "dinov2", "siglip2", "mae", "dinov3")
_MLPS = ("gelu", "gelu_tanh", "swiglu")
CHOICES = {
    "dtype": ("float32", "bfloat16"),
    "attention": ("auto", "xla", "cudnn", "flash"),
    "remat": ("auto", "none", "dots", "full"),
    "data.source": ("shapes", "image_folder", "array_record", "tfds", "webdataset", "parquet"),
    "data.on_error": ("stop", "skip"),
    "checkpoint.best_is": ("lowest", "highest"),
    "checkpoint.on_error": ("continue", "stop"),
    "encoder.family": ("small", *_PUBLISHED, "sd_vae"),
    "encoder.mlp": _MLPS,
    "discriminator.backbone.family": ("encoder", *_PUBLISHED),
    "discriminator.backbone.mlp": _MLPS,
    "discriminator.loss": ("hinge", "vanilla"),
    "dit.path": ("linear", "cosine", "vp"),
    "dit.prediction": ("velocity", "noise", "data", "data_in_velocity"),
    "dit.conditioning": ("adaln", "in_context"),
    "guidance.dit.conditioning": ("adaln", "in_context"),
    "decoder.output": ("normalised", "image"),
    "dit.train.time": ("logit_normal", "uniform"),
    "few_step.objective": ("distillation", "finetuning", "trajectories"),
    "few_step.derivative": ("differences", "jvp"),
    "sampler.method": ("euler", "heun", "adaptive", "sde", "mean_velocity"),
    "sampler.grid": ("plain", "published"),
    "sampler.diffusion": ("constant", "score_based", "sigma", "linear", "decreasing", "increasing_decreasing"),
    "sampler.last_step": ("mean", "tweedie", "euler", "none"),
    "guidance.method": ("none", "cfg", "autoguidance", "internal", "internal_cfg"),
}
TRAIN_CHOICES = {  # choices in the section `train` of every stage
    **{"unit": ("step", "epoch"), "crop": ("centre", "random")},
    **{"optimizer": ("adamw", "muon", "muon_all"), "decay": ("cosine", "linear")},
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
    *("sampler.num_steps", "sampler.reuse", "sampler.rtol", "sampler.atol"),
    *("dit.train.microbatches", "few_step.train.microbatches", "few_step.difference"),
    "few_step.trajectories.pairs",
    *("evaluate.num_images", "evaluate.batch_size", "statistics.batch_size"),
    *("encoder.mlp_ratio", "dit.train.time_std"),
)
_NOT_NEGATIVE = (
    *("encoder.num_registers", "encoder.train.noise_tau", "decoder.train.noise_tau"),
    *("decoder.train.discriminator_start", "decoder.train.adversarial_start"),
)
_FRACTIONS = (
    *("dit.train.label_dropout", "few_step.train.label_dropout", "few_step.equal_times", "few_step.balance"),
    *("discriminator.augment.prob", "discriminator.augment.cutout"),
)


def check(config, mesh, *, trains=True, evaluates=True):
    """Raise UserError for the first value that cannot work, anywhere or on the devices of `mesh` (machine.check)."""
    _check_values(config)
    if trains and "few_step" in config.stages:
        generation_checks.check_derivative(config)
    machine.check(config, mesh, trains=trains, evaluates=evaluates)


def _check_values(config):
    for key, choices in CHOICES.items():
        require(value_of(config, key) in choices, config, key, f"choose one of {', '.join(choices)}")
    require(config.unroll in (True, False, "auto"), config, "unroll", "choose one of True, False, 'auto'")
    for key in _NUMBERS:
        numbers = all(isinstance(value, int | float) for value in value_of(config, key))
        require(numbers, config, key, "it must hold numbers, such as (0, 2)")
    for name in config.stages:
        require(name in STAGES, config, "stages", f"choose from {', '.join(STAGES)}")
    require(tuple(s for s in STAGES if s in config.stages) == tuple(config.stages), config, "stages", _ORDER)
    for key in _POSITIVE:
        require(value_of(config, key) > 0, config, key, "it must be positive")
    for key in _NOT_NEGATIVE:
        require(value_of(config, key) >= 0, config, key, "it must be 0 or more")
    for key in _FRACTIONS:
        require(0 <= value_of(config, key) <= 1, config, key, "it must be between 0 and 1")
    require(0 <= config.seed < 2**64, config, "seed", "it must be from 0 to 2**64 - 1")
    for key in ("data.num_threads", "data.num_workers"):
        require(value_of(config, key) >= 0, config, key, "it must be positive, or 0 for none")
    require(config.evaluate.every >= 0, config, "evaluate.every", "it must be positive, or 0 for only at the end")
    for key in ("checkpoint.keep_every", *(f"health.{name}" for name in config.health)):
        require(value_of(config, key) >= 0, config, key, "it must be positive, or 0 for none")
    evaluated = not config.checkpoint.best or config.evaluate.every
    require(evaluated, config, "checkpoint.best", "it needs evaluations in training: set config.evaluate.every")
    # Probes are computed only at the end.
    metrics = [name for name in RESULTS if name != "seconds" and not name.startswith("probe")]
    known = config.checkpoint.best in ("", *metrics)
    require(known, config, "checkpoint.best", f"choose one of {', '.join(metrics)}, or ''")
    for stage in TRAINED:
        _check_training(config, f"{stage}.train")
    labels = config.data.source == "image_folder" or not config.data.heldout_labels
    require(labels, config, "data.heldout_labels", "only source='image_folder' uses it: set it to ''")
    if config.data.latents:
        _check_latents(config)
    both = bool(config.lpips.vgg) == bool(config.lpips.linear)
    require(both, config, "lpips.linear", f"set it together with config.lpips.vgg={config.lpips.vgg!r}, or neither")
    _check_shapes(config)


def check_schedules(config):
    """Raise UserError for a learning rate that rises to its end, in a new run; runs of older versions may have it."""
    for stage in set(config.stages) & set(TRAINED):
        train = config[stage].train
        fix = f"it must not be above config.{stage}.train.learning_rate={train.learning_rate}"
        falls = train.final_learning_rate <= train.learning_rate
        require(falls, config, f"{stage}.train.final_learning_rate", fix)


_DIVIDES = "it must divide the latent grid's {}"
_HEAD_DEPTH = "it must be 0 for a plain DiT, or positive"
_ORDER = f"name each stage at most once, in the order {', '.join(STAGES)}"


def _check_training(config, section):
    train = value_of(config, section)
    for key in ("num_steps", "batch_size", "learning_rate", "final_learning_rate"):
        require(train[key] > 0, config, f"{section}.{key}", "it must be positive")
    for key in ("warmup_steps", "clip_norm", "weight_decay"):
        require(train[key] >= 0, config, f"{section}.{key}", "it must be positive, or 0 for none")
    require(train.decay_start >= 0, config, f"{section}.decay_start", "it must be 0 or more")
    start = max(train.decay_start, train.warmup_steps)
    ends = train.decay_end == 0 or start < train.decay_end <= train.num_steps
    fix = f"it must be 0, or from {start + 1} to config.{section}.num_steps={train.num_steps}"
    require(ends, config, f"{section}.decay_end", fix)
    for key in ("ema_decay", "b1", "b2"):
        require(0.0 <= train[key] < 1.0, config, f"{section}.{key}", generation_checks.DECAYS)
    for key, choices in TRAIN_CHOICES.items():
        require(train[key] in choices, config, f"{section}.{key}", f"choose one of {', '.join(choices)}")
    drawn = config.data.source == "shapes"
    fix = "images of shapes are drawn at their size: set it to 'centre'"
    require(not (drawn and train.crop == "random"), config, f"{section}.crop", fix)


def _check_latents(config):
    fixed = "encoder" not in config.stages
    require(fixed, config, "data.latents", "they are not of the encoder that this run trains: set it to ''")
    for stage in GENERATORS:
        centre = config[stage].train.crop == "centre"
        require(centre, config, f"{stage}.train.crop", "packed latents are of centre crops: set it to 'centre'")


def _check_shapes(config):
    if is_vae(config):
        _check_sd_vae(config)
    size, patch = config.data.image_size, config.encoder.patch_size
    if "encoder" in config.stages:
        require(config.encoder.family == "small", config, "encoder.family", "the encoder stage trains only 'small'")
        whole = config.encoder.input_size in (0, size)
        require(whole, config, "encoder.input_size", f"the encoder stage resizes no images: set it to 0 or {size}")
    key = "encoder.input_size" if config.encoder.input_size else "data.image_size"
    multiple = f"it must be a multiple of config.encoder.patch_size={patch}"
    require(value_of(config, key) > 0 and value_of(config, key) % patch == 0, config, key, multiple)
    grid = value_of(config, key) // patch
    tokens = config.decoder.grid_size or grid
    require(size % tokens == 0, config, "data.image_size", f"it must be a multiple of the decoder's {tokens} tokens")
    require(
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
        require(whole, config, f"encoder.{key}", "it must hold three numbers, and each std must be positive")
    groups = len(config.judge.widths) > 0 and all(width > 0 and width % 8 == 0 for width in config.judge.widths)
    require(groups, config, "judge.widths", "each width must be a multiple of the 8 groups of its norm")
    dits = ["dit"]
    if config.guidance.method == "autoguidance":
        dits.append("guidance.dit")
        widths.append(("guidance.dit", "width", "num_heads", 4))
    for section in dits:
        sizes = (
            "width",
            "depth",
            "num_heads",
            *(("head_width", "head_num_heads") if value_of(config, section).head_depth else ()),
        )
        for key in sizes:
            require(value_of(config, section)[key] > 0, config, f"{section}.{key}", "it must be positive")
        require(
            grid % value_of(config, section).patch_size == 0, config, f"{section}.patch_size", _DIVIDES.format(grid)
        )
        _check_dit(config, section)
        if value_of(config, section).head_depth:
            widths.append((section, "head_width", "head_num_heads", 4))
    for section, width, heads, multiple in widths:
        values = value_of(config, section)
        fix = f"it must be a multiple of {multiple} times config.{section}.{heads}={values[heads]}"
        require(values[width] % (multiple * values[heads]) == 0, config, f"{section}.{width}", fix)
    for key in ("decoder.width", *(f"{section}.width" for section in dits)):
        require(value_of(config, key) % 4 == 0, config, key, "the sin-cos position embedding needs a multiple of 4")
    inside = all(isinstance(n, int) and 0 <= n < config.encoder.depth for n in config.encoder.layers)
    require(inside, config, "encoder.layers", "it must hold numbers of encoder blocks, from 0")
    if "decoder" in config.stages:
        _check_discriminator(config)
    position = config.encoder.position_size
    require(position >= 0 and position % patch == 0, config, "encoder.position_size", multiple)
    generation_checks.check(config)


def _check_dit(config, section):
    c = value_of(config, section)
    require(c.head_depth >= 0, config, f"{section}.head_depth", _HEAD_DEPTH)
    if c.conditioning == "in_context":
        require(c.head_depth > 0, config, f"{section}.head_depth", "conditioning='in_context' needs a head: raise it")
        for key in ("time_tokens", "label_tokens"):
            require(c[key] > 0, config, f"{section}.{key}", "it must be positive")
    inside = f"it must be 0 for no base output, or less than config.{section}.depth={c.depth}"
    require(0 <= c.base_depth < c.depth, config, f"{section}.base_depth", inside)
    fix = "the base output needs a DiT with a head: set it to 0, or raise head_depth"
    require(c.head_depth > 0 or not c.base_depth, config, f"{section}.base_depth", fix)


def _check_discriminator(config):
    train, d = config.decoder.train, config.discriminator
    for key in ("adversarial_weight", "lpips_weight"):
        require(train[key] >= 0, config, f"decoder.train.{key}", "it must be positive, or 0 to leave the loss out")
    own = d.backbone.family != "encoder"
    for key in ("width", "depth", "num_heads", "patch_size") if own else ():
        require(d.backbone[key] > 0, config, f"discriminator.backbone.{key}", "it must be positive")
    depth = d.backbone.depth if own else config.encoder.depth
    inside = len(d.layers) > 0 and all(0 <= layer < depth for layer in d.layers)
    require(inside, config, "discriminator.layers", f"it must hold numbers of the backbone's {depth} blocks, from 0")
    if not own:
        return
    for key, size in (("input_size", input_size(config, d.backbone)), ("position_size", d.backbone.position_size)):
        fix = f"it must be a multiple of config.discriminator.backbone.patch_size={d.backbone.patch_size}"
        require(size >= 0 and size % d.backbone.patch_size == 0, config, f"discriminator.backbone.{key}", fix)
    heads = d.backbone.num_heads
    fix = f"it must be a multiple of config.discriminator.backbone.num_heads={heads}"
    require(d.backbone.width % heads == 0, config, "discriminator.backbone.width", fix)


def _check_sd_vae(config):
    e = config.encoder
    groups = len(e.widths) > 0 and all(width > 0 and width % 32 == 0 for width in e.widths)
    require(groups, config, "encoder.widths", "each width must be a multiple of the 32 groups of its norm")
    factor = 2 ** (len(e.widths) - 1)
    fix = f"set it to {factor}, the factor by which {len(e.widths)} levels reduce the size of images"
    require(e.patch_size == factor, config, "encoder.patch_size", fix)
    require(e.depth > 0, config, "encoder.depth", "it must be positive")
    require(not e.input_size, config, "encoder.input_size", "the VAE does not resize images: set it to 0")
    require(not e.layers, config, "encoder.layers", "the VAE has only one latent: set it to ()")
    require("decoder" not in config.stages, config, "stages", "the VAE's decoder is not trained: leave 'decoder' out")
    named = config.decoder.weights != "small"
    require(named, config, "decoder.weights", "name the VAE's hub id or folder, as in config.encoder.weights")
