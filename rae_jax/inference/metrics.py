"""Metrics of images and features. Images are [B, H, W, 3] in [0, 1]; features are [N, D]."""

import dataclasses
from typing import NamedTuple

import dm_pix
import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.linalg
import scipy.special

SPLIT = 5000  # images in a split; the Inception Score is the mean over the splits of a set, in order
NEIGHBOURS = 3  # precision and recall: a radius is the distance to the third nearest neighbour
_BLOCK = 1024  # rows of the matrix of distances that are in memory at once


def psnr(images, reference):
    """Return the peak signal-to-noise ratio in dB of each image, [B]; peak 1.

    At most 100 dB: equal images have an infinite ratio, which would make the mean of a set infinite.
    """
    return jnp.minimum(dm_pix.psnr(images, reference), 100.0)


def ssim(images, reference):
    """Return the structural similarity per image, [B]: Gaussian window 11, sigma 1.5, data range 1 (Wang et al. 2004).

    The mean is over all pixels. The image is continued by reflection at its edges, as in torchmetrics 1.9; Wang et al.
    and older versions of torchmetrics leave out 5 pixels at each edge. Sides must be at least 6.
    """
    edge = ((0, 0), (5, 5), (5, 5), (0, 0))
    return dm_pix.ssim(*(jnp.pad(x, edge, mode="reflect") for x in (images, reference)))


class Moments(NamedTuple):
    """Count of a set of features, their mean [D], and the sum [D, D] of outer products of differences from the mean.

    float64. The defaults are the moments of an empty set.
    """

    count: int = 0
    mean: np.ndarray | float = 0.0
    scatter: np.ndarray | float = 0.0

    @property
    def covariance(self):
        """Return the unbiased covariance [D, D]; it needs at least two features."""
        return self.scatter / (self.count - 1)


@dataclasses.dataclass(frozen=True)
class Gaussian:
    """Mean [D] and covariance [D, D] of a set of features, float64."""

    mean: np.ndarray
    covariance: np.ndarray


def moments(features):
    """Return the Moments of features [N, D], N at least 1."""
    features = np.asarray(features, np.float64)
    mean = features.mean(0)
    centred = features - mean
    return Moments(len(features), mean, centred.T @ centred)


def merge(a, b):
    """Return the Moments of the union of two sets (Chan et al.); `b` must not be empty."""
    count, delta = a.count + b.count, b.mean - a.mean
    between = np.outer(delta, delta) * (a.count * b.count / count)
    return Moments(count, a.mean + delta * (b.count / count), a.scatter + b.scatter + between)


def frechet_distance(a, b):
    """Return |mu_a - mu_b|^2 + tr(C_a + C_b - 2 sqrt(C_a C_b)) of two `Gaussian`s or `Moments` (two features or more).

    The trace of the square root comes from the eigenvalues of sqrt(C_a) C_b sqrt(C_a), which is symmetric: no complex
    numbers occur, and a covariance may be singular. float64.
    """
    values, vectors = scipy.linalg.eigh(a.covariance)
    roots = _roots(values)
    root = vectors[:, roots > 0] * roots[roots > 0]  # [D, rank]
    cross = _roots(scipy.linalg.eigvalsh(root.T @ b.covariance @ root)).sum() if root.size else 0.0
    difference = a.mean - b.mean
    return float(difference @ difference + np.trace(a.covariance) + np.trace(b.covariance) - 2.0 * cross)


def _roots(values):
    """Return square roots of a positive semidefinite matrix's eigenvalues; eigenvalues within rounding of 0 give 0."""
    return np.sqrt(np.where(values > np.finfo(np.float64).eps * len(values) * values.max(), values, 0.0))


def inception_score(logits, *, split=SPLIT):
    """Return the mean over splits of exp(mean KL divergence of softmax(logits [N, K]) from the split's mean softmax).

    float64. The last split may be smaller. Source: ADM's evaluator.
    """
    parts = np.split(np.asarray(logits), range(split, len(logits), split))
    return float(np.mean([_score(part.astype(np.float64)) for part in parts]))


def _score(logits):
    log_p = scipy.special.log_softmax(logits, axis=1)
    log_mean = scipy.special.logsumexp(log_p, axis=0) - np.log(len(log_p))
    return np.exp((np.exp(log_p) * (log_p - log_mean)).sum(1).mean())


def precision_recall(generated, reference, *, block=_BLOCK, tick=lambda rows: None):
    """Return (precision, recall) of features [N, D] compared with a reference [M, D], more than three each.

    Precision is the fraction of generated features that lie within the radius of some reference feature; the radius is
    the distance to its third nearest neighbour in the reference. Recall exchanges both sets. float32 on the device,
    `block` rows of distances at a time; `tick` is called with the number of rows of each block, 2 (N + M) in all.
    Source: Kynkäänniemi et al. 2019, as implemented in ADM's evaluator.
    """
    centre = np.mean(reference, 0)  # centred: distances are differences of squares, which cancel less
    generated, reference = (np.asarray(x - centre, np.float32) for x in (generated, reference))
    within = []
    for rows, others in ((generated, reference), (reference, generated)):
        on_device = jnp.asarray(others)
        radii = jnp.asarray(_in_blocks(_radii, others, on_device, block=block, tick=tick))
        within.append(_in_blocks(_are_within, rows, on_device, radii, block=block, tick=tick).mean())
    return tuple(map(float, within))


def _in_blocks(function, rows, *others, block, tick):
    """Return function(rows, *others), `block` rows at a time; the last block is filled up to the same shape."""
    size, blocks = min(block, len(rows)), []
    for start in range(0, len(rows), size):
        block_rows = np.take(rows, range(start, start + size), axis=0, mode="wrap")
        blocks.append(np.asarray(function(block_rows, *others)))
        tick(min(size, len(rows) - start))
    return np.concatenate(blocks)[: len(rows)]


@jax.jit
def _radii(rows, others):
    """Return the squared distance [B] of each row, which is one of the others, to its third nearest neighbour."""
    nearest, _ = jax.lax.top_k(-_distances(rows, others), NEIGHBOURS + 1)  # the first is the row itself
    return -nearest[:, -1]


@jax.jit
def _are_within(rows, others, radii):
    """Return for each row whether it lies within the radius of any of the others, [B]."""
    return (_distances(rows, others) <= radii).any(1)


def _distances(a, b):
    """Return squared distances [A, B]."""
    products = jnp.matmul(a, b.T, precision=jax.lax.Precision.HIGHEST)
    return jnp.maximum(jnp.square(a).sum(1)[:, None] - 2.0 * products + jnp.square(b).sum(1), 0.0)


def linear_probe(train, train_labels, test, test_labels, *, num_classes, steps=200, weight_decay=1e-4):
    """Return the accuracy on `test` of logistic regression on standardised features, fitted to `train` by L-BFGS."""
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
    with jax.default_matmul_precision("highest"):  # a TPU would round float32 to bfloat16
        params = fit((params, solver.init(params)))
        predicted = np.asarray((test @ params["kernel"] + params["bias"]).argmax(-1))
    return float((predicted == np.asarray(test_labels)).mean())
