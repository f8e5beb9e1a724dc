"""A step on every mesh: the same numbers, nothing whole on one device; and the command that compiles ahead of time."""

import functools
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import doc_commands
import jax
import numpy as np
import pytest
import step_oracles
from conftest import tiny, uncached

from launch.bench import compile_table
from rae_jax.profiling import chips, compile_ahead, hlo_costs
from rae_jax.runtime import sharding

MESHES = ((8, 1, 1), (1, 8, 1), (2, 2, 2))
STAGES = ("dit", pytest.param("decoder", marks=pytest.mark.slow))
needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="the extra 'tpu' is not installed")


def _config():
    """Sizes that 2 and 8 divide, and of which no part of one is another or the batch."""
    config = tiny()
    config.encoder.update({"width": 48, "num_heads": 2})
    config.decoder.update({"width": 32, "depth": 2, "num_heads": 2, "hidden": 64})
    config.decoder.train.update({"batch_size": 56, "discriminator_start": 0, "adversarial_start": 0})
    config.dit.update({"width": 40, "depth": 2, "num_heads": 2, "head_width": 64, "head_num_heads": 2})
    config.dit.train.update({"batch_size": 56, "clip_norm": 1.0})
    return config


@functools.cache
def _compiled(stage, sizes):
    config = _config()
    config.stages = (stage,)
    config.unroll = True  # on CPU, collectives behind a loop may meet those inside it: tests/stress/collectives.py
    mesh, program = _only(config, sizes)
    with uncached():
        return mesh, program, program.jitted.lower(*program.arguments).compile()


def _step(stage, sizes):
    """(state, metrics) after a step from made-up weights and images, the optimisers' moments being zero."""
    mesh, program, compiled = _compiled(stage, sizes)
    rng = np.random.default_rng(0)

    def make(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        match leaf.dtype:
            case np.uint8:
                value = rng.integers(0, 256, leaf.shape)
            case np.int32:
                value = rng.integers(0, 10, leaf.shape) if leaf.shape else 0
            case _ if re.search("/(mu|nu)/", name):
                value = np.zeros(leaf.shape)
            case _:
                value = 0.1 * rng.normal(size=leaf.shape)
                value = np.square(value) if name.endswith("var") else value
        return jax.device_put(np.asarray(value, leaf.dtype), leaf.sharding)

    *trees, _ = program.arguments
    arguments = [jax.tree_util.tree_map_with_path(make, tree) for tree in trees]
    key = jax.device_put(jax.random.key(0), sharding.replicated(mesh))
    state, metrics = jax.device_get(compiled(*arguments, key))
    return state, metrics


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(
    "sizes", [*(pytest.param(sizes, marks=pytest.mark.slow) for sizes in MESHES[:2]), MESHES[2]], ids=str
)
def test_a_step_is_the_same_on_every_mesh(stage, sizes):
    """Numbers, parameters, and gradients, which the first moments tell: the first rate of a warm-up is zero."""
    (state, metrics), (expected, numbers) = _step(stage, sizes), _step(stage, (1, 1, 1))
    ours, theirs = ({name: float(value) for name, value in of.items()} for of in (metrics, numbers))
    # The discriminator sees 8-bit images: a pixel between two levels may be rounded the other way.
    rough = [name for name in theirs if name.startswith(("discriminator", "logits"))]
    assert {n: ours.pop(n) for n in rough} == pytest.approx({n: theirs.pop(n) for n in rough}, rel=5e-3, abs=1e-5)
    assert ours.pop("loss") == pytest.approx(theirs.pop("loss"), rel=1e-5)
    assert ours == pytest.approx(theirs, rel=1e-4) and ours["grad_norm"] > 1e-3
    for name in (name for name in state if name.endswith("params")):
        step_oracles.close(state[name], expected[name], rtol=0, atol=1e-5)
    for name in (name for name in state if name.endswith("opt_state")):
        (gradient, _), (their_gradient, _) = (step_oracles.moments(s[name]) for s in (state, expected))
        largest = max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(their_gradient))
        step_oracles.close(gradient, their_gradient, atol=(5e-3 if name.startswith("disc") else 1e-4) * largest)


def _whole(program, mesh, compiled):
    """Arrays of the program that are a whole stack of kernels, or the whole batch's."""
    state, _, batch, _ = program.arguments
    stacks = {leaf.shape for leaf in jax.tree.leaves(state["params"]) if leaf.ndim == 3 and leaf.size > 1024}
    size = batch["label"].shape[0]
    made = hlo_costs.Program(compiled.as_text()).arrays()
    return {(dtype, shape) for dtype, shape in made if shape in stacks or (size in shape and len(shape) > 1)}


@pytest.mark.parametrize("stage", STAGES)
def test_no_device_holds_all_parameters_or_all_of_the_batch(stage):
    mesh, program, compiled = _compiled(stage, (2, 2, 2))
    assert not _whole(program, mesh, compiled)
    for leaf in jax.tree.leaves(program.arguments[0]):
        whole = leaf.sharding.is_fully_replicated
        assert not (whole and leaf.ndim >= 2 and leaf.size > 1024), leaf


@pytest.mark.slow
def test_kernels_travel_in_the_compute_dtype_once_each_way():
    """Under FSDP, of a step from latents: gathered twice, gradients scattered once; only times are in float32."""
    config = _config()
    config.stages, config.dtype, config.remat, config.data.latents = ("dit",), "bfloat16", "dots", "not read"
    mesh, program = _only(config, (1, 8, 1))
    lowered = program.jitted.lower(*program.arguments)
    params = {jax.tree_util.keystr(p): leaf for p, leaf in jax.tree.leaves_with_path(program.arguments[0]["params"])}
    kernels = {path: leaf for path, leaf in params.items() if path.endswith("['kernel']")}
    times = sum("time_embed" in path for path in kernels)
    for kind, most in (("all_gather", 2), ("reduce_scatter", 1)):
        # As it is asked for: XLA computes, and sends, bfloat16 as float32 on CPU. Loops stand there once.
        found = re.findall(rf'"stablehlo\.{kind}".*?\) -> tensor<[\dx]+x(\w+)>', lowered.as_text(), re.DOTALL)
        assert times <= found.count("f32") <= most * times  # inputs have no gradient: their kernels may go once
        assert 0 < found.count("bf16") <= most * (len(kernels) - times)
        assert len(found) == found.count("f32") + found.count("bf16")
    sent = hlo_costs.Program(lowered.compile().as_text()).costs().sent
    once = 7 / 8 * 4 * sum(leaf.size for leaf in params.values() if leaf.ndim > 1)
    assert once < sent["all-gather"] < 2 * once and 0.9 * once < sent["reduce-scatter"] < once
    assert sent["all-to-all"] + sent["collective-permute"] < 0.01 * once  # activations stay where they are
    assert sent["all-reduce"] < 0.05 * once  # biases and the like


def _only(config, sizes):
    mesh = sharding.make_mesh(dict(zip(sharding.AXES, sizes, strict=True)), jax.devices()[: np.prod(sizes)])
    (program,) = compile_ahead.programs(config, mesh, ("train",))
    return mesh, program


def _compile(*arguments, timeout=600):
    command = [sys.executable, "-m", "rae_jax.main", "--mode=compile", *arguments]
    root = Path(__file__).parents[2]
    environment = {key: value for key, value in os.environ.items() if key not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    return subprocess.run(command, capture_output=True, text=True, cwd=root, timeout=timeout, env=environment)


@needs_libtpu
def test_the_command_compiles_for_a_tpu():
    """A plain DiT's step from latents on four chips: the table, and the numbers as JSON in the last line."""
    # Narrow heads, as of a wide model: the products that turn them for their positions are K / (6 * width) of a block.
    small = {"width": 128, "depth": 2, "num_heads": 8, "head_depth": 0}
    sizes = [f"--config.dit.{key}={value}" for key, value in small.items()]
    how = ["--config.dtype=bfloat16", "--config.remat=dots", "--config.unroll=False", "--config.mesh.data=1"]
    stage = ["--config.stages=('dit',)", "--config.data.latents=none", "--config.dit.train.optimizer=adamw"]
    rest = ["--config.mesh.fsdp=4", "--topology=v5e:2x2", "--program=train"]
    done = _compile("--config=configs/small.py", *sizes, *how, *stage, *rest)
    assert done.returncode == 0, done.stderr
    (found,) = json.loads(done.stdout.splitlines()[-1])
    assert found["program"] == "train" and found["topology"] == "v5e:2x2" and found["fits"] is True
    assert 0 < found["peak_bytes"] < found["hbm_bytes"] == int(15.75 * 2**30)
    assert 1.0 <= found["flops_ratio"] < 1.06 and found["estimated_cycles"] > 0
    assert found["collective_bytes"] == sum(found["collective_bytes_by_kind"].values()) > 0
    assert "times the model's own" in done.stdout


@needs_libtpu
def test_nothing_is_whole_in_the_program_of_a_tpu():
    config = _config()
    config.stages, config.dtype, config.remat = ("dit",), "bfloat16", "dots"
    devices, chip = chips.devices("v5e:2x2")
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 1}, devices)
    (program,) = compile_ahead.programs(config, mesh, ("train",))
    compiled = program.jitted.lower(*program.arguments).compile()
    assert not _whole(program, mesh, compiled)


def test_the_table_is_made_of_what_was_found(tmp_path, monkeypatch, capsys):
    """Rows that are there are not compiled again; too full is told by the exit status."""
    row = {"program": "train", "stage": "dit", "topology": "v6e:8x8", "num_slices": 1, "batch_size": 1024}
    row |= {"remat": "dots", "mesh": {"data": 1, "fsdp": 64, "tensor": 1}, "fits": True, "compile_seconds": 200.4}
    row |= {"hbm_bytes": 32 * 2**30, "flops": 16.7e12, "flops_ratio": 1.029, "collective_bytes": 5 * 2**30}
    for name, peak in (("v6e_8x8", 4), ("512px", 31)):
        (tmp_path / f"{name}.json").write_text(json.dumps({**row, "peak_bytes": peak * 2**30}))
    for names, status in ((["v6e_8x8"], 0), (["v6e_8x8", "512px"], 1)):
        monkeypatch.setattr(sys, "argv", ["compile_table.py", f"--folder={tmp_path}", "--only", *names])
        with pytest.raises(SystemExit) as end:
            compile_table.main()
        assert end.value.code == status
        first = capsys.readouterr().out.splitlines()[2]
        assert first == (
            "| train dit, v6e:8x8, batch 1024 | 1 x 64 | 16 | 4.00 of 32.00 | 16.70 | 1.029 | 5.00 | 200 s |"
        )


def test_the_rows_of_the_table_are_commands():
    assert doc_commands.check([("rae_jax.main", compile_table.arguments(name)) for name in compile_table.ROWS]) == {}


SMALL = "--config=configs/small.py"


@pytest.mark.parametrize(
    "said, gib",
    [
        ("RESOURCE_EXHAUSTED: the memory of arguments and temporaries (1.50T) exceeds available HBM", 1536.0),
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm.", 20.5),
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem. Used 33.05M of 16.00M vmem.", None),
        ("INTERNAL: Used 20.50G of 15.75G hbm.", None),
    ],
)
def test_what_does_not_fit_is_told_from_other_mistakes(said, gib):
    needed = compile_ahead.needed_bytes(said)
    assert needed == gib or needed / 2**30 == gib


BAD = {
    "needs --topology": [SMALL],
    "--topology=v9:2x2 is not KIND:SIZES": [SMALL, "--topology=v9:2x2"],
    "a slice of v5e has 2 axes": [SMALL, "--topology=v5e:2x2x2"],
    "libtpu does not know this topology": [SMALL, "--topology=v5e:3x5"],
    "do not multiply to the 16 devices": [SMALL, "--topology=v5e:4x4", "--config.mesh.data=3"],
    "config.dit.train.batch_size=20 cannot be split over 16 devices": [
        *(SMALL, "--topology=v5e:4x4", "--config.dit.train.batch_size=20"),
    ],
}


@needs_libtpu
@pytest.mark.parametrize("message", BAD)
def test_mistakes_are_one_line(message):
    done = _compile(*BAD[message])
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    assert message in done.stderr


def test_without_libtpu_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(chips.UserError, match=r"pip install -e '.\[tpu\]'"):
        chips.devices("v5e:4x4")
