"""Pack images once, so that training reads them fast: cropped or resized, encoded again, in ArrayRecord shards.

    python -m rae_jax.data.pack --path=IMAGENET/train --heldout_path=IMAGENET/val --output=PACKED
    python -m rae_jax.data.pack --tfds=imagenet2012 --output=PACKED --crop=random

--path takes the same as config.data.path for image folders: a folder with one subfolder per class, a .zip archive of
such a folder, or a list. --crop=centre keeps ADM's crop at --image_size; --crop=random keeps whole training images,
with a short side of 1.5 times --image_size, for random crops in training. To train on the result, set
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

from rae_jax.data import decode, packed_images, shard_writer, sources
from rae_jax.errors import UserError
from rae_jax.runtime import atomic_files, command_line, host, logs, sharding

SPLITS = ("train", "heldout")
ENCODINGS = ("jpeg", "png")
IMAGES_PER_SHARD = 2048
_OPTIONS = ("image_size", "crop", "encoding", "quality", "images_per_shard", "num_workers", "on_error")  # flags


def pack(parts, output, *, image_size, crop, encoding, quality, images_per_shard, num_workers, on_error):
    """Write the sources `parts` {split: ImageSource} to the folder `output` and return the index.

    Raises UserError for an image that cannot be read (with `on_error`='stop'), if the folder holds other files, or if a
    shard that is read back is not equal to what was written.
    """
    output = Path(output)
    form = {"image_size": image_size, "crop": crop, "encoding": encoding, "quality": quality, "on_error": on_error}
    shard_writer.claim(output, {**form, "images_per_shard": images_per_shard, "images": _digest(parts)})
    jobs = []
    for split, source in parts.items():
        count = -(-len(source) // images_per_shard)
        for shard in range(count):
            rows = range(shard * images_per_shard, min(len(source), (shard + 1) * images_per_shard))
            file = output / shard_writer.name(split, shard, count)
            jobs.append((split, functools.partial(_pack_shard, source, rows, file, _Form(split=split, **form))))
    packed_shards = {split: [] for split in parts}
    for (split, _), shard in zip(jobs, _run([job for _, job in jobs], parts, num_workers), strict=True):
        packed_shards[split].append(shard)
    class_names = list(parts["train"].class_names)
    index = {"image_size": image_size, "crop": crop, "class_names": class_names, "splits": packed_shards}
    atomic_files.write_text(output / packed_images.INDEX, json.dumps(index, indent=1))
    return index


def _digest(parts):
    """Return a digest of the names of all images: packing is resumed only with the same images."""
    digest = hashlib.sha256()
    for split, source in parts.items():
        for index in range(len(source)):
            digest.update(f"{split} {source.name(index)}\n".encode())
    return digest.hexdigest()


def _run(jobs, parts, num_workers):
    """Run the jobs, show progress, and return their results in the order of the jobs."""
    total = sum(len(source) for source in parts.values())
    results, done = {}, 0
    with logs.Progress("pack", total=total, unit="image") as progress:
        for number, result in _finished(jobs, num_workers):
            results[number] = result
            done += result["num_images"] + len(result["skipped"])
            progress.update(done)
            for report in result["skipped"]:
                logs.say(f"skipped: {report}")
    return [results[number] for number in range(len(jobs))]


def _finished(jobs, num_workers):
    """Yield (number of the job, result) as the jobs finish."""
    if num_workers == 1:
        yield from ((number, job()) for number, job in enumerate(jobs))
        return
    with ProcessPoolExecutor(num_workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = {pool.submit(job): number for number, job in enumerate(jobs)}
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


def _pack_shard(source, rows, file, form):
    """Write one shard unless it is finished already, and return its entry of the index."""
    done = shard_writer.finished(file)
    if done is not None:
        return done
    skipped = []

    def records():
        for row in rows:
            try:
                example = source.example(row, form.crop)
            except UserError as error:
                if not form.skips:
                    raise
                skipped.append(str(error))
                continue
            yield packed_images.record(int(example["label"]), source.name(row), form.encode(example["image"]))

    count = shard_writer.write(
        file, records(), lambda data: decode.decode(packed_images.parse(data)[2], file, decode.pixels)
    )
    return shard_writer.finish(file, {"file": file.name, "num_images": count, "skipped": skipped})


def _sources(given):
    """Return {split: source} of the images that the flags name."""
    size = given.image_size
    if (given.path is None) == (given.tfds is None):
        raise UserError(
            "--path and --tfds: exactly one of them is needed; name images by --path, or a data set by --tfds"
        )
    if given.tfds is None:
        options = {"path": given.path, "heldout_path": given.heldout_path, "image_size": size, "named": sources.FLAGS}
        return {split: sources.image_folder(split=split, **options) for split in SPLITS}
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
    flags.DEFINE(
        command_line.PATH, "path", None, "A folder of class folders, a .zip archive of such a folder, or a list."
    )
    flags.DEFINE(command_line.PATH, "heldout_path", "", "The same for evaluation. Empty: every 20th image of --path.")
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
        index = pack(_sources(given), given.output, **{name: given[name].value for name in _OPTIONS})
    except UserError as error:
        command_line.fail(str(error))
    for split, written in index["splits"].items():
        skipped = sum(len(shard["skipped"]) for shard in written)
        print(f"{split}: {sum(s['num_images'] for s in written)} images in {len(written)} shards, {skipped} skipped")


if __name__ == "__main__":
    main()
