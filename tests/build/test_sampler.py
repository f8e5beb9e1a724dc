"""The path, prediction and sampler that the config selects, against their equations in closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from configs import small
from rae_jax.build import models, objectives, sampler
from rae_jax.config import keys as config_keys
from rae_jax.diffusion import flow


def _coefficients(path, t, xp=np):
    """(alpha, sigma, d alpha / dt, d sigma / dt) at times t, written out."""
    match path:
        case "linear":
            return 1 - t, t, -xp.ones_like(t), xp.ones_like(t)
        case "cosine":
            angle = np.pi / 2 * t
            return xp.cos(angle), xp.sin(angle), -np.pi / 2 * xp.sin(angle), np.pi / 2 * xp.cos(angle)
        case "vp":
            log_sigma = -0.25 * (1 - t) ** 2 * 19.9 - 0.5 * (1 - t) * 0.1
            alpha, sigma = xp.sqrt(-xp.expm1(2 * log_sigma)), xp.exp(log_sigma)
            d_sigma = (0.5 * (1 - t) * 19.9 + 0.05) * sigma
            return alpha, sigma, -sigma * d_sigma / alpha, d_sigma


PATHS, PREDICTIONS = ("linear", "cosine", "vp"), ("velocity", "noise", "data")


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("path", PATHS)
def test_the_config_s_path_and_prediction_are_their_equations(path, prediction, tiny_config):
    tiny_config.dit.update({"path": path, "prediction": prediction})
    x, noise = np.random.default_rng(3).normal(size=(2, 4, 2, 2, 5))
    t = np.array([0.1, 0.3, 0.6, 0.9])
    coefficients = _coefficients(path, t[:, None, None, None])
    found = sampler.prediction(tiny_config)
    for ours, theirs in zip(found.path.at(jnp.asarray(t), x), coefficients, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
    alpha, sigma, d_alpha, d_sigma = coefficients
    velocity = d_alpha * x + d_sigma * noise
    wanted = {"velocity": velocity, "noise": noise, "data": x}[prediction]
    x, noise, t, x_t = (jnp.asarray(array) for array in (x, noise, t, alpha * x + sigma * noise))
    np.testing.assert_allclose(found.target(x, noise, t), wanted, rtol=1e-5, atol=1e-5)
    back = found.to_velocity(jnp.asarray(wanted), x_t, t)
    np.testing.assert_allclose(back, velocity, rtol=1e-4, atol=1e-4)


class _Truth(nn.Module):
    """A DiT that predicts the exact target of the loss, for data that are 0.7 everywhere. It has one parameter."""

    along: str
    prediction: str

    @nn.compact
    def __call__(self, x_t, t, label):
        alpha, sigma, d_alpha, d_sigma = _coefficients(self.along, t[:, None, None, None], jnp)
        x = jnp.full_like(x_t, 0.7)
        noise = (x_t - alpha * x) / sigma
        said = {"velocity": d_alpha * x + d_sigma * noise, "noise": noise, "data": x}[self.prediction]
        return said + 0.0 * self.param("any", nn.initializers.zeros, ())


@pytest.mark.parametrize("path, prediction", [("linear", "data"), ("cosine", "velocity"), ("vp", "noise")])
def test_a_model_that_predicts_the_target_has_no_loss(path, prediction, tiny_config, monkeypatch):
    tiny_config.dit.update({"path": path, "prediction": prediction})
    tiny_config.dit.train.time = "uniform"
    monkeypatch.setattr(models, "dit", lambda config: _Truth(path, prediction))
    init, step = objectives.init_and_step(tiny_config, "dit")
    latent = (16, *config_keys.latent_shape(tiny_config))
    batch = {"latent": jnp.full(latent, 0.7), "label": jnp.zeros(16, jnp.int32)}
    frozen = {"statistics": {"mean": jnp.zeros(latent[1:]), "var": jnp.full(latent[1:], 1 - 1e-5)}}
    _, metrics = jax.jit(step)(init(jax.random.key(0)), frozen, batch, jax.random.key(1))
    assert float(metrics["loss"]) < 1e-7


MEAN, STD = 0.6, 0.5  # of Gaussian data


def _expected(path, x_t, t, xp=np):
    """Return the predictions of the best model at x_t, which are expectations; and the score."""
    alpha, sigma, d_alpha, d_sigma = _coefficients(path, t, xp)
    score = -(x_t - alpha * MEAN) / ((alpha * STD) ** 2 + sigma**2)
    x, noise = MEAN - alpha * STD**2 * score, -sigma * score
    return {"velocity": d_alpha * x + d_sigma * noise, "noise": noise, "data": x, "score": score}


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("path", PATHS)
def test_the_config_s_flow_ends_in_the_data(path, prediction, tiny_config):
    """For Gaussian data the flow keeps the distance from the mean in units of the standard deviation."""
    tiny_config.dit.update({"path": path, "prediction": prediction})
    tiny_config.dit.time_shift = 1.0
    tiny_config.sampler.update({"method": "heun", "num_steps": 200})
    solver, to_velocity = sampler.sampler(tiny_config), sampler.prediction(tiny_config).to_velocity
    velocity = flow.undivided(lambda x, t: to_velocity(_expected(path, x, t[:, None], jnp)[prediction], x, t))
    times = solver.times
    (alpha, end_alpha), (sigma, end_sigma), _, _ = _coefficients(path, np.float64([times[0], times[-1]]))
    normal = np.linspace(-2.0, 2.0, 5)[:, None]
    start = alpha * MEAN + np.hypot(alpha * STD, sigma) * normal
    found = solver.solve(velocity, jnp.asarray(start), None)
    end = end_alpha * MEAN + np.hypot(end_alpha * STD, end_sigma) * normal
    np.testing.assert_allclose(found, end, atol=2e-3)
    np.testing.assert_allclose(end, MEAN + STD * normal, atol=0.03)


@pytest.mark.parametrize("prediction", ["data", "data_in_velocity"])
@pytest.mark.parametrize("method", ["euler", "heun"])
def test_few_steps_end_in_the_data_that_the_model_predicts(method, prediction, tiny_config):
    """Heun's mean would take a velocity at the data, where the noise that is left is divided by nearly nothing."""
    tiny_config.dit.update({"prediction": prediction, "time_shift": 1.0})
    tiny_config.sampler.update({"method": method, "num_steps": 3})
    to_velocity = sampler.prediction(tiny_config).to_velocity
    velocity = flow.undivided(lambda x, t: to_velocity(jnp.full_like(x, 0.5), x, t))
    found = sampler.sampler(tiny_config).solve(velocity, jnp.linspace(-2.0, 2.0, 5)[:, None], None)
    np.testing.assert_allclose(found, 0.5, atol=5e-3)  # 'data' stops at t = 0.001


def _diffusion(name, path, t):
    match name:
        case "constant":
            return 1.0
        case "score_based":
            alpha, sigma, d_alpha, d_sigma = _coefficients(path, t)
            return sigma * d_sigma - d_alpha / alpha * sigma**2
        case "sigma":
            return _coefficients(path, t)[1]
        case "linear":
            return t
        case "decreasing":
            return 0.25 * (1 - np.cos(np.pi * t)) ** 2
        case "increasing_decreasing":
            return np.sin(np.pi * t) ** 2


SDES = (
    *(("linear", "score_based", "none"), ("cosine", "score_based", "mean"), ("vp", "score_based", "tweedie")),
    *(("vp", "sigma", "mean"), ("vp", "constant", "none"), ("cosine", "linear", "euler")),
    *(("cosine", "decreasing", "tweedie"), ("vp", "decreasing", "mean"), ("linear", "increasing_decreasing", "none")),
)


@pytest.mark.parametrize("path, diffusion, last_step", SDES)
def test_the_config_s_sde_is_its_equations(path, diffusion, last_step, tiny_config):
    """For Gaussian data, whose score is known: SiT's equations (arXiv 2401.08740), in which data have the time 0."""
    tiny_config.dit.update({"path": path, "time_shift": 0.5})
    tiny_config.sampler.update({"method": "sde", "num_steps": 6, "last_step_size": 0.1})
    tiny_config.sampler.update({"diffusion": diffusion, "last_step": last_step})
    first = 0.999 if path == "vp" or diffusion == "score_based" else 1.0
    last = {"vp": 0.001}.get(path, 0.0) if last_step == "none" else 0.1
    times = np.linspace(first, last, 7)
    times = 0.5 * times / (1 - 0.5 * times)  # shifted
    noises = np.random.default_rng(0).normal(size=(6, 4, 3))
    x = np.random.default_rng(1).normal(size=(4, 3))
    velocity = flow.undivided(lambda x, t: _expected(path, x, t[:, None], jnp)["velocity"])
    found = sampler.sampler(tiny_config).solve(velocity, jnp.asarray(x), jnp.asarray(noises).__getitem__)

    for t, t_next, noise in zip(times[:-1], times[1:], noises, strict=True):
        e, w = _expected(path, x, t), _diffusion(diffusion, path, t)
        x = x + (t_next - t) * (e["velocity"] - w * e["score"]) + np.sqrt(2 * w * (t - t_next)) * noise
    if last_step != "none":
        t = times[-1]
        e, w = _expected(path, x, t), _diffusion(diffusion, path, t)
        steps = {"mean": x - t * (e["velocity"] - w * e["score"]), "euler": x - t * e["velocity"], "tweedie": e["data"]}
        x = steps[last_step]
    np.testing.assert_allclose(found, x, rtol=1e-3, atol=1e-3)


def test_times_of_data_in_velocity_are_not_truncated():
    """The logits are normal without bounds; other predictions have no time above 0.999."""
    config = small.get_config()
    config.dit.train.update({"time": "logit_normal", "time_mean": 2.0, "time_std": 2.5})
    for name, most in (("data_in_velocity", 1.0), ("velocity", 0.999)):
        config.dit.prediction = name
        times = np.float64(sampler.time_fn(config)(jax.random.key(0), 20_000))
        assert (times.max() > 0.999) == (most == 1.0) and times.max() <= most and times.min() >= 0
        if most == 1.0:
            inside = times[(times > 1e-6) & (times < 1 - 1e-6)]
            logits = np.log(inside / (1 - inside))
            assert abs(logits.mean() - 2.0) < 0.1 and abs(logits.std() - 2.5) < 0.1
