"""--mode=benchmark: timed steps on the devices of this machine."""

from rae_jax.profiling import timing


def run(config, workdir, mesh, flags):
    """Print a table of timed steps and, as the last line, one JSON object. Without --profile no file is written."""
    timing.report(config, mesh, flags.only, steps=flags.timed_steps, warmup=flags.warmup_steps, profile=flags.profile)
