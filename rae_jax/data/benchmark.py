"""Images a second and core: this project's pipeline compared with torch's DataLoader and Pillow, on the same files.

    python -m rae_jax.data.benchmark --path=IMAGENET/train [--packed=PACKED] [--num_images=500] [--rounds=3]
    python -m rae_jax.data.benchmark --source=webdataset --path='SHARDS/train-{000..146}.tar'

Each side reads --num_images images in random order, cropped at the centre and flipped at random, into batches. It uses
one core: its own process without further workers or threads. The sides take turns in each round. The command prints the
medians of the rates of all rounds, and of the ratios within a round. Rates are by CPU time, which varies less than the
clock on a shared machine. The DataLoader yields float32 [B, 3, H, W] in [0, 1], as in the published recipe;
`torch_uint8` leaves this conversion out, as our pipeline does. It reads tar files by the package webdataset, and
parquet files by the package datasets. Without these and torch, only our sides are measured. The last line printed is
one JSON object.
"""

import functools
import io
import json
import multiprocessing
import os
import statistics
import tempfile
import time

import numpy as np
from absl import app, flags, logging
from PIL import Image

from rae_jax.data import pipeline, shard_index, shards, sources
from rae_jax.data.packed_images import PackedImages
from rae_jax.errors import UserError
from rae_jax.runtime import command_line, host_allocator, logs

SOURCES = {"image_folder": sources.image_folder, "webdataset": sources.webdataset, "parquet": sources.parquet}


def _ours(source, batch_size, num_batches):
    """Yield batches of our pipeline."""
    options = {"seed": 0, "random_crop": False, "flip": True, "num_threads": 0}
    batches = pipeline.training_batches(source, batch_size=batch_size, **options)
    iterator = iter(batches)
    for _ in range(num_batches):
        yield next(iterator)["image"]


def _tensor(image, size, as_float):
    """Return the tensor of a PIL image, as in the published recipe: ADM's crop, flip, tensor."""
    import torch

    image = image.convert("RGB")
    while min(image.size) >= 2 * size:
        image = image.resize(tuple(side // 2 for side in image.size), resample=Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize(tuple(round(side * scale) for side in image.size), resample=Image.Resampling.BICUBIC)
    pixels = np.array(image)
    top, left = ((side - size) // 2 for side in pixels.shape[:2])
    pixels = pixels[top : top + size, left : left + size]
    if torch.rand(()) < 0.5:
        pixels = pixels[:, ::-1]
    tensor = torch.from_numpy(np.ascontiguousarray(pixels))
    return tensor.permute(2, 0, 1).contiguous().float().div(255) if as_float else tensor


class _Files:
    """Torch data set of image files."""

    def __init__(self, files, transform):
        self._files, self._transform = files, transform

    def __len__(self):
        return len(self._files)

    def __getitem__(self, index):
        with open(self._files[index], "rb") as file:
            return self._transform(Image.open(file))


def _tars(files, transform):
    """Return the data set of the package webdataset, which takes random images from a buffer."""
    import webdataset

    images = webdataset.WebDataset(files, shardshuffle=len(files), empty_check=False).shuffle(1000)
    return images.to_tuple("jpg;jpeg;png").map(lambda row: transform(Image.open(io.BytesIO(row[0]))))


def _parquets(files, transform, copies):
    """Return the data set of the package datasets, which copies parquet files to the folder `copies` once."""
    import datasets

    datasets.disable_progress_bars()
    found = datasets.load_dataset("parquet", data_files=list(files), split="train", cache_dir=copies)
    column = next(name for name, kind in found.features.items() if isinstance(kind, datasets.Image))
    found = found.select_columns([column])
    found.set_transform(lambda rows: {column: [transform(image) for image in rows[column]]})
    return _Column(found, column)


class _Column:
    """A column of a data set."""

    def __init__(self, rows, column):
        self._rows, self._column = rows, column

    def __len__(self):
        return len(self._rows)

    def __getitem__(self, index):
        return self._rows[index][self._column]


def _torch(dataset, image_size, batch_size, num_batches, *, as_float):
    """Yield batches of torch's DataLoader over dataset(transform)."""
    import torch

    torch.set_num_threads(1)
    images = dataset(functools.partial(_tensor, size=image_size, as_float=as_float))
    options = {} if isinstance(images, torch.utils.data.IterableDataset) else {"shuffle": True}
    loader = torch.utils.data.DataLoader(images, batch_size=batch_size, drop_last=True, **options)
    done = 0
    while done < num_batches:
        for batch in loader:
            yield batch
            done += 1
            if done == num_batches:
                break


def _sides(source, path, packed, image_size, batch_size, copies):
    """Return the sides to measure, {name: function(num_batches) -> batches}."""
    originals = SOURCES[source](split="train", path=path, heldout_path=path, image_size=image_size, named=sources.FLAGS)
    if len(originals) < batch_size:
        raise UserError(f"--batch_size={batch_size} is more than the {len(originals)} images of --path: lower it")
    sides = {"originals": functools.partial(_ours, originals, batch_size)}
    if packed:
        images = PackedImages(path=packed, split="train", image_size=image_size, crop="centre")
        if len(images) < batch_size:
            raise UserError(f"--batch_size={batch_size} is more than the {len(images)} packed images: lower it")
        sides["packed"] = functools.partial(_ours, images, batch_size)
    try:
        dataset = _peer(source, path, list(originals.names()), copies)
    except ImportError as error:
        logs.say(f"{error.name} is not installed: only our sides are measured")
        return sides
    if dataset is None:
        logs.say("torch is not measured, because its side reads files: name a folder by --path")
        return sides
    for name, as_float in (("torch", True), ("torch_uint8", False)):
        sides[name] = functools.partial(_torch, dataset, image_size, batch_size, as_float=as_float)
    return sides


def _peer(source, path, names, copies):
    """Return the function transform -> data set for torch's DataLoader; None if it cannot read the images."""
    import torch  # noqa: F401

    match source:
        case "webdataset":
            import webdataset  # noqa: F401

            return functools.partial(_tars, shards.files_at(path, "--path", ".tar", sources.FLAGS))
        case "parquet":
            import datasets  # noqa: F401

            return functools.partial(
                _parquets, shards.files_at(path, "--path", ".parquet", sources.FLAGS), copies=copies
            )
    return functools.partial(_Files, names) if all(map(os.path.exists, names)) else None


def _measure(side, name, num_batches, connection):
    """Send the number of images and the CPU seconds of a round, after one batch to warm up."""
    for _ in side(1):
        pass
    began = time.process_time()
    count = sum(len(batch) for batch in side(num_batches))
    connection.send({"name": name, "images": count, "cpu": time.process_time() - began})


def _in_own_process(side, name, num_batches):
    """Return the result of _measure, run in a new process."""
    ours, theirs = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=_measure, args=(side, name, num_batches, theirs))
    process.start()
    theirs.close()
    try:
        return ours.recv()
    except EOFError as error:
        raise UserError(f"the measurement of {name!r} failed: see the error above") from error
    finally:
        process.join()


def main():
    """Define the flags and run the command."""
    flags.DEFINE_enum("source", "image_folder", tuple(SOURCES), "Kind of data at --path.")
    flags.DEFINE_string("path", None, "The original images: a path as config.data.path.", required=True)
    flags.DEFINE_string("packed", None, "The same images, packed by rae_jax.data.pack.")
    flags.DEFINE_integer("image_size", 256, "Side of the crops, in pixels.", lower_bound=1)
    flags.DEFINE_integer("num_images", 500, "Images that are read in one round.", lower_bound=1)
    flags.DEFINE_integer("batch_size", 50, "Images in a batch.", lower_bound=1)
    flags.DEFINE_integer("rounds", 3, "Number of measurements of each side.", lower_bound=1)
    app.run(_run, flags_parser=command_line.plain_parser)


def _run(argv):
    logging.set_verbosity(logging.ERROR)
    given = flags.FLAGS
    host_allocator.keep_freed_memory()  # as in training; for all sides
    num_batches = -(-given.num_images // given.batch_size)
    try:
        with tempfile.TemporaryDirectory() as copies:
            shard_index.keep_in(copies, copies=True)
            kind = given["source"].value
            sides = _sides(kind, given.path, given.packed, given.image_size, given.batch_size, copies)
            order = [item for _ in range(given.rounds) for item in sides.items()]
            runs = [_in_own_process(side, name, num_batches) for name, side in order]
    except UserError as error:
        command_line.fail(str(error))
    rates = {name: [run["images"] / run["cpu"] for run in runs if run["name"] == name] for name in sides}
    found = {"images_per_cpu_second": {name: statistics.median(values) for name, values in rates.items()}}
    if "torch" in rates:
        pairs = {name: zip(values, rates["torch"], strict=True) for name, values in rates.items()}
        found["times_torch"] = {
            name: statistics.median(rate / torch for rate, torch in values) for name, values in pairs.items()
        }
    for name, values in rates.items():
        ratio = f"  {found['times_torch'][name]:.2f} times torch's rate" if "torch" in rates else ""
        print(f"{name:12} {statistics.median(values):8.1f} images/s and core (at most {max(values):.1f}){ratio}")
    print(json.dumps({**found, "image_size": given.image_size, "num_images": given.num_images}))


if __name__ == "__main__":
    main()
