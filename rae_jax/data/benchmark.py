"""Images a second and core: this project's pipeline beside torch's DataLoader with Pillow, on the same files.

    python -m rae_jax.data.benchmark --path=IMAGENET/train [--packed=PACKED] [--num_images=500] [--rounds=3]

Each side reads --num_images images in random order, centre-cropped and flipped at random, into batches, on one core: in
a process of its own without further workers or threads, round by round in turn. Printed are medians: of the rounds'
rates, and of the ratios within a round. What counts is CPU time: on a machine that is shared with others it moves less
than the clock. The DataLoader yields what the published recipe's does: float32 [B, 3, H, W] in [0, 1]; `torch_uint8`
leaves that conversion out, as we do. Without torch, only our own sides are measured. The last line printed is one JSON
object.
"""

import json
import multiprocessing
import os
import statistics
import time

import numpy as np
from absl import app, flags, logging
from PIL import Image

from rae_jax import command, logs, malloc
from rae_jax.data import pipeline, sources
from rae_jax.data.packed import PackedImages
from rae_jax.errors import UserError

_PATH = flags.DEFINE_string("path", None, "Originals: what config.data.path is for image folders.", required=True)
_PACKED = flags.DEFINE_string("packed", None, "The same, as rae_jax.data.pack has packed them.")
_SIZE = flags.DEFINE_integer("image_size", 256, "Side of the crops.", lower_bound=1)
_NUM = flags.DEFINE_integer("num_images", 500, "Images that a round reads.", lower_bound=1)
_BATCH = flags.DEFINE_integer("batch_size", 50, "Images in a batch.", lower_bound=1)
_ROUNDS = flags.DEFINE_integer("rounds", 3, "How often each side is measured.", lower_bound=1)


def _ours(source, num_batches):
    """Batches of our pipeline."""
    batches = pipeline.training_batches(
        source,
        **{"batch_size": _BATCH.value, "seed": 0, "random_crop": False, "flip": True},
        num_threads=0,
    )
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


def _torch(files, num_batches, *, as_float):
    """Batches of torch's DataLoader."""
    import torch

    torch.set_num_threads(1)
    dataset = _Photographs(files, _SIZE.value, as_float=as_float)
    loader = torch.utils.data.DataLoader(dataset, batch_size=_BATCH.value, shuffle=True, drop_last=True)
    done = 0
    while done < num_batches:
        for batch in loader:
            yield batch
            done += 1
            if done == num_batches:
                break


def _sides():
    """{name: function(num_batches) -> batches}."""
    options = {"path": _PATH.value, "heldout_path": _PATH.value, "image_size": _SIZE.value}
    originals = sources.image_folder(split="train", **options, named=sources.FLAGS)
    if len(originals) < _BATCH.value:
        raise UserError(f"--batch_size={_BATCH.value} is more than the {len(originals)} images of --path: lower it")
    sides = {"originals": lambda count: _ours(originals, count)}
    if _PACKED.value:
        packed = PackedImages(path=_PACKED.value, split="train", image_size=_SIZE.value, crop="centre")
        if len(packed) < _BATCH.value:
            raise UserError(f"--batch_size={_BATCH.value} is more than the {len(packed)} packed images: lower it")
        sides["packed"] = lambda count: _ours(packed, count)
    files = [originals.name(index) for index in range(len(originals))]
    try:
        import torch  # noqa: F401
    except ImportError:
        logs.say("torch is not installed: only our own sides are measured")
        return sides
    if not all(os.path.exists(file) for file in files):
        logs.say("torch's side reads files: name a folder by --path to have it measured")
        return sides
    sides["torch"] = lambda count: _torch(files, count, as_float=True)
    sides["torch_uint8"] = lambda count: _torch(files, count, as_float=False)
    return sides


def _measure(side, name, connection):
    """CPU seconds of a round after a batch to warm up, in a process of its own."""
    num_batches = -(-_NUM.value // _BATCH.value)
    for _ in side(1):
        pass
    began = time.process_time()
    count = sum(len(batch) for batch in side(num_batches))
    connection.send({"name": name, "images": count, "cpu": time.process_time() - began})


def _in_own_process(side, name):
    ours, theirs = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=_measure, args=(side, name, theirs))
    process.start()
    theirs.close()
    try:
        return ours.recv()
    except EOFError as error:
        raise UserError(f"the side {name!r} failed, see above") from error
    finally:
        process.join()


def _main(argv):
    logging.set_verbosity(logging.ERROR)
    malloc.keep_freed_memory()  # as in training, and for every side
    try:
        sides = _sides()
        runs = [_in_own_process(side, name) for _ in range(_ROUNDS.value) for name, side in sides.items()]
    except UserError as error:
        command.fail(str(error))
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
    print(json.dumps({**found, "image_size": _SIZE.value, "num_images": _NUM.value}))


if __name__ == "__main__":
    app.run(_main, flags_parser=command.plain_parser)
