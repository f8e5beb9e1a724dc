"""--mode=compile: the run's programs, compiled ahead of time for a TPU topology without a TPU."""

from rae_jax.config import checks
from rae_jax.errors import UserError
from rae_jax.profiling import chips, compile_ahead
from rae_jax.runtime import sharding


def run(config, flags):
    """Print the costs of the programs on --topology and, as the last line, JSON. Returns whether all programs fit."""
    if flags.topology is None:
        raise UserError("--mode=compile needs --topology=KIND:SIZES, such as v5e:16x16")
    devices, chip = chips.devices(flags.topology, flags.num_slices)
    mesh = sharding.make_mesh(config.mesh, devices)
    checks.check(config, mesh, trains="train" in flags.program, evaluates=False)
    return compile_ahead.report(config.lock(), mesh, chip, flags.topology, flags.num_slices, flags.program)
