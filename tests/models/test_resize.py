"""Bicubic resizing against torch, or against values that torch gave where it is absent."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rae_jax.models import resize

SIZES = [(256, 224), (512, 448), (320, 224), (200, 224)]


@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize("old, new", SIZES)
def test_images_are_resized_as_torch_does(old, new, antialias):
    torch = pytest.importorskip("torch")
    images = np.random.default_rng(0).random((2, old, old, 3), np.float32)
    theirs = torch.nn.functional.interpolate(
        torch.from_numpy(images).permute(0, 3, 1, 2), size=(new, new), mode="bicubic", antialias=antialias
    )
    ours = jax.jit(lambda x: resize.bicubic(x, new, new, antialias=antialias))(images)
    assert np.abs(ours - theirs.permute(0, 2, 3, 1).numpy()).max() <= 2e-6


@pytest.mark.parametrize(
    "new, antialias, expected",
    [
        (3, False, [0.14814901, 4.0, 14.07407093]),
        (3, True, [0.16923104, 4.19534874, 13.33845901]),
        (8, False, [-0.09283447, 0.18756104, 1.17651367, 2.61938477, 5.44165039, 8.47143555, 13.39508057, 16.64984131]),
        (8, True, [-0.07195572, 0.24374929, 1.12890625, 2.84765625, 5.34765625, 8.62890625, 13.48818398, 16.50368881]),
    ],
)
def test_a_parabola_has_torch_s_values(new, antialias, expected):
    image = jnp.broadcast_to(jnp.arange(5.0) ** 2, (5, 5))[None, :, :, None]
    resized = resize.bicubic(image, 5, new, antialias=antialias)
    np.testing.assert_allclose(resized[0, 2, :, 0], expected, atol=2e-6)


def test_rows_and_columns_are_not_confused():
    image = jnp.zeros((5, 7, 1)).at[4].set(1.0)
    resized = resize.bicubic(image, 10, 7)
    assert resized.shape == (10, 7, 1)
    np.testing.assert_allclose(resized, jnp.broadcast_to(resized[:, :1], resized.shape), atol=1e-6)
    assert float(resized[9, 0, 0]) > 0.9 and abs(float(resized[0, 0, 0])) < 1e-6
