"""Flow, samplers and guidance against closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rae_jax import flow, guidance, sampling


def test_shift_factors_are_the_papers():
    assert flow.shift_factor((16, 16, 768)) == pytest.approx(6.928, abs=1e-3)
    assert flow.shift_factor((32, 32, 768)) == pytest.approx(13.856, abs=1e-3)


def test_shift_keeps_the_ends_and_moves_towards_noise():
    t = jnp.linspace(0.0, 1.0, 11)
    shifted = flow.shift_time(t, 6.928)
    np.testing.assert_allclose(shifted[jnp.array([0, 10])], [0.0, 1.0], atol=1e-6)
    assert bool((shifted[1:-1] > t[1:-1]).all())
    np.testing.assert_allclose(flow.shift_time(shifted, 1 / 6.928), t, atol=1e-6)  # the inverse shift undoes it


def test_training_times_are_shifted_logit_normal():
    t = flow.sample_time(jax.random.key(0), 20_000, factor=3.0, mean=0.5, std=0.8)
    normal = jax.scipy.special.logit(flow.shift_time(t, 1 / 3.0))
    assert float(normal.mean()) == pytest.approx(0.5, abs=0.02)
    assert float(normal.std()) == pytest.approx(0.8, abs=0.02)


def test_velocity_is_the_paths_derivative():
    x, noise = jax.random.normal(jax.random.key(0), (2, 3, 4, 4, 5))
    t = jnp.array([0.1, 0.5, 0.9])
    _, derivative = jax.jvp(lambda t: flow.interpolate(x, noise, t), (t,), (jnp.ones(3),))
    np.testing.assert_allclose(derivative, flow.velocity(x, noise), atol=1e-6)


def _gaussian_velocity(std):
    # Data N(0, std^2): E[noise - x | x_t] is linear in x_t.
    def velocity_fn(x, t):
        t = t[:, None]
        variance = (1 - t) ** 2 * std**2 + t**2
        return (t - (1 - t) * std**2) / variance * x

    return velocity_fn


@pytest.mark.parametrize("factor", [1.0, 3.0])
def test_euler_carries_noise_to_gaussian_data_with_first_order(factor):
    std = 0.5
    x = jax.random.normal(jax.random.key(0), (1000, 1))
    errors = []
    for steps in (50, 100, 200):
        out = sampling.euler(_gaussian_velocity(std), x, sampling.time_grid(steps, factor))
        errors.append(float(jnp.abs(out - std * x).max()))  # the exact flow scales by the ratio of deviations
    assert errors[-1] < 0.05
    assert errors[0] / errors[1] == pytest.approx(2.0, rel=0.15)
    assert errors[1] / errors[2] == pytest.approx(2.0, rel=0.15)


def test_guidance_acts_inside_its_interval_only():
    velocity_fn = guidance.classifier_free(
        lambda x, t: jnp.full_like(x, 3.0), lambda x, t: jnp.full_like(x, 1.0), scale=2.0, t_min=0.2, t_max=0.6
    )
    x = jnp.zeros((2, 3))
    for t, expected in ((0.1, 3.0), (0.2, 5.0), (0.4, 5.0), (0.7, 3.0)):
        np.testing.assert_allclose(velocity_fn(x, jnp.full(2, t)), expected)
