"""Images that are not numbers: the settings that would give them are refused, and the first such image is named."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import one_device, random_like, tiny

from rae_jax.build import part_weights, sampler
from rae_jax.config import checks
from rae_jax.config import keys as config_keys
from rae_jax.errors import UserError
from rae_jax.inference import generate


@pytest.mark.parametrize("path", ["linear", "cosine", "vp"])
@pytest.mark.parametrize("predicted", ["velocity", "noise", "data"])
@pytest.mark.parametrize("method", ["euler", "sde"])
def test_what_is_not_finite_is_refused_and_nothing_else(tiny_config, path, predicted, method):
    """With a model that outputs half of its input, on the grid that starts at pure noise."""
    tiny_config.dit.update({"path": path, "prediction": predicted})
    tiny_config.sampler.update({"grid": "published", "method": method, "num_steps": 4})
    prediction, solver = sampler.prediction(tiny_config), sampler.sampler(tiny_config)
    x = jax.random.normal(jax.random.key(0), (1, *config_keys.latent_shape(tiny_config)))
    out = solver.solve(
        lambda x, t: prediction.to_velocity(0.5 * x, x, t), x, lambda n: jax.random.normal(jax.random.key(n), x.shape)
    )
    if jnp.isfinite(out).all() and float(jnp.abs(out).max()) < 1e3:
        checks.check(tiny_config, one_device(), trains=False)
    else:
        with pytest.raises(UserError, match="config.sampler.grid='published' cannot work: .*: set it to 'plain'"):
            checks.check(tiny_config, one_device(), trains=False)


def test_an_image_that_is_not_finite_is_named():
    config = tiny()
    config.sampler.num_steps, latent = 2, config_keys.latent_shape(tiny())
    parts = random_like({"dit": part_weights.shapes(config, "dit")}, seed=2, scale=0.2)
    statistics = {"mean": jnp.zeros(latent), "var": jnp.ones(latent)}
    decoder = random_like(part_weights.shapes(config, "decoder"), seed=1, scale=0.2)
    table = jnp.asarray(parts["dit"]["label_embed"]["table"]).at[3].set(jnp.nan)
    dit = {**parts["dit"], "label_embed": {"table": table}}
    whole, mesh = {"decoder": decoder, "statistics": statistics, "dit": dit}, one_device()
    found = generate.batches(
        generate.make_sampler(config, mesh), whole, np.array([1, 2, 3, 4, 5]), mesh, batch_size=2, seed=0
    )
    assert next(found)[1].shape == (2, 32, 32, 3)
    with pytest.raises(UserError, match=r"image 2 \(label 3\) is not finite: check the weights and config.sampler"):
        next(found)
