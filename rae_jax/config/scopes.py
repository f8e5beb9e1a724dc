"""Scopes: the results that depend on each key of a config. One table answers for runs, samples, latents and weights."""

import re

from rae_jax.config.keys import STAGES

SAMPLES = "samples"  # the pixels of generated images, given the weights
LATENTS = "latents"  # the latents of images, given the encoder's weights
MODEL = "model"  # the shapes and the meaning of trained weights

_ON_LATENTS = ("decoder", "statistics", "dit", "few_step")  # the stages that take latents

# Ordered pairs (regex over the whole key, stages and other results that depend on the key): the first match decides.
# No result depends on devices, kernels, threads or batches of evaluations.
RULES = (
    (r"name|log_every|wandb|compilation_cache|unroll|remat|attention", ()),
    (r"(mesh|checkpoint|health|evaluate)\..*", ()),
    (r"seed", (*STAGES, SAMPLES)),
    (r"dtype", (*STAGES, SAMPLES, LATENTS)),
    (r"stages", (*STAGES, MODEL)),
    (r"data\.(num_threads|num_workers|on_error)", ()),
    (r"data\.image_size", (*STAGES, SAMPLES, LATENTS, MODEL)),
    (r"data\.num_classes", (*STAGES, SAMPLES, MODEL)),
    (r"data\.latents", ("dit", "few_step")),
    (r"data\..*", STAGES),
    (r"(dit|few_step)\.train\.microbatches", ()),
    *((rf"{stage}\.(train\..*|batch_size)", (stage,)) for stage in STAGES),
    (r"encoder\.weights", _ON_LATENTS),
    (r"statistics\.weights", ("dit", "few_step")),
    (r"dit\.weights", ("dit", "few_step")),
    (r"guidance\.dit\.weights", ()),
    *((rf"{stage}\.weights", (stage,)) for stage in STAGES),
    (r"encoder\..*", ("encoder", *_ON_LATENTS, SAMPLES, LATENTS, MODEL)),
    (r"judge\..*", ("judge", MODEL)),
    (r"dit\.average", (SAMPLES,)),
    (r"decoder\..*", ("decoder", SAMPLES, MODEL)),
    (r"dit\..*", ("dit", "few_step", SAMPLES, MODEL)),
    (r"few_step\..*", ("few_step",)),
    (r"(lpips|discriminator)\..*", ("decoder",)),
    (r"guidance\..*", ("few_step", SAMPLES)),
    (r"sampler\..*", (SAMPLES,)),
    (r".*", (*STAGES, SAMPLES, LATENTS, MODEL)),  # a key of another version of this package
)

# Keys of places. A run may be resumed with other places: see inputs for what is compared.
PLACES = re.compile(r"data\.(path|heldout_path|heldout_labels|latents)|.*\.train\.init")
WEIGHTS = re.compile(r".*\.weights|lpips\.(vgg|linear)")


def of(key):
    """Return the stages and other results that depend on a key."""
    return frozenset(next(results for pattern, results in RULES if re.fullmatch(pattern, key)))


def select(flat, *results):
    """Return the items of a flat config, {key: value}, on which one of the results depends."""
    return {key: value for key, value in flat.items() if of(key) & set(results)}
