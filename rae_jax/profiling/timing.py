"""Timed steps of what a config describes, on the devices that are here; weights and data are made up on them.

Nothing is read or written, and between the steps no host does more than start the next one, as the training loop does.
"""

import functools
import json
import resource
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from rae_jax.build import models, part_weights
from rae_jax.config.keys import latent_shape
from rae_jax.errors import UserError
from rae_jax.models.autoencoder import denormalise, to_float, to_uint8
from rae_jax.profiling import chips, compile_ahead, jaxpr_flops
from rae_jax.runtime import processes, sharding

TRACED_STEPS = 3
_MATRIX = {"cpu": 2048}  # side of the products that show what the device can do; 8192 elsewhere
_CHAINED, _TRIES = 4, 4


def report(config, mesh, names, *, steps, warmup, profile=None):
    """Time the programs of these names, print a table, and at last one line, a JSON object.

    `profile`: a folder for a trace of three more steps of each, PROFILE/NAME, which TensorBoard and xprof show.
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
    _say(f"{mesh.size} x {device.device_kind}, {config.dtype}; products reach {measured / 1e12:.2f} TFLOP/s on one")
    _say(HEAD)
    for name in names:
        try:
            trace = None if profile is None else f"{profile}/{name}"
            result = measure(PROGRAMS[name](config, mesh), mesh, peaks, steps=steps, warmup=warmup, trace=trace)
        except UserError as error:
            result = {"left_out": str(error)}
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            result = {"left_out": "it does not fit in the device's memory: lower the batch size"}
        found["programs"][name] = result
        _say(row(name, result))
    _say(f"the process held {peak_of_process() / chips.GIB:.2f} GiB of the host's memory at most")
    found["host_peak_bytes"] = peak_of_process()
    _say(json.dumps(found))


def measure(program, mesh, peaks, *, steps, warmup, trace=None):
    """What one run of a program takes, by name; see `row`."""
    began = time.perf_counter()
    compiled = program.jitted.lower(*program.arguments).compile()
    compile_seconds = time.perf_counter() - began
    asked = jaxpr_flops.count(program.plain, *program.arguments)
    run = _runner(compiled, program)
    seconds = _timed(run, steps, warmup, ahead=program.kind == "train")
    if trace is not None:
        with jax.profiler.trace(trace):
            for _ in range(TRACED_STEPS):
                jax.block_until_ready(run())
    median = statistics.median(seconds)
    memory = compiled.memory_analysis()
    needed = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
    rate = asked / median / mesh.size
    return {
        **{"batch_size": program.batch_size, "compile_seconds": compile_seconds},
        **{"seconds_median": median, "seconds_min": min(seconds), "images_per_second": program.batch_size / median},
        **{"model_flops": asked, "flops_per_second_and_device": rate},
        **{f"utilisation_of_{kind}": rate / peak if peak else None for kind, peak in peaks.items()},
        "program_bytes": needed - memory.alias_size_in_bytes,
        "device_peak_bytes": _peak_of_devices(mesh),
    }


HEAD = (
    f"{'':18}{'batch':>6}{'compile s':>10}{'step s':>9}{'(least)':>10}{'images/s':>10}{'TFLOP/s':>9}"
    f"{'of peak':>9}{'of meas.':>9}{'program GiB':>13}{'device GiB':>12}"
)


def row(name, found):
    """A line of the table: rates and memory are a device's, and its peak is that of the process so far."""
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
    """FLOPs a second of large products on one device, one after the other: what can be had.

    Of random numbers: processors that lower their clock for heat are faster on numbers that are all alike.
    """
    side = _MATRIX.get(device.platform, 8192)
    local = jax.local_devices()[0]

    @jax.jit
    def chain(a, b):
        return jax.lax.fori_loop(0, _CHAINED, lambda _, a: a @ b, a)

    a, b = jax.random.normal(jax.random.key(0), (2, side, side), dtype)
    a, b = jax.device_put((a, b * side**-0.5), local)  # products stay as large as a
    best = float("inf")
    for _ in range(1 + _TRIES):  # the first compiles
        began = time.perf_counter()
        jax.block_until_ready(chain(a, b))
        best = min(best, time.perf_counter() - began)
    return 2 * side**3 * _CHAINED / best


def peak_of_process():
    """Bytes of memory that this process held at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _peak_of_devices(mesh):
    """The largest peak of this process's devices so far; None where they do not tell."""
    found = [device.memory_stats() for device in mesh.local_devices]
    return max(stats["peak_bytes_in_use"] for stats in found) if all(found) else None


def _say(line):
    if processes.is_first():
        print(line, flush=True)


def _runner(compiled, program):
    """Function that starts one step, and gives what to wait for."""
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
    """A state in its stage's last phase, all losses at work; moments of squares are not negative."""
    state = made_up(shapes)
    for name in ("opt_state", "disc_opt_state"):
        if name in state:
            state[name] = jax.tree.map(jnp.abs, state[name])
    return {**state, "step": jax.device_put(jnp.asarray(2**30, jnp.int32), state["step"].sharding)}


def _timed(run, steps, warmup, *, ahead):
    """Seconds of so many steps. With `ahead` from the end of one to that of the next, the host starting each while the
    one before runs: only for steps that take what it gave, since others could run side by side.
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
    return seconds[ahead:]  # the first of them began before the clock


def made_up(shapes):
    """Arrays of these shapes on their devices: pixels over their whole range, keys, numbers of 0 for what counts or
    names, small values around 0, and around 1 for scales and variances.
    """

    def make(path, leaf, start):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.key(0)
        places = (start + jax.lax.iota(jnp.uint32, max(leaf.size, 1))) * jnp.uint32(2654435761)  # hashed, after Knuth
        if leaf.dtype == jnp.uint8:
            return (places >> 24).astype(jnp.uint8).reshape(leaf.shape)
        if jnp.issubdtype(leaf.dtype, jnp.integer):
            return jnp.zeros(leaf.shape, leaf.dtype)
        name = jax.tree_util.keystr(path, simple=True, separator="/").split("/")[-1]
        small = 0.02 * ((places >> 8).astype(jnp.float32) / 2**23 - 1.0)
        return ((name in ("scale", "var")) + small).astype(leaf.dtype).reshape(leaf.shape)

    placed = jax.tree.map(lambda leaf: leaf.sharding, shapes)

    def make_all(start):  # an argument, so that XLA does not compute it all while it compiles
        return jax.tree_util.tree_map_with_path(functools.partial(make, start=start), shapes)

    return jax.jit(make_all, out_shardings=placed)(np.uint32(0))


def _train(config, mesh, *, name, latents=""):
    """A stage's step."""
    if name == "decoder" and models.is_vae(config):
        raise UserError("the VAE's decoder is not trained")
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
    """That of `make(config)`, a function of parameters and a batch."""
    size = sharding.round_up(config.evaluate.batch_size, mesh)
    batch = jax.ShapeDtypeStruct((size, *shape), dtype, sharding=sharding.batch_sharding(mesh))
    jitted, plain = sharding.jit(make(config), mesh), make(compile_ahead.plain(config))
    return compile_ahead.Program(kind, stage, size, jitted, plain, (params, batch))


# name: (config, mesh) -> aot.Program; raises UserError where the config has none.
PROGRAMS = {
    "train_decoder": functools.partial(_train, name="decoder"),
    "train_dit": functools.partial(_train, name="dit"),
    "train_dit_latents": functools.partial(_train, name="dit", latents="made up"),
    "encode": _encode,
    "decode": _decode,
    "sample": _sample,
}
