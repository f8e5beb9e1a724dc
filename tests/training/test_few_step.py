"""The few-step student: the identity that it learns, Gaussian data, and its training, resumed and on eight devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import stage_cases
from conftest import tiny
from etils import epath
from flax import linen as nn

from rae_jax.build import objectives, part_weights, stages
from rae_jax.config import keys
from rae_jax.diffusion import flow, ode
from rae_jax.models import conditions
from rae_jax.runtime import sharding
from rae_jax.training import few_step

SPREAD = 0.5  # standard deviation of the Gaussian data


def _sigma(t):
    return jnp.sqrt((1 - t) ** 2 * SPREAD**2 + t**2)


def _velocity(z, t):
    """The velocity field of Gaussian data, on whose trajectories z is proportional to _sigma(t)."""
    return ((t - (1 - t) * SPREAD**2) / _sigma(t) ** 2)[:, None, None, None] * z


def _mean_velocity(z, r, t):
    factor = jnp.where(t > r, (1 - _sigma(r) / _sigma(t)) / jnp.where(t > r, t - r, 1), jnp.nan)
    return factor[:, None, None, None] * z


@pytest.mark.parametrize("name", ["jvp", "differences"])
def test_the_mean_velocity_of_gaussian_data_is_its_own_target(name):
    derivative = {"jvp": few_step.by_jvp, "differences": functools.partial(few_step.by_differences, size=5e-3)}[name]
    rng = np.random.default_rng(0)
    r, t = np.sort(rng.uniform(0.05, 0.95, (2, 64)).astype(np.float32), 0)
    z = jnp.asarray(rng.normal(size=(64, 1, 1, 3)), jnp.float32)
    expected = _mean_velocity(z, r, t)
    found = few_step.target(_mean_velocity, z, r, jnp.asarray(t), _velocity(z, t), derivative)
    np.testing.assert_allclose(found, expected, atol=1e-4 if name == "jvp" else 2e-3)


def test_times_are_sorted_and_partly_equal():
    r, t = few_step.Times(2.0, 0.75)(jax.random.key(0), 4096)
    assert (r <= t).all() and abs(float((r == t).mean()) - 0.75) < 0.03
    both = np.sort(np.concatenate([r[r < t], t[r < t]]))  # of two uniform times, shifted by 2
    np.testing.assert_allclose(flow.shift_time(jnp.linspace(0, 1, len(both)), 2.0), both, atol=0.05)


class _Student(nn.Module):
    """A small network of z and both times."""

    @nn.compact
    def __call__(self, x, t, condition, r):
        times = jnp.stack([t, t - r, t**2, r**2, t * r], -1)[:, None, None]
        times = jnp.broadcast_to(times, (*x.shape[:3], times.shape[-1]))
        y = jnp.concatenate([x, times], -1)
        for _ in range(2):
            y = nn.silu(nn.Dense(64)(y))
        return nn.Dense(x.shape[-1])(y) + nn.Dense(x.shape[-1])(times) * x


@pytest.mark.parametrize("taught", [True, False], ids=["distillation", "finetuning"])
def test_one_step_draws_gaussian_data(taught):
    def velocity(frozen, x, noise, z, t, labels):
        return _velocity(z, t) if taught else flow.velocity(x, noise, t)

    def u(params, z, r, t, labels):
        return _Student().apply({"params": params}, z, t, labels, r=r)

    init, step = few_step.make(
        autoencoder=None,
        student=_Student(),
        mean_velocity=u,
        velocity=velocity,
        condition=conditions.labels(3),
        latent_shape=(1, 1, 1),
        path=flow.LINEAR,
        times=few_step.Times(1.0, 0.5),
        derivative=few_step.by_jvp,
        optimiser=optax.adam(optax.cosine_decay_schedule(3e-3, 1500)),
        ema_decay=0.99,
        condition_dropout=0.1,
        microbatches=2,
    )

    size = 512 if taught else 2048  # the velocities of data and noise are noisy

    def train(state, key):
        keys = jax.random.split(key)
        latents = SPREAD * jax.random.normal(keys[0], (size, 1, 1, 1))
        batch = {"latent": latents, "label": jnp.zeros(size, jnp.int32)}
        return step(state, {"statistics": None}, batch, keys[1])

    state, metrics = jax.jit(lambda key: jax.lax.scan(train, init(key), jax.random.split(key, 1500)))(jax.random.key(0))
    assert metrics["mean_square"][-100:].mean() < metrics["mean_square"][:100].mean()
    noise = jax.random.normal(jax.random.key(1), (20_000, 1, 1, 1))
    for steps in (1, 2):
        drawn = ode.jumps(lambda x, t, r: u(state["ema_params"], x, r, t, None), noise, ode.time_grid(steps, 1.0))
        assert float(jnp.quantile(jnp.abs(drawn - SPREAD * noise), 0.99)) < (0.15 if taught else 0.35)
        # Without a teacher the balanced loss has a bias towards small values: images with small errors weigh more.
        assert abs(float(drawn.std()) / SPREAD - 1) < (0.05 if taught else 0.15)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(config, rows of metrics, workdir) of the student alone, of a DiT with random weights; nothing interrupts it."""
    folder, config = epath.Path(tmp_path_factory.mktemp("few_step")), tiny()
    config.stages, config.encoder.weights, config.dit.weights = ("few_step",), str(folder), str(folder)
    config.statistics.weights = "none"
    config.few_step.derivative = "jvp"  # differences multiply rounding by a hundred
    config.few_step.train.update({"num_steps": 6, "batch_size": 16, "warmup_steps": 0})
    stage_cases.write_weights(config, folder, ("encoder", "dit"), 0.1)
    return config, stage_cases.train(config, "few_step", folder / "whole"), folder / "whole"


def test_the_student_starts_as_its_dit(whole, tmp_path):
    config, _, _ = whole
    mesh = sharding.make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1])
    stage = stages.stage(config, "few_step", tmp_path, mesh)
    state = stage.begin(stage.init(jax.random.key(0)))
    given = part_weights.load(config, "dit", None, mesh)
    for tree in (state["params"], state["ema_params"]):
        assert tree.keys() - given.keys() == {"interval_embed"}
        jax.tree.map(np.testing.assert_array_equal, {name: tree[name] for name in given}, given)


def test_a_resumed_run_is_the_same_to_the_last_bit(whole, tmp_path):
    config, rows, workdir = whole
    stage_cases.check_resumed(config, "few_step", rows, workdir, epath.Path(tmp_path) / "parts")


@pytest.mark.slow
def test_eight_devices_are_one(whole, tmp_path):
    config, rows, _ = whole
    stage_cases.check_eight_devices(config, "few_step", rows, epath.Path(tmp_path) / "eight", 1e-4)


def test_each_generator_is_evaluated_by_its_own_sampler():
    config = tiny()
    student = keys.drawing_from(config.lock(), "few_step")
    assert (student.sampler.method, student.sampler.num_steps) == ("mean_velocity", 1)
    again = keys.drawing_from(student, "dit")
    assert (again.sampler.method, again.sampler.num_steps) == ("euler", 50)
    assert keys.drawing_from(again, "dit") is again and config.sampler.num_steps == 3


def test_finetuning_uses_the_config_s_path():
    """Also its velocity: on the cosine path it is not noise - x."""
    config, t = tiny(), jnp.array([0.3])
    config.dit.path, config.few_step.objective = "cosine", "finetuning"
    x, noise = jnp.full((1, 1, 1, 1), 2.0), jnp.full((1, 1, 1, 1), 3.0)
    found = objectives.velocity_to_learn(config)({}, x, noise, None, t, None)
    angle = 0.15 * np.pi
    assert float(found[0, 0, 0, 0]) == pytest.approx(np.pi / 2 * (3 * np.cos(angle) - 2 * np.sin(angle)), rel=1e-5)
