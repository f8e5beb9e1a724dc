"""Evaluation of weights, of an npz file and of a folder: one code, so one result."""

import jax
import jax.numpy as jnp
import numpy as np
import perceptual_stand_ins
import pytest
from conftest import tiny
from jax import monitoring
from PIL import Image

from rae_jax.build import data as build_data
from rae_jax.build import models, part_weights
from rae_jax.config import keys as config_keys
from rae_jax.errors import UserError
from rae_jax.inference import generate, image_grid, metrics, perceptual_metrics
from rae_jax.inference.evaluator import Evaluator
from rae_jax.runtime import sharding

INCEPTION = ("fid", "sfid", "inception_score", "precision", "recall")
COMPILING = "/jax/core/compile/backend_compile_duration"
NUM_IMAGES = 30


def _config(**evaluate):
    config = tiny()
    config.seed, config.data.num_heldout = 3, 40
    config.evaluate.update({"num_images": NUM_IMAGES, "inception": "its weights are not read here", **evaluate})
    return config


def _evaluator(config, devices=8):
    return Evaluator(config, sharding.make_mesh(config.mesh, jax.devices()[:devices]))


@pytest.fixture(scope="module", autouse=True)
def inception():
    with perceptual_stand_ins.in_place() as weights:
        yield weights


@pytest.fixture(scope="module")
def parts(inception):
    """Random weights, none of them zero."""
    config, rng = _config(), np.random.default_rng(0)
    shapes = {part: part_weights.shapes(config, part) for part in ("encoder", "judge", "decoder", "dit")}
    made = jax.tree.map(lambda leaf: jnp.asarray(0.2 * rng.normal(size=leaf.shape), jnp.float32), shapes)
    latent = config_keys.latent_shape(config)
    made["statistics"] = {"mean": jnp.zeros(latent), "var": jnp.ones(latent)}
    mesh = sharding.make_mesh(config.mesh)
    made |= {"inception": inception, "lpips": jnp.asarray(0.7)}
    return jax.device_put(made, sharding.replicated(mesh))


@pytest.fixture(scope="module")
def evaluated(parts):
    """(The evaluator of the tiny config, what it says of the weights)."""
    evaluator = _evaluator(_config())
    return evaluator, evaluator.weights(parts)


@pytest.fixture(scope="module")
def view():
    """(parts, images in [0, 1]) -> {'features' of the encoder, 'judged', 'decoded' [N, ...]}, ten images at a time."""
    config = _config()
    autoencoder, judge = models.autoencoder(config), models.classifier(config)

    @jax.jit
    def ten(parts, images):
        latents = autoencoder.encode(parts["encoder"], images)
        judged = judge.apply({"params": parts["judge"]}, images).argmax(-1)
        decoded = autoencoder.decode(parts["decoder"], latents)
        return {"features": latents.mean((1, 2)), "judged": judged, "decoded": decoded}

    def all_of(parts, images):
        parts = jax.device_get({name: parts[name] for name in ("encoder", "judge", "decoder")})
        found = [ten(parts, np.float32(images[start : start + 10])) for start in range(0, len(images), 10)]
        return {name: np.concatenate([np.asarray(of[name]) for of in found]) for name in found[0]}

    return all_of


@pytest.fixture(scope="module")
def drawn(parts):
    """(The images that the weights make, their labels)."""
    config, labels = _config(), np.arange(NUM_IMAGES) % 10
    mesh = sharding.make_mesh(config.mesh)
    batches = generate.batches(
        generate.make_sampler(config, mesh), parts, labels, mesh, batch_size=16, seed=config.seed
    )
    return np.concatenate([images for _, images in batches]), labels


@pytest.fixture(scope="module")
def held_out():
    source = build_data.source(_config(), "heldout")
    return np.stack([source[i]["image"] for i in range(len(source))])


def _npz(folder, name="given.npz", save=np.savez, **arrays):
    save(folder / name, **arrays)
    return str(folder / name)


def _features(params, images):
    """{name: [N, D] float64}."""
    found = perceptual_metrics.features(params, jnp.asarray(images / np.float32(255)))
    return {name: np.float64(values) for name, values in found.items()}


def _distance(a, b):
    """Fréchet distance of features [N, D]."""
    a, b = np.float64(a), np.float64(b)
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = np.sqrt(np.linalg.eigvals(cov_a @ cov_b).astype(complex)).real.sum()
    return np.square(a.mean(0) - b.mean(0)).sum() + np.trace(cov_a + cov_b) - 2 * root


def _same(found, expected, names):
    for name in names:
        assert found[name] == pytest.approx(expected[name], rel=1e-4), name


def test_the_weights_images_have_the_same_metrics_from_an_npz_and_from_a_folder(evaluated, parts, drawn, tmp_path):
    evaluator, (results, shown) = evaluated
    images, labels = drawn
    found = evaluator.images(parts, _npz(tmp_path, arr_0=images, arr_1=labels))
    assert found.keys() == {"fd", "fd_real", "agreement", *INCEPTION}
    assert results.keys() == found.keys() | {"psnr", "ssim", "lpips", "rfid", "judge_accuracy"}
    _same(found, results, found)
    compressed = evaluator.images(parts, _npz(tmp_path, save=np.savez_compressed, arr_0=images, arr_1=labels))
    assert compressed == found
    for i, image in enumerate(images):
        image_grid.save(tmp_path / "folder" / f"{i:06d}.png", image)
    del found["agreement"]  # a folder has no labels
    assert evaluator.images(parts, str(tmp_path / "folder")) == found
    # The picture shows three rows of ten classes, on which nothing but their captions lies.
    assert shown["samples"].shape[0] == 3 * (10 * 34 + 2) and shown["samples"].shape[1] > 3 * 3 * 34


def test_metrics_are_those_of_the_features(evaluated, parts, drawn, held_out):
    """Computed once more from the images."""
    results = evaluated[1][0]
    a, b = (_features(parts["inception"], images) for images in (drawn[0], held_out))
    for name, kind in (("fid", "pool"), ("sfid", "spatial")):
        assert results[name] == pytest.approx(_distance(a[kind], b[kind]), rel=1e-4)
    p = np.exp(a["logits"]) / np.exp(a["logits"]).sum(1, keepdims=True)
    score = np.exp((p * np.log(p / p.mean(0))).sum(1).mean())
    assert results["inception_score"] == pytest.approx(score, rel=1e-4)

    def covered(points, centres):
        radii = np.sort(np.linalg.norm(centres[:, None] - centres, axis=-1), axis=1)[:, 3]
        return (np.linalg.norm(points[:, None] - centres, axis=-1) <= radii).any(1).mean()

    assert results["precision"] == pytest.approx(covered(a["pool"], b["pool"]))
    assert results["recall"] == pytest.approx(covered(b["pool"], a["pool"]))


def test_reconstructions_of_all_held_out_images_are_compared_with_them(evaluated, parts, held_out, view):
    """Rounded to 8 bits, by the definitions of the metrics: means over forty pairs, and the distance of two sets."""
    results, given = evaluated[1][0], held_out / 255
    decoded = np.rint(255 * np.clip(np.float64(view(parts, given)["decoded"]), 0, 1))
    a, b = (_features(parts["inception"], images)["pool"] for images in (held_out, decoded))
    decoded = decoded / 255
    expected = {
        "psnr": -10 * np.log10(np.square(given - decoded).mean((1, 2, 3))).mean(),
        "ssim": float(metrics.ssim(np.float32(given), np.float32(decoded)).mean()),
        "lpips": 0.7 * np.abs(given - decoded).mean(),
        "rfid": _distance(a, b),
    }
    _same(results, expected, expected)


def test_distances_in_the_encoders_space_are_of_as_many_images(evaluated, parts, drawn, held_out, view):
    """Thirty generated images next to halves of twenty, chosen again; the judge's classes are computed again."""
    config, results = _config(), evaluated[1][0]
    found, real = (view(parts, images / 255) for images in (drawn[0], held_out))
    rng = np.random.default_rng(config.seed)
    order = rng.permutation(40)
    chosen = rng.permutation(NUM_IMAGES)[:20]
    assert not set(order[:20]) & set(order[20:]) and len(set(chosen)) == 20
    one, other = real["features"][order[:20]], real["features"][order[20:]]
    assert results["fd"] == pytest.approx(_distance(found["features"][chosen], one), rel=1e-3)
    assert results["fd_real"] == pytest.approx(_distance(other, one), rel=1e-3)
    assert results["agreement"] == pytest.approx((found["judged"] == drawn[1]).mean())
    source = build_data.source(config, "heldout")
    labels = np.array([source[i]["label"] for i in range(len(source))])
    assert results["judge_accuracy"] == pytest.approx((real["judged"] == labels).mean())


def test_every_encoder_sees_the_reference_itself(parts, drawn, held_out, view, tmp_path):
    """Two encoders in turn in one evaluator: both sets of images, all of each, are seen by the same one."""
    samples = _npz(tmp_path, "samples.npz", arr_0=drawn[0])
    evaluator = _evaluator(_config(reference=_npz(tmp_path, "reference.npz", arr_0=held_out), inception=""))
    other = jax.tree.map(lambda x: 1.5 * x, parts["encoder"])
    for encoder in (parts["encoder"], other, parts["encoder"]):
        found = evaluator.images({"encoder": encoder}, samples)
        seen = [view({**parts, "encoder": encoder}, images / 255)["features"] for images in (drawn[0], held_out)]
        assert found == {"fd": pytest.approx(_distance(*seen), rel=1e-3)}


def test_batches_and_devices_make_no_difference(evaluated, parts, drawn, tmp_path):
    """Batches of 7 on one device against batches of 16 on eight: thirty images and forty held-out images."""
    path = _npz(tmp_path, arr_0=drawn[0], arr_1=drawn[1])
    found = _evaluator(_config(batch_size=7), devices=1).images(jax.device_get(parts), path)
    assert len(found) == 8
    _same(found, evaluated[1][0], found)


def test_a_second_evaluation_compiles_nothing(evaluated, parts):
    evaluator, (results, _) = evaluated
    compiled = []
    monitoring.register_event_duration_secs_listener(lambda name, *_, **__: compiled.append(name))
    again = jax.tree.map(lambda x: 1.01 * x, parts)
    jax.block_until_ready(again)
    compiled.clear()
    second, _ = evaluator.weights({**again, "inception": parts["inception"]})
    assert second["fd"] != results["fd"]
    assert COMPILING not in compiled
    jax.jit(lambda x: x + 17)(1)  # so that the name is the right one
    assert COMPILING in compiled


def test_references(evaluated, parts, drawn, held_out, tmp_path):
    """Images, the same with moments, moments alone; each of the held-out images, so that the numbers are known."""
    results = evaluated[1][0]
    samples = _npz(tmp_path, "samples.npz", arr_0=drawn[0])
    seen = _features(parts["inception"], held_out)
    moments = {
        **{"mu": seen["pool"].mean(0), "sigma": np.cov(seen["pool"], rowvar=False)},
        **{"mu_s": seen["spatial"].mean(0), "sigma_s": np.cov(seen["spatial"], rowvar=False)},
    }

    def found(**arrays):
        config = _config(reference=_npz(tmp_path, "reference.npz", **arrays))
        return _evaluator(config).images(parts, samples)

    of_images = found(arr_0=held_out)
    assert of_images.keys() == {"fd", *INCEPTION}
    _same(of_images, results, INCEPTION)
    of_moments = found(**moments)
    assert of_moments.keys() == {"fid", "sfid", "inception_score"}
    _same(of_moments, results, of_moments)
    # Moments come before images: a mean that is 2 further off in every feature, and no spatial ones.
    nearer = moments["mu"] - 2.0
    shifted = found(arr_0=held_out, mu=nearer, sigma=moments["sigma"])
    mean = _features(parts["inception"], drawn[0])["pool"].mean(0)
    further = ((mean - nearer) ** 2).sum() - ((mean - moments["mu"]) ** 2).sum()
    assert shifted["fid"] == pytest.approx(results["fid"] + further, rel=1e-4)
    _same(shifted, results, INCEPTION[1:])
    _same(shifted, of_images, ["fd"])


def _resized_by_pillow(images):
    """[N, H, W, 3] in [0, 1] -> [N, 32, 32, 3], bicubic, each channel in floats, clipped."""
    channels = np.float32(images).transpose(0, 3, 1, 2).reshape(-1, *images.shape[1:3])
    resized = [np.asarray(Image.fromarray(channel).resize((32, 32), Image.Resampling.BICUBIC)) for channel in channels]
    assert np.min(resized) < -0.01 and np.max(resized) > 1.01, "a case that tests nothing"
    return np.clip(resized, 0, 1).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)


def test_images_of_another_size(evaluated, parts, view, tmp_path, capsys):
    """Inception sees an npz's as they are; the encoder and the judge see them resized as Pillow does it, which does
    antialiasing, and clipped. And few images are said to be few."""
    rng = np.random.default_rng(0)
    images = np.where(rng.random((10, 16, 64, 3)) < 0.5, 20, 255).astype(np.uint8).repeat(3, axis=1)
    seen = metrics.moments(_features(parts["inception"], images)["pool"])
    config = _config(reference=_npz(tmp_path, arr_0=images))
    labels = np.arange(10) % 2
    found = _evaluator(config).images(parts, _npz(tmp_path, "samples.npz", arr_0=255 - images, arr_1=labels))
    other = metrics.moments(_features(parts["inception"], 255 - images)["pool"])
    assert found["fid"] == pytest.approx(metrics.frechet_distance(seen, other), rel=1e-4)
    views = [view(parts, _resized_by_pillow(pixels / 255)) for pixels in (255 - images, images)]
    assert found["fd"] == pytest.approx(_distance(*(of["features"] for of in views)), rel=1e-3)
    assert found["agreement"] == (views[0]["judged"] == labels).mean()
    said = capsys.readouterr().err
    assert "samples.npz: images of 48x64 px are resized to 32x32 for encoder and judge" in said
    assert "fid: the covariance of 12 features from 10 images does not have full rank" in said
    three = evaluated[0].images(parts, _npz(tmp_path, arr_0=images[:3]))
    assert "precision" not in three and "no precision and recall" in capsys.readouterr().err


def test_a_damaged_first_image_can_be_left_out_as_any_other(evaluated, parts, drawn, tmp_path):
    config = _config()
    config.data.on_error = "skip"
    evaluator = _evaluator(config)
    for i, image in enumerate(drawn[0]):
        image_grid.save(tmp_path / f"{i:06d}.png", image)
    (tmp_path / "000000.png").write_bytes(b"\x89PNG\r\n")
    found = evaluator.images(parts, str(tmp_path))
    without = evaluated[0].images(parts, _npz(tmp_path, arr_0=drawn[0][1:]))
    _same(found, without, INCEPTION)


def test_of_a_reference_labels_do_not_matter(parts, drawn, held_out, tmp_path):
    """ADM's have some; nobody reads them."""
    path = _npz(tmp_path, "reference.npz", arr_0=held_out, arr_1=np.zeros(3))
    config = _config(reference=path)
    assert "fd" in _evaluator(config).images(parts, _npz(tmp_path, arr_0=drawn[0]))


def test_with_nothing_to_compare_with_it_says_so(parts, drawn, tmp_path):
    config = _config(inception="")
    config.data.num_heldout = 3
    with pytest.raises(UserError, match="3 held-out images are too few; set config.evaluate.reference"):
        _evaluator(config).images({"encoder": parts["encoder"]}, _npz(tmp_path, arr_0=drawn[0]))


def test_without_inception_there_is_the_distance_in_the_encoders_space(evaluated, parts, drawn, tmp_path):
    parts = {name: parts[name] for name in ("encoder", "judge")}
    found = _evaluator(_config(inception="")).images(parts, _npz(tmp_path, arr_0=drawn[0], arr_1=drawn[1]))
    assert found.keys() == {"fd", "fd_real", "agreement"}
    _same(found, evaluated[1][0], found)
