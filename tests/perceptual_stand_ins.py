"""Small networks in the places of Inception and LPIPS; models/test_inception.py and test_lpips.py test these two."""

import contextlib
import types

import jax.numpy as jnp
import numpy as np
import pytest

from rae_jax.inference import perceptual_metrics

SIZES = {"pool": 12, "spatial": 9, "logits": 10}


def features(params, images):
    height, width = (size // 4 for size in images.shape[1:3])
    x = images[:, : 4 * height, : 4 * width].reshape(-1, 4, height, 4, width, 3).mean((2, 4)).reshape(-1, 48)
    return {name: jnp.tanh(x @ params[name]) for name in SIZES}


@contextlib.contextmanager
def in_place():
    """Yield the weights of the network in the place of Inception."""
    lpips = types.SimpleNamespace(apply=lambda variables, a, b: variables["params"] * jnp.abs(a - b).mean((1, 2, 3)))
    rng = np.random.default_rng(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(perceptual_metrics, "features", features)
        patch.setattr(perceptual_metrics, "Lpips", lambda: lpips)
        patch.setattr(perceptual_metrics, "MOMENTS_OF", {name: SIZES[name] for name in ("pool", "spatial")})
        yield {name: jnp.asarray(rng.normal(size=(48, size)), jnp.float32) for name, size in SIZES.items()}
