"""Solvers and guidance on Gaussian data, whose flow is known in closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rae_jax.diffusion import flow, ode, sde
from rae_jax.diffusion.guidance import Guidance

STD = 0.5  # of the data
PATHS = {"linear": flow.LINEAR, "cosine": flow.COSINE}


def gaussian_velocity(std, path=flow.LINEAR, mean=0.0):
    """E[velocity | x_t] for data N(mean, std^2)."""

    def velocity_fn(x, t):
        alpha, sigma, d_alpha, d_sigma = path.at(t, x)
        variance = jnp.square(alpha * std) + jnp.square(sigma)
        covariance = d_alpha * alpha * std**2 + d_sigma * sigma
        return d_alpha * mean + covariance / variance * (x - alpha * mean)

    return velocity_fn


def _errors(solver, path, factor, counts):
    x = jax.random.normal(jax.random.key(0), (1000, 1))
    # The exact flow scales by the ratio of deviations.
    return [
        float(jnp.abs(solver(gaussian_velocity(STD, path), x, ode.time_grid(n, factor)) - STD * x).max())
        for n in counts
    ]


@pytest.mark.parametrize("factor", [1.0, 3.0])
@pytest.mark.parametrize("path", PATHS)
def test_euler_carries_noise_to_gaussian_data_with_first_order(factor, path):
    errors = _errors(ode.euler, PATHS[path], factor, (50, 100, 200))
    assert errors[-1] < 0.05
    assert errors[0] / errors[1] == pytest.approx(2.0, rel=0.15)
    assert errors[1] / errors[2] == pytest.approx(2.0, rel=0.15)


@pytest.mark.parametrize("factor", [1.0, 3.0])
@pytest.mark.parametrize("path", PATHS)
def test_heun_does_so_with_second_order(factor, path):
    errors = _errors(ode.heun, PATHS[path], factor, (25, 50, 100))
    assert errors[-1] < 1e-3
    assert errors[0] / errors[1] > 0.85 * 4.0
    assert errors[1] / errors[2] > 0.85 * 4.0  # more than the order: leading terms of opposite signs, on uneven grids


def test_a_step_asks_for_the_velocity_at_its_start_and_heun_s_at_its_end_as_well():
    x, times = jnp.ones((1, 1)), jnp.array([1.0, 0.5])

    def velocity_fn(x, t):
        return x * t[:, None]

    assert ode.euler(velocity_fn, x, times).item() == 1 - 0.5 * 1
    first = ode.heun(velocity_fn, x, times).item()
    assert first == 1 - 0.5 * (1 + 0.5 * 0.5) / 2
    assert ode.heun(velocity_fn, x, times, last_by_euler=True).item() == 1 - 0.5 * 1
    last = ode.heun(velocity_fn, x, jnp.array([1.0, 0.5, 0.25]), last_by_euler=True).item()
    assert last == first - 0.25 * first * 0.5


def test_the_adaptive_solver_keeps_its_tolerance():
    pytest.importorskip("diffrax", reason="the extra 'adaptive' is not installed")
    x = jax.random.normal(jax.random.key(0), (1000, 1))
    errors = []
    for tolerance in (1e-2, 1e-5):
        solve = jax.jit(
            lambda x, tolerance=tolerance: ode.adaptive(
                gaussian_velocity(STD), x, ode.time_grid(2, 1.0), rtol=tolerance, atol=tolerance
            )
        )
        errors.append(float(jnp.abs(solve(x) - STD * x).max()))
    assert errors[0] < 0.05 and errors[1] < 5e-5


DIFFUSIONS = ("constant", "score_based", "sigma", "linear", "decreasing", "increasing_decreasing")


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", DIFFUSIONS)
def test_every_diffusion_keeps_the_marginals(name, path):
    """Mean and variance after the SDE are the path's, whatever its noise."""
    path, num = PATHS[path], 20_000
    x = jax.random.normal(jax.random.key(0), (num, 1))
    times = ode.time_grid(200, 1.0, first=0.999, last=0.01)
    velocity_fn, diffusion_fn = gaussian_velocity(STD, path, mean=1.0), getattr(sde, name)

    def noise_fn(n):
        return jax.random.normal(jax.random.fold_in(jax.random.key(1), n), x.shape)

    out = jax.jit(
        lambda x: sde.euler_maruyama(velocity_fn, x, times, noise_fn=noise_fn, diffusion_fn=diffusion_fn, path=path)
    )(x)
    alpha, sigma, _, _ = path.at(times[-1:], jnp.ones((1, 1)))
    expected = float(jnp.sqrt(jnp.square(alpha * STD) + jnp.square(sigma))[0, 0])
    assert float(out.mean()) == pytest.approx(float(alpha[0, 0]), abs=0.03)
    assert float(out.std()) == pytest.approx(expected, rel=0.03)


def test_last_steps_reach_the_expected_data():
    t = 0.04
    velocity_fn = gaussian_velocity(STD)
    x = jax.random.normal(jax.random.key(0), (50, 1))
    expected = x * (1 - t) * STD**2 / ((1 - t) ** 2 * STD**2 + t**2)
    np.testing.assert_allclose(sde.tweedie_step(velocity_fn, x, t), expected, rtol=1e-5)
    # On the linear path x_t - t v is the expected data too.
    np.testing.assert_allclose(sde.euler_step(velocity_fn, x, t), expected, rtol=1e-4)
    score = -x / ((1 - t) ** 2 * STD**2 + t**2)
    mean = x - t * (velocity_fn(x, jnp.full(50, t)) - t * score)
    np.testing.assert_allclose(sde.mean_step(velocity_fn, x, t, diffusion_fn=sde.sigma), mean, rtol=1e-5)


def test_the_published_grid_has_its_points():
    grid = np.asarray(ode.published_grid(50, 6.928))
    assert len(grid) == 50 and grid[0] == 1.0
    assert grid[-1] == pytest.approx(0.0069, abs=1e-4)


def test_guidance_acts_inside_its_interval_only():
    strong, weak = (flow.undivided(lambda x, t, v=v: jnp.full_like(x, v)) for v in (3.0, 1.0))
    velocity_fn = Guidance(2.0, t_min=0.2, t_max=0.6)(strong, weak)
    x = jnp.zeros((2, 3))
    for t, expected in ((0.1, 3.0), (0.2, 5.0), (0.4, 5.0), (0.6, 5.0), (0.7, 3.0)):
        np.testing.assert_allclose(velocity_fn(x, jnp.full(2, t)), expected)


def test_guided_gaussians_reach_the_gaussian_they_should():
    """Guided by a weaker model with another mean, v is still linear, and its flow ends in a known Gaussian."""
    scale, x = 1.7, jax.random.normal(jax.random.key(0), (1000, 1))
    velocity_fn = Guidance(scale)(*(flow.undivided(gaussian_velocity(STD, mean=mean)) for mean in (1.0, 0.2)))
    out = ode.heun(velocity_fn, x, ode.time_grid(200, 1.0))
    # The difference of the two is a field of its own, of the mean: it adds (scale - 1) times the means' distance.
    np.testing.assert_allclose(out, STD * x + 1.0 + (scale - 1.0) * 0.8, atol=2e-3)
