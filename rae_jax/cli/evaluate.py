"""--mode=evaluate: metrics of a checkpoint, or of given images."""

from rae_jax.build import part_weights
from rae_jax.cli import results
from rae_jax.errors import UserError
from rae_jax.inference import linear_probes
from rae_jax.inference.evaluator import Evaluator


def run(config, workdir, mesh, flags):
    """Print the metrics of the newest checkpoint, of --step, or of --samples, and write them to eval/."""
    if flags.samples is not None and flags.step is not None:
        raise UserError(f"--step={flags.step} picks a checkpoint, and --samples names images: leave one out")
    evaluator = Evaluator(config, mesh)
    if flags.samples is not None:
        names = ("encoder", *(name for name in ("judge", "inception") if part_weights.has_part(config, name)))
        parts = part_weights.load_all(config, names, workdir, mesh)
        found = evaluator.images(parts, flags.samples)
        results.remember(config, workdir)
        results.write(workdir, f"{config.name}_samples.json", found)
        return
    linear_probes.check_available(config)
    parts = part_weights.load_all(config, part_weights.parts_of_evaluation(config), workdir, mesh, step=flags.step)
    results.remember(config, workdir)
    if flags.step is None:
        results.measure_trained(evaluator, config, parts, workdir, results.of_shipped(config, workdir))
    else:
        found = results.measure(evaluator, config, parts, workdir, str(flags.step))
        results.write(workdir, f"{config.name}_{flags.step}.json", found)
