"""The library inside other programs: their types, their JAX options, their meshes; and what it refuses."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import random_like, tiny
from ml_collections import ConfigDict, FrozenConfigDict

import rae_jax
from rae_jax.build import models, objectives, part_weights, saved_config
from rae_jax.config import keys as config_keys
from rae_jax.inference import generate
from rae_jax.weights import safetensors_tree

CLASSES = 1000


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """(RAE, DiT, images) of random weights, with a thousand classes and two steps."""
    folder, config = tmp_path_factory.mktemp("converted"), tiny()
    config.data.num_classes, config.sampler.num_steps, config.guidance.scale = CLASSES, 2, 2.5
    parts = random_like({p: part_weights.shapes(config, p) for p in ("encoder", "decoder", "dit")}, seed=0, scale=0.2)
    latent = config_keys.latent_shape(config)
    parts["statistics"] = {"mean": np.full(latent, 0.1, np.float32), "var": np.full(latent, 0.5, np.float32)}
    for part, tree in parts.items():
        safetensors_tree.write(folder / f"{part}.safetensors", tree)
    saved_config.write(config, folder, parts)
    images = np.random.default_rng(0).random((2, 32, 32, 3), np.float32)
    return rae_jax.load_rae(folder), rae_jax.load_dit(folder), images


@pytest.fixture(scope="module")
def plain(loaded):
    """(latents, decoded images, samples) without anything unusual."""
    rae, dit, images = loaded
    latents = rae_jax.encode(rae, images)
    return latents, rae_jax.decode(rae, latents), rae_jax.sample(rae, dit, [3, 200], seed=5)


def _set_mesh(shape, names, **options):
    count = int(np.prod(shape))
    return jax.set_mesh(jax.make_mesh(shape, names, devices=jax.devices()[:count], **options))


@contextlib.contextmanager
def _option(name, value):
    before = getattr(jax.config, name)
    jax.config.update(name, value)
    try:
        yield
    finally:
        jax.config.update(name, before)


SURROUNDINGS = {
    "a mesh of one device": lambda: _set_mesh((1,), ("x",)),
    "a mesh of one device, automatic": lambda: _set_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,)),
    "a mesh with two of our names": lambda: _set_mesh((1, 1), ("data", "tensor")),
    "64 bits": lambda: jax.enable_x64(True),
    "no rank promotion": lambda: _option("jax_numpy_rank_promotion", "raise"),
    "no dtype promotion": lambda: _option("jax_numpy_dtype_promotion", "strict"),
    "no leaked tracers": lambda: jax.checking_leaks(),
}


@pytest.mark.parametrize("name", SURROUNDINGS)
def test_a_program_s_own_mesh_and_options_change_nothing(loaded, plain, name):
    rae, dit, images = loaded
    with SURROUNDINGS[name]():
        latents = rae_jax.encode(rae, images)
        found = latents, rae_jax.decode(rae, latents), rae_jax.sample(rae, dit, [3, 200], seed=5)
    for ours, wanted in zip(found, plain, strict=True):
        assert ours.dtype == jnp.float32
        np.testing.assert_allclose(ours, wanted, rtol=1e-5, atol=1e-5)


def test_parameters_load_inside_a_program_s_own_mesh():
    with _set_mesh((1,), ("x",)):
        rae = rae_jax.load_rae()
    assert rae.params["encoder"]["pos_embed"].devices() == {jax.local_devices()[0]}


def test_it_may_be_mapped_over_a_program_s_own_devices(loaded, plain):
    rae, _, images = loaded
    wanted = np.asarray(plain[0])
    mapped = jax.pmap(lambda x: rae_jax.encode(rae, x), devices=jax.devices()[:2])(images[:, None])
    np.testing.assert_allclose(mapped[:, 0], wanted, rtol=1e-5, atol=1e-5)
    mesh = jax.make_mesh((2,), ("x",), devices=jax.devices()[:2], axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.sharding.PartitionSpec("x")
    encode = jax.shard_map(
        lambda x: rae_jax.encode(rae, x), mesh=mesh, in_specs=split, out_specs=split, check_vma=False
    )
    np.testing.assert_allclose(jax.jit(encode)(images), wanted, rtol=1e-5, atol=1e-5)


def test_gradients_outside_jit_of_parameters_on_several_devices(loaded):
    rae, _, images = loaded
    mesh = jax.make_mesh((2,), ("x",), devices=jax.devices()[:2], axis_types=(jax.sharding.AxisType.Auto,))
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    module = models.autoencoder(rae.config)

    def loss(params, images):
        return jnp.square(module.encode(params, images)).sum()

    wanted = jax.grad(loss)(rae.params["encoder"], images)
    found = jax.grad(loss)(jax.device_put(rae.params["encoder"], everywhere), jax.device_put(images, everywhere))
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.int64, np.uint64, "list", "jax"])
def test_labels_of_any_integer_type_are_the_same_labels(loaded, plain, dtype):
    rae, dit, _ = loaded
    labels = [3, 200] if dtype == "list" else jnp.array([3, 200]) if dtype == "jax" else np.array([3, 200], dtype)
    np.testing.assert_array_equal(rae_jax.sample(rae, dit, labels, seed=5), plain[2])


def test_the_null_label_of_small_integers_does_not_wrap(loaded):
    condition = models.condition(loaded[1].config)
    null = condition.with_null(np.array([1, 2, 3], np.uint8), np.array([True, False, True]))
    assert null.tolist() == [CLASSES, 2, CLASSES]


@pytest.mark.parametrize("labels", [[2**40], [-1], [CLASSES], np.array([2**63], np.uint64), [0.5], [True], [[1]], 3])
def test_labels_out_of_range_and_of_other_types_are_refused(loaded, labels):
    rae, dit, _ = loaded
    with pytest.raises(rae_jax.UserError, match="cannot work"):
        rae_jax.sample(rae, dit, labels)


def test_seeds_have_64_bits(loaded, plain):
    rae, dit, _ = loaded
    seeds = {seed: np.asarray(rae_jax.sample(rae, dit, [3, 200], seed=seed)) for seed in (5, 5 + 2**32, 2**64 - 1)}
    assert len({images.tobytes() for images in seeds.values()}) == 3
    np.testing.assert_array_equal(seeds[5], plain[2])
    np.testing.assert_array_equal(rae_jax.sample(rae, dit, [3, 200], seed=np.uint64(5 + 2**32)), seeds[5 + 2**32])
    traced = jax.jit(lambda seed: rae_jax.sample(rae, dit, np.array([3, 200]), seed=seed))(5)
    np.testing.assert_allclose(traced, plain[2], rtol=1e-5, atol=1e-5)
    assert (jax.random.key_data(generate.random_key(7)) == jax.random.key_data(jax.random.key(7))).all()
    for seed in (-1, 2**64, 0.5, "1", [1, 2]):
        with pytest.raises(rae_jax.UserError, match=r"seed=.* cannot work: give an integer from 0 to 2\*\*64 - 1"):
            rae_jax.sample(rae, dit, [3, 200], seed=seed)


def test_images_of_other_types_and_ranges_are_refused(loaded, plain):
    rae, _, images = loaded
    pixels = (images * 255).astype(np.uint8)
    found = rae_jax.encode(rae, pixels)
    np.testing.assert_allclose(rae_jax.encode(rae, pixels / np.float64(255)), found, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(rae_jax.encode(rae, (pixels / np.float32(255)).tolist()), found, rtol=1e-4, atol=1e-4)
    for wrong in (np.int32, np.uint16, np.int8, bool, np.int64, np.complex64):
        with pytest.raises(rae_jax.UserError, match=r"images of type .* are not accepted: give floats in \[0, 1\], or"):
            rae_jax.encode(rae, pixels.astype(wrong))
    with pytest.raises(rae_jax.UserError, match="images of type int32"):
        rae_jax.encode(rae, pixels.tolist())
    for wrong, words in ((pixels.astype(np.float32), "images from 0 to 25."), (2 * images - 1, "images from -1 to 1")):
        with pytest.raises(rae_jax.UserError, match=f"{words} cannot be encoded: scale them"):
            rae_jax.encode(rae, wrong)
    with pytest.raises(rae_jax.UserError, match="latents of type uint8 are not accepted: give floats"):
        rae_jax.decode(rae, np.zeros((1, 8, 8, 16), np.uint8))


def test_no_images_and_images_that_are_not_numbers(loaded):
    rae, dit, images = loaded
    assert rae_jax.encode(rae, images[:0]).shape == (0, 8, 8, 16)
    assert rae_jax.decode(rae, np.zeros((0, 8, 8, 16), np.float32)).shape == (0, 32, 32, 3)
    assert rae_jax.sample(rae, dit, np.zeros(0, int)).shape == (0, 32, 32, 3)
    with pytest.raises(rae_jax.UserError, match="images from .* cannot be encoded"):
        rae_jax.encode(rae, images * np.nan)


def test_the_guide_of_a_config_is_free_of_the_project_s_mesh(tmp_path):
    config = ConfigDict(tiny().to_dict())
    guide = random_like({"dit": part_weights.shapes(config, "dit")}, seed=2, scale=0.2)["dit"]
    safetensors_tree.write(tmp_path / "dit.safetensors", guide)
    config.dit.weights, config.statistics.weights, config.stages = str(tmp_path), "none", ()
    config.guidance.method = "autoguidance"
    config.guidance.dit.update({key: config.dit[key] for key in config.guidance.dit})
    dit = rae_jax.load_dit(config)
    shardings = {type(leaf.sharding) for leaf in jax.tree.leaves((dit.guide, dit.params["dit"]))}
    assert shardings == {jax.sharding.SingleDeviceSharding}


def test_a_guide_needs_a_scale(loaded):
    rae, dit, _ = loaded
    config = ConfigDict(dit.config.to_dict())
    config.guidance.scale = 1.0
    unguided = rae_jax.DiT(dit.params, None, FrozenConfigDict(config))
    with pytest.raises(rae_jax.UserError, match="guide has no effect at the config's scale of 1: give guidance_scale"):
        rae_jax.sample(rae, unguided, [1], guide=dit)
    assert rae_jax.sample(rae, unguided, [1], guide=dit, guidance_scale=1.5).shape == (1, 32, 32, 3)


def test_images_that_are_not_finite_are_an_error(loaded):
    rae, dit, _ = loaded
    params = jax.tree.map(lambda leaf: leaf * jnp.nan, dit.params)
    with pytest.raises(rae_jax.UserError, match="the images are not finite: check the weights"):
        rae_jax.sample(rae, rae_jax.DiT(params, None, dit.config), [1, 2], seed=5)


@pytest.mark.parametrize(
    "stage", ["encoder", *(pytest.param(stage, marks=pytest.mark.slow) for stage in ("decoder", "dit"))]
)
def test_training_is_the_same_with_64_bits(stage):
    """The state and the metrics of three steps."""
    config = tiny()
    init, step = objectives.init_and_step(config, stage)
    shapes = {"encoder": part_weights.shapes(config, "encoder")}
    latent = config_keys.latent_shape(config)
    frozen = random_like(shapes, seed=1, scale=0.2)
    frozen |= {"statistics": {"mean": np.zeros(latent, np.float32), "var": np.ones(latent, np.float32)}}
    frozen["backbone"] = frozen["encoder"]
    batch = {
        "image": np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3), np.uint8),
        "label": np.arange(8, dtype=np.int32),
    }

    def run():
        state = jax.jit(init)(jax.random.key(0))
        for number in range(3):
            state, metrics = jax.jit(step)(state, frozen, batch, jax.random.key(number))
        return state, metrics

    wanted = run()
    with jax.enable_x64(True):
        found = run()
    for (path, ours), theirs in zip(jax.tree.leaves_with_path(found), jax.tree.leaves(wanted), strict=True):
        assert ours.dtype == theirs.dtype, path
        np.testing.assert_allclose(ours, theirs, rtol=2e-3, atol=2e-4, err_msg=str(path))


def test_a_notebook_shows_a_model_in_one_line(loaded):
    """Also as a tree of shapes, and inside jit, where it has no numbers."""
    rae, dit, _ = loaded
    counts = [sum(leaf.size for leaf in jax.tree.leaves(model)) for model in (rae, dit)]
    assert [repr(rae), repr(dit)] == [
        f"{kind}(config.name='tiny', {count:,} parameters)" for kind, count in zip(("RAE", "DiT"), counts, strict=True)
    ]
    assert repr(jax.eval_shape(lambda model: model, dit)) == repr(dit)


def test_a_few_step_student_is_loaded_and_not_guided(loaded, tmp_path):
    rae, dit, _ = loaded
    config = ConfigDict(dit.config.to_dict())
    config.sampler.update({"method": "mean_velocity", "num_steps": 1})
    parts = {"few_step": random_like(part_weights.shapes(config, "few_step"), seed=1, scale=0.2)}
    parts["statistics"] = dit.params["statistics"]
    for part, tree in parts.items():
        safetensors_tree.write(tmp_path / f"{part}.safetensors", tree)
    saved_config.write(config, tmp_path, parts)
    student = rae_jax.load_dit(tmp_path)
    assert student.params.keys() == {"few_step", "statistics"}
    one, two = (rae_jax.sample(rae, student, [0, 1], seed=3, num_steps=steps) for steps in (1, 2))
    assert one.shape == (2, 32, 32, 3) and not np.array_equal(one, two)
    with pytest.raises(rae_jax.errors.UserError, match="^a few-step student is not guided"):
        rae_jax.sample(rae, student, [0], guidance_scale=2.0)
