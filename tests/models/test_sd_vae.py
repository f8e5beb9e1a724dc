"""Stable Diffusion's VAE: parity with diffusers, its checkpoints, and the job on its latents.

The goldens (tests/goldens/sd_vae.npz, by make_sd_vae_goldens.py) stand in for torch where it is absent.
"""

import json
import types

import encoder_cases
import jax
import numpy as np
import pytest
import sd_vae_cases as cases
from conftest import one_device
from etils import epath
from safetensors.numpy import load_file

from configs import encoders, sdvae_dit_xl
from rae_jax import convert
from rae_jax.build import models, stages
from rae_jax.cli import reconstruct, sample
from rae_jax.config import checks
from rae_jax.config import keys as config_keys
from rae_jax.errors import UserError
from rae_jax.inference import generate, image_grid
from rae_jax.models.autoencoder import to_uint8
from rae_jax.runtime import logs, sharding
from rae_jax.training.loop import fit

OLD_NAMES = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


@pytest.fixture
def checkpoint(tmp_path):
    """A folder with the tiny VAE's file."""
    folder = tmp_path / "vae"
    folder.mkdir()
    cases.write(folder, cases.made_up(cases.tiny_shapes()))
    return folder


def test_latents_and_images_are_the_goldens(checkpoint):
    outputs = cases.ours(cases.config_of(cases.TINY, checkpoint), *cases.inputs(cases.TINY, *cases.SIZE))
    for name, array in outputs.items():
        assert encoder_cases.difference(array, cases.goldens()[name]) <= cases.TOLERANCE, name


def test_bfloat16_stays_close(checkpoint):
    outputs = cases.ours(
        cases.config_of(cases.TINY, checkpoint, dtype="bfloat16"), *cases.inputs(cases.TINY, *cases.SIZE)
    )
    for name, array in outputs.items():
        assert array.dtype == np.float32
        golden = cases.goldens()[name]
        assert 1e-4 < np.linalg.norm(array - golden) / np.linalg.norm(golden) < 0.05, name


def test_latents_and_images_are_diffusers_own(tmp_path):
    """Also: the goldens are what diffusers makes today."""
    pytest.importorskip("diffusers")
    model, shapes = cases.torch_model(cases.TINY, tmp_path)
    assert {key: list(shape) for key, shape in shapes.items()} == cases.tiny_shapes()
    given = tuple(cases.inputs(cases.TINY, *cases.SIZE))
    outputs = cases.ours(cases.config_of(cases.TINY, tmp_path), *given)
    for name, array in cases.theirs(model, *given).items():
        assert encoder_cases.difference(array, cases.goldens()[name]) <= cases.TOLERANCE
        assert encoder_cases.difference(array, outputs[name]) <= cases.TOLERANCE


@pytest.mark.slow
@pytest.mark.by_hand
def test_full_size_is_diffusers_own(tmp_path):
    pytest.importorskip("diffusers")
    values = encoders.sd_vae()
    model, _ = cases.torch_model(values, tmp_path)
    given = tuple(cases.inputs(values, 256, 256))
    outputs = cases.ours(cases.config_of(values, tmp_path), *given)
    for name, array in cases.theirs(model, *given).items():
        apart = encoder_cases.difference(array, outputs[name])
        print(f"{name} {array.shape}, std {array.std():.2f}: {apart:.1e}")
        assert apart <= cases.TOLERANCE


def test_the_published_config_is_the_published_model():
    config = sdvae_dit_xl.get_config()
    checks.check(config, sharding.make_mesh(config.mesh))
    assert config_keys.latent_shape(config) == (32, 32, 4)
    vae = models.autoencoder(config)
    key, shapes = jax.random.key(0), ((1, 256, 256, 3), (1, *config_keys.latent_shape(config)))
    made = [jax.eval_shape(m.init, key, np.zeros(s)) for m, s in zip((vae.encoder, vae.decoder), shapes, strict=True)]
    assert sum(leaf.size for leaf in jax.tree.leaves(made)) == 83_653_863  # as many as diffusers counts


def test_names_of_old_files_are_known(checkpoint):
    config = cases.config_of(cases.TINY, checkpoint)
    new = cases.load(config)
    arrays = cases.made_up(cases.tiny_shapes())
    renamed = {}
    for name, array in arrays.items():
        for today, old in OLD_NAMES.items():
            name = name.replace(f".{today}.", f".{old}.")
        renamed[name] = array
    assert len(arrays.keys() - renamed.keys()) == 16
    cases.write(checkpoint, renamed)
    jax.tree.map(np.testing.assert_array_equal, cases.load(config), new)


def test_written_for_diffusers_it_is_the_same_file(checkpoint, tmp_path):
    config = cases.config_of(cases.TINY, checkpoint)
    convert.export(None, tmp_path / "out", config=config, form="diffusers")
    with pytest.raises(UserError, match="config.statistics.weights='none'"):
        convert.export(None, tmp_path / "out", config=config, parts=["encoder", "statistics"])
    arrays, written = (load_file(folder / cases.FILE) for folder in (checkpoint, tmp_path / "out"))
    assert arrays.keys() == written.keys()
    jax.tree.map(np.testing.assert_array_equal, written, arrays)
    diffusers = pytest.importorskip("diffusers")
    model = diffusers.AutoencoderKL.from_pretrained(tmp_path / "out", low_cpu_mem_usage=False)
    assert model.config.scaling_factor == 0.18215
    jax.tree.map(np.testing.assert_array_equal, {k: v.numpy() for k, v in model.state_dict().items()}, arrays)


_CONV, _EXTRA = "decoder.up_blocks.1.resnets.0.conv1", "decoder.up_blocks.2.resnets.0.conv1"
_ATTENTION = "decoder.mid_block.attentions.0"


@pytest.mark.parametrize(
    "change, message",
    [
        ({"quant_conv.bias": None}, "lacks tensor 'quant_conv.bias'"),
        ({"encoder.conv_out.bias": None}, "lacks tensor 'encoder.conv_out.bias'"),
        ({f"{_CONV}.bias": None}, f"lacks tensor '{_CONV}.bias'"),
        ({f"{_EXTRA}.bias": (32,)}, f"unknown tensor '{_EXTRA}.bias'"),
        ({f"{_CONV}.weight": (64, 64, 1, 1)}, rf"'{_CONV}.weight' has shape \(64, 64, 1, 1\)"),
        ({f"{_ATTENTION}.key.bias": (64,)}, f"unknown tensor '{_ATTENTION}.key.bias'"),
        ({"loss.logvar": (1,)}, "unknown tensor 'loss.logvar'"),
    ],
)
def test_wrong_tensors_are_named(checkpoint, change, message):
    arrays = cases.made_up(cases.tiny_shapes())
    for name, shape in change.items():
        arrays.pop(name, None)
        if shape is not None:
            arrays[name] = np.zeros(shape, np.float32)
    cases.write(checkpoint, arrays)
    with pytest.raises(UserError, match=message):
        cases.load(cases.config_of(cases.TINY, checkpoint))


def test_other_models_files_and_damaged_ones_are_refused(checkpoint, tmp_path):
    encoder_cases.write(tmp_path, encoder_cases.shapes_of("mae"))
    with pytest.raises(UserError, match="tensor '.*name another file, or change the config"):
        cases.load(cases.config_of(cases.TINY, tmp_path))
    with pytest.raises(UserError, match="tensor '.*name another file, or change the config"):
        encoder_cases.load(encoder_cases.config_of(encoder_cases.TINY["mae"], checkpoint))
    file = checkpoint / cases.FILE
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match=f"{cases.FILE} is not a whole safetensors file"):
        cases.load(cases.config_of(cases.TINY, checkpoint))


@pytest.mark.parametrize(
    "key, value",
    [
        ("stages", ("decoder", "dit")),
        ("encoder.widths", ()),
        ("encoder.widths", (32, 48)),
        ("encoder.patch_size", 8),
        ("encoder.depth", 0),
        ("encoder.input_size", 64),
        ("encoder.layers", (0,)),
        ("decoder.weights", "small"),
        ("decoder.patch_size", 8),
    ],
)
def test_impossible_values_are_named(key, value):
    config = cases.config_of(cases.TINY, "a/folder")
    checks.check(config, sharding.make_mesh(config.mesh))
    config.update_from_flattened_dict({key: value})
    with pytest.raises(UserError, match=f"config.{key}"):
        checks.check(config, sharding.make_mesh(config.mesh))


def test_the_encoder_is_not_trained():
    config = cases.config_of(cases.TINY, "a/folder", stages=("encoder", "dit"))
    with pytest.raises(UserError, match="config.encoder.family='sd_vae'"):
        checks.check(config, sharding.make_mesh(config.mesh))


def _dit_job(folder):
    """A config whose job is two steps of the DiT on the VAE's latents."""
    config = cases.config_of(cases.TINY, folder, stages=("dit",))
    config.data.num_train = 16
    config.dit.train.update({"num_steps": 2, "batch_size": 8})
    config.evaluate.batch_size = 8
    checks.check(config, one_device())
    return config


def test_files_are_reconstructed(checkpoint, tmp_path):
    image, _ = cases.inputs(cases.TINY, 32, 32)
    image_grid.save(epath.Path(tmp_path / "image.png"), np.asarray(to_uint8(image[0])))
    workdir, flags = epath.Path(tmp_path), types.SimpleNamespace(images=str(tmp_path / "image.png"))
    reconstruct.run(_dit_job(checkpoint), workdir, one_device(), flags)
    results = json.loads((workdir / "eval" / "reconstruct.json").read_text())
    assert results["num_images"] == 1 and 5 < results["psnr"] < 20  # with made-up weights


@pytest.mark.slow
def test_the_dit_s_step_and_sampler_fit_its_latents(checkpoint, tmp_path):
    """Shapes alone: nothing is compiled."""
    config = _dit_job(checkpoint)
    stage = stages.stage(config, "dit", tmp_path, one_device())
    assert stage.frozen["statistics"] is None
    key, batch = jax.random.key(0), next(iter(stage.batches))
    state = jax.eval_shape(stage.init, key)
    after, metrics = jax.eval_shape(stage.step, state, stage.frozen, batch, key)
    assert after == state and metrics["loss"].shape == ()
    parts = {"decoder": cases.load(config)["decoder"], "statistics": None, "dit": state["params"]}
    indices = np.arange(8, dtype=np.uint32)
    images, _ = jax.eval_shape(generate.make_sampler(config, one_device()), parts, key, indices, batch["label"])
    assert (images.shape, images.dtype) == ((8, 32, 32, 3), np.uint8)


@pytest.mark.slow
def test_the_job_on_its_latents(checkpoint, tmp_path):
    config, mesh, workdir = _dit_job(checkpoint), one_device(), epath.Path(tmp_path / "run")
    run = {"log_every": 1, "checkpoint_every": 2, "keep": 1}
    fit(stages.stage(config, "dit", workdir, mesh), workdir=workdir, mesh=mesh, key=jax.random.key(0), **run)
    losses = [row["loss"] for row in logs.read(workdir / "metrics" / "dit.jsonl")]
    assert len(losses) == 2 and all(0.5 < loss < 5 for loss in losses)  # of latents and noise of variance about one
    flags = types.SimpleNamespace(
        step=None, num_images=8, label=None, labels="balanced", images=str(workdir / "samples" / "images")
    )
    sample.run(config, workdir, mesh, flags)
    reconstruct.run(config, workdir, mesh, flags)
    assert json.loads((workdir / "eval" / "reconstruct.json").read_text())["num_images"] == 8
