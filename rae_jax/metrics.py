"""Metrics of images and features. Images are [B, H, W, 3] in [0, 1]; features are [N, D]."""

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
    """Structural similarity per image, [B]: Gaussian window 11, sigma 1.5, data range 1 (Wang et al. 2004)."""
    return dm_pix.ssim(images, reference)


def frechet_distance(a, b):
    """|mu_a - mu_b|^2 + tr(C_a + C_b - 2 sqrt(C_a C_b)) between Gaussians fitted to two sets of features.

    The trace of the square root comes from eigenvalues of sqrt(C_a) C_b sqrt(C_a), which is symmetric: no
    complex numbers, and no trouble where a covariance is singular. float64.
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    values, vectors = scipy.linalg.eigh(cov_a)
    root = (vectors * np.sqrt(np.maximum(values, 0.0))) @ vectors.T
    cross = np.sqrt(np.maximum(scipy.linalg.eigvalsh(root @ cov_b @ root), 0.0)).sum()
    difference = a.mean(0) - b.mean(0)
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
