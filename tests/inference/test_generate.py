"""Trajectories of a tiny DiT^DH with random weights, as the config asks for them, against loops written out."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats
from conftest import one_device, random_like, tiny
from flax import linen as nn

from rae_jax.build import models, objectives, part_weights, sampler
from rae_jax.config import keys as config_keys
from rae_jax.diffusion import flow
from rae_jax.inference import generate
from rae_jax.models import conditions, dit
from rae_jax.training import dit as dit_lib

LABELS = jnp.array([0, 3, 9])


def _random(module, latent, seed):
    x = jnp.zeros((1, *latent))
    shapes = jax.eval_shape(module.init, jax.random.key(0), x, jnp.ones(1), jnp.ones(1, int))["params"]
    return jax.device_put(random_like(shapes, seed=seed, scale=0.3))


@pytest.fixture(scope="module")
def case():
    """A config, its latents' shape, random weights of the DiT and of a narrower guide."""
    config = tiny()
    config.guidance.dit.update(config.dit.copy_and_resolve_references())
    config.guidance.dit.update({"width": 8, "head_width": 16})
    latent = config_keys.latent_shape(config)
    parts = {
        "dit": _random(models.dit(config), latent, 1),
        "guide": _random(models.dit(config, config.guidance.dit), latent, 2),
    }
    return config, latent, parts


def _velocities(config, parts):
    """(of the model, without a label, of the guide): functions of x and a number t."""
    dit, guide = models.dit(config), models.dit(config, config.guidance.dit)
    nobody = jnp.full_like(LABELS, config.data.num_classes)

    def of(module, name, labels):
        apply = jax.jit(lambda x, t: module.apply({"params": parts[name]}, x, jnp.full(3, t), labels))
        return apply

    return of(dit, "dit", LABELS), of(dit, "dit", nobody), of(guide, "guide", LABELS)


def _run(config, latent, parts):
    x = jax.random.normal(jax.random.key(0), (3, *latent))
    solver = sampler.sampler(config)
    velocity = sampler.velocity(config, parts, LABELS)
    out = jax.jit(lambda x: solver.solve(velocity, x, lambda n: _noise(n, x.shape)))(x)
    return x, np.asarray(solver.times), out


def _noise(n, shape):
    return jax.random.normal(jax.random.fold_in(jax.random.key(7), n), shape)


def _close(ours, loop):
    assert float(jnp.abs(ours - loop).max() / jnp.abs(loop).max()) < 1e-4


@pytest.mark.parametrize("method", ["cfg", "autoguidance"])
def test_guided_euler_on_the_published_grid(case, method):
    config, latent, parts = case
    config = config.copy_and_resolve_references()
    config.guidance.update({"method": method, "scale": 1.42, "t_min": 0.1, "t_max": 0.9})
    config.sampler.update({"grid": "published", "num_steps": 12})
    x, times, out = _run(config, latent, parts)
    assert len(times) == 12
    strong, unlabelled, guide = _velocities(config, parts)
    weak = {"cfg": unlabelled, "autoguidance": guide}[method]
    for t, t_next in zip(times, times[1:], strict=False):
        v = strong(x, t)
        if 0.1 <= t <= 0.9:
            v = weak(x, t) + 1.42 * (v - weak(x, t))
        x = x + (t_next - t) * v
    _close(out, x)


@pytest.mark.parametrize("reuse, refresh", [(2, ()), (3, ()), (1, (1, 2, 7))])
def test_the_trunk_s_output_serves_several_steps(case, reuse, refresh):
    """And is made again where the guidance interval begins, where the weak model is used for the first time."""
    config, latent, parts = case
    config = config.copy_and_resolve_references()
    config.guidance.update({"scale": 1.5, "t_min": 0.2, "t_max": 0.65})
    config.sampler.update({"num_steps": 10, "reuse": reuse, "refresh": refresh})
    x, times, out = _run(config, latent, parts)
    dit, nobody = models.dit(config), jnp.full_like(LABELS, config.data.num_classes)

    @functools.partial(jax.jit, static_argnums=0)
    def apply(method, *arguments):
        return dit.apply({"params": parts["dit"]}, *arguments, method=method)

    entered = False
    for n, (t, t_next) in enumerate(zip(times, times[1:], strict=False)):
        inside, batch_t = 0.2 <= t <= 0.65, jnp.full(3, t)
        again = n in (0, *refresh) if refresh else n % reuse == 0
        if again or (inside and not entered):
            made = [apply("trunk", x, batch_t, labels) for labels in (LABELS, nobody)]
        entered = inside
        v, v_null = (apply("head", x, batch_t, s) for s in made)
        x = x + (t_next - t) * (v_null + 1.5 * (v - v_null) if inside else v)
    _close(out, x)


def test_latents_are_denormalised_before_decoding(case):
    """By mean and var of each element, of which some are as small as the epsilon."""
    config, latent, parts = case
    rng = np.random.default_rng(4)
    mean, var = rng.normal(size=latent), np.exp(rng.uniform(np.log(1e-6), np.log(4.0), latent))

    @jax.jit
    def draw(mean, var):
        given = {**parts, "statistics": {"mean": mean, "var": var}}
        return generate.draw(config, given, jax.random.key(0), jnp.arange(3), LABELS)

    plain = np.float64(draw(np.zeros(latent, np.float32), np.full(latent, 1 - 1e-5, np.float32)))
    found = draw(np.float32(mean), np.float32(var))
    np.testing.assert_allclose(found, plain * np.sqrt(var + 1e-5) + mean, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("keys", [{"reuse": 2}, {"method": "heun"}, {"method": "sde"}])
def test_all_of_it_is_traced_as_one_program(case, keys):
    config, latent, parts = case
    config = config.copy_and_resolve_references()
    config.sampler.update(keys)
    whole = {
        "decoder": part_weights.shapes(config, "decoder"),
        "statistics": {"mean": jnp.zeros(latent), "var": jnp.ones(latent)},
        **parts,
    }
    sample = generate.make_sampler(config, one_device())
    drawn, finite = jax.eval_shape(sample, whole, jax.random.key(0), jnp.arange(3, dtype=jnp.uint32), LABELS)
    assert drawn.shape == (3, 32, 32, 3) and drawn.dtype == jnp.uint8 and finite.shape == (3,)


def test_heun_of_a_noise_prediction_on_the_cosine_path(case):
    config, latent, parts = case
    config = config.copy_and_resolve_references()
    config.guidance.method = "none"
    config.dit.update({"path": "cosine", "prediction": "noise"})
    config.sampler.update({"method": "heun", "num_steps": 4})
    x, times, out = _run(config, latent, parts)
    model = _velocities(config, parts)[0]

    def velocity(x, t):
        alpha, sigma = np.cos(np.pi / 2 * t), np.sin(np.pi / 2 * t)
        noise = model(x, t)
        return np.pi / 2 * (alpha * noise - sigma * (x - sigma * noise) / alpha)

    for t, t_next in zip(times, times[1:], strict=False):
        v = velocity(x, t)
        x = x + 0.5 * (t_next - t) * (v + velocity(x + (t_next - t) * v, t_next))
    _close(out, x)


def test_sde_steps_and_the_last_one(case):
    config, latent, parts = case
    config = config.copy_and_resolve_references()
    config.guidance.method = "none"
    config.sampler.update({"method": "sde", "num_steps": 5, "diffusion": "sigma", "last_step": "mean"})
    x, times, out = _run(config, latent, parts)
    factor = flow.shift_factor(latent)
    np.testing.assert_allclose(times, flow.shift_time(np.linspace(1.0, 0.04, 6), factor), rtol=1e-6)  # as published
    model = _velocities(config, parts)[0]

    def drift(x, t):
        v = model(x, t)
        return v + (x + (1 - t) * v)  # w score = -sigma noise / sigma, noise = x + (1 - t) v on the linear path

    for n, (t, t_next) in enumerate(zip(times, times[1:], strict=False)):
        x = x + (t_next - t) * drift(x, t) + np.sqrt(2 * t * (t - t_next)) * _noise(n, x.shape)
    _close(out, x - times[-1] * drift(x, times[-1]))


class _Clock(nn.Module):
    """A DiT that says what time it is, and has a parameter."""

    @nn.compact
    def __call__(self, x, t, label):
        return jnp.broadcast_to(t[:, None, None, None], x.shape) + 0.0 * self.param("any", nn.initializers.zeros, ())


@pytest.mark.parametrize("given, factor", [(0.0, np.sqrt(8 * 8 * 16 / 4096)), (1.0, 1.0), (3.0, 3.0)])
def test_training_and_sampling_shift_times_by_the_same_factor(given, factor, tiny_config):
    tiny_config.dit.time_shift = given
    tiny_config.sampler.num_steps = 4
    expected = flow.shift_time(jnp.linspace(1.0, 0.0, 5), factor)
    np.testing.assert_allclose(generate.times(tiny_config), expected, rtol=1e-6)

    init, step = dit_lib.make(
        autoencoder=None,
        dit=_Clock(),
        condition=conditions.labels(10),
        latent_shape=(2, 2, 3),
        prediction=flow.Prediction(flow.LINEAR, lambda x, noise, t: jnp.zeros_like(x), None, 1.0, 0.0),
        time_fn=lambda key, batch_size: jnp.full(batch_size, 0.25),
        shift_factor=sampler.shift_factor(tiny_config),
        optimiser=optax.sgd(0.1),
        ema_decay=0.9,
        more_ema_decays=(),
        condition_dropout=0.1,
        microbatches=1,
    )
    batch = {"latent": jnp.zeros((2, 2, 2, 3)), "label": jnp.zeros(2, jnp.int32)}
    _, metrics = jax.jit(step)(init(jax.random.key(0)), {"statistics": None}, batch, jax.random.key(1))
    assert float(metrics["loss"]) == pytest.approx(float(expected[3]) ** 2, rel=1e-5)  # of the time 0.25


@pytest.mark.parametrize("time", ["logit_normal", "uniform"])
def test_training_times_stay_where_the_published_ones_are(tiny_config, time):
    """Up to 0.999, of a distribution that lies beyond; from 0.001 where the prediction is not defined at zero."""
    train = tiny_config.dit.train
    for prediction, mean, lowest in (("velocity", 8.0, 0.0), ("velocity", -20.0, 0.0), ("noise", -20.0, 0.001)):
        tiny_config.dit.prediction = prediction
        train.update({"time": time, "time_mean": mean, "time_std": 1.0})
        t = np.asarray(sampler.time_fn(tiny_config)(jax.random.key(0), 20_000))
        assert lowest <= t.min() and t.max() <= 0.999
        ends = (t.min() - lowest, 0.999 - t.max())
        assert min(ends) < 1e-4 if time == "logit_normal" else max(ends) < 1e-3


def test_noise_is_normal_and_new_in_every_step_of_every_image(tiny_config, monkeypatch):
    """With velocity 0, a step of the SDE with w = 1 from t to 0 leaves sqrt(2 t) times its noise and nothing else."""
    tiny_config.guidance.method = "none"
    tiny_config.sampler.update({"method": "sde", "diffusion": "constant", "last_step": "none"})
    monkeypatch.setattr(sampler, "velocity", lambda *_: flow.undivided(lambda x, t: jnp.zeros_like(x)))
    latent = config_keys.latent_shape(tiny_config)
    parts = {"dit": None, "statistics": {"mean": jnp.zeros(latent), "var": jnp.full(latent, 1 - 1e-5)}}
    key, indices = jax.random.key(0), jnp.arange(20)
    samples = [generate.first_noise(tiny_config, key, indices)]
    for steps in (1, 2):
        tiny_config.sampler.num_steps = steps
        drawn = generate.draw(tiny_config, parts, key, indices, jnp.zeros(20, jnp.int32))
        samples.append(drawn / np.sqrt(2 * generate.times(tiny_config)[-2]))
    for values in map(np.ravel, samples):
        moments = [values.mean(), values.var() - 1.0, scipy.stats.kurtosis(values)]
        assert (np.abs(moments) < 4 * np.sqrt(np.array([1, 2, 24]) / values.size)).all()
        assert scipy.stats.kstest(values, scipy.stats.norm.cdf).pvalue > 0.01
    images = np.concatenate(samples).reshape(60, -1)
    correlations = np.corrcoef(images) - np.eye(60)
    assert np.abs(correlations).max() < 5 / np.sqrt(images.shape[1])


def test_microbatches_are_the_whole_batch():
    """Three steps in one part and in four, the gradient large enough for the clipping to bite."""
    config = tiny()
    config.dit.head_depth = 0  # a plain DiT, which compiles faster
    config.dit.train.update({"clip_norm": 0.1, "learning_rate": 1e-4, "warmup_steps": 0, "optimizer": "adamw"})
    latent = config_keys.latent_shape(config)
    batch = {"latent": jax.random.normal(jax.random.key(0), (16, *latent)), "label": jnp.arange(16) % 10}
    frozen = {"statistics": {"mean": jnp.zeros(latent), "var": jnp.ones(latent)}}
    ends, norms = [], []
    for parts in (1, 4):
        config.dit.train.microbatches = parts
        init, step = objectives.init_and_step(config, "dit")
        state = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(init, jax.random.key(2)))
        state["params"] = _random(models.dit(config), latent, 3)
        step = jax.jit(step)
        for n in range(3):
            state, metrics = step(state, frozen, batch, jax.random.key(n))
        ends.append(state["params"])
        norms.append(float(metrics["grad_norm"]))
    assert norms[0] > 0.1
    for end, norm in zip(ends[1:], norms[1:], strict=True):
        assert norm == pytest.approx(norms[0], rel=1e-4)
        apart = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), ends[0], end)
        assert max(jax.tree.leaves(apart)) <= 1e-6


def test_kernels_cast_before_the_trajectory_change_no_evaluation(case):
    """In bfloat16, bit by bit; the time's own layers stay in float32, in which they are computed."""
    config, latent, parts = case
    config = config.copy_and_resolve_references()
    config.dtype = "bfloat16"
    params = dit.in_dtype(parts["dit"], "bfloat16")
    dtypes = {jax.tree_util.keystr(path): leaf.dtype for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    assert dtypes["['trunk']['mlp']['w3']['kernel']"] == jnp.bfloat16
    assert dtypes["['time_embed']['fc1']['kernel']"] == dtypes["['head']['norm1']['scale']"] == jnp.float32
    x, module = jax.random.normal(jax.random.key(0), (3, *latent)), models.dit(config)
    evaluate = jax.jit(lambda params: module.apply({"params": params}, x, jnp.full(3, 0.3), LABELS))
    np.testing.assert_array_equal(evaluate(params), evaluate(parts["dit"]))
