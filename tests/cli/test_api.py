"""The Python API: sources it loads, the same samples as --mode=sample, and purity."""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import autoencoder_cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import one_device, random_like, tiny
from etils import epath
from huggingface_hub import constants
from ml_collections import ConfigDict, FrozenConfigDict

import rae_jax
from configs import small
from rae_jax import api, convert
from rae_jax.build import models, part_weights, saved_config
from rae_jax.config import keys as config_keys
from rae_jax.config import run_config
from rae_jax.inference import generate
from rae_jax.models.autoencoder import denormalise, to_uint8
from rae_jax.weights import safetensors_tree

LABELS = [0, 3, 9]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Folder of random weights as convert writes it; guidance of scale 2.5, as in configs/small.py."""
    folder, config = tmp_path_factory.mktemp("converted"), tiny()
    shapes = {part: part_weights.shapes(config, part) for part in ("encoder", "decoder", "dit")}
    latent = config_keys.latent_shape(config)
    parts = random_like(shapes, seed=0, scale=0.2)
    parts["statistics"] = {"mean": np.full(latent, 0.1, np.float32), "var": np.full(latent, 0.5, np.float32)}
    for part, tree in parts.items():
        safetensors_tree.write(folder / f"{part}.safetensors", tree)
    saved_config.write(config, folder, parts)
    return folder


@pytest.mark.slow
def test_the_readme_s_example_runs_as_written():
    text = (Path(__file__).parents[2] / "README.md").read_text()
    (code,) = re.findall(r"```python\n(import rae_jax\n.*?)```", text, re.DOTALL)
    assert len([line for line in code.splitlines() if line]) == 5
    names = {}
    exec(code, names)
    assert names["latents"].shape == (3, 8, 8, 64)
    for images in (names["images"], names["again"]):
        assert images.shape == (3, 32, 32, 3) and 0 <= float(images.min()) < float(images.max()) <= 1
    assert float(jnp.abs(names["again"] - names["images"]).mean()) < 0.03


def test_importing_is_light():
    code = (
        "import sys, rae_jax; assert not {'jax', 'numpy'} & set(sys.modules); rae_jax.load_rae; rae_jax.UserError;"
        "assert not {'torch', 'tensorflow', 'gradio', 'wandb'} & set(sys.modules); assert 'sample' in dir(rae_jax)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


def test_the_shipped_weights_are_described_by_small():
    """If a key was added, write config.json again: json.loads(small.get_config().to_json()) with an indent of 2."""
    there = json.loads((run_config.SHIPPED / "config.json").read_text())
    assert there == json.loads(small.get_config().to_json())


def _changed(value):
    """Return another value of the same type."""
    match value:
        case bool():
            return not value
        case int() | float():
            return value + 1
        case str():
            return f"{value} and more"
        case _:
            return (*value, 7)


def test_a_description_keeps_all_that_encodes_decodes_and_samples(tmp_path):
    config, before = tiny(), config_keys.flatten(json.loads(small.get_config().to_json()))
    kept = ("encoder.", "decoder.", "statistics.", "dit.", "sampler.", "guidance.")
    keys = [key for key in before if key.startswith(kept) and ".train." not in key]
    keys.remove("statistics.batch_size")
    keys += ["name", "dtype", "unroll", "data.image_size", "data.num_classes"]
    config.update_from_flattened_dict({key: _changed(before[key]) for key in keys})
    saved_config.write(config, tmp_path, ("encoder", "judge", "decoder", "statistics", "dit"))
    found = config_keys.flatten(json.loads(saved_config.read(tmp_path).to_json()))
    wanted = config_keys.flatten(json.loads(config.to_json()))
    assert {key: found[key] for key in keys} == {key: wanted[key] for key in keys}
    assert all(found[key] != before[key] for key in keys)


def test_it_draws_what_the_command_draws_and_so_do_single_steps(folder):
    auto, dit, config = rae_jax.load_rae(folder), rae_jax.load_dit(str(folder)), tiny()
    config.sampler.num_steps, config.guidance.scale = 2, 1.5
    ours = rae_jax.sample(auto, dit, LABELS, seed=5, num_steps=2, guidance_scale=1.5)
    parts = {"decoder": auto.params["decoder"], **dit.params}
    key, indices, labels = jax.random.key(5), jnp.arange(3, dtype=jnp.uint32), jnp.array(LABELS)
    wanted, _ = generate.make_sampler(config, one_device())(parts, key, indices, labels)
    assert np.abs(np.int32(to_uint8(ours)) - np.int32(wanted)).max() <= 1
    x, times = generate.first_noise(config, key, indices), generate.times(config)
    step = jax.jit(lambda x, t, t_next, scale: generate.euler_step(config, parts, x, t, t_next, labels, scale))
    for t, t_next in zip(times, times[1:], strict=False):
        before = x
        x, seen = step(x, t, t_next, 1.5)
    straight_on = before - t * (x - before) / (t_next - t)  # to t = 0
    np.testing.assert_allclose(seen, denormalise(straight_on, parts["statistics"]), atol=1e-4)
    stepped = rae_jax.decode(auto, denormalise(x, parts["statistics"]))
    np.testing.assert_allclose(stepped, ours, atol=1e-4)

    unguided = ConfigDict(dit.config.to_dict())
    unguided.guidance.method = "none"  # with a scale it is guided all the same
    plain = dataclasses.replace(dit, config=FrozenConfigDict(unguided))
    found = rae_jax.sample(auto, plain, LABELS, seed=5, num_steps=2, guidance_scale=1.5)
    np.testing.assert_allclose(found, stepped, atol=1e-4)


def test_encode_takes_bytes_and_decode_stays_between_0_and_1(folder):
    auto = rae_jax.load_rae(folder)
    model = models.autoencoder(tiny())
    images = np.random.default_rng(0).integers(0, 256, (2, 8, 12, 3), np.uint8)
    latents = jax.jit(model.encode)(auto.params["encoder"], images / np.float32(255))
    for given in (images, images / np.float32(255)):
        np.testing.assert_allclose(rae_jax.encode(auto, given), latents, atol=1e-5)
    strong = {"decoder": jax.tree.map(lambda leaf: 5.0 * leaf, auto.params["decoder"])}
    decoded = jax.jit(model.decode)(strong["decoder"], latents)
    assert decoded.min() < -0.1 and decoded.max() > 1.1
    found = rae_jax.decode(dataclasses.replace(auto, params=strong), latents)
    np.testing.assert_allclose(found, np.clip(decoded, 0.0, 1.0), atol=1e-4)


@pytest.mark.slow
def test_it_works_inside_jit_and_grad(folder):
    auto, dit = rae_jax.load_rae(folder), rae_jax.load_dit(folder)

    @jax.jit
    def both(auto, dit, labels, seed, scale):
        images = rae_jax.sample(auto, dit, labels, seed=seed, num_steps=2, guidance_scale=scale)
        return images, rae_jax.decode(auto, rae_jax.encode(auto, images))

    images, again = both(auto, dit, jnp.array(LABELS), 7, 2.0)
    np.testing.assert_allclose(
        images, rae_jax.sample(auto, dit, LABELS, seed=7, num_steps=2, guidance_scale=2.0), atol=1e-5
    )
    np.testing.assert_allclose(again, rae_jax.decode(auto, rae_jax.encode(auto, images)), atol=1e-5)

    grads = jax.grad(lambda auto: rae_jax.decode(auto, rae_jax.encode(auto, images)).mean(), allow_int=True)(auto)
    assert all(
        float(jnp.abs(grads.params[part]["blocks"]["attention"]["qkv"]["kernel"]).max()) > 0 for part in auto.params
    )


def test_other_values_do_not_compile_again(folder):
    auto, dit = rae_jax.load_rae(folder), rae_jax.load_dit(folder)
    rae_jax.sample(auto, dit, LABELS, seed=0, num_steps=2, guidance_scale=1.0)
    count = api._sample._cache_size()
    for seed, scale in ((1, 1.5), (2, 3.0)):
        rae_jax.sample(rae_jax.load_rae(folder), dit, [1, 2, 3], seed=seed, num_steps=2, guidance_scale=scale)
    assert api._sample._cache_size() == count


def test_a_weaker_model_guides(folder):
    """By how much it differs: the model itself as its guide is no guidance at all, at any scale."""
    auto, dit = rae_jax.load_rae(folder), rae_jax.load_dit(folder)
    plain = rae_jax.sample(auto, dit, LABELS, num_steps=2, guidance_scale=1.0)
    itself = rae_jax.sample(auto, dit, LABELS, num_steps=2, guidance_scale=3.0, guide=dit)
    np.testing.assert_allclose(itself, plain, atol=1e-5)
    weak = jax.tree.map(lambda leaf: 0.5 * leaf, dit)
    guided = rae_jax.sample(auto, dit, LABELS, num_steps=2, guidance_scale=3.0, guide=weak)
    assert float(jnp.abs(guided - plain).max()) > 0.01


def test_what_cannot_be_drawn_is_refused(folder):
    auto, dit = rae_jax.load_rae(folder), rae_jax.load_dit(folder)
    with pytest.raises(rae_jax.UserError, match="num_steps=0 cannot work"):
        rae_jax.sample(auto, dit, LABELS, num_steps=0)
    for key, value in (("dit.prediction", "data"), ("data.num_classes", 3), ("encoder.width", 32)):
        config = ConfigDict(dit.config.to_dict())
        config.update_from_flattened_dict({key: value})
        guide = dataclasses.replace(dit, config=FrozenConfigDict(config))
        with pytest.raises(rae_jax.UserError, match="the guide has .* load a guide that has the same"):
            rae_jax.sample(auto, dit, LABELS, guide=guide)


def test_configs_as_values_and_as_files(folder):
    config = tiny()
    for part in ("encoder", "decoder", "statistics", "dit"):
        config[part].weights = str(folder)
    named, there = rae_jax.load_rae(config, dtype="bfloat16"), rae_jax.load_rae(folder)
    jax.tree.map(np.testing.assert_array_equal, named.params, there.params)
    assert named.config.dtype == "bfloat16" and config.dtype == "float32" and config.stages
    elsewhere = {"attention": "cudnn", "wandb": "project", "evaluate.reference": "/not/here"}
    config.update_from_flattened_dict(elsewhere)  # where it was trained
    jax.tree.map(np.testing.assert_array_equal, rae_jax.load_rae(config).params, there.params)
    shipped = rae_jax.load_dit(Path(__file__).parents[2] / "configs" / "small.py")
    jax.tree.map(np.testing.assert_array_equal, shipped.params, rae_jax.load_dit().params)


@pytest.mark.parametrize("name", ["dinov2", "mae"])
def test_an_autoencoder_as_diffusers_saves_it_here_and_on_the_hub(tmp_path, name, monkeypatch):
    (tmp_path / "theirs").mkdir()
    autoencoder_cases.write(name, tmp_path / "theirs")
    config = autoencoder_cases.config_of(autoencoder_cases.TINY[name], tmp_path / "theirs")
    cache = tmp_path / "models--someone--rae" / "snapshots" / "abc"
    convert.export(None, cache, config=config, form="diffusers")
    (tmp_path / "models--someone--rae" / "refs").mkdir()
    (tmp_path / "models--someone--rae" / "refs" / "main").write_text("abc")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    wanted = autoencoder_cases.load(config, "encoder", "decoder")
    for source in (cache, "someone/rae"):
        found = rae_jax.load_rae(source)
        jax.tree.map(np.testing.assert_array_equal, [found.params["encoder"], found.params["decoder"]], wanted)
    for key in autoencoder_cases.TINY[name].keys() - {"weights"}:
        assert found.config.encoder[key] == config.encoder[key], key


def test_mistakes_are_one_line(folder, tmp_path):
    auto, dit = rae_jax.load_rae(folder), rae_jax.load_dit(folder)
    (tmp_path / "config.json").write_text('{"_class_name": "UNet"}')
    half = epath.Path(tmp_path / "half")
    half.mkdir()
    (half / "config.json").write_text('{"encod')
    for mistake, words in (
        (lambda: rae_jax.sample(auto, dit, [10]), "0 to 9"),
        (lambda: rae_jax.sample(auto, dit, [0.5]), "integers"),
        (lambda: rae_jax.sample(auto, rae_jax.load_dit("small"), [0]), "one source"),
        (lambda: rae_jax.encode(auto, np.zeros((32, 32, 3))), "B, H, W, 3"),
        (lambda: rae_jax.encode(auto, np.zeros((1, 30, 32, 3))), "multiples of 4"),
        (lambda: rae_jax.decode(auto, np.zeros((1, 8, 8, 3))), "B, h, w, 16"),
        (lambda: rae_jax.load_rae(tmp_path), "UNet"),
        (lambda: rae_jax.load_rae(half), "truncated or not JSON"),
        (lambda: rae_jax.load_rae(tmp_path / "nothing.py"), "cannot load the config"),
        (lambda: rae_jax.load_rae("no such folder"), "neither a folder here nor a hub id"),
        (lambda: rae_jax.load_dit(folder, dtype="float8"), "config.dtype"),
    ):
        with pytest.raises(rae_jax.UserError, match=re.escape(words)) as error:
            mistake()
        assert "\n" not in str(error.value)
