"""Packed latents: training from them is training with the encoder in the step, to their precision."""

import functools
import json

import jax
import ml_dtypes
import numpy as np
import optax
import pytest
from conftest import random_like, tiny
from etils import epath
from flax import linen as nn

from rae_jax import pack_latents
from rae_jax.build import models, part_weights, sampler, stages
from rae_jax.config import checks
from rae_jax.data.packed_latents import records
from rae_jax.errors import UserError
from rae_jax.models import conditions
from rae_jax.runtime import logs, sharding
from rae_jax.training import dit
from rae_jax.training.loop import fit
from rae_jax.weights import safetensors_tree

FORM = {"dtype": "float16", "mirrored": True, "images_per_shard": 16}


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A DiT stage on the images of an encoder with random weights."""
    config = tiny()
    config.stages, config.data.num_train = ("dit",), 44
    config.dit.train.flip = True
    folder = tmp_path_factory.mktemp("weights")
    for part in ("encoder", "statistics"):
        config[part].weights = str(folder)
        tree = random_like(part_weights.shapes(config, part), seed=1, scale=0.3)
        safetensors_tree.write(
            folder / f"{part}.safetensors", jax.tree.map(np.abs, tree) if part == "statistics" else tree
        )
    return config


def _mesh():
    return sharding.make_mesh(tiny().mesh)


@pytest.fixture(scope="module")
def packed(config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("latents")
    pack_latents.pack(config, folder, _mesh(), **FORM)
    return folder


def _with(config, folder, **changes):
    changed = config.copy_and_resolve_references()
    changed.data.latents = str(folder)
    changed.update_from_flattened_dict(changes)
    return changed


def _stage(config, tmp_path):
    return stages.stage(config, "dit", epath.Path(tmp_path), _mesh())


def test_batches_are_those_of_the_images(config, packed, tmp_path):
    """The same labels, and the latents of the same images, flipped where those are, over three epochs."""
    images, latents = (_stage(each, tmp_path) for each in (config, _with(config, packed)))
    assert "encoder" in images.frozen and "encoder" not in latents.frozen
    encode, iterator = jax.jit(models.autoencoder(config).encode), iter(latents.batches)
    for _, theirs in zip(range(6), images.batches, strict=False):
        state = iterator.get_state()
        iterator.set_state(state)  # as after an interruption
        ours = next(iterator)
        np.testing.assert_array_equal(ours["label"], theirs["label"])
        expected = np.asarray(encode(images.frozen["encoder"], theirs["image"] / np.float32(255)))
        assert ours["latent"].dtype == np.float16 and ours["latent"].shape == (16, 8, 8, 16)
        np.testing.assert_allclose(ours["latent"].astype(np.float32), expected, rtol=1e-3, atol=1e-5)


class _Pixels:
    def encode(self, params, images):
        return params * images


class _Linear(nn.Module):
    @nn.compact
    def __call__(self, x, t, label):
        return nn.Dense(x.shape[-1])(x) * t[:, None, None, None] + nn.Embed(11, x.shape[-1])(label)[:, None, None]


def test_a_step_takes_images_or_their_latents():
    """In miniature what the next one does with the real models."""
    config = tiny()
    parts = {"autoencoder": _Pixels(), "dit": _Linear(), "condition": conditions.labels(10), "latent_shape": (4, 4, 3)}
    parts |= {name: getattr(sampler, name)(config) for name in ("prediction", "time_fn", "shift_factor")}
    how = {"optimiser": optax.adam(0.1), "ema_decay": 0.9, "more_ema_decays": (), "microbatches": 1}
    init, step = dit.make(**parts, **how, condition_dropout=0.1)
    images = np.random.default_rng(0).integers(0, 256, (8, 4, 4, 3), np.uint8)
    latents = (3.0 * images / 255).astype(np.float16)
    state, label, statistics = init(jax.random.key(0)), np.arange(8), {"statistics": None}
    ours, theirs = (
        jax.jit(step)(state, {**statistics, **frozen}, {"label": label, **batch}, jax.random.key(1))
        for frozen, batch in (({}, {"latent": latents}), ({"encoder": 3.0}, {"image": images}))
    )
    compare = functools.partial(np.testing.assert_allclose, rtol=2e-3, atol=1e-5)
    jax.tree.map(compare, ours, theirs)


@pytest.mark.slow
def test_training_is_the_same_to_their_precision(config, packed, tmp_path):
    rows = []
    for name, each in (("images", config), ("latents", _with(config, packed))):
        workdir, mesh = epath.Path(tmp_path) / name, _mesh()
        how = {"key": jax.random.key(0), "log_every": 1, "checkpoint_every": 100, "keep": 1}
        fit(stages.stage(each, "dit", workdir, mesh), workdir=workdir, mesh=mesh, **how)
        rows.append(logs.read(workdir / "metrics" / "dit.jsonl"))
    assert len(rows[0]) == 6
    for theirs, ours in zip(*rows, strict=True):
        for key in ("loss", "grad_norm"):
            assert ours[key] == pytest.approx(theirs[key], rel=2e-3), (theirs["step"], key)


def test_packing_goes_on_where_it_was(config, packed, tmp_path):
    before = {file.name: file.read_bytes() for file in packed.iterdir()}
    assert sum(name.endswith(".array_record") for name in before) == 3
    times = {file: file.stat().st_mtime_ns for file in packed.glob("*.array_record")}
    (packed / "index.json").unlink()
    (packed / "train-00001-of-00003.json").unlink()
    (packed / "train-00001-of-00003.array_record").write_bytes(b"half a shard")
    pack_latents.pack(config, packed, _mesh(), **FORM)
    changed = [file.name for file in times if file.stat().st_mtime_ns != times[file]]
    assert changed == ["train-00001-of-00003.array_record"]
    assert {file.name: file.read_bytes() for file in packed.iterdir()} == before
    with pytest.raises(UserError, match="or with other options"):
        pack_latents.pack(config, packed, _mesh(), **{**FORM, "dtype": "bfloat16"})


@pytest.mark.parametrize("dtype, largest", [(np.float16, 65504.0), (ml_dtypes.bfloat16, 3e38)])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, "too large"])
def test_one_number_that_is_not_finite_is_not_packed(dtype, largest, value):
    """Nor what is not finite in the stored dtype alone; its largest numbers are."""
    numbers = np.random.default_rng(0).normal(size=(3, 2, 2, 2, 3)).astype(np.float32)
    numbers[1, 1, 0, 1, 2] = largest
    assert len(list(records(numbers.astype(dtype), [0, 1, 2], [7, 8, 9]))) == 6
    with np.errstate(over="ignore"):
        numbers[1, 1, 0, 1, 2] = np.float32(2.0 * largest) if value == "too large" else value
        wrong = numbers.astype(dtype)
    with pytest.raises(UserError, match=f"the latent of image 8 is not finite in {np.dtype(dtype)}.*--dtype"):
        list(records(wrong, [0, 1, 2], [7, 8, 9]))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"encoder.patch_size": 8}, "config.encoder.patch_size=4, not 8"),
        ({"dtype": "bfloat16"}, "config.dtype='float32', not 'bfloat16'"),
        ({"encoder.weights": "OTHER"}, "the encoder's weights="),
        ({"data.image_size": 64}, "config.data.image_size=32, not 64"),
        ({"data.num_classes": 11}, "num_classes=10"),
        ({"data.latents": "nowhere"}, "config.data.latents='nowhere' has no index.json.*rae_jax.pack_latents"),
    ],
)
def test_latents_of_something_else_are_refused(config, packed, tmp_path, change, said):
    changed = _with(config, packed, **change)
    if not {"dtype", "data.num_classes"} & change.keys():  # where the weights may stay
        shapes = part_weights.shapes(changed, "encoder")
        safetensors_tree.write(tmp_path / "encoder.safetensors", random_like(shapes, seed=2, scale=0.3))
        changed.encoder.weights = str(tmp_path)
    with pytest.raises(UserError, match=said) as refusal:
        stages.packed_latents(changed, _mesh())
    assert "\n" not in str(refusal.value)


def test_what_is_missing_is_named(config, packed, tmp_path):
    index = json.loads((packed / "index.json").read_text())
    (tmp_path / "index.json").write_text(json.dumps({**index, "mirrored": False}))
    with pytest.raises(UserError, match="no mirrored latents.*config.dit.train.flip=False"):
        stages.packed_latents(_with(config, tmp_path), _mesh())
    with pytest.raises(UserError, match="train-00000-of-00003.array_record with 16 images is missing"):
        stages.packed_latents(_with(config, tmp_path, **{"dit.train.flip": False}), _mesh())
    trained = _with(config, packed)
    trained.stages = ("encoder", "dit")
    with pytest.raises(UserError, match="config.data.latents=.* not of the encoder that this run trains"):
        checks.check(trained, _mesh())
    with pytest.raises(UserError, match="--images_per_shard=10.*batch_size=16"):
        pack_latents.pack(config, tmp_path / "new", _mesh(), **{**FORM, "images_per_shard": 10})


def test_the_digest_of_weights_is_theirs_alone():
    tree = {"a": {"b": np.arange(6, dtype=np.float32)}, "c": np.ones((2, 3), np.float32)}
    known = safetensors_tree.digest(tree)
    assert known == safetensors_tree.digest(jax.device_put(tree, sharding.replicated(_mesh())))
    for a, b in ((0, 1), (4, 5)):
        swapped = {**tree, "a": {"b": tree["a"]["b"].copy()}}
        swapped["a"]["b"][[a, b]] = swapped["a"]["b"][[b, a]]
        assert safetensors_tree.digest(swapped) != known
    assert safetensors_tree.digest({**tree, "c": np.nextafter(tree["c"], 2)}) != known
