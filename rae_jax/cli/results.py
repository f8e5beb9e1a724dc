"""Results of the modes: metrics, printed and written to eval/; and queries of workdir and data that modes share."""

import json
import time

from rae_jax.build import data as build_data
from rae_jax.build import part_weights
from rae_jax.config import inputs, run_config
from rae_jax.errors import UserError
from rae_jax.inference import image_grid
from rae_jax.runtime import atomic_files, processes


def measure(evaluator, config, parts, workdir, name):
    """Evaluate the weights `parts`; write their pictures to samples/KIND_NAME.png. Returns {metric: number}."""
    began = time.monotonic()
    results, pictures = evaluator.weights(parts, probe=config.evaluate.probe)
    for kind, picture in pictures.items() if processes.is_first() else ():
        image_grid.save(workdir / "samples" / (f"{kind}_{name}.png" if name else f"{kind}.png"), picture)
    return {**results, "seconds": time.monotonic() - began}


def measure_trained(evaluator, config, parts, workdir, shipped):
    """Evaluate the run's weights and write the numbers, next to the numbers of the shipped weights if these exist."""
    prefix = "trained" if config.evaluate.shipped and part_weights.has_checkpoints(config, workdir) else ""
    found = measure(evaluator, config, parts, workdir, prefix)
    found = {f"{prefix}_{name}" if prefix else name: value for name, value in found.items()}
    write(workdir, f"{config.name}.json", {**shipped, **found})


def of_shipped(config, workdir):
    """Return the numbers of the shipped weights in the run's results; {} if the run has not written any."""
    path = workdir / "eval" / f"{config.name}.json"
    found = json.loads(path.read_text()) if config.evaluate.shipped and path.exists() else {}
    shipped = {name: value for name, value in found.items() if not name.startswith("trained_")}
    return shipped if len(shipped) < len(found) else {}


def write(workdir, name, results):
    """Write {metric: number} to WORKDIR/eval/NAME and print it, in the first process."""
    if not processes.is_first():
        return
    path = workdir / "eval" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_files.write_text(path, json.dumps(results, indent=2) + "\n")
    width = max(map(len, results))
    for key, value in results.items():
        print(f"{key:{width}}  {value:.4f}")


def remember(config, workdir):
    """Write config.json if the workdir has none, so that the next command needs no --config."""
    if not (workdir / run_config.FILE).exists():
        run_config.save(config, workdir)


def held_out(config):
    """Return the source of held-out images; None if the data is not on this machine."""
    try:
        return build_data.source(config, "heldout")
    except UserError:
        return None


def class_names(config, workdir):
    """Return the names of the classes, from the run's record or the data on this machine; otherwise their numbers."""
    names = inputs.read(workdir).get("data", {}).get("class_names")
    if names is None or len(names) != config.data.num_classes:
        found = held_out(config)
        names = found.class_names if found else [str(c) for c in range(config.data.num_classes)]
    return names
