"""Parts of the oracles of training/test_dit_step.py and training/test_decoder_step.py, written from the equations.

Networks are the project's modules, which other tests compare with PyTorch. All else is NumPy in float64.
"""

import jax
import numpy as np


def latents(config, autoencoder, params, images):
    """[B, h, w, D] of uint8 images: the encoder's last tokens, each with mean 0 and variance 1."""
    mean, std = (np.asarray(config.encoder[name], np.float32) for name in ("mean", "std"))
    encode = jax.jit(lambda p, x: autoencoder.encoder.apply({"params": p}, x))
    tokens = np.float64(encode(params, (images / np.float32(255) - mean) / std))[-1]
    tokens = (tokens - tokens.mean(-1, keepdims=True)) / np.sqrt(tokens.var(-1, keepdims=True) + 1e-6)
    side = round(tokens.shape[1] ** 0.5)
    return np.float32(tokens.reshape(len(tokens), side, side, -1))


def norm(tree):
    """The norm of all leaves together."""
    return np.sqrt(sum(np.square(np.float64(leaf)).sum() for leaf in jax.tree.leaves(tree)))


def moments(opt_state):
    """(first, second) moments in AdamW's state."""
    (adam,) = [s for s in jax.tree.leaves(opt_state, is_leaf=lambda s: hasattr(s, "mu")) if hasattr(s, "mu")]
    return adam.mu, adam.nu


def check_adamw(before, after, gradient, *, step, rate, train, tolerance=1e-4):
    """Compare AdamW's step number `step`, from 1, on `gradient`, from (parameters, its state) to the same.

    `tolerance`: of the gradient, relative to its largest number. New parameters are compared with the formula of the
    moments that were found: it divides by the root of the second, which amplifies a gradient of rounding alone.
    """
    scale = max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(gradient))
    (params, old), (new_params, new) = ((p, moments(state)) for p, state in (before, after))
    for power, decay, then, now in zip((1, 2), (train.b1, train.b2), old, new, strict=True):
        wanted = jax.tree.map(
            lambda m, g, d=decay, n=power: d * np.float64(m) + (1 - d) * np.float64(g) ** n, then, gradient
        )
        close(now, wanted, atol=(1 - decay) * power * tolerance * scale**power)

    def moved(path, p, first, second):
        first, second = np.float64(first) / (1 - train.b1**step), np.float64(second) / (1 - train.b2**step)
        constant = path[-1].key == "frequencies"
        return p - (0.0 if constant else rate * (first / (np.sqrt(second) + 1e-8) + train.weight_decay * np.float64(p)))

    close(new_params, jax.tree_util.tree_map_with_path(moved, params, *new), atol=1e-6)


def check_average(average, params, new_average, decay):
    """Compare with decay * average + (1 - decay) * new parameters."""
    close(new_average, jax.tree.map(lambda a, p: decay * np.float64(a) + (1 - decay) * np.float64(p), average, params))


def close(found, expected, *, rtol=1e-5, atol=1e-6):
    """Compare two trees leaf by leaf."""
    for (path, a), b in zip(jax.tree.leaves_with_path(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=atol, err_msg=jax.tree_util.keystr(path))
