"""Files of samples: written while the next batch is computed; an interrupted request resumes."""

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


def draw(config, parts, labels, mesh, folder, *, request, class_names):
    """Write FOLDER/images/NNNNNN.png, samples.npz (arr_0; labels are arr_1: as ADM's) and sampled.png, a picture.

    `request` is plain data on which the images depend, without the labels. Existing images of the same request and
    label are kept; existing images of another request or label are replaced. Only the first process writes.
    """
    writes = jax.process_index() == 0
    present = _present(folder, request, labels) if writes else frozenset()
    # All processes must compute the same batches.
    present = frozenset(np.flatnonzero(processes.agreed(np.isin(np.arange(len(labels)), list(present)))).tolist())
    with ThreadPoolExecutor() as pool:
        pending = []
        settings = {"batch_size": config.evaluate.batch_size, "seed": config.seed, "present": present}
        for indices, images in generate.batches(generate.make_sampler(config, mesh), parts, labels, mesh, **settings):
            for future in pending:  # of the batch before: at most two batches are in memory
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
    """Return the indices of existing images of the same request and label; existing images of another one are removed.

    request.json keeps the request and the label of every image, also of images beyond the number of labels.
    """
    path = folder / "images" / "request.json"
    old_request, old_labels = _read_request(path)
    existing = {int(file.stem): file for file in path.parent.glob("*.png") if file.stem.isdecimal()}
    wanted = labels.tolist() + old_labels[len(labels) :]
    is_same = old_request == request
    same = {i for i in existing if is_same and i < len(old_labels) and old_labels[i] == wanted[i]}
    if len(same) < len(existing):
        logs.say(f"{path.parent} holds {len(existing) - len(same)} images of another request: replacing them")
        (folder / "samples.npz").unlink(missing_ok=True)
    if more := sum(i >= len(labels) for i in same):
        logs.say(f"{path.parent} holds {more} more images of the same request than --num_images: they are kept")
    for i in existing.keys() - same:
        existing[i].unlink()
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = wanted if is_same else labels.tolist()
    atomic_files.write_text(path, json.dumps({"request": request, "labels": kept}) + "\n")
    return frozenset(same)


def _read_request(path):
    """Return (request, labels) of the existing images; (None, []) if request.json does not tell."""
    try:
        saved = json.loads(path.read_text())
        return saved["request"], saved["labels"]
    except (FileNotFoundError, json.JSONDecodeError, KeyError, TypeError):
        return None, []


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
