"""Files of samples: written while the next batch is computed; an interrupted request resumes."""

import hashlib
import json
import zipfile
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from etils import epath
from PIL import Image

from rae_jax.config import scopes
from rae_jax.data import decode
from rae_jax.errors import UserError
from rae_jax.inference import generate, image_grid
from rae_jax.runtime import atomic_files, checkpoint_reader, logs, processes, sharding, workdir_lock


def labels_of(kind, num_images, num_classes, seed):
    """Return labels [num_images]: 'balanced' (classes in turn), 'random', or from a text file with one label a line.

    Label i depends on (seed, i) alone. Raises UserError for a file that does not exist, is too short or has no labels.
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
        raise UserError(f"--labels={kind}: {reason}; choose balanced, random, or a file, one label a line") from error
    if labels.ndim != 1:
        raise UserError(f"--labels={kind} holds {labels.shape[1]} numbers a line: write one label a line")
    if len(labels) < num_images:
        raise UserError(f"--labels={kind} holds {len(labels)} labels: lower --num_images={num_images}, or add labels")
    wrong = (labels < 0) | (labels >= num_classes)
    if wrong.any():
        raise UserError(f"--labels={kind} holds the label {labels[wrong][0]}: labels are 0 to {num_classes - 1}")
    return labels


class Request(NamedTuple):
    """A folder of samples, and how its images are drawn; see `claim`."""

    folder: epath.Path
    rows: int  # images that a device draws at a time: another number would change the last bits of an image
    present: frozenset  # indices of the images that exist


def claim(folder, request, labels, config, mesh):
    """Return the Request of the images of `labels` in `folder`, or inside it if `folder` holds other images.

    `request` is plain data: 'config' {key: value} and 'weights' {part: digest}, on which the images depend. A request
    whose images exist is resumed, with more or fewer labels; no image is ever deleted or replaced. All processes call
    it; the first one reads and writes.
    """
    rows = sharding.even_batch(len(labels), config.evaluate.batch_size, mesh) // sharding.ways(mesh)
    found = None
    if processes.is_first():
        found = _existing(folder, request, labels, rows) or _new(folder, request, labels, rows)
        _write_request(found, request, labels)
    marks = np.isin(np.arange(len(labels)), list(found.present if found else ()))
    rows, *marks = processes.agreed(np.array([found.rows if found else 0, *marks], np.int64)).tolist()
    # All processes must compute the same batches.
    return Request(found.folder if found else folder, rows, frozenset(i for i, mark in enumerate(marks) if mark))


def _existing(folder, request, labels, rows):
    """Return the Request that exists already, in `folder` or in a folder inside it; None without one.

    As long as no image exists, `rows` may change: the first number may be too large for the memory.
    """
    for place in (folder, *sorted(checkpoint_reader.inside(folder))):
        saved = _read_request(place)
        if saved is None or not _is_same(saved["request"], request):
            continue
        count = min(len(labels), len(saved["labels"]))
        if saved["labels"][:count] == labels[:count].tolist():
            images = _images(place)
            if more := sum(i >= len(labels) for i in images):
                logs.say(f"{place / 'images'} holds {more} more images of the same request: they stay")
            return Request(place, saved.get("rows", rows) if images else rows, frozenset(images))
    return None


def _new(folder, request, labels, rows):
    """Claim `folder` if it holds no images, otherwise a new folder inside it, named by the request."""
    name = hashlib.sha256(json.dumps([request, labels.tolist()]).encode()).hexdigest()
    for place in (folder, *(folder / name[:length] for length in range(8, len(name)))):
        (place / "images").mkdir(parents=True, exist_ok=True)
        found = Request(place, rows, frozenset())
        if not _images(place) and _take(found, request, labels):
            if place != folder:
                logs.say(f"{folder} holds images of another request: these images go to {place}")
            return found
    raise UserError(f"{folder} holds no free name for another request: remove folders in it")


def _take(found, request, labels):
    """Return whether this command gets a folder without images; of two commands at the same time one gets it."""
    path, text = found.folder / decode.SAMPLES, _text(found, request, labels)
    if atomic_files.create(path, text):
        return True
    saved = _read_request(found.folder)
    if saved is None or not workdir_lock.has_ended(saved.get("by")):
        return False
    path.unlink(missing_ok=True)  # of a command that ended before its first image
    return atomic_files.create(path, text)


def _images(place):
    """Return the indices of the images in a folder of samples."""
    return {int(file.stem) for file in (place / "images").glob("*.png") if file.stem.isdecimal()}


def _is_same(saved, request):
    """Return whether an existing request draws the same images; it may have keys that no longer matter, or lack some.

    A key that it lacks was added by a later version of this package.
    """
    config = scopes.select(saved.get("config", {}), scopes.SAMPLES)
    same = all(key in request["config"] and request["config"][key] == value for key, value in config.items())
    return same and saved.get("weights") == request["weights"]


def _read_request(place):
    """Return the saved request of a folder, a dict with 'request' and 'labels'; None if the folder has none."""
    try:
        saved = json.loads((place / decode.SAMPLES).read_text())
        return saved if isinstance(saved["request"], dict) and isinstance(saved["labels"], list) else None
    except (OSError, ValueError, KeyError, TypeError):  # also of a file in the place of a folder
        return None


def _write_request(found, request, labels):
    """Write the request with the labels of all its images, also of images beyond the number of labels."""
    saved = _read_request(found.folder) or {"labels": []}
    kept = np.concatenate([labels, np.asarray(saved["labels"][len(labels) :], labels.dtype)])
    atomic_files.write_text(found.folder / decode.SAMPLES, _text(found, request, kept))


def _text(found, request, labels):
    saved = {"request": request, "labels": labels.tolist(), "rows": found.rows, "by": workdir_lock.this_process()}
    return json.dumps(saved) + "\n"


def draw(config, parts, labels, mesh, claimed, *, class_names):
    """Write FOLDER/images/NNNNNN.png, samples.npz (arr_0; labels are arr_1: as ADM's) and sampled.png, a picture.

    `claimed`: the Request of `claim`. Only the first process writes. The bytes of an image do not depend on the batch,
    the processes, the interruptions, or the axes data and fsdp of the mesh.
    """
    folder, writes = claimed.folder, processes.is_first()
    sampler, batch_size = generate.make_sampler(config, mesh), claimed.rows * sharding.ways(mesh)
    with ThreadPoolExecutor() as pool:
        pending = []
        settings = {"batch_size": batch_size, "seed": config.seed, "present": claimed.present}
        for indices, images in generate.batches(sampler, parts, labels, mesh, **settings):
            for future in pending:  # of the batch before: at most two batches are in memory
                future.result()
            if writes:
                wanted = [(_path(folder, i), image) for i, image in zip(indices, images, strict=True)]
                pending = [pool.submit(_write, path, image) for path, image in wanted if not path.exists()]
        for future in pending:
            future.result()
    if writes:
        _write_npz(folder, labels)
        shown = image_grid.chosen(labels)
        images = np.stack([_read(_path(folder, i)) for i in shown])
        image_grid.save(folder / "sampled.png", image_grid.overview(images, labels[shown], class_names))


def _path(folder, index):
    return folder / "images" / f"{index:06d}.png"


def _write(path, image):
    """Write a PNG under another name and rename it: an interruption leaves no incomplete PNG."""
    part = path.with_suffix(".part")
    image_grid.save(part, image)
    part.replace(path)


def _read(path):
    with path.open("rb") as file:
        return np.asarray(Image.open(file))


def _write_npz(folder, labels):
    """Write samples.npz image by image: 50,000 images need not be in memory at once."""
    shape, unfinished = _read(_path(folder, 0)).shape, atomic_files.unfinished_of(folder / "samples.npz")
    with unfinished.open("wb") as file, zipfile.ZipFile(file, "w") as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as array:
            header = {"descr": "|u1", "fortran_order": False, "shape": (len(labels), *shape)}
            np.lib.format.write_array_header_1_0(array, header)
            with logs.Progress("npz", total=len(labels), unit="image") as progress:
                for i in range(len(labels)):
                    array.write(_read(_path(folder, i)).tobytes())
                    progress.update(i + 1)
        with archive.open("arr_1.npy", "w") as array:
            np.lib.format.write_array(array, labels)
    unfinished.replace(folder / "samples.npz")
