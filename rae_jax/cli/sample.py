"""--mode=sample: class-conditional images as a picture, as PNG files, and as an ADM-style npz file."""

import json

import numpy as np

from rae_jax.build import part_weights
from rae_jax.cli import results
from rae_jax.config import keys, scopes
from rae_jax.errors import UserError
from rae_jax.inference import sample_files
from rae_jax.runtime import processes
from rae_jax.weights import safetensors_tree


def run(config, workdir, mesh, flags):
    """Write {sampled.png, images/, samples.npz} to samples/, or inside it if samples/ holds another request.

    An interrupted request resumes if it is repeated, on any devices.
    """
    labels = _labels(config, flags)
    parts = part_weights.load_all(config, part_weights.parts_of_sampling(config), workdir, mesh, step=flags.step)
    request = {
        "config": scopes.select(keys.flatten(json.loads(config.to_json())), scopes.SAMPLES),
        "weights": {name: safetensors_tree.digest(params) for name, params in parts.items() if params is not None},
    }
    results.remember(config, workdir)
    claimed = sample_files.claim(workdir / "samples", request, labels, config, mesh)
    folder, names = claimed.folder, results.class_names(config, workdir)
    sample_files.draw(config, parts, labels, mesh, claimed, class_names=names)
    if processes.is_first():
        print(f"pictures: {folder / 'sampled.png'}, {folder / 'images'}; for evaluators: {folder / 'samples.npz'}")


def _labels(config, flags):
    classes = config.data.num_classes
    if flags.num_images < 1:
        raise UserError(f"--num_images={flags.num_images} cannot work: it must be positive")
    if flags.label is not None and not 0 <= flags.label < classes:
        raise UserError(f"--label={flags.label} cannot work: labels are 0 to {classes - 1}")
    labels = sample_files.labels_of(flags.labels, flags.num_images, classes, config.seed)
    return labels if flags.label is None else np.full(flags.num_images, flags.label)
