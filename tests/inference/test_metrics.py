"""Metrics against closed forms."""

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
import scipy.ndimage
import scipy.optimize
import scipy.special

from rae_jax.inference import metrics


def _with_moments(rng, mean, root, n=4000):
    """Samples whose empirical mean and covariance are exactly `mean` and root @ root.T."""
    x = rng.normal(size=(n, len(mean)))
    x -= x.mean(0)
    white = np.linalg.inv(np.linalg.cholesky(np.cov(x, rowvar=False)))
    return x @ white.T @ root.T + mean


def _distance(a, b):
    return metrics.frechet_distance(metrics.moments(a), metrics.moments(b))


def test_frechet_distance_of_commuting_gaussians():
    rng = np.random.default_rng(0)
    rotation = np.linalg.qr(rng.normal(size=(5, 5)))[0]
    sigma_a, sigma_b = np.array([1.0, 2, 3, 4, 0.1]), np.array([2.0, 1, 0.5, 3, 0.0])
    a = _with_moments(rng, np.arange(5.0), rotation * sigma_a)
    b = _with_moments(rng, np.zeros(5), rotation * sigma_b)
    expected = (np.arange(5.0) ** 2).sum() + ((sigma_a - sigma_b) ** 2).sum()
    assert _distance(a, b) == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_is_the_definition_by_sqrtm():
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=(200, 6)), rng.normal(size=(300, 6)) @ rng.normal(size=(6, 6)) + 0.3
    ca, cb = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = scipy.linalg.sqrtm(ca @ cb).real
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(ca + cb - 2 * root)
    assert _distance(a, b) == pytest.approx(expected, rel=1e-8)


def _few(num, width, seed):
    """Two sets of fewer features than dimensions, all at least 0 and of unlike scales, as Inception's are."""
    rng = np.random.default_rng(seed)
    mix = rng.normal(size=(width, width)) * np.exp(-4 * rng.random(width))
    return (np.maximum(rng.normal(size=(num, width)) @ mix + shift, 0.0) for shift in (0.3, 0.4))


@pytest.mark.parametrize(
    "num, width", [(60, 160), pytest.param(500, 2048, marks=[pytest.mark.slow, pytest.mark.by_hand])]
)
def test_frechet_distance_where_sqrtm_is_complex(num, width):
    """tr sqrt(C_a C_b) is the sum of the singular values of the product of the centred features themselves."""
    a, b = _few(num, width, 0)
    covs = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    assert np.iscomplexobj(scipy.linalg.sqrtm(covs[0] @ covs[1])), "a case that tests nothing"
    cross = np.linalg.svd((a - a.mean(0)) @ (b - b.mean(0)).T, compute_uv=False).sum() / (num - 1)
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(covs[0] + covs[1]) - 2 * cross
    assert _distance(a, b) == pytest.approx(expected, rel=1e-9)
    assert _distance(b, a) == pytest.approx(expected, rel=1e-9)
    assert _distance(a, a) == pytest.approx(0, abs=1e-9 * expected)


def test_frechet_distance_from_mean_and_covariance():
    a, b = _few(40, 7, 1)
    given = metrics.Gaussian(b.mean(0), np.cov(b, rowvar=False))
    assert metrics.frechet_distance(metrics.moments(a), given) == pytest.approx(_distance(a, b), rel=1e-9)
    nothing = metrics.Gaussian(np.zeros(7), np.zeros((7, 7)))
    expected = (b.mean(0) ** 2).sum() + np.trace(given.covariance)
    assert metrics.frechet_distance(nothing, given) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("num, split", [(30, 100), (30, 12), (24, 12)])
def test_inception_score_is_adms(num, split):
    """One split; two splits and a smaller one; two splits. Some classes have the probability 0."""
    logits = (4 * np.random.default_rng(0).normal(size=(num, 9))).astype(np.float32)
    logits[:, 3] -= 1e4
    scores = []
    for start in range(0, num, split):
        p = np.exp(logits[start : start + split].astype(np.float64))
        p /= p.sum(1, keepdims=True)
        terms = np.zeros_like(p)
        there = p > 0
        terms[there] = p[there] * np.log((p / np.maximum(p.mean(0), 1e-300))[there])
        scores.append(np.exp(terms.sum(1).mean()))
    assert metrics.inception_score(logits, split=split) == pytest.approx(np.mean(scores), rel=1e-12)
    many = np.tile(logits, (5000 // num + 1, 1))  # ADM's splits are of 5,000
    assert metrics.inception_score(many) == metrics.inception_score(many, split=5000)
    assert metrics.inception_score(np.zeros((5, 9))) == pytest.approx(1.0)
    assert metrics.inception_score(1e3 * np.eye(9)) == pytest.approx(9.0)


def _precision_recall(generated, reference):
    """The definition, in float64."""

    def distances(a, b):
        return np.linalg.norm(a[:, None] - b[None], axis=-1)

    def covered(points, centres):
        radii = np.sort(distances(centres, centres), axis=1)[:, 3]  # the first is the point itself
        return (distances(points, centres) <= radii).any(1).mean()

    return covered(generated, reference), covered(reference, generated)


@pytest.mark.parametrize("offset, block", [(0.0, 1024), (0.0, 7), (500.0, 16)])
def test_precision_and_recall_are_their_definition(offset, block):
    """Also far from zero, where float32 has few digits left, and whatever the blocks."""
    rng = np.random.default_rng(0)
    reference = rng.normal(size=(50, 12)) + offset
    generated = np.concatenate([0.7 * rng.normal(size=(30, 12)), 3 + rng.normal(size=(7, 12))]) + offset
    found = metrics.precision_recall(generated, reference, block=block)
    expected = _precision_recall(generated, reference)
    assert min(expected) > 0.05 and max(expected) < 0.95 and expected[0] != expected[1]
    assert found == pytest.approx(expected, rel=1e-12)
    np.testing.assert_array_equal(metrics.precision_recall(reference, reference, block=block), (1.0, 1.0))


def test_metrics_of_features_are_torch_fidelitys():
    """Compare with torch-fidelity's functions that take features."""
    torch = pytest.importorskip("torch")
    fid = pytest.importorskip("torch_fidelity.metric_fid", reason="torch-fidelity is not installed")
    from torch_fidelity import metric_isc, metric_prc

    rng = np.random.default_rng(0)
    a, b = (np.abs(rng.normal(size=(n, 40)) + shift).astype(np.float32) for n, shift in ((300, 0.0), (200, 0.1)))
    a, b = a * rng.random((300, 1), np.float32), b * rng.random((200, 1), np.float32)
    theirs = [torch.from_numpy(x) for x in (a, b)]
    (expected,) = fid.fid_statistics_to_metric(*map(fid.fid_features_to_statistics, theirs), False).values()
    assert _distance(a, b) == pytest.approx(expected, rel=1e-6)
    expected = metric_prc.prc_features_to_metric(
        *theirs, prc_neighborhood=3, prc_batch_size=64, save_cpu_ram=False, verbose=False
    )
    assert 0.5 < expected["precision"] < 1 and 0.5 < expected["recall"] < 1
    found = metrics.precision_recall(a, b, block=64)
    assert found == pytest.approx((expected["precision"], expected["recall"]), rel=1e-6)
    expected = metric_isc.isc_features_to_metric(10 * theirs[0], splits=3, shuffle=False)["inception_score_mean"]
    assert metrics.inception_score(10 * a, split=100) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("batch_size", [1, 7, 64, 200])
def test_moments_do_not_depend_on_the_batches(batch_size):
    features = np.random.default_rng(2).normal(size=(200, 6)) + 1e4  # far from zero: squares minus square would cancel
    found = metrics.Moments()
    for start in range(0, 200, batch_size):
        found = metrics.merge(found, metrics.moments(features[start : start + batch_size]))
    assert found.count == 200
    np.testing.assert_allclose(found.mean, features.mean(0), rtol=1e-14)
    np.testing.assert_allclose(found.scatter / 199, np.cov(features, rowvar=False), rtol=1e-9, atol=1e-9)


def test_psnr_and_ssim():
    rng = np.random.default_rng(0)
    a = rng.uniform(0.2, 0.8, (2, 32, 32, 3)).astype(np.float32)
    np.testing.assert_allclose(metrics.psnr(a + 0.1, a), 20.0, atol=1e-3)
    np.testing.assert_array_equal(metrics.psnr(a, a), 100.0)  # and not infinite, which no mean survives
    np.testing.assert_allclose(metrics.ssim(a, a), 1.0, atol=1e-5)
    # Images constant within every window: only the luminance term is left.
    one, two = np.full((1, 16, 16, 3), 0.4, np.float32), np.full((1, 16, 16, 3), 0.6, np.float32)
    expected = (2 * 0.4 * 0.6 + 1e-4) / (0.4**2 + 0.6**2 + 1e-4)
    np.testing.assert_allclose(metrics.ssim(one, two), expected, rtol=1e-3)


def test_psnr_and_ssim_are_their_definitions():
    """Per image, and SSIM per channel over all pixels and their reflections, as torchmetrics has them; in float64."""
    rng = np.random.default_rng(1)
    a = scipy.ndimage.gaussian_filter(rng.uniform(size=(3, 40, 33, 3)), (0, 2, 2, 0))
    b = np.clip(a + 0.1 * rng.normal(size=a.shape), 0, 1)
    window = np.exp(-0.5 * (np.arange(-5, 6) / 1.5) ** 2)
    window /= window.sum()

    def local(x):
        """Weighted means over the 11x11 window around each pixel."""
        x = np.pad(x, ((0, 0), (5, 5), (5, 5), (0, 0)), mode="reflect")
        patches = np.lib.stride_tricks.sliding_window_view(x, (11, 11), (1, 2))
        return np.einsum("nhwcij,i,j->nhwc", patches, window, window)

    mean_a, mean_b = local(a), local(b)
    var_a, var_b, cov = local(a * a) - mean_a**2, local(b * b) - mean_b**2, local(a * b) - mean_a * mean_b
    luminance = (2 * mean_a * mean_b + 0.01**2) / (mean_a**2 + mean_b**2 + 0.01**2)
    structure = (2 * cov + 0.03**2) / (var_a + var_b + 0.03**2)
    expected = (luminance * structure).mean((1, 2, 3))
    a, b = (jnp.asarray(x, jnp.float32) for x in (a, b))
    np.testing.assert_allclose(metrics.ssim(a, b), expected, atol=1e-5)
    expected = -10 * np.log10(np.square(np.float64(a) - np.float64(b)).mean((1, 2, 3)))
    np.testing.assert_allclose(metrics.psnr(a, b), expected, atol=1e-4)


def _probed(train, labels, test, num_classes, weight_decay):
    """Classes of the test features by scipy, in float64: the mean and std of the training features standardise both."""
    mean, std = train.mean(0), train.std(0)
    train, test, one_hot = (train - mean) / std, (test - mean) / std, np.eye(num_classes)[labels]

    def split(params):
        return params[num_classes:].reshape(-1, num_classes), params[:num_classes]

    def loss(params):
        kernel, bias = split(params)
        log_p = scipy.special.log_softmax(train @ kernel + bias, axis=1)
        error = (np.exp(log_p) - one_hot) / len(train)
        gradient = train.T @ error + 2 * weight_decay * kernel
        value = weight_decay * np.square(kernel).sum() - (one_hot * log_p).sum(1).mean()
        return value, np.concatenate([error.sum(0), gradient.ravel()])

    start, options = np.zeros((1 + train.shape[1]) * num_classes), {"maxiter": 5000, "ftol": 1e-15, "gtol": 1e-9}
    fitted = scipy.optimize.minimize(loss, start, jac=True, method="L-BFGS-B", options=options)
    kernel, bias = split(fitted.x)
    return (test @ kernel + bias).argmax(1)


def test_linear_probe_is_a_regression_on_features_standardised_by_the_training_set():
    """Few training features of different scales; of one class there is no test feature, so its statistics differ."""
    rng = np.random.default_rng(0)
    labels, scales = rng.integers(0, 3, 1060), np.exp(2 * rng.normal(size=20))
    features = (0.35 * rng.normal(size=(3, 20))[labels] + rng.normal(size=(1060, 20)) + 1) * scales
    train, test = (features[:60], labels[:60]), (features[60:][labels[60:] > 0], labels[60:][labels[60:] > 0])
    expected = (_probed(*train, test[0], 3, weight_decay=1e-4) == test[1]).mean()
    found = metrics.linear_probe(np.float32(train[0]), train[1], np.float32(test[0]), test[1], num_classes=3)
    assert found == pytest.approx(expected, abs=1.5 / len(test[1]))


def test_linear_probe_separates_what_is_separable_and_nothing_else():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 600)
    features = np.eye(3)[labels] @ rng.normal(size=(3, 8)) + 0.05 * rng.normal(size=(600, 8))
    good = metrics.linear_probe(features[:400], labels[:400], features[400:], labels[400:], num_classes=3)
    assert good > 0.98
    noise = rng.normal(size=(600, 8))
    bad = metrics.linear_probe(noise[:400], labels[:400], noise[400:], labels[400:], num_classes=3)
    assert bad < 0.5
