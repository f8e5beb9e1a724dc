"""One training step of the decoder: its gradients, its order, its cost, and the same on one device and on eight."""

import dataclasses
import functools
import re
import types

import decoder_oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import step_oracles
from conftest import random_like, tiny, uncached

from rae_jax.build import models, objectives, part_weights
from rae_jax.build.optimiser import optimiser
from rae_jax.models.autoencoder import to_float
from rae_jax.runtime import sharding
from rae_jax.training import decoder
from rae_jax.training.adversarial import diff_augment

LATENT = (8, 8, 16)
BATCH = 16
HIDDEN = 40  # of the decoder's MLP, and of nothing else
DISC = ("disc_params", "disc_spectral", "disc_opt_state")


def _perceptual(params, decoded, images):
    """Distances by frozen random filters: differentiable, and no multiple of L1."""
    a, b = (jnp.tanh(x.reshape(len(x), -1) @ params["kernel"]) for x in (decoded, images))
    return jnp.square(a - b).sum(-1)


def _config(**train):
    """Step 0 has no discriminator, step 1 fools it, step 2 trains it as well."""
    config = tiny()
    config.decoder.hidden = HIDDEN
    config.unroll = True  # as in profiling/test_compile_ahead.py
    config.decoder.train.update({"warmup_steps": 0, "learning_rate": 2e-4, "lpips_weight": 0.5})
    config.decoder.train.update({"adversarial_start": 1, "discriminator_start": 2, **train})
    return config


def _stage(config, **changes):
    """(init, step) with a perceptual loss; `changes` of the discriminator."""
    objective = objectives.decoder_objective(config)
    if objective.discriminator is not None:
        changed = dataclasses.replace(objective.discriminator, **changes)
        objective = dataclasses.replace(objective, discriminator=changed)
    train = config.decoder.train
    return decoder.make(
        autoencoder=models.autoencoder(config),
        objective=dataclasses.replace(objective, perceptual=_perceptual),
        latent_shape=LATENT,
        optimiser=optimiser(train),
        ema_decay=train.ema_decay,
    )


def _frozen():
    encoder = random_like(part_weights.shapes(_config(), "encoder"), seed=7, scale=0.3)
    lpips = {"kernel": 0.05 * np.random.default_rng(8).standard_normal((32 * 32 * 3, 5), np.float32)}
    return {"encoder": encoder, "backbone": encoder, "lpips": lpips}


def _batch():
    return {"image": np.random.default_rng(0).integers(0, 256, (BATCH, 32, 32, 3), np.uint8)}


@pytest.fixture(scope="module")
def game():
    """The stage, compiled once, its states after 0, 1, ... steps, with the metrics and the augmented images of each."""
    config, frozen, seen = _config(), _frozen(), []

    def look(images, key):
        jax.debug.callback(lambda images: seen[-1].append(np.asarray(images)), images)
        return diff_augment(images, key)

    init, step = _stage(config)
    run = jax.jit(_stage(config, augment=look)[1])
    states, metrics = [jax.jit(init)(jax.random.key(0))], []
    for i in range(4):
        seen.append([])
        state, values = run(states[-1], frozen, _batch(), jax.random.key(i))
        jax.effects_barrier()
        states.append(state)
        metrics.append(values)
    return types.SimpleNamespace(
        **{"config": config, "frozen": frozen, "init": init, "step": step, "run": run},
        **{"states": states, "metrics": metrics, "seen": list(seen)},
    )


def test_a_whole_step_is_the_equations(game):
    """Losses, gradients, norms, weights, optimisers, parameters, average and singular vectors of both players."""
    state, train = dict(game.states[3]), game.config.decoder.train
    # Far from the singular vectors that they are to become, which after a few steps they hardly are.
    vectors = random_like(state["disc_spectral"], seed=9, scale=1.0)
    state["disc_spectral"] = jax.tree.map(lambda v: v / np.linalg.norm(v), vectors)
    new, metrics = game.run(state, game.frozen, _batch(), jax.random.key(3))
    oracle = decoder_oracle.Oracle(game, _batch(), _perceptual, state, jax.random.key(3))

    # Two gradients at the last layer, each of a backward pass of its own (VQGAN's definition).
    loss, grads, fooled, fooled_grads = oracle.decoder()
    norms = [step_oracles.norm(g["pred"]["kernel"]) for g in (grads, fooled_grads)]
    weight = 0.75 * min(norms[0] / (norms[1] + 1e-6), 1e4)
    whole = jax.tree.map(lambda a, b: np.float64(a) + weight * np.float64(b), grads, fooled_grads)
    found = [float(metrics[name]) for name in ("adversarial", "adversarial_weight", "loss", "grad_norm")]
    assert found == pytest.approx(
        [float(fooled), weight, float(loss + weight * fooled), step_oracles.norm(whole)], rel=1e-4
    )
    before, after = ((s["params"], s["opt_state"]) for s in (state, new))
    step_oracles.check_adamw(before, after, whole, step=4, rate=decoder_oracle.rate(train, 3), train=train)
    step_oracles.check_average(state["ema_params"], new["params"], new["ema_params"], train.ema_decay)

    spectral = decoder_oracle.iterated({"params": state["disc_params"], "spectral": state["disc_spectral"]})
    step_oracles.close(new["disc_spectral"], spectral, atol=1e-5)
    (loss, (real, fake)), grads = oracle.discriminator(new["params"], spectral)
    found = [float(metrics[name]) for name in decoder._DISC_METRICS]
    expected = [float(loss), step_oracles.norm(grads), float(real.mean()), float(fake.mean())]
    assert found == pytest.approx(expected, rel=1e-3, abs=1e-5)
    before, after = ((s["disc_params"], s["disc_opt_state"]) for s in (state, new))
    # Its second update. A pixel that lies between two levels may be rounded the other way, which is seen in gradients.
    step_oracles.check_adamw(
        before, after, grads, step=2, rate=decoder_oracle.rate(train, 1), train=train, tolerance=2e-3
    )
    assert int(new["step"]) == 4


def test_before_they_start_the_adversarial_parts_are_not_there(game):
    alone = _config(adversarial_weight=0.0)
    init, step = _stage(alone)
    start = {name: value for name, value in game.states[0].items() if name not in DISC}
    assert jax.eval_shape(init, jax.random.key(0)) == jax.eval_shape(lambda: start)
    state, metrics = jax.jit(step)(start, game.frozen, _batch(), jax.random.key(0))
    assert not set(DISC) & set(state) and "adversarial" not in metrics
    assert float(game.metrics[0]["adversarial_weight"]) == float(game.metrics[0]["adversarial"]) == 0.0
    found, expected = (_without_rounding({"params": s["params"]}) for s in (state, game.states[1]))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), found, expected)


def test_fooling_leaves_the_discriminator_as_it_is(game):
    """Its parameters, its singular vectors and its optimiser."""
    assert float(game.metrics[1]["adversarial_weight"]) > 0.0
    for name in DISC:
        jax.tree.map(np.testing.assert_array_equal, game.states[2][name], game.states[1][name])
        with pytest.raises(AssertionError):  # as the next step does not
            jax.tree.map(np.testing.assert_array_equal, game.states[3][name], game.states[2][name])


def test_the_discriminator_sees_clean_8_bit_images_of_the_updated_decoder(game):
    assert [sorted(map(len, seen)) for seen in game.seen[:3]] == [[], [BATCH], [BATCH, 2 * BATCH]]
    state, new = game.states[2:4]
    pairs = (max(game.seen[2], key=len) + 1.0) / 2.0 * 255.0
    real, fake = pairs[0::2], pairs[1::2]
    np.testing.assert_allclose(real, _batch()["image"], atol=1e-4)
    np.testing.assert_allclose(fake, np.round(fake), atol=1e-4)
    ours, before = (np.clip(_decode(game, s), 0, 1) * 255.0 for s in (new, state))
    assert np.abs(fake - ours).max() <= 0.501 < np.abs(fake - before).max()


def _decode(game, state):
    """Reconstructions without noise."""
    autoencoder = models.autoencoder(game.config)

    @jax.jit
    def decode(params, images):
        return autoencoder.decode(params, autoencoder.encode(game.frozen["encoder"], images))

    return np.asarray(decode(state["params"], to_float(_batch()["image"])))


@pytest.mark.parametrize("name", ["hinge", pytest.param("vanilla", marks=pytest.mark.slow)])
def test_the_discriminator_minimises_its_loss(game, name):
    """The losses by hand, on logits by the singular vectors after this forward pass's power iteration."""
    run, key = game.run, jax.random.key(2)
    if name == "vanilla":
        config = _config()
        config.discriminator.loss = name
        run = jax.jit(_stage(config)[1])
    new, metrics = run(game.states[2], game.frozen, _batch(), key)
    fake = np.round(np.clip(_decode(game, new), 0, 1) * 255) / np.float32(255)
    both = np.stack([_batch()["image"] / np.float32(255), fake], 1).reshape(-1, *fake.shape[1:])
    disc = objectives.decoder_objective(game.config).discriminator

    @jax.jit
    def logits(variables, images):
        augmented = (diff_augment(2 * images - 1, jax.random.split(key, 3)[2]) + 1) / 2
        return disc.heads.apply(variables, disc.backbone(game.frozen["backbone"], augmented))

    variables = {"params": game.states[2]["disc_params"], "spectral": new["disc_spectral"]}
    real, fake = np.asarray(logits(variables, both))[0::2], np.asarray(logits(variables, both))[1::2]
    if name == "hinge":
        expected = 0.5 * (np.maximum(1 - real, 0).mean() + np.maximum(1 + fake, 0).mean())
    else:
        expected = 0.5 * (np.log1p(np.exp(-real)).mean() + np.log1p(np.exp(fake)).mean())
    assert float(metrics["discriminator"]) == pytest.approx(expected, rel=1e-4)
    assert float(metrics["logits_fake"]) == pytest.approx(fake.mean(), rel=1e-3, abs=1e-5)


def _count_products(module):
    """Matrix products of the lowered program that have the decoder's hidden size, calls followed."""
    functions = {op.attributes["sym_name"].value: op for op in module.body.operations}

    def count(op):
        name = op.operation.name
        total = 0
        if name == "stablehlo.dot_general":
            shapes = [v.type.shape for v in (*op.operation.operands, *op.operation.results)]
            total += any(HIDDEN in shape for shape in shapes)
        if name in ("func.call", "call"):
            total += count(functions[op.operation.attributes["callee"].value])
        for region in op.operation.regions:
            for block in region.blocks:
                total += sum(count(inner) for inner in block.operations)
        return total

    return count(functions["main"])


def test_the_decoder_runs_forward_twice_and_backward_once(game):
    """Forward for its own update and for the discriminator's images; the adaptive weight costs it nothing."""
    assert game.config.remat == "none" and game.config.decoder.depth == 1
    autoencoder, state = models.autoencoder(game.config), game.states[0]
    latents = jnp.zeros((BATCH, *LATENT))

    def products(function, *arguments):
        return _count_products(jax.jit(function).lower(*arguments).compiler_ir("stablehlo"))

    forward = products(autoencoder.decode, state["params"], latents)
    both = products(jax.grad(lambda p: autoencoder.decode(p, latents).sum()), state["params"])
    assert (forward, both) == (2, 6)  # two layers; each one's backward pass has two products
    assert products(game.step, state, game.frozen, _batch(), jax.random.key(0)) == forward + both


@pytest.mark.parametrize("sizes", [(2, 4, 1), pytest.param((8, 1, 1), marks=pytest.mark.slow)])
def test_the_step_is_the_same_on_eight_devices_as_on_one(game, sizes):
    """Generator and discriminator: losses, gradient norms, gradients in the optimisers, new parameters."""
    mesh = sharding.make_mesh(dict(zip(sharding.AXES, sizes, strict=True)))
    place = sharding.shardings(jax.eval_shape(game.init, jax.random.key(0)), mesh)
    run = sharding.jit(game.step, mesh, out_shardings=(place, sharding.replicated(mesh)))
    weights = jax.device_put(game.frozen, sharding.shardings(game.frozen, mesh))
    start = jax.device_put(jax.device_get(game.states[3]), place)
    with uncached():
        state, metrics = run(start, weights, sharding.put_batch(_batch(), mesh), jax.random.key(3))
    assert all(float(metrics[name]) != 0.0 for name in ("adversarial", "discriminator_grad_norm", "lpips"))
    for name, value in game.metrics[3].items():
        assert float(metrics[name]) == pytest.approx(float(value), rel=1e-5, abs=1e-5), name
    compare = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
    jax.tree.map(compare, *map(_without_rounding, (state, game.states[4])))


def _without_rounding(state):
    """The state without parameters that change nothing: their gradient is rounding alone, and Adam's steps are as large
    for that as for any other. Softmax takes out the bias of the keys, the norms after them those of convolutions.
    """

    def keep(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        leaf = np.asarray(leaf)
        if re.match(r"disc_params/.*/(in|mix)_conv/bias$", name):
            return leaf[:0]
        if re.match(r"(ema_)?params/.*/qkv/bias$", name):
            return np.delete(leaf, np.s_[leaf.shape[-1] // 3 : leaf.shape[-1] // 3 * 2], axis=-1)
        return leaf

    return jax.tree_util.tree_map_with_path(keep, state)
