"""The few-step student: the identity that it learns, Gaussian data, and its training, resumed and on eight devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import stage_cases
from conftest import random_like, tiny
from etils import epath
from flax import linen as nn

from rae_jax.build import objectives, part_weights, sampler, stages
from rae_jax.config import keys
from rae_jax.diffusion import flow, ode
from rae_jax.errors import UserError
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


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_an_image_s_gradient_is_divided_by_a_power_of_its_error(power):
    errors = jnp.asarray([0.5, 40.0, 8000.0])
    found = jax.grad(lambda errors: few_step.balanced(errors, power).sum())(errors)
    np.testing.assert_allclose(found, 2.0 * errors**-power, rtol=5e-3)  # 1e-3 is added to the square of 0.5


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


def _student_velocity(params, z, r, t, labels):
    return _Student().apply({"params": params}, z, t, labels, r=r)


def _trained(objective, batch_size):
    """Return (state, metrics of all steps) of a small student after 1500 steps on Gaussian data."""
    init, step = few_step.make(
        student=_Student(),
        mean_velocity=_student_velocity,
        objective=objective,
        condition=conditions.labels(3),
        latent_shape=(1, 1, 1),
        optimiser=optax.adam(optax.cosine_decay_schedule(3e-3, 1500)),
        ema_decay=0.99,
        condition_dropout=0.1,
        microbatches=2,
    )

    def train(state, key):
        keys = jax.random.split(key)
        latents = SPREAD * jax.random.normal(keys[0], (batch_size, 1, 1, 1))
        batch = {"latent": latents, "label": jnp.zeros(batch_size, jnp.int32)}
        return step(state, {"statistics": None}, batch, keys[1])

    return jax.jit(lambda key: jax.lax.scan(train, init(key), jax.random.split(key, 1500)))(jax.random.key(0))


def _of_teacher(frozen, x, noise, z, t, labels):
    return _velocity(z, t)


def _of_data_and_noise(frozen, x, noise, z, t, labels):
    return flow.velocity(x, noise, t)


def _objective(name, balance):
    """Return (objective, batch size, bounds of the error of images and of their spread)."""
    if name == "trajectories":
        # The whole way from noise to data is one of 136 pairs: the error there is larger than the mean one.
        return few_step.Trajectories(_of_teacher, ode.time_grid(16, 1.0), 8, (1, 1, 1)), 64, 0.1, 0.15
    velocity = _of_teacher if name == "distillation" else _of_data_and_noise
    found = few_step.Identity(None, velocity, flow.LINEAR, few_step.Times(1.0, 0.5), few_step.by_jvp, balance)
    # The velocities of data and noise are noisy. Without a teacher the balanced loss has a bias towards small values:
    # images with small errors weigh more.
    if balance == 1.0:
        return (found, 512, 0.15, 0.05) if name == "distillation" else (found, 1024, 0.35, 0.15)
    return (found, 512, 0.08, 0.04) if name == "distillation" else (found, 512, 0.3, 0.1)


@pytest.mark.parametrize(
    ("name", "balance"),
    [
        *(("distillation", 0.5), ("finetuning", 0.5), ("trajectories", None)),
        *(pytest.param(name, 1.0, marks=pytest.mark.slow) for name in ("distillation", "finetuning")),  # as published
    ],
)
def test_one_step_draws_gaussian_data(name, balance):
    objective, batch_size, error, of_spread = _objective(name, balance)
    state, metrics = _trained(objective, batch_size)
    assert metrics["mean_square"][-100:].mean() < metrics["mean_square"][:100].mean()
    noise = jax.random.normal(jax.random.key(1), (20_000, 1, 1, 1))
    exact = SPREAD * noise
    if name == "trajectories":  # the student learns where the teacher's steps lead
        exact = ode.euler(_velocity, noise, objective.times)
    for steps in (1, 2):
        u = lambda x, t, r: _student_velocity(state["ema_params"], x, r, t, None)  # noqa: E731
        drawn = ode.jumps(u, noise, ode.time_grid(steps, 1.0))
        assert float(jnp.quantile(jnp.abs(drawn - exact), 0.99)) < error
        assert abs(float(drawn.std() / exact.std()) - 1) < of_spread


def test_pairs_are_of_the_teacher_s_trajectories():
    """Each pair is compared with Euler's steps in numpy; the times that the student is told are even, as published."""
    times, labels = ode.time_grid(4, 3.0), jnp.arange(3)
    teacher = lambda frozen, x, noise, z, t, labels: _velocity(z, t) * (1 + labels)[:, None, None, None]  # noqa: E731
    objective = few_step.Trajectories(teacher, times, 40, (2, 2, 1))
    keys = jax.random.split(jax.random.key(0))
    found = jax.tree.map(np.asarray, objective.examples({}, {"label": labels}, labels, keys))
    path = [np.asarray(jax.random.normal(keys[1], (3, 2, 2, 1)))]
    factors = (1 + np.arange(3)).reshape(3, 1, 1, 1)
    for t, t_next in zip(times[:-1], times[1:], strict=True):
        path.append(path[-1] + float(t_next - t) * np.asarray(_velocity(path[-1], jnp.full(3, t))) * factors)
    path, told = np.stack(path), np.linspace(1, 0, 5)
    image = np.repeat(np.arange(3), 40)
    i, j = (np.abs(found[name][:, None] - told).argmin(1) for name in ("t", "r"))
    assert (i < j).all() and len(set(zip(i, j, strict=True))) == 10  # all pairs of five points
    np.testing.assert_array_equal(found["condition"], image)
    np.testing.assert_allclose(found["z"], path[i, image], atol=1e-5)
    mean = (path[i, image] - path[j, image]) / (told[i] - told[j]).reshape(-1, 1, 1, 1)
    np.testing.assert_allclose(found["u"], mean, atol=1e-5)


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


def test_a_teacher_of_other_latents_is_refused(whole, tmp_path):
    config, _, _ = whole
    other = config.copy_and_resolve_references()
    other.encoder.width = 24
    stage_cases.write_weights(other, epath.Path(tmp_path), ("dit",), 0.1)
    config = config.copy_and_resolve_references()
    config.dit.weights = str(tmp_path)
    mesh = sharding.make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1])
    with pytest.raises(UserError, match=r"config.dit.weights=.* has shape .*\(24, .* and not \(16, "):
        stages.stage(config, "few_step", tmp_path / "run", mesh).begin(None)


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


def test_finetuning_uses_the_config_s_path_and_balance():
    """Also the path's velocity: on the cosine path it is not noise - x."""
    config, t = tiny(), jnp.array([0.3])
    config.dit.path, config.few_step.objective, config.few_step.balance = "cosine", "finetuning", 0.25
    x, noise = jnp.full((1, 1, 1, 1), 2.0), jnp.full((1, 1, 1, 1), 3.0)
    objective = objectives.student_objective(config)
    assert objective.balance == 0.25
    found = objective.velocity({}, x, noise, None, t, None)
    angle = 0.15 * np.pi
    assert float(found[0, 0, 0, 0]) == pytest.approx(np.pi / 2 * (3 * np.cos(angle) - 2 * np.sin(angle)), rel=1e-5)


@pytest.mark.parametrize(("shift", "guided"), [(1.0, True), (6.0, False)])
def test_trajectories_are_those_of_the_sampler(shift, guided):
    """The mean velocity from noise to data leads to what config.sampler draws with the same noise and steps."""
    config, labels = tiny(), jnp.arange(2)
    config.dit.time_shift, config.few_step.objective, config.few_step.trajectories.points = shift, "trajectories", 4
    config.few_step.guided, config.guidance.method, config.sampler.num_steps = guided, "cfg", 3
    parts = {"dit": jax.tree.map(jnp.asarray, random_like(part_weights.shapes(config, "dit"), seed=0, scale=0.1))}
    objective = objectives.student_objective(config)._replace(pairs=60)
    random = jax.random.split(jax.random.key(0))
    found = objective.examples(parts, {"label": labels}, labels, random)
    if not guided:
        config.guidance.method = "none"
    whole = np.flatnonzero((found["t"] == 1) & (found["r"] == 0))
    noise = jax.random.normal(random[1], (2, *keys.latent_shape(config)))
    drawn = sampler.sampler(config).solve(sampler.velocity(config, parts, labels), noise, None)
    assert len(whole) > 4
    for row in whole:
        image = int(found["condition"][row])
        np.testing.assert_allclose(found["z"][row] - found["u"][row], drawn[image], atol=1e-4)
