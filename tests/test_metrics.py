"""Metrics against closed forms."""

import numpy as np
import pytest

from rae_jax import metrics


def _with_moments(rng, mean, root, n=4000):
    """Samples whose empirical mean and covariance are exactly `mean` and root @ root.T."""
    x = rng.normal(size=(n, len(mean)))
    x -= x.mean(0)
    white = np.linalg.inv(np.linalg.cholesky(np.cov(x, rowvar=False)))
    return x @ white.T @ root.T + mean


def test_frechet_distance_of_commuting_gaussians():
    rng = np.random.default_rng(0)
    rotation = np.linalg.qr(rng.normal(size=(5, 5)))[0]
    sigma_a, sigma_b = np.array([1.0, 2, 3, 4, 0.1]), np.array([2.0, 1, 0.5, 3, 0.0])
    a = _with_moments(rng, np.arange(5.0), rotation * sigma_a)
    b = _with_moments(rng, np.zeros(5), rotation * sigma_b)
    expected = (np.arange(5.0) ** 2).sum() + ((sigma_a - sigma_b) ** 2).sum()
    assert metrics.frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_is_the_definition_by_sqrtm():
    import scipy.linalg

    rng = np.random.default_rng(1)
    a, b = rng.normal(size=(200, 6)), rng.normal(size=(300, 6)) @ rng.normal(size=(6, 6)) + 0.3
    ca, cb = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = scipy.linalg.sqrtm(ca @ cb).real
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(ca + cb - 2 * root)
    assert metrics.frechet_distance(a, b) == pytest.approx(expected, rel=1e-8)


def test_psnr_and_ssim():
    rng = np.random.default_rng(0)
    a = rng.uniform(0.2, 0.8, (2, 32, 32, 3)).astype(np.float32)
    np.testing.assert_allclose(metrics.psnr(a + 0.1, a), 20.0, atol=1e-3)
    np.testing.assert_allclose(metrics.ssim(a, a), 1.0, atol=1e-5)
    # Images constant within every window: only the luminance term is left.
    one, two = np.full((1, 16, 16, 3), 0.4, np.float32), np.full((1, 16, 16, 3), 0.6, np.float32)
    expected = (2 * 0.4 * 0.6 + 1e-4) / (0.4**2 + 0.6**2 + 1e-4)
    np.testing.assert_allclose(metrics.ssim(one, two), expected, rtol=1e-3)


def test_linear_probe_separates_what_is_separable_and_nothing_else():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 600)
    features = np.eye(3)[labels] @ rng.normal(size=(3, 8)) + 0.05 * rng.normal(size=(600, 8))
    good = metrics.linear_probe(features[:400], labels[:400], features[400:], labels[400:], num_classes=3)
    assert good > 0.98
    noise = rng.normal(size=(600, 8))
    bad = metrics.linear_probe(noise[:400], labels[:400], noise[400:], labels[400:], num_classes=3)
    assert bad < 0.5
