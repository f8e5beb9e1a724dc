"""Ahead-of-time compiling: a run's real programs for TPUs that are not here.

Do they fit, what do they compute and send, what bounds them? Shapes only: no weights, no data, no devices.
"""

import dataclasses
import json
import re
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp

from rae_jax.build import objectives, part_weights
from rae_jax.build import sampler as build_sampler
from rae_jax.config.keys import TRAINED, in_steps, latent_shape
from rae_jax.errors import UserError
from rae_jax.inference import generate
from rae_jax.profiling import hlo_costs, jaxpr_flops
from rae_jax.profiling.chips import GIB
from rae_jax.runtime import sharding
from rae_jax.training import loop

_SCHEDULE = 1000  # steps of an epoch, for schedules that count them: no data set is asked how many


@dataclasses.dataclass(frozen=True)
class Program:
    """One program of a run: compiled as `jitted` is, while `plain` is the same mathematics and recomputes nothing."""

    kind: str  # 'train' or 'sample'
    stage: str
    batch_size: int
    jitted: Callable
    plain: Callable
    arguments: tuple  # shapes, with their shardings


def programs(config, mesh, kinds=("train", "sample")):
    """The train step of each stage that config.stages trains, and the sampler, as the run itself makes them.

    Raises UserError for what cannot be compiled so.
    """
    found = []
    if "train" in kinds:
        found += [_train(config, name, mesh) for name in config.stages if name in TRAINED]
    if "sample" in kinds:
        found.append(_sample(config, mesh))
    if not found:
        raise UserError(f"config.stages={tuple(config.stages)} trains nothing: there is no train step to compile")
    return found


def measure(program, mesh, chip):
    """Compile a program; what one device needs, does and sends in one run of it, by name."""
    asked = jaxpr_flops.count(program.plain, *program.arguments) / mesh.size
    began = time.monotonic()
    lowered = program.jitted.lower(*program.arguments)
    found = {"lower_seconds": time.monotonic() - began, "hbm_bytes": int(chip.hbm)}
    began = time.monotonic()
    try:
        compiled, assigned = _compile(lowered)
    except jax.errors.JaxRuntimeError as error:
        needed = needed_bytes(str(error))
        if needed is None:
            raise
        return {**found, "fits": False, "peak_bytes": needed, **_UNKNOWN}
    found["compile_seconds"] = time.monotonic() - began
    memory = compiled.memory_analysis()
    sizes = {
        "argument_bytes": memory.argument_size_in_bytes,
        "output_bytes": memory.output_size_in_bytes,
        "donated_bytes": memory.alias_size_in_bytes,
    }
    kept = sum(sizes.values()) - 2 * sizes["donated_bytes"]
    peak = assigned or kept + memory.temp_size_in_bytes
    sizes |= {"temp_bytes": peak - kept, "code_bytes": memory.generated_code_size_in_bytes}
    costs = hlo_costs.Program(compiled.as_text()).costs()
    return {
        **{**found, **sizes, "fits": peak <= chip.hbm, "peak_bytes": peak},
        **{"flops": costs.flops, "model_flops": asked, "flops_ratio": costs.flops / asked},
        **{"collective_bytes": costs.sent.total(), "collective_bytes_by_kind": dict(costs.sent)},
        **{"roofline_seconds": _roofline(costs, chip), "estimated_cycles": costs.cycles},
    }


def needed_bytes(said):
    """Of HBM, by what the TPU compiler says where it is not enough; None where it says something else."""
    found = re.search(r"\(([\d.]+)([KMGT])\) exceeds|Used ([\d.]+)([KMGT]) of [\d.]+[KMGT] hbm", said)
    if "RESOURCE_EXHAUSTED" not in said or not found:
        return None
    size, unit = (group for group in found.groups() if group)
    return int(float(size) * 2 ** (10 * (1 + "KMGT".index(unit))))


def _compile(lowered):
    """(the compiled program, the bytes of HBM that the TPU compiler assigned in it, or None where it does not say).

    By those, which it writes among its dumps, it refuses what does not fit. What it hands on as the size of temporaries
    is more: 5.18 GiB where it had assigned 4.02.
    """
    with tempfile.TemporaryDirectory() as folder:
        compiled = lowered.compile(compiler_options={"xla_dump_to": folder})
        reports = [path.read_text() for path in Path(folder).glob("*memory-usage-report.txt")]
    assigned = [re.search(r"Memory Space: default.*?Total bytes: (\d+)", report, re.DOTALL) for report in reports]
    return compiled, max((int(found[1]) for found in assigned if found), default=None)


_UNKNOWN = dict.fromkeys(("compile_seconds", "flops_ratio", "collective_bytes"))  # of what does not fit


def _roofline(costs, chip):
    """Seconds that each resource takes at its peak; the step cannot be faster than the slowest."""
    return {
        "compute": costs.flops * chip.devices / chip.flops,
        "HBM": costs.moved * chip.devices / chip.bandwidth,
        "interconnect": costs.sent.total() * chip.devices / chip.links,
    }


def table(name, found):
    """The lines that a person reads of what `measure` found."""
    gib = lambda key: f"{found[key] / GIB:9.2f} GiB"  # noqa: E731
    verdict = "fits" if found["fits"] else "DOES NOT FIT"
    peak = f"  peak         {gib('peak_bytes')} of {found['hbm_bytes'] / GIB:.2f}: {verdict}"
    if "argument_bytes" not in found:
        return [name, peak]
    bound = max(found["roofline_seconds"], key=found["roofline_seconds"].get)
    seconds = ", ".join(f"{key} {1e3 * value:.1f}" for key, value in found["roofline_seconds"].items())
    sent = {kind: size for kind, size in found["collective_bytes_by_kind"].items() if size}
    return [
        name,
        f"  arguments    {gib('argument_bytes')}",
        f"  outputs      {gib('output_bytes')}, {found['donated_bytes'] / GIB:.2f} of them in the arguments' place",
        f"  temporaries  {gib('temp_bytes')}, and {found['code_bytes'] / GIB:.2f} of code beside them",
        peak,
        f"  FLOPs        {found['flops'] / 1e12:9.2f} T, {found['flops_ratio']:.3f} of the model's own",
        *(f"  {kind:18} {size / GIB:.3f} GiB sent" for kind, size in sent.items()),
        f"  at least     {1e3 * max(found['roofline_seconds'].values()):9.1f} ms, bound by {bound} (ms: {seconds})",
        f"  estimate     {found['estimated_cycles'] / 1e6:9.1f} M cycles, by the compiler's own model of the chip",
        f"  compiled in  {found['compile_seconds']:9.0f} s, after {found['lower_seconds']:.0f} s of tracing",
    ]


def report(config, mesh, chip, topology, num_slices, kinds):
    """Compile, print tables and at last one line of JSON, a list with an object for each program; whether all fit."""
    shape = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    results = []
    for program in programs(config, mesh, kinds):
        found = measure(program, mesh, chip)
        where = f"{num_slices} slices of {topology}" if num_slices > 1 else topology
        name = f"{program.kind} ({program.stage}) on {where}: batch {program.batch_size}, mesh {shape}; a device:"
        print("\n".join(table(name, found)), flush=True)
        what = {"program": program.kind, "stage": program.stage, "topology": topology, "num_slices": num_slices}
        how = {"config": config.name, "dtype": config.dtype, "remat": config.remat, "batch_size": program.batch_size}
        results.append({**what, **how, "mesh": dict(mesh.shape), **found})
    print(json.dumps(results))
    return all(result["fits"] for result in results)


def _train(config, name, mesh):
    batch_size = config[name].train.batch_size
    config = in_steps(config, name, _SCHEDULE * batch_size)
    init, step = objectives.init_and_step(config, name)
    key = jax.eval_shape(lambda: jax.random.key(0))
    shapes = jax.eval_shape(init, key)
    frozen = part_weights.frozen(config, name, lambda part: part_weights.shapes_or_none(config, part))
    state, frozen = sharding.abstract(shapes, mesh), sharding.abstract(frozen, mesh)
    placed = jax.tree.map(lambda leaf: leaf.sharding, state)
    arguments = (state, frozen, _batch(config, name, batch_size, mesh), _whole(key, mesh))
    same = objectives.init_and_step(plain(config), name)[1]
    return Program("train", name, batch_size, loop.compiled_step(step, placed, mesh), same, arguments)


def _sample(config, mesh):
    if not build_sampler.has_fixed_steps(config):
        raise UserError("config.sampler.method='adaptive' has no number of steps to count: compile it with 'heun'")
    shapes = {part: part_weights.shapes_or_none(config, part) for part in part_weights.of_sampling(config)}
    batch_size = sharding.round_up(config.evaluate.batch_size, mesh)
    numbers = [_split((batch_size,), dtype, mesh) for dtype in (jnp.uint32, jnp.int32)]
    arguments = (sharding.abstract(shapes, mesh), _whole(jax.eval_shape(lambda: jax.random.key(0)), mesh), *numbers)
    asked = generate.sampler(plain(config))
    return Program("sample", "dit", batch_size, generate.make_sampler(config, mesh), asked, arguments)


def plain(config):
    """The config whose programs compute the same without a kernel of their own, and nothing twice."""
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.remat, config.attention = "none", "xla"
    return config


def _batch(config, name, batch_size, mesh):
    size = config.data.image_size
    if name == "dit" and config.data.latents:
        batch = {"latent": _split((batch_size, *latent_shape(config)), jnp.bfloat16, mesh)}
    else:
        batch = {"image": _split((batch_size, size, size, 3), jnp.uint8, mesh)}
    return {**batch, "label": _split((batch_size,), jnp.int32, mesh)}


def _split(shape, dtype, mesh):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding.batch_sharding(mesh))


def _whole(leaf, mesh):
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding.replicated(mesh))
