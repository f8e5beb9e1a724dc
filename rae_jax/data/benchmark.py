"""Images a second and core: this project's pipeline beside torch's DataLoader with Pillow, on the same files.

    python -m rae_jax.data.benchmark --path=IMAGENET/train [--packed=PACKED] [--num_images=500] [--rounds=3]

Each side reads --num_images images in random order, centre-cropped and flipped at random, into batches, on one core: in
a process of its own without further workers or threads, round by round in turn. Printed are medians: of the rounds'
rates, and of the ratios within a round. What counts is CPU time: on a machine that is shared with others it moves less
than the clock. The DataLoader yields what the published recipe's does: float32 [B, 3, H, W] in [0, 1]; `torch_uint8`
leaves that conversion out, as we do. Without torch, only our own sides are measured. The last line printed is one JSON
object.
"""

import functools
import json
import multiprocessing
import os
import statistics
import time

import numpy as np
from absl import app, flags, logging
from PIL import Image

from rae_jax.data import pipeline, sources
from rae_jax.data.packed_images import PackedImages
from rae_jax.errors import UserError
from rae_jax.runtime import command_line, host_allocator, logs


def _ours(source, batch_size, num_batches):
    """Batches of our pipeline."""
    how = {"seed": 0, "random_crop": False, "flip": True, "num_threads": 0}
    batches = pipeline.training_batches(source, batch_size=batch_size, **how)
    iterator = iter(batches)
    for _ in range(num_batches):
        yield next(iterator)["image"]


class _Photographs:
    """A torch data set of image files as the published recipe reads them: Pillow, ADM's crop, flip, tensor."""

    def __init__(self, files, size, *, as_float):
        self._files, self._size, self._as_float = files, size, as_float

    def __len__(self):
        return len(self._files)

    def __getitem__(self, index):
        import torch

        with open(self._files[index], "rb") as file:
            image = Image.open(file).convert("RGB")
        while min(image.size) >= 2 * self._size:
            image = image.resize(tuple(side // 2 for side in image.size), resample=Image.Resampling.BOX)
        scale = self._size / min(image.size)
        image = image.resize(tuple(round(side * scale) for side in image.size), resample=Image.Resampling.BICUBIC)
        pixels = np.array(image)
        top, left = ((side - self._size) // 2 for side in pixels.shape[:2])
        pixels = pixels[top : top + self._size, left : left + self._size]
        if torch.rand(()) < 0.5:
            pixels = pixels[:, ::-1]
        tensor = torch.from_numpy(np.ascontiguousarray(pixels))
        return tensor.permute(2, 0, 1).contiguous().float().div(255) if self._as_float else tensor


def _torch(files, image_size, batch_size, num_batches, *, as_float):
    """Batches of torch's DataLoader."""
    import torch

    torch.set_num_threads(1)
    dataset = _Photographs(files, image_size, as_float=as_float)
    loader = torch.utils.data.DataLoader(dataset, batch_size=batch_size, shuffle=True, drop_last=True)
    done = 0
    while done < num_batches:
        for batch in loader:
            yield batch
            done += 1
            if done == num_batches:
                break


def _sides(path, packed, image_size, batch_size):
    """{name: function(num_batches) -> batches}."""
    originals = sources.image_folder(
        split="train", path=path, heldout_path=path, image_size=image_size, named=sources.FLAGS
    )
    if len(originals) < batch_size:
        raise UserError(f"--batch_size={batch_size} is more than the {len(originals)} images of --path: lower it")
    sides = {"originals": functools.partial(_ours, originals, batch_size)}
    if packed:
        images = PackedImages(path=packed, split="train", image_size=image_size, crop="centre")
        if len(images) < batch_size:
            raise UserError(f"--batch_size={batch_size} is more than the {len(images)} packed images: lower it")
        sides["packed"] = functools.partial(_ours, images, batch_size)
    files = [originals.name(index) for index in range(len(originals))]
    try:
        import torch  # noqa: F401
    except ImportError:
        logs.say("torch is not installed: only our own sides are measured")
        return sides
    if not all(os.path.exists(file) for file in files):
        logs.say("torch's side reads files: name a folder by --path to have it measured")
        return sides
    for name, as_float in (("torch", True), ("torch_uint8", False)):
        sides[name] = functools.partial(_torch, files, image_size, batch_size, as_float=as_float)
    return sides


def _measure(side, name, num_batches, connection):
    """CPU seconds of a round after a batch to warm up, in a process of its own."""
    for _ in side(1):
        pass
    began = time.process_time()
    count = sum(len(batch) for batch in side(num_batches))
    connection.send({"name": name, "images": count, "cpu": time.process_time() - began})


def _in_own_process(side, name, num_batches):
    ours, theirs = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=_measure, args=(side, name, num_batches, theirs))
    process.start()
    theirs.close()
    try:
        return ours.recv()
    except EOFError as error:
        raise UserError(f"the side {name!r} failed, see above") from error
    finally:
        process.join()


def main():
    """Define the flags and run the command."""
    flags.DEFINE_string("path", None, "Originals: what config.data.path is for image folders.", required=True)
    flags.DEFINE_string("packed", None, "The same, as rae_jax.data.pack has packed them.")
    flags.DEFINE_integer("image_size", 256, "Side of the crops.", lower_bound=1)
    flags.DEFINE_integer("num_images", 500, "Images that a round reads.", lower_bound=1)
    flags.DEFINE_integer("batch_size", 50, "Images in a batch.", lower_bound=1)
    flags.DEFINE_integer("rounds", 3, "How often each side is measured.", lower_bound=1)
    app.run(_run, flags_parser=command_line.plain_parser)


def _run(argv):
    logging.set_verbosity(logging.ERROR)
    given = flags.FLAGS
    host_allocator.keep_freed_memory()  # as in training, and for every side
    num_batches = -(-given.num_images // given.batch_size)
    try:
        sides = _sides(given.path, given.packed, given.image_size, given.batch_size)
        runs = [_in_own_process(side, name, num_batches) for _ in range(given.rounds) for name, side in sides.items()]
    except UserError as error:
        command_line.fail(str(error))
    rates = {name: [run["images"] / run["cpu"] for run in runs if run["name"] == name] for name in sides}
    found = {"images_per_cpu_second": {name: statistics.median(of) for name, of in rates.items()}}
    if "torch" in rates:
        pairs = {name: zip(of, rates["torch"], strict=True) for name, of in rates.items()}
        found["times_torch"] = {
            name: statistics.median(ours / torch for ours, torch in of) for name, of in pairs.items()
        }
    for name, of in rates.items():
        beside = f"  {found['times_torch'][name]:.2f} of torch's" if "torch" in rates else ""
        print(f"{name:12} {statistics.median(of):8.1f} images/s and core (at most {max(of):.1f}){beside}")
    print(json.dumps({**found, "image_size": given.image_size, "num_images": given.num_images}))


if __name__ == "__main__":
    main()
