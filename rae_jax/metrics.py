"""Metrics of images and features. Images are [B, H, W, 3] in [0, 1]; features are [N, D]."""

from typing import NamedTuple

import dm_pix
import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.linalg


def psnr(images, reference):
    """Peak signal-to-noise ratio in dB per image, [B]; peak 1."""
    return dm_pix.psnr(images, reference)


def ssim(images, reference):
    """Structural similarity per image, [B]: Gaussian window 11, sigma 1.5, data range 1 (Wang et al. 2004).

    The mean over all pixels, windows at the edge going on in the image's reflection, as torchmetrics 1.9 has it; Wang,
    and older versions of torchmetrics, leave out 5 pixels at each edge. Sides of 6 and more.
    """
    edge = ((0, 0), (5, 5), (5, 5), (0, 0))
    return dm_pix.ssim(*(jnp.pad(x, edge, mode="reflect") for x in (images, reference)))


class Moments(NamedTuple):
    """Of a set of features: how many, their mean [D], and the sum of outer products of differences from it [D, D].

    float64; as they start out, those of no feature at all.
    """

    count: int = 0
    mean: np.ndarray | float = 0.0
    scatter: np.ndarray | float = 0.0


def moments(features):
    """Moments of features [N, D], N at least 1."""
    features = np.asarray(features, np.float64)
    mean = features.mean(0)
    centred = features - mean
    return Moments(len(features), mean, centred.T @ centred)


def merge(a, b):
    """Moments of two sets together (Chan et al.); b's is not empty."""
    count, delta = a.count + b.count, b.mean - a.mean
    between = np.outer(delta, delta) * (a.count * b.count / count)
    return Moments(count, a.mean + delta * (b.count / count), a.scatter + b.scatter + between)


def frechet_distance(a, b):
    """|mu_a - mu_b|^2 + tr(C_a + C_b - 2 sqrt(C_a C_b)) between the Gaussians of two `Moments` of two features or more.

    The trace of the square root comes from eigenvalues of sqrt(C_a) C_b sqrt(C_a), which is symmetric: no
    complex numbers, and no trouble where a covariance is singular. float64.
    """
    cov_a, cov_b = (m.scatter / (m.count - 1) for m in (a, b))
    values, vectors = scipy.linalg.eigh(cov_a)
    root = (vectors * np.sqrt(np.maximum(values, 0.0))) @ vectors.T
    cross = np.sqrt(np.maximum(scipy.linalg.eigvalsh(root @ cov_b @ root), 0.0)).sum()
    difference = a.mean - b.mean
    return float(difference @ difference + np.trace(cov_a) + np.trace(cov_b) - 2.0 * cross)


def linear_probe(train, train_labels, test, test_labels, *, num_classes, steps=200, weight_decay=1e-4):
    """Accuracy on `test` of logistic regression fitted to `train` features by L-BFGS; features are standardised."""
    mean, std = train.mean(0), train.std(0) + 1e-6
    train, test = jnp.asarray((train - mean) / std), jnp.asarray((test - mean) / std)

    def loss(params):
        logits = train @ params["kernel"] + params["bias"]
        cross_entropy = optax.softmax_cross_entropy_with_integer_labels(logits, train_labels).mean()
        return cross_entropy + weight_decay * jnp.square(params["kernel"]).sum()

    solver = optax.lbfgs()
    params = {"kernel": jnp.zeros((train.shape[1], num_classes)), "bias": jnp.zeros(num_classes)}
    value_and_grad = optax.value_and_grad_from_state(loss)

    def step(carry, _):
        params, state = carry
        value, grad = value_and_grad(params, state=state)
        updates, state = solver.update(grad, state, params, value=value, grad=grad, value_fn=loss)
        return (optax.apply_updates(params, updates), state), None

    fit = jax.jit(lambda carry: jax.lax.scan(step, carry, length=steps)[0][0])
    params = fit((params, solver.init(params)))
    predicted = np.asarray((test @ params["kernel"] + params["bias"]).argmax(-1))
    return float((predicted == np.asarray(test_labels)).mean())
