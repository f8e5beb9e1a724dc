"""Construction of each stage's objective from the config: its initial state and its pure step."""

import functools

import jax.numpy as jnp

from rae_jax.build import models, sampler
from rae_jax.build.optimiser import optimiser
from rae_jax.config.keys import latent_shape
from rae_jax.diffusion import flow
from rae_jax.models.discriminator import DiscriminatorHeads
from rae_jax.models.lpips import Lpips
from rae_jax.training import adversarial, classifier, decoder, dit, encoder, few_step, statistics


def init_and_step(config, stage):
    """Return the two functions of a stage: init(key) -> state, step(state, frozen, batch, key) -> (state, metrics)."""
    match stage:
        case "encoder":
            return _encoder(config)
        case "judge":
            return classifier.make(
                classifier=models.classifier(config),
                image_size=config.data.image_size,
                **_optimisation(config.judge.train),
            )
        case "decoder":
            return decoder.make(
                autoencoder=models.autoencoder(config),
                objective=decoder_objective(config),
                latent_shape=latent_shape(config),
                **_optimisation(config.decoder.train),
            )
        case "statistics":
            return statistics.make(autoencoder=models.autoencoder(config), latent_shape=latent_shape(config))
        case "dit":
            return _dit(config)
        case "few_step":
            return _few_step(config)
        case other:
            raise ValueError(f"unknown stage {other!r}")


def _optimisation(train):
    return {"optimiser": optimiser(train), "ema_decay": train.ema_decay}


def _encoder(config):
    train = config.encoder.train
    return encoder.make(
        autoencoder=models.autoencoder(config),
        patch_size=config.encoder.patch_size,
        num_classes=config.data.num_classes,
        image_size=config.data.image_size,
        noise_tau=train.noise_tau,
        detail=train.detail,
        label_weight=train.label_weight,
        **_optimisation(train),
    )


def _dit(config):
    train = config.dit.train
    return dit.make(
        autoencoder=models.autoencoder(config),
        dit=models.dit(config),
        condition=models.condition(config),
        latent_shape=latent_shape(config),
        prediction=sampler.prediction(config),
        time_fn=sampler.time_fn(config),
        shift_factor=sampler.shift_factor(config),
        more_ema_decays=tuple(train.more_ema_decays),
        condition_dropout=train.label_dropout,
        microbatches=train.microbatches,
        base_weight=train.base_weight if config.dit.base_depth else 0.0,
        **_optimisation(train),
    )


def _few_step(config):
    train = config.few_step.train
    return few_step.make(
        student=models.dit(config, mean_velocity=True),
        mean_velocity=lambda params, z, r, t, labels: sampler.mean_velocity(config, params, labels)(z, t, r),
        objective=student_objective(config),
        condition=models.condition(config),
        latent_shape=latent_shape(config),
        condition_dropout=train.label_dropout,
        microbatches=train.microbatches,
        **_optimisation(train),
    )


def student_objective(config):
    """Return what the few-step student learns: few_step.Identity or few_step.Trajectories."""
    c, path = config.few_step, sampler.prediction(config).path
    match c.objective:
        case "distillation":
            velocity = _velocity_of_teacher(config)
        case "finetuning":
            velocity = lambda frozen, x, noise, z, t, labels: flow.velocity(x, noise, t, path)  # noqa: E731
        case "trajectories":
            times = sampler.times_of_trajectory(config, c.trajectories.points)
            return few_step.Trajectories(
                _velocity_of_teacher(config), times, c.trajectories.pairs, latent_shape(config)
            )
        case other:
            raise ValueError(f"unknown objective {other!r}")
    times = few_step.Times(sampler.shift_factor(config), c.equal_times)
    return few_step.Identity(models.autoencoder(config), velocity, path, times, _derivative(c), c.balance)


def _velocity_of_teacher(config):
    """Return the function (frozen parts, x, noise, z, t, labels) -> velocity of config.dit at z."""
    teacher = config.copy_and_resolve_references()
    if not config.few_step.guided:
        with teacher.unlocked():
            teacher.guidance.method = "none"

    def velocity(frozen, x, noise, z, t, labels):
        return sampler.velocity(teacher, frozen, labels, same_time=False)(z, t)

    return velocity


def _derivative(few):
    match few.derivative:
        case "differences":
            return functools.partial(few_step.by_differences, size=few.difference)
        case "jvp":
            return few_step.by_jvp
        case other:
            raise ValueError(f"unknown derivative {other!r}")


def decoder_objective(config):
    """Return the `Objective` of the decoder; a term whose weight is 0 is None."""
    train = config.decoder.train
    return decoder.Objective(
        discriminator=_discriminator(config) if train.adversarial_weight else None,
        perceptual=_perceptual(config) if train.lpips_weight else None,
        perceptual_weight=train.lpips_weight,
        adversarial_weight=train.adversarial_weight,
        discriminator_start=train.discriminator_start,
        adversarial_start=train.adversarial_start,
        noise_tau=train.noise_tau,
    )


def _discriminator(config):
    d = config.discriminator
    augment = functools.partial(adversarial.diff_augment, prob=d.augment.prob, cutout=d.augment.cutout)
    return decoder.Discriminator(models.backbone(config), DiscriminatorHeads(), augment, _discriminator_loss(d.loss))


def _discriminator_loss(name):
    match name:
        case "hinge":
            return adversarial.hinge_loss
        case "vanilla":
            return adversarial.vanilla_loss
        case other:
            raise ValueError(f"unknown discriminator loss {other!r}")


def _perceptual(config):
    lpips = Lpips(jnp.dtype(config.dtype))
    return lambda params, a, b: lpips.apply({"params": params}, a, b)
