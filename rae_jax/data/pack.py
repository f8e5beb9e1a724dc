"""Pack images once, so that training reads them fast: cropped or resized, encoded again, in ArrayRecord shards.

    python -m rae_jax.data.pack --path=IMAGENET/train --heldout_path=IMAGENET/val --output=PACKED
    python -m rae_jax.data.pack --source=webdataset --path='SHARDS/train-{000..146}.tar' --output=PACKED
    python -m rae_jax.data.pack --tfds=imagenet2012 --output=PACKED --crop=random

--source and --path take the same as config.data.source and config.data.path. --crop=centre keeps ADM's crop at
--image_size; --crop=random keeps whole training images, with a short side of 1.5 times --image_size, for random crops
in training. Captions of webdataset and parquet files are kept. To train on the result, set
config.data.source='array_record' and config.data.path. The command uses all cores. Each shard is read back and compared
before it counts. The same command resumes interrupted work.
"""

import functools
import hashlib
import io
import json
import multiprocessing
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from absl import app, flags, logging
from PIL import Image

from rae_jax.data import decode, packed_images, shard_index, shard_writer, sources
from rae_jax.errors import UserError
from rae_jax.runtime import atomic_files, command_line, host, logs, sharding

SPLITS = ("train", "heldout")
ENCODINGS = ("jpeg", "png")
IMAGES_PER_SHARD = 2048
_OPTIONS = ("image_size", "crop", "encoding", "quality", "images_per_shard", "num_workers", "on_error")  # flags


def pack(parts, output, *, image_size, crop, encoding, quality, images_per_shard, num_workers, on_error, fields=()):
    """Write the sources `parts` {split: ImageSource} to the folder `output` and return the index.

    `fields`: {setting: value} of how the sources read shards; packing is resumed only with the same.

    Raises UserError for an image that cannot be read (with `on_error`='stop'), if the folder holds other files, or if a
    shard that is read back is not equal to what was written.
    """
    output = Path(output)
    form = {"image_size": image_size, "crop": crop, "encoding": encoding, "quality": quality, "on_error": on_error}
    names = [split for split, source in parts.items() if not source.labelled]
    unlabelled = {"unlabelled": names} if names else {}
    request = {**form, "images_per_shard": images_per_shard, **unlabelled, **dict(fields)}
    shard_writer.claim(output, {**request, "images": _digest(parts), "labels": _digest_of_labels(parts)})
    packer = _Packer(parts, output, images_per_shard, form)
    packed_shards = {split: [] for split in parts}
    for (split, _), shard in zip(packer.jobs(), _run(packer, num_workers), strict=True):
        packed_shards[split].append(shard)
    class_names = list(parts["train"].class_names)
    index = {"image_size": image_size, "crop": crop, "class_names": class_names, **unlabelled, "splits": packed_shards}
    atomic_files.write_text(output / packed_images.INDEX, json.dumps(index, indent=1))
    return index


def _digest(parts):
    """Return a digest of the names of all images: packing is resumed only with the same images."""
    digest = hashlib.sha256()
    for split, source in parts.items():
        for name in source.names():
            digest.update(f"{split} {name}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


def _digest_of_labels(parts):
    """Return a digest of the labels of all images, and of the names of the classes."""
    digest = hashlib.sha256(json.dumps([source.class_names for source in parts.values()]).encode())
    for source in parts.values():
        for name, label in source.image_names():
            digest.update(f"{name}\t{label}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


def _run(packer, num_workers):
    """Run the packer's jobs, show progress, and return their results in the order of the jobs."""
    results, done = {}, 0
    with logs.Progress("pack", total=packer.num_images, unit="image") as progress:
        for job, result in _finished(packer, num_workers):
            results[job] = result
            done += result["num_images"] + len(result["skipped"])
            progress.update(done)
            for report in result["skipped"]:
                logs.say(f"skipped: {report}")
    return [results[job] for job in packer.jobs()]


def _finished(packer, num_workers):
    """Yield (job, result) as the jobs finish."""
    if num_workers == 1:
        yield from ((job, packer(*job)) for job in packer.jobs())
        return
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_workers, mp_context=spawn, initializer=_begin_worker, initargs=(packer,)) as pool:
        futures = {pool.submit(_work, *job): job for job in packer.jobs()}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BrokenProcessPool as error:
            raise UserError(
                "a process that packs was killed, perhaps for lack of memory: run the same command again with a lower "
                "--num_workers; finished shards are kept"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def _begin_worker(packer):
    """Keep the packer in this process: sent with each job, the names of a million images would take a second a job."""
    global _packer
    _packer = packer


def _work(split, number):
    return _packer(split, number)


class _Packer:
    """Writes shards: packer(split, number) -> the shard's entry of the index."""

    def __init__(self, parts, output, images_per_shard, form):
        self._parts, self._output, self._images_per_shard = parts, output, images_per_shard
        self._forms = {split: _Form(split=split, **form) for split in parts}
        self.num_images = sum(len(source) for source in parts.values())

    def jobs(self):
        """Yield (split, number of the shard) of all shards."""
        for split in self._parts:
            yield from ((split, number) for number in range(self._count(split)))

    def _count(self, split):
        return -(-len(self._parts[split]) // self._images_per_shard)

    def __call__(self, split, number):
        """Write a shard unless it is finished already, and return its entry of the index."""
        source, form = self._parts[split], self._forms[split]
        file = self._output / shard_writer.name(split, number, self._count(split))
        done = shard_writer.finished(file)
        if done is not None:
            return done
        skipped, first = [], number * self._images_per_shard
        rows = range(first, min(len(source), first + self._images_per_shard))
        records = _records(source, rows, form, skipped)
        count = shard_writer.write(
            file, records, lambda data: decode.decode(packed_images.parse(data)[2], file, decode.pixels)
        )
        return shard_writer.finish(file, {"file": file.name, "num_images": count, "skipped": skipped})


def _records(source, rows, form, skipped):
    """Yield the records of some images; add reports on images that cannot be read to `skipped`."""
    for row in rows:
        try:
            example = source.example(row, form.crop)
            with decode.naming(source.name(row)):
                captions = source.captions(row)
        except UserError as error:
            if not form.skips:
                raise
            skipped.append(str(error))
            continue
        label = int(example.get("label", packed_images.UNLABELLED))
        yield packed_images.record(label, source.name(row), form.encode(example["image"]), captions)


class _Form:
    """Crops and encodes images."""

    def __init__(self, *, split, image_size, crop, encoding, quality, on_error):
        self._size, self._encoding, self._quality = image_size, encoding, quality
        self._enlarge = crop == "random" and split == "train"
        self.skips = on_error == "skip"

    def crop(self, image):
        """Return the pixels to pack of a PIL image."""
        if self._enlarge:
            return decode.pixels(decode.enlarge(image, self._size))
        return decode.centre_crop(image, self._size)

    def encode(self, pixels):
        """Return pixels as an encoded image, bytes."""
        file = io.BytesIO()
        if self._encoding == "png":
            Image.fromarray(pixels).save(file, "PNG", compress_level=1)
        else:
            Image.fromarray(pixels).save(file, "JPEG", quality=self._quality, subsampling=0)
        return file.getvalue()


def _sources(given):
    """Return {split: source} of the images that the flags name."""
    size = given.image_size
    if (given.path is None) == (given.tfds is None):
        raise UserError(
            "--path and --tfds: exactly one of them is needed; name images by --path, or a data set by --tfds"
        )
    if given.tfds is None:
        options = {"path": given.path, "heldout_path": given.heldout_path, "image_size": size, "named": sources.FLAGS}
        fields = {name: given[f"{name}_field"].value for name in sources.NO_FIELDS}
        kinds = {
            "image_folder": functools.partial(
                sources.image_folder, heldout_labels=given.heldout_labels, on_error=given.on_error
            ),
            "webdataset": functools.partial(sources.webdataset, fields=fields),
            "parquet": functools.partial(sources.parquet, fields=fields),
        }
        return {split: kinds[given["source"].value](split=split, **options) for split in SPLITS}
    if len(given.tfds_splits) != 2:
        raise UserError(
            f"--tfds_splits={','.join(given.tfds_splits)} cannot work: name two splits, for train and heldout"
        )
    options = {"name": given.tfds, "data_dir": given.data_dir, "image_size": size}
    return {split: sources.tfds(split=part, **options) for split, part in zip(SPLITS, given.tfds_splits, strict=True)}


def main():
    """Define the flags and run the command."""
    _define_flags()
    app.run(_run_command, flags_parser=command_line.plain_parser)


def _define_flags():
    flags.DEFINE_enum("source", "image_folder", ("image_folder", "webdataset", "parquet"), "Kind of data at --path.")
    flags.DEFINE(
        command_line.PATH,
        "path",
        None,
        "A folder of class folders, a .zip archive of such a folder, a list, or shards.",
    )
    flags.DEFINE(command_line.PATH, "heldout_path", "", "The same for evaluation. Empty: every 20th image of --path.")
    flags.DEFINE(command_line.PATH, "heldout_labels", "", "The value of config.data.heldout_labels.")
    for field in sources.NO_FIELDS:
        flags.DEFINE_string(f"{field}_field", "", f"The value of config.data.fields.{field}.")
    flags.DEFINE_string("tfds", None, "A TFDS data set prepared as array_record, instead of --path.")
    flags.DEFINE(command_line.PATH, "data_dir", "", "TFDS' data folder. Empty: TFDS' default.")
    flags.DEFINE_list("tfds_splits", ["train", "validation"], "TFDS' names of the train and heldout splits.")
    flags.DEFINE(command_line.PATH, "output", None, "Folder to write the shards to.", required=True)
    flags.DEFINE_integer("image_size", 256, "The value of config.data.image_size.", lower_bound=1)
    flags.DEFINE_enum("crop", "centre", ("centre", "random"), "The value of config.STAGE.train.crop.")
    flags.DEFINE_enum("encoding", "jpeg", ENCODINGS, "png is lossless and takes more space.")
    flags.DEFINE_integer("quality", 95, "Quality of JPEG, without chroma subsampling.", lower_bound=1, upper_bound=100)
    flags.DEFINE_integer("images_per_shard", IMAGES_PER_SHARD, "Images in a shard.", lower_bound=1)
    flags.DEFINE_integer(
        "num_workers", host.num_cores(), "Number of processes. 1: pack in the main process.", lower_bound=1
    )
    flags.DEFINE_enum(
        "on_error",
        "stop",
        ("stop", "skip"),
        "stop or skip at an image that cannot be read; skipped images are reported.",
    )


def _run_command(argv):
    logging.set_verbosity(logging.ERROR)
    given = flags.FLAGS
    try:
        sharding.all_devices()
        shard_index.keep_in(Path(given.output) / shard_writer.INDEX_OF_SHARDS, copies=False)
        options = {name: given[name].value for name in _OPTIONS}
        fields = {f"{name}_field": given[f"{name}_field"].value for name in sources.NO_FIELDS}
        options["fields"] = {name: value for name, value in fields.items() if value}
        index = pack(_sources(given), given.output, **options)
    except UserError as error:
        command_line.fail(str(error))
    for split, written in index["splits"].items():
        skipped = sum(len(shard["skipped"]) for shard in written)
        print(f"{split}: {sum(s['num_images'] for s in written)} images in {len(written)} shards, {skipped} skipped")


if __name__ == "__main__":
    main()
