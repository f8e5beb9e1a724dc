"""Timed steps: what is measured of what, as a table for people and as JSON at the end."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import tiny

from rae_jax.build import part_weights
from rae_jax.errors import UserError
from rae_jax.inference import generate
from rae_jax.profiling import jaxpr_flops, timing
from rae_jax.runtime import sharding


def _report(capsys, config, names):
    timing.report(config, sharding.make_mesh(config.mesh), names, steps=2, warmup=1)
    lines = capsys.readouterr().out.splitlines()
    return lines, json.loads(lines[-1])


def _check(config, lines, found, names):
    assert [line.split()[0] for line in lines[2:-2]] == list(found["programs"]) == list(names)
    assert found["devices"] == 8 and found["processes"] == 1 and found["published_peak"] is None
    assert found["measured_peak"] > 0 and found["host_peak_bytes"] > 2**20
    for name, result in found["programs"].items():
        trained = {"train_decoder": config.decoder, "train_dit": config.dit, "train_dit_latents": config.dit}
        size = trained[name].train.batch_size if name in trained else config.evaluate.batch_size
        assert result["batch_size"] == size
        assert 0 < result["seconds_min"] <= result["seconds_median"]
        assert result["images_per_second"] == pytest.approx(size / result["seconds_median"])
        rate = result["model_flops"] / result["seconds_median"] / 8
        assert result["flops_per_second_and_device"] == pytest.approx(rate)
        assert result["utilisation_of_measured"] == pytest.approx(rate / found["measured_peak"])
        assert result["utilisation_of_published"] is None and result["device_peak_bytes"] is None
        assert result["program_bytes"] > 0 and result["compile_seconds"] > 0


def test_a_table_and_one_line_of_json(capsys):
    names = ("encode", "decode")
    config = tiny()
    _check(config, *_report(capsys, config, names), names)


@pytest.mark.slow
def test_all_programs(capsys):
    config = tiny()
    lines, found = _report(capsys, config, timing.PROGRAMS)
    _check(config, lines, found, timing.PROGRAMS)
    cost = {name: result["model_flops"] for name, result in found["programs"].items()}
    assert cost["train_dit"] == cost["train_dit_latents"] + cost["encode"]  # the same batch size
    sample = generate.make_sampler(config, sharding.make_mesh(config.mesh))
    shapes = {name: part_weights.shapes(config, name) for name in ("decoder", "statistics", "dit")}
    numbers = [jax.ShapeDtypeStruct((16,), dtype) for dtype in (jnp.uint32, jnp.int32)]
    assert cost["sample"] == jaxpr_flops.count(sample, shapes, jax.random.key(0), *numbers)


def test_what_the_config_has_not_is_left_out(capsys):
    config = tiny()
    config.sampler.method = "adaptive"
    lines, found = _report(capsys, config, ("sample",))
    assert "adaptive" in found["programs"]["sample"]["left_out"] and "left out" in lines[2]
    with pytest.raises(UserError, match="--only=fly cannot work: choose from train_decoder"):
        _report(capsys, config, ("fly",))


def test_kernels_and_recomputation_do_not_change_the_model_s_flops():
    config, mesh = tiny(), sharding.make_mesh(tiny().mesh)
    plain = timing.PROGRAMS["encode"](config, mesh)
    config.attention = "flash"  # its kernel could not be counted
    assert jaxpr_flops.count(timing.PROGRAMS["encode"](config, mesh).plain, *plain.arguments) == jaxpr_flops.count(
        plain.plain, *plain.arguments
    )


def test_what_is_made_up_is_where_and_what_it_should_be():
    mesh = sharding.make_mesh(tiny().mesh)
    split, whole = sharding.batch_sharding(mesh), sharding.replicated(mesh)
    shapes = {
        "image": jax.ShapeDtypeStruct((8, 16, 16, 3), jnp.uint8, sharding=split),
        "label": jax.ShapeDtypeStruct((8,), jnp.int32, sharding=split),
        "norm": {"scale": jax.ShapeDtypeStruct((5,), jnp.float32, sharding=whole)},
        "kernel": jax.ShapeDtypeStruct((64, 32), jnp.bfloat16, sharding=whole),
        "statistics": None,
    }
    found = timing.made_up(shapes)
    assert jax.tree.map(lambda a: (a.shape, a.dtype, a.sharding), found) == jax.tree.map(
        lambda s: (s.shape, s.dtype, s.sharding), shapes
    )
    pixels, kernel = np.asarray(found["image"], int), np.asarray(found["kernel"], np.float32)
    assert (pixels.min(), pixels.max()) == (0, 255) and abs(pixels.mean() - 127.5) < 5
    assert 0.01 < kernel.std() < 0.02 and abs(kernel.mean()) < 1e-3
    assert not np.asarray(found["label"]).any() and np.allclose(found["norm"]["scale"], 1, atol=0.03)
