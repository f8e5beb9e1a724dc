"""Checks of the keys by which images are generated: the DiT's times, the student, the sampler and the guidance."""

import importlib.util
import math

from rae_jax.config.keys import GENERATORS, fewest_steps, generator, require

DECAYS = "it must be at least 0 and below 1"


def check(config):
    """Raise UserError for the first value that cannot work."""
    _check_dit(config)
    _check_sampler(config)
    _check_guidance(config)
    if "few_step" in config.stages or generator(config) == "few_step":
        _check_few_step(config)


def _check_dit(config):
    train = config.dit.train
    shift = "it must be positive; 1 is no shift, 0 the shift by the latent's dimension"
    require(config.dit.time_shift >= 0, config, "dit.time_shift", shift)
    decays = train.more_ema_decays
    require(all(0.0 <= decay < 1.0 for decay in decays), config, "dit.train.more_ema_decays", DECAYS)
    number = f"it must be 0, or a number from 1 to the {len(decays)} decays of config.dit.train.more_ema_decays"
    require(0 <= config.dit.average <= len(decays), config, "dit.average", number)
    for stage in GENERATORS:
        size, parts = (config[stage].train[key] for key in ("batch_size", "microbatches"))
        fix = f"it must divide config.{stage}.train.batch_size={size}"
        require(size % parts == 0, config, f"{stage}.train.microbatches", fix)
    linear = config.dit.prediction != "data_in_velocity" or config.dit.path == "linear"
    require(linear, config, "dit.path", "config.dit.prediction='data_in_velocity' needs the path 'linear'")
    require(train.base_weight >= 0, config, "dit.train.base_weight", "it must be 0 or more")


def _check_sampler(config):
    sampler = config.sampler
    unbounded = config.dit.prediction == "noise" or (sampler.method == "sde" and sampler.diffusion == "score_based")
    unbounded |= config.dit.path == "vp" and (config.dit.prediction == "data" or sampler.method == "sde")
    plain = "the velocity of this path and prediction, or the diffusion, is infinite at its start: set it to 'plain'"
    require(sampler.grid != "published" or not unbounded, config, "sampler.grid", plain)
    reusable = sampler.method == "euler" and config.dit.head_depth > 0
    share = "only euler steps of a DiT^DH can share the trunk's output: set it to"
    require(reusable or sampler.reuse == 1, config, "sampler.reuse", f"{share} 1")
    require(reusable or not sampler.refresh, config, "sampler.refresh", f"{share} ()")
    last = sampler.num_steps - fewest_steps(config)
    require(last >= 0, config, "sampler.num_steps", "it counts points of the grid 'published': set it to 2 or more")
    inside = all(isinstance(step, int) and 0 <= step <= last for step in sampler.refresh)
    require(inside, config, "sampler.refresh", f"it must hold numbers of steps, from 0 to {last}")
    alone = not sampler.refresh or sampler.reuse == 1
    require(alone, config, "sampler.reuse", "config.sampler.refresh names the steps already: set it to 1")
    require(0 < sampler.last_step_size < 1, config, "sampler.last_step_size", "it must be between 0 and 1")
    installed = sampler.method != "adaptive" or importlib.util.find_spec("diffrax") is not None
    require(installed, config, "sampler.method", "it needs diffrax: pip install -e '.[adaptive]'")


def _check_guidance(config):
    guidance = config.guidance
    labelled = config.dit.class_conditional or guidance.method not in ("cfg", "internal_cfg")
    require(labelled, config, "guidance.method", "it needs classes: set config.dit.class_conditional=True")
    has_base = guidance.method not in ("internal", "internal_cfg") or config.dit.base_depth > 0
    require(has_base, config, "guidance.method", "it needs a DiT with a base output, config.dit.base_depth > 0")
    named = guidance.method != "autoguidance" or bool(guidance.dit.weights)
    require(named, config, "guidance.dit.weights", "name the weights of the model that config.guidance.dit describes")
    for key, section in {"guidance": guidance, "guidance.internal": guidance.internal}.items():
        ordered = 0 <= section.t_min <= section.t_max <= 1
        require(ordered, config, f"{key}.t_min", f"0 <= config.{key}.t_min <= config.{key}.t_max <= 1 must hold")
        require(math.isfinite(section.scale), config, f"{key}.scale", "it must be a finite number")


def _check_few_step(config):
    """Check for a velocity at pure noise, where the student starts, and for a trajectory."""
    d = config.dit
    fix = "the few-step student needs a velocity at pure noise: set it to"
    require(d.path != "vp", config, "dit.path", f"{fix} 'linear'")
    defined = d.prediction in ("velocity", "data_in_velocity")
    require(defined, config, "dit.prediction", f"{fix} 'velocity' or 'data_in_velocity'")
    points = config.few_step.trajectories.points
    require(points >= 2, config, "few_step.trajectories.points", "it must be 2 or more")


def check_derivative(config):
    """Raise UserError if the student's training would round its differences away."""
    few = config.few_step
    rounded = config.dtype == "bfloat16" and few.objective != "trajectories" and few.derivative == "differences"
    fix = "config.dtype='bfloat16' rounds by more than the difference: set it to 'jvp', or config.dtype='float32'"
    require(not rounded, config, "few_step.derivative", fix)
