"""Samples as files: written while the next batch is computed, and taken up where an earlier run was interrupted."""

import json
import zipfile
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
from PIL import Image

from rae_jax import generate, logs, pictures
from rae_jax.errors import UserError

ROWS, COLUMNS = 10, 8  # of the picture


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
        raise UserError(f"--labels={kind}: {error}; take balanced, random, or a file with one label a line") from error
    if len(labels) < num_images:
        raise UserError(f"--labels={kind} holds {len(labels)} labels: lower --num_images={num_images}, or add some")
    wrong = (labels < 0) | (labels >= num_classes)
    if wrong.any():
        raise UserError(f"--labels={kind} holds {labels[wrong][0]}: labels are 0 to {num_classes - 1}")
    return labels


def draw(config, parts, labels, mesh, folder, *, request, class_names):
    """Write FOLDER/images/NNNNNN.png, samples.npz (arr_0 and labels, as ADM's) and sampled.png, a picture of some.

    `request` says as plain data what is drawn. Images that are there from the same request are kept, those of another
    one are replaced. Only the first process writes.
    """
    writes = jax.process_index() == 0
    present = _present(folder, request) if writes else frozenset()
    present = _agreed(present, len(labels))
    with ThreadPoolExecutor() as pool:
        pending = []
        for indices, images in generate.batches(config, parts, labels, mesh, seed=config.seed, present=present):
            for future in pending:  # the batch before: no more than two are in memory
                future.result()
            if writes:
                paths = [_path(folder, i) for i in indices]
                pending = [pool.submit(_write, path, image) for path, image in zip(paths, images, strict=True)]
        for future in pending:
            future.result()
    if writes:
        _write_npz(folder, labels)
        pictures.save(folder / "sampled.png", _picture(folder, labels, class_names))


def _present(folder, request):
    """Indices of the images of this request that are there already; those of another request are removed."""
    path = folder / "images" / "request.json"
    found = sorted(path.parent.glob("*.png"))
    if found and (not path.exists() or json.loads(path.read_text()) != request):
        logs.say(f"{path.parent} holds {len(found)} images of another request: replacing them")
        for image in found:
            image.unlink()
        found = []
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(request, indent=2) + "\n")
    return frozenset(int(image.stem) for image in found)


def _agreed(present, num_images):
    """The first process's set, on every process: all must compute the same batches."""
    if jax.process_count() == 1:
        return present
    from jax.experimental import multihost_utils

    mine = np.isin(np.arange(num_images), list(present))
    return frozenset(np.flatnonzero(multihost_utils.broadcast_one_to_all(mine)).tolist())


def _path(folder, index):
    return folder / "images" / f"{index:06d}.png"


def _write(path, image):
    """A file is there whole or not at all."""
    part = path.with_suffix(".part")
    pictures.save(part, image)
    part.rename(path)


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
            for i in range(len(labels)):
                array.write(_read(_path(folder, i)).tobytes())
        with archive.open("labels.npy", "w") as array:
            np.lib.format.write_array(array, labels)


def _picture(folder, labels, class_names):
    """A row for each of the first classes, with its name."""
    classes = list(dict.fromkeys(labels.tolist()))[:ROWS]
    rows = [np.flatnonzero(labels == c)[:COLUMNS] for c in classes]
    columns = min(map(len, rows))
    if columns == 1:
        rows, classes = [np.concatenate(rows)], []
    images = np.stack([_read(_path(folder, i)) for row in rows for i in (row[:columns] if classes else row)])
    grid = pictures.grid(images, columns if classes else len(images))
    scale = max(1, 96 // images.shape[1])
    if not classes:
        return grid
    return pictures.with_captions(grid, [class_names[c] for c in classes], scale=scale)
