"""Timed steps of a config's programs on the devices of this machine; weights and data are generated on the devices.

No file is read or written. Between two steps the host only starts the next step, as the training loop does.
"""

import functools
import json
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from rae_jax.build import models, part_weights
from rae_jax.config import auto
from rae_jax.config.keys import is_vae, latent_shape
from rae_jax.errors import UserError
from rae_jax.models.autoencoder import denormalise, to_float, to_uint8
from rae_jax.profiling import chips, compile_ahead, jaxpr_flops
from rae_jax.runtime import host, processes, sharding

TRACED_STEPS = 3
_MATRIX = {"cpu": 2048}  # {platform: side of the matrices of `matrix_rate`}; 8192 on other platforms
_CHAINED, _TRIES = 4, 4  # products in one run, and timed runs


def report(config, mesh, names, *, steps, warmup, profile=None):
    """Time the programs with these names; print a table and, as the last line, one JSON object.

    `profile`: a folder for a trace of three more steps of each program, PROFILE/NAME, for TensorBoard and xprof.
    """
    device = mesh.devices.flat[0]
    for name in names:
        if name not in PROGRAMS:
            raise UserError(f"--only={name} cannot work: choose from {', '.join(PROGRAMS)}")
    measured = matrix_rate(device, config.dtype)
    peaks = {"published": chips.PEAKS.get(device.device_kind), "measured": measured}
    found = {
        **{"config": config.name, "device": device.device_kind, "devices": mesh.size, "processes": jax.process_count()},
        **{"jax": jax.__version__, "mesh": dict(mesh.shape)},
        **{key: config[key] for key in ("dtype", "attention", "remat", "unroll")},
        **{"published_peak": peaks["published"], "measured_peak": measured, "programs": {}},
    }
    _say(
        f"{mesh.size} x {device.device_kind}, {config.dtype}; "
        f"matrix products reach {measured / 1e12:.2f} TFLOP/s per device"
    )
    _say(HEAD)
    for name in names:
        trace = None if profile is None else f"{profile}/{name}"
        for option in auto.options(config, device):
            result = _measured(name, option, mesh, peaks, steps=steps, warmup=warmup, trace=trace)
            if result.get("left_out") != _TOO_LARGE:
                break
        found["programs"][name] = result
        _say(row(name, result))
    _say(f"peak host memory of the process: {host.peak_memory() / chips.GIB:.2f} GiB")
    found["host_peak_bytes"] = host.peak_memory()
    _say(json.dumps(found))


_TOO_LARGE = "it does not fit in the device's memory: lower the batch size"


def _measured(name, config, mesh, peaks, **how):
    """Return the settings of the config, and the result of `measure` or the reason why there is none."""
    settings = auto.of(config)._asdict()
    try:
        return {**settings, **measure(PROGRAMS[name](config, mesh), mesh, peaks, **how)}
    except UserError as error:
        return {**settings, "left_out": str(error)}
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return {**settings, "left_out": _TOO_LARGE}


def measure(program, mesh, peaks, *, steps, warmup, trace=None):
    """Return {name: value} of the time, FLOP rate and memory of one run of a program; see `row`."""
    began = time.perf_counter()
    compiled = program.jitted.lower(*program.arguments).compile()
    compile_seconds = time.perf_counter() - began
    model_flops = jaxpr_flops.count(program.plain, *program.arguments)
    run = _runner(compiled, program)
    seconds = _timed(run, steps, warmup, ahead=program.kind == "train")
    if trace is not None:
        with jax.profiler.trace(trace):
            for _ in range(TRACED_STEPS):
                jax.block_until_ready(run())
    median = statistics.median(seconds)
    memory = compiled.memory_analysis()
    size = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
    rate = model_flops / median / mesh.size
    return {
        **{"batch_size": program.batch_size, "compile_seconds": compile_seconds},
        **{"seconds_median": median, "seconds_min": min(seconds), "images_per_second": program.batch_size / median},
        **{"model_flops": model_flops, "flops_per_second_and_device": rate},
        **{f"utilisation_of_{kind}": rate / peak if peak else None for kind, peak in peaks.items()},
        "program_bytes": size - memory.alias_size_in_bytes,
        "device_peak_bytes": _peak_of_devices(mesh),
    }


HEAD = (
    f"{'':18}{'batch':>6}{'compile s':>10}{'step s':>9}{'(min)':>10}{'images/s':>10}{'TFLOP/s':>9}"
    f"{'of peak':>9}{'of meas.':>9}{'program GiB':>13}{'device GiB':>12}"
)


def row(name, found):
    """Return a line of the table. Rates and memory are per device; 'device GiB' is the peak of the process so far."""
    if "left_out" in found:
        return f"{name:18}left out: {found['left_out']}"

    def or_none(value, form):
        return "-" if value is None else format(value, form)

    device = found["device_peak_bytes"]
    return (
        f"{name:18}{found['batch_size']:6}{found['compile_seconds']:10.1f}{found['seconds_median']:9.4f}"
        f"{found['seconds_min']:10.4f}{found['images_per_second']:10.2f}"
        f"{found['flops_per_second_and_device'] / 1e12:9.2f}{or_none(found['utilisation_of_published'], '.1%'):>9}"
        f"{found['utilisation_of_measured']:9.1%}{found['program_bytes'] / chips.GIB:13.2f}"
        f"{or_none(device and device / chips.GIB, '.2f'):>12}"
    )


def matrix_rate(device, dtype):
    """Return the FLOPs a second of large matrix products on one device, one after the other: a practical peak.

    The numbers are random, because a processor that lowers its clock when it is hot is faster on equal numbers.
    """
    side = _MATRIX.get(device.platform, 8192)
    local = jax.local_devices()[0]

    @jax.jit
    def chain(a, b):
        return jax.lax.fori_loop(0, _CHAINED, lambda _, a: a @ b, a)

    a, b = jax.random.normal(jax.random.key(0), (2, side, side), dtype)
    a, b = jax.device_put((a, b * side**-0.5), local)  # the products keep the scale of a
    best = float("inf")
    for _ in range(1 + _TRIES):  # the first run compiles
        began = time.perf_counter()
        jax.block_until_ready(chain(a, b))
        best = min(best, time.perf_counter() - began)
    return 2 * side**3 * _CHAINED / best


def _peak_of_devices(mesh):
    """Return the largest peak so far of this process's devices in bytes; None if a device does not report it."""
    found = [device.memory_stats() for device in mesh.local_devices]
    return max(stats["peak_bytes_in_use"] for stats in found) if all(found) else None


def _say(line):
    if processes.is_first():
        print(line, flush=True)


def _runner(compiled, program):
    """Return a function that starts one step and returns outputs to wait for."""
    trains = program.kind == "train"
    first, *rest = program.arguments
    arguments = [late_state(first) if trains else made_up(first), *map(made_up, rest)]

    def run():
        out = compiled(*arguments)
        if trains:  # the state was donated
            arguments[0], out = out
        return out

    return run


def late_state(shapes):
    """Return a made-up state in the last phase of its stage: all losses are active; second moments are not negative."""
    state = made_up(shapes)
    for name in ("opt_state", "disc_opt_state"):
        if name in state:
            state[name] = jax.tree.map(jnp.abs, state[name])
    return {**state, "step": jax.device_put(jnp.asarray(2**30, jnp.int32), state["step"].sharding)}


def _timed(run, steps, warmup, *, ahead):
    """Return the seconds of each of `steps` steps.

    With `ahead`, the host starts each step while the step before runs, and times are from end to end. Only for steps
    that take the output of the step before: other steps could run at the same time.
    """
    for _ in range(warmup):
        jax.block_until_ready(run())
    previous = run() if ahead else None
    ends = [time.perf_counter()]
    for _ in range(steps + ahead):
        following = run()
        jax.block_until_ready(previous if ahead else following)
        ends.append(time.perf_counter())
        previous = following
    jax.block_until_ready(previous)
    seconds = [end - start for start, end in zip(ends[:-1], ends[1:], strict=True)]
    return seconds[ahead:]  # the first step began before the clock


def made_up(shapes):
    """Return arrays of these shapes on their devices.

    Pixels cover their whole range; integers are 0; other numbers are small, but near 1 in scales and variances.
    """

    def make(path, leaf, start):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.key(0)
        # Knuth's multiplicative hash of the positions.
        hashes = (start + jax.lax.iota(jnp.uint32, max(leaf.size, 1))) * jnp.uint32(2654435761)
        if leaf.dtype == jnp.uint8:
            return (hashes >> 24).astype(jnp.uint8).reshape(leaf.shape)
        if jnp.issubdtype(leaf.dtype, jnp.integer):
            return jnp.zeros(leaf.shape, leaf.dtype)
        name = jax.tree_util.keystr(path, simple=True, separator="/").split("/")[-1]
        small = 0.02 * ((hashes >> 8).astype(jnp.float32) / 2**23 - 1.0)
        return ((name in ("scale", "var")) + small).astype(leaf.dtype).reshape(leaf.shape)

    placed = jax.tree.map(lambda leaf: leaf.sharding, shapes)

    def make_all(start):  # an argument, so that XLA does not compute the arrays as constants during compilation
        return jax.tree_util.tree_map_with_path(functools.partial(make, start=start), shapes)

    return jax.jit(make_all, out_shardings=placed)(np.uint32(0))


def _train(config, mesh, *, name, latents=""):
    """Return the program of a stage's train step."""
    if name == "decoder" and is_vae(config):
        raise UserError("the decoder of a VAE is not trained: no train step exists")
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.stages, config.data.latents = (name,), latents
    return compile_ahead.programs(config, mesh, ("train",))[0]


def _sample(config, mesh):
    return compile_ahead.programs(config, mesh, ("sample",))[0]


def _encode(config, mesh):
    def encode(config):
        autoencoder = models.autoencoder(config)
        return lambda params, images: autoencoder.encode(params, to_float(images))

    size = config.data.image_size
    params = sharding.abstract(part_weights.shapes(config, "encoder"), mesh)
    return _program(config, mesh, "encode", "encoder", encode, params, (size, size, 3), jnp.uint8)


def _decode(config, mesh):
    def decode(config):
        autoencoder = models.autoencoder(config)

        def decode(parts, latents):
            latents = denormalise(latents, parts["statistics"])
            return to_uint8(autoencoder.decode(parts["decoder"], latents))

        return decode

    parts = sharding.abstract({name: part_weights.shapes(config, name) for name in ("decoder", "statistics")}, mesh)
    return _program(config, mesh, "decode", "decoder", decode, parts, latent_shape(config), jnp.float32)


def _program(config, mesh, kind, stage, make, params, shape, dtype):
    """Return the program of `make(config)`, a function of parameters and a batch."""
    size = sharding.round_up(config.evaluate.batch_size, mesh)
    batch = jax.ShapeDtypeStruct((size, *shape), dtype, sharding=sharding.batch_sharding(mesh))
    jitted, plain = sharding.jit(make(config), mesh), make(compile_ahead.plain(config))
    return compile_ahead.Program(kind, stage, size, jitted, plain, (params, batch))


# {name: function (config, mesh) -> compile_ahead.Program}; raises UserError if the config has no such program.
PROGRAMS = {
    "train_decoder": functools.partial(_train, name="decoder"),
    "train_dit": functools.partial(_train, name="dit"),
    "train_dit_latents": functools.partial(_train, name="dit", latents="made up"),
    "train_few_step": functools.partial(_train, name="few_step"),
    "encode": _encode,
    "decode": _decode,
    "sample": _sample,
}
DEFAULT = [name for name in PROGRAMS if name != "train_few_step"]  # the stage that few runs have
