"""Samples as files: written while the next batch is computed, and taken up where an earlier run was interrupted."""

import json
import zipfile
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
from PIL import Image

from rae_jax.errors import UserError
from rae_jax.inference import generate, image_grid
from rae_jax.runtime import atomic_files, logs, processes


def labels_of(kind, num_images, num_classes, seed):
    """Labels [num_images] of the kind 'balanced' (classes in turn), 'random', or a text file with one label a line.

    Label i depends on (seed, i) alone. Raises UserError for a file that is not there, too short or no list of labels.
    """
    match kind:
        case "balanced":
            return np.arange(num_images) % num_classes
        case "random":
            return np.array([np.random.default_rng((seed, i)).integers(num_classes) for i in range(num_images)])
    try:
        labels = np.loadtxt(kind, dtype=np.int64, ndmin=1)[:num_images]
    except (OSError, ValueError) as error:
        reason = str(error).rstrip(".")
        raise UserError(f"--labels={kind}: {reason}; take balanced, random, or a file with one label a line") from error
    if labels.ndim != 1:
        raise UserError(f"--labels={kind} holds {labels.shape[1]} numbers a line: it takes one label a line")
    if len(labels) < num_images:
        raise UserError(f"--labels={kind} holds {len(labels)} labels: lower --num_images={num_images}, or add some")
    wrong = (labels < 0) | (labels >= num_classes)
    if wrong.any():
        raise UserError(f"--labels={kind} holds {labels[wrong][0]}: labels are 0 to {num_classes - 1}")
    return labels


def draw(config, parts, labels, mesh, folder, *, request, class_names):
    """Write FOLDER/images/NNNNNN.png, samples.npz (arr_0; labels are arr_1: as ADM's) and sampled.png, a picture.

    `request` says as plain data what is drawn, but for the labels. Images that are there from the same request with the
    same label are kept, those of another one are replaced. Only the first process writes.
    """
    writes = jax.process_index() == 0
    present = _present(folder, request, labels) if writes else frozenset()
    # All must compute the same batches.
    present = frozenset(np.flatnonzero(processes.agreed(np.isin(np.arange(len(labels)), list(present)))).tolist())
    with ThreadPoolExecutor() as pool:
        pending = []
        how = {"batch_size": config.evaluate.batch_size, "seed": config.seed, "present": present}
        for indices, images in generate.batches(generate.make_sampler(config, mesh), parts, labels, mesh, **how):
            for future in pending:  # the batch before: no more than two are in memory
                future.result()
            if writes:
                paths = [_path(folder, i) for i in indices]
                pending = [pool.submit(_write, path, image) for path, image in zip(paths, images, strict=True)]
        for future in pending:
            future.result()
    if writes:
        _write_npz(folder, labels)
        shown = image_grid.chosen(labels)
        images = np.stack([_read(_path(folder, i)) for i in shown])
        image_grid.save(folder / "sampled.png", image_grid.overview(images, labels[shown], class_names))


def _present(folder, request, labels):
    """Indices of the images that are there and are what is wanted; those that are not are removed.

    request.json keeps the request and the label of every image, also of those beyond the wanted ones.
    """
    path = folder / "images" / "request.json"
    then, given = _read_request(path)
    found = {int(file.stem): file for file in path.parent.glob("*.png") if file.stem.isdecimal()}
    wanted = labels.tolist() + given[len(labels) :]
    same = {i for i in found if then == request and i < len(given) and given[i] == wanted[i]}
    if len(same) < len(found):
        logs.say(f"{path.parent} holds {len(found) - len(same)} images of another request: replacing them")
        (folder / "samples.npz").unlink(missing_ok=True)
    if more := sum(i >= len(labels) for i in same):
        logs.say(f"{path.parent} holds {more} images more than are asked for, of the same request: they stay")
    for i in found.keys() - same:
        found[i].unlink()
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = wanted if then == request else labels.tolist()
    atomic_files.write_text(path, json.dumps({"request": request, "labels": kept}) + "\n")
    return frozenset(same)


def _read_request(path):
    """(request, labels) of the images that are there; (None, []) where nothing tells."""
    try:
        there = json.loads(path.read_text())
        return there["request"], there["labels"]
    except (FileNotFoundError, json.JSONDecodeError, KeyError, TypeError):
        return None, []


def _path(folder, index):
    return folder / "images" / f"{index:06d}.png"


def _write(path, image):
    """A file is there whole or not at all."""
    part = path.with_suffix(".part")
    image_grid.save(part, image)
    part.replace(path)


def _read(path):
    with path.open("rb") as file:
        return np.asarray(Image.open(file))


def _write_npz(folder, labels):
    """Image by image: fifty thousand of them need not be in memory at once."""
    shape = _read(_path(folder, 0)).shape
    with (folder / "samples.npz").open("wb") as file, zipfile.ZipFile(file, "w") as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as array:
            header = {"descr": "|u1", "fortran_order": False, "shape": (len(labels), *shape)}
            np.lib.format.write_array_header_1_0(array, header)
            with logs.Progress("npz", total=len(labels), unit="image") as progress:
                for i in range(len(labels)):
                    array.write(_read(_path(folder, i)).tobytes())
                    progress.update(i + 1)
        with archive.open("arr_1.npy", "w") as array:
            np.lib.format.write_array(array, labels)
