"""Paths, times and predictions against closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from rae_jax.diffusion import flow

PATHS = {"linear": flow.LINEAR, "cosine": flow.COSINE, "vp": flow.VP}


def test_shift_factors_are_the_papers():
    assert flow.shift_factor((16, 16, 768)) == pytest.approx(6.928, abs=1e-3)
    assert flow.shift_factor((32, 32, 768)) == pytest.approx(13.856, abs=1e-3)


def test_shift_keeps_the_ends_and_moves_towards_noise():
    t = jnp.linspace(0.0, 1.0, 11)
    shifted = flow.shift_time(t, 6.928)
    np.testing.assert_allclose(shifted[jnp.array([0, 10])], [0.0, 1.0], atol=1e-6)
    assert bool((shifted[1:-1] > t[1:-1]).all())
    np.testing.assert_allclose(flow.shift_time(shifted, 1 / 6.928), t, atol=1e-6)  # the inverse shift undoes it


@pytest.mark.parametrize("mean, std, low, high", [(0.5, 0.8, 0.0, 0.999), (0.0, 1.0, 0.2, 0.6), (1.0, 1.5, 0.0, 0.9)])
def test_training_times_are_truncated_logit_normal(mean, std, low, high):
    """As a distribution: what lies beyond the ends is spread over the inside, not piled up at the ends."""
    t = np.asarray(flow.logit_normal_time(jax.random.key(0), 20_000, mean=mean, std=std, low=low, high=high))
    assert low <= t.min() and t.max() <= high
    with np.errstate(divide="ignore"):
        ends = (scipy.special.logit([low, high]) - mean) / std
    expected = scipy.stats.truncnorm(*ends, loc=mean, scale=std)
    assert scipy.stats.kstest(scipy.special.logit(t), expected.cdf).pvalue > 0.01


def test_uniform_times_fill_their_interval():
    t = np.asarray(flow.uniform_time(jax.random.key(0), 20_000, low=0.1, high=0.9))
    assert scipy.stats.kstest(t, scipy.stats.uniform(0.1, 0.8).cdf).pvalue > 0.01


def _points():
    x, noise = jax.random.normal(jax.random.key(0), (2, 4, 3, 3, 5))
    return x, noise, jnp.array([0.05, 0.3, 0.6, 0.95])


@pytest.mark.parametrize("name", PATHS)
def test_a_path_leads_from_data_to_noise(name):
    x, noise, _ = _points()
    ends = [flow.interpolate(x, noise, jnp.full(4, t), PATHS[name]) for t in (0.0, 1.0)]
    np.testing.assert_allclose(ends[0], x, atol=0.03)  # the variance-preserving path starts a little off data
    np.testing.assert_allclose(ends[1], noise, atol=1e-6)


@pytest.mark.parametrize("name", PATHS)
def test_velocity_is_the_paths_derivative_and_predictions_agree(name):
    path, (x, noise, t) = PATHS[name], _points()
    x_t, derivative = jax.jvp(lambda t: flow.interpolate(x, noise, t, path), (t,), (jnp.ones(4),))
    v = flow.velocity(x, noise, t, path)
    np.testing.assert_allclose(v, derivative, atol=1e-5)
    np.testing.assert_allclose(flow.noise_of(v, x_t, t, path), noise, atol=2e-5)
    np.testing.assert_allclose(flow.data_of(v, x_t, t, path), x, atol=2e-5)
    np.testing.assert_allclose(flow.velocity_from_noise(noise, x_t, t, path), v, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(flow.velocity_from_data(x, x_t, t, path), v, rtol=1e-4, atol=1e-4)


def test_the_published_coefficients():
    """alpha and sigma of the authors' cosine and VP paths at t = 0.3, by hand."""
    t, one = jnp.array([0.3]), jnp.ones((1, 1))
    rest = np.exp(-0.25 * 0.7**2 * 19.9 - 0.5 * 0.7 * 0.1)
    for path, alpha, sigma in (
        (flow.COSINE, np.cos(0.15 * np.pi), np.sin(0.15 * np.pi)),
        (flow.VP, np.sqrt(1 - rest**2), rest),
    ):
        np.testing.assert_allclose([float(c[0, 0]) for c in path.at(t, one)[:2]], [alpha, sigma], rtol=1e-6)
    assert flow.velocity(2 * one, one, t).item() == -1.0  # exactly, on the linear path
