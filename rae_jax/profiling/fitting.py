"""The fastest settings with which a stage's step fits in the memory of the devices, where the config says 'auto'."""

import jax

from rae_jax.config import auto
from rae_jax.config.keys import TRAINED
from rae_jax.profiling import compile_ahead
from rae_jax.profiling.chips import GIB
from rae_jax.runtime import logs, processes

MARGIN = 0.92  # part of a device's memory that a step may take; batches that wait and fragments take the rest


def fitted(config, stage, mesh):
    """Return the config of a stage with settings in the place of 'auto', and print them once.

    The choices are compiled until one fits; the compilation cache keeps this program for the step. If no choice fits,
    the last one is returned. All processes get the same choice.
    """
    if not auto.is_open(config):
        return config
    device = mesh.local_devices[0]
    options, limit, size = auto.options(config, device), float(processes.agreed(float(memory_of(device)))), ""
    chosen = options[0]
    if limit and stage in TRAINED and len(options) > 1:
        for chosen in options:
            needed = float(processes.agreed(float(_needed(chosen, stage, mesh))))
            if needed <= MARGIN * limit:
                size = f" ({needed / GIB:.1f} of {limit / GIB:.1f} GiB)"
                break
    logs.say(f"{stage}: {auto.of(chosen)} on {device.device_kind}, {config.dtype}{size}")
    return chosen


def memory_of(device):
    """Return the bytes that programs may use on a device of this process; 0 if it does not tell, such as a CPU."""
    return (device.memory_stats() or {}).get("bytes_limit", 0)


def _needed(config, stage, mesh):
    """Return the bytes that the step of a stage takes on a device; infinity if the compiler refuses it."""
    program = compile_ahead.training_program(config, mesh, stage)
    try:
        memory = program.jitted.lower(*program.arguments).compile().memory_analysis()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return float("inf")
    sizes = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
    return sizes - memory.alias_size_in_bytes
