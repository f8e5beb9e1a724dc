"""Ahead-of-time compilation of a run's programs for TPUs, without a TPU.

Reports whether a program fits, its FLOPs, its traffic between devices, and its bound. Uses shapes only: no weights, no
data, no devices.
"""

import dataclasses
import functools
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
from rae_jax.config import auto
from rae_jax.config.keys import GENERATORS, TRAINED, generator, in_steps, latent_shape
from rae_jax.errors import UserError
from rae_jax.inference import generate
from rae_jax.profiling import hlo_costs, jaxpr_flops
from rae_jax.profiling.chips import GIB
from rae_jax.runtime import health, sharding
from rae_jax.training import loop

_SCHEDULE = 1000  # steps of an epoch, for schedules in epochs: no data set is read


@dataclasses.dataclass(frozen=True)
class Program:
    """One program of a run. `jitted` is compiled; `plain` computes the same without kernels and rematerialisation."""

    kind: str  # 'train' or 'sample'
    stage: str
    batch_size: int
    jitted: Callable
    plain: Callable
    arguments: tuple  # shapes, with their shardings


def programs(config, mesh, kinds=("train", "sample")):
    """Return the run's own programs: the train step of each stage in config.stages that is trained, and the sampler.

    Raises UserError if no stage is trained, or the sampler has no fixed number of steps.
    """
    return [make(config, mesh) for make in _makers(config, kinds)]


def _makers(config, kinds):
    """Return the functions (config, mesh) -> Program of the run's programs."""
    found = []
    if "train" in kinds:
        found += [functools.partial(training_program, stage=name) for name in config.stages if name in TRAINED]
    if "sample" in kinds:
        found.append(_sample)
    if not found:
        raise UserError(f"config.stages={tuple(config.stages)} trains nothing: name a stage to compile its train step")
    return found


def measure(program, mesh, chip):
    """Compile a program; return {name: value} of the memory, FLOPs and traffic of one device in one run of it."""
    model_flops = jaxpr_flops.count(program.plain, *program.arguments) / mesh.size
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
        **{"flops": costs.flops, "model_flops": model_flops, "flops_ratio": costs.flops / model_flops},
        **{"collective_bytes": costs.sent.total(), "collective_bytes_by_kind": dict(costs.sent)},
        **{"roofline_seconds": _roofline(costs, chip), "estimated_cycles": costs.cycles},
    }


def needed_bytes(message):
    """Return the bytes of HBM that the TPU compiler's message asks for; None for a message about something else."""
    found = re.search(r"\(([\d.]+)([KMGT])\) exceeds|Used ([\d.]+)([KMGT]) of [\d.]+[KMGT] hbm", message)
    if "RESOURCE_EXHAUSTED" not in message or not found:
        return None
    size, unit = (group for group in found.groups() if group)
    return int(float(size) * 2 ** (10 * (1 + "KMGT".index(unit))))


def _compile(lowered):
    """Return (compiled program, bytes of HBM that the TPU compiler assigned, or None if no dump holds them).

    The compiler refuses a program by the assigned bytes, which it writes to its dumps. The size of temporaries that jax
    reports is larger: 5.18 GiB in a program with 4.02 GiB assigned.
    """
    with tempfile.TemporaryDirectory() as folder:
        compiled = lowered.compile(compiler_options={"xla_dump_to": folder})
        reports = [path.read_text() for path in Path(folder).glob("*memory-usage-report.txt")]
    assigned = [re.search(r"Memory Space: default.*?Total bytes: (\d+)", report, re.DOTALL) for report in reports]
    return compiled, max((int(found[1]) for found in assigned if found), default=None)


_UNKNOWN = dict.fromkeys(("compile_seconds", "flops_ratio", "collective_bytes"))  # of a program that does not fit


def _roofline(costs, chip):
    """Return {resource: seconds at its peak rate}; the step cannot be faster than the slowest resource."""
    return {
        "compute": costs.flops * chip.devices / chip.flops,
        "HBM": costs.moved * chip.devices / chip.bandwidth,
        "interconnect": costs.sent.total() * chip.devices / chip.links,
    }


def table(name, found):
    """Return the lines of a table of the result of `measure`."""
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
        f"  outputs      {gib('output_bytes')}, {found['donated_bytes'] / GIB:.2f} GiB of these in donated arguments",
        f"  temporaries  {gib('temp_bytes')}, and {found['code_bytes'] / GIB:.2f} GiB of code",
        peak,
        f"  FLOPs        {found['flops'] / 1e12:9.2f} T, {found['flops_ratio']:.3f} times the model's own",
        *(f"  {kind:18} {size / GIB:.3f} GiB sent" for kind, size in sent.items()),
        f"  at least     {1e3 * max(found['roofline_seconds'].values()):9.1f} ms, bound by {bound} (ms: {seconds})",
        f"  estimate     {found['estimated_cycles'] / 1e6:9.1f} M cycles, by the compiler's model of the chip",
        f"  compiled in  {found['compile_seconds']:9.0f} s, after {found['lower_seconds']:.0f} s of tracing",
    ]


def report(config, mesh, chip, topology, num_slices, kinds):
    """Compile, print tables and, last, one line of JSON: a list of one object per program. Returns whether all fit."""
    shape = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    results = []
    for make in _makers(config, kinds):
        for option in auto.options(config, mesh.devices.flat[0]):
            program = make(option, mesh)
            found = measure(program, mesh, chip)
            if found["fits"]:
                break
        hardware = f"{num_slices} slices of {topology}" if num_slices > 1 else topology
        shown = f"batch {program.batch_size}, mesh {shape}; {auto.of(option)}"
        name = f"{program.kind} ({program.stage}) on {hardware}: {shown}; per device:"
        print("\n".join(table(name, found)), flush=True)
        identity = {"program": program.kind, "stage": program.stage, "topology": topology, "num_slices": num_slices}
        settings = {"config": config.name, "dtype": config.dtype, **auto.of(option)._asdict()}
        settings |= {"batch_size": program.batch_size}
        results.append({**identity, **settings, "mesh": dict(mesh.shape), **found})
    print(json.dumps(results))
    return all(result["fits"] for result in results)


def training_program(config, mesh, stage):
    """Return the train step of a stage."""
    batch_size = config[stage].train.batch_size
    config = in_steps(config, stage, _SCHEDULE * batch_size)
    init, step = objectives.init_and_step(config, stage)
    step = health.guarded(step, config.health.skip)
    key = jax.eval_shape(lambda: jax.random.key(0))
    shapes = jax.eval_shape(init, key)
    frozen = part_weights.frozen(config, stage, lambda part: part_weights.shapes_or_none(config, part))
    state, frozen = sharding.abstract(shapes, mesh), sharding.abstract(frozen, mesh)
    placed = jax.tree.map(lambda leaf: leaf.sharding, state)
    arguments = (state, frozen, _batch(config, stage, batch_size, mesh), _replicated_shape(key, mesh))
    plain_step = objectives.init_and_step(plain(config), stage)[1]
    return Program("train", stage, batch_size, loop.compiled_step(step, placed, mesh), plain_step, arguments)


def _sample(config, mesh):
    if not build_sampler.has_fixed_steps(config):
        raise UserError("config.sampler.method='adaptive' has no fixed number of steps to count: set it to 'heun'")
    shapes = {part: part_weights.shapes_or_none(config, part) for part in part_weights.parts_of_sampling(config)}
    batch_size = sharding.round_up(config.evaluate.batch_size, mesh)
    numbers = [_split_shape((batch_size,), dtype, mesh) for dtype in (jnp.uint32, jnp.int32)]
    key = _replicated_shape(jax.eval_shape(lambda: jax.random.key(0)), mesh)
    arguments = (sharding.abstract(shapes, mesh), key, *numbers)
    jitted, plain_sampler = generate.make_sampler(config, mesh), generate.sampler(plain(config))
    return Program("sample", generator(config), batch_size, jitted, plain_sampler, arguments)


def plain(config):
    """Return the config whose programs compute the same without custom kernels and without rematerialisation."""
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.remat, config.attention = "none", "xla"
    return config


def _batch(config, name, batch_size, mesh):
    size = config.data.image_size
    if name in GENERATORS and config.data.latents:
        batch = {"latent": _split_shape((batch_size, *latent_shape(config)), jnp.bfloat16, mesh)}
    else:
        batch = {"image": _split_shape((batch_size, size, size, 3), jnp.uint8, mesh)}
    return {**batch, "label": _split_shape((batch_size,), jnp.int32, mesh)}


def _split_shape(shape, dtype, mesh):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding.batch_sharding(mesh))


def _replicated_shape(leaf, mesh):
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding.replicated(mesh))
