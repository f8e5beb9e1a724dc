"""Damaged images, damaged weights and wrong configs by the thousand: each is taken, or refused in one line.

    python -m launch.fuzz [--images=2000] [--files=500] [--configs=500] [--seed=0]

Images go through the pipeline's reader; safetensors, npz and torch files through the loaders; random overrides through
the flags' parser and all checks that come before training, and now and then the shapes of the models. Whatever is
neither taken nor a UserError, or takes more than `LIMIT` seconds of work, is printed with its number; the exit status
is 1 then.
"""

import argparse
import contextlib
import io
import os
import random
import signal
import sys
import tempfile
import traceback
from pathlib import Path

import numpy as np
from absl import flags
from ml_collections import config_flags
from PIL import Image

from launch import tiny
from rae_jax.build import models, stages
from rae_jax.config import checks
from rae_jax.config import keys as config_keys
from rae_jax.data import evaluator_npz, pipeline, sources
from rae_jax.errors import UserError
from rae_jax.runtime import command_line, sharding
from rae_jax.weights import hub, safetensors_tree

LIMIT = 20  # seconds of one core


def images(count, seed):
    """(taken, refused, what went wrong) of mutated images, through the pipeline."""
    rng, originals = random.Random(seed), _pictures(np.random.default_rng(seed))
    mutated = [_mutate(rng, rng.choice(originals)) for _ in range(count)]
    source = sources.ImageSource(_InMemory(mutated), ("only",), 16)
    tally = _Tally()
    for number in range(count):
        tally.attempt(f"image {number}", source.random_crop, number, np.random.default_rng(number))
    with contextlib.redirect_stderr(io.StringIO()) as said:
        batches = list(pipeline.one_pass(source, batch_size=8, num_threads=2, on_error="skip"))
    shown = int(sum(batch["mask"].sum() for batch in batches))
    if shown + said.getvalue().count("skipped: ") != count:
        tally.wrong.append(f"the pipeline shows {shown} images and reports others, of {count} in all")
    return tally


def files(count, seed, folder):
    """The same of mutated files of weights, images and moments, through their loaders."""
    rng, tally, loaders = random.Random(seed), _Tally(), _loaders(Path(folder))
    for number in range(count):
        name, path, whole, load = loaders[number % len(loaders)]
        damaged = path.with_name(f"damaged{number}{path.suffix}")
        damaged.write_bytes(_mutate(rng, whole))
        tally.attempt(f"{name} {number}", load, damaged)
        damaged.unlink()
    return tally


def configs(count, seed, folder):
    """The same of random overrides of launch/tiny.py's keys, through start-up."""
    rng, tally = random.Random(seed), _Tally()
    keys = sorted(config_keys.flatten(tiny.get_config().to_dict()))
    for number in range(count):
        chosen = rng.sample(keys, rng.choice((1, 1, 2, 3)))
        arguments = [f"--config.{_misspelt(rng, key)}={rng.choice(_VALUES)}" for key in chosen]
        tally.attempt(f"config {number} {' '.join(arguments)}", _start_up, arguments, folder, number % 10 == 0)
    return tally


_VALUES = (
    *("0", "-1", "1", "3", "7", "64", "1000000000000", "0.5", "-0.1", "1e30", "1e-30", "nan", "inf", "", "x"),
    *("None", "True", "()", "(1,)", "(0,0)", "('dit',)", "[1, 2]", "small", "float32", "/dev/null", "nowhere"),
    *("\x00", "ä", "{}"),
)


class _Tally:
    def __init__(self):
        self.taken, self.refused, self.wrong = 0, 0, []

    def attempt(self, name, function, *arguments):
        for number in (signal.SIGPROF, signal.SIGALRM):
            signal.signal(number, _too_long)
        signal.setitimer(
            signal.ITIMER_PROF, LIMIT
        )  # of work, as others may have the machine; and a wait is bounded, too
        signal.alarm(20 * LIMIT)
        said = io.StringIO()
        try:
            with contextlib.redirect_stderr(said):
                function(*arguments)
            self.taken += 1
        except UserError as error:
            self._refuse(name, f"error: {error}\n")
        except SystemExit as status:
            self._refuse(name, said.getvalue() if status.code == 2 else f"exit status {status.code}")
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            place = traceback.extract_tb(error.__traceback__)[-2 if isinstance(error, _TooLong) else -1]
            where = f"{Path(place.filename).name}:{place.lineno}"
            self.wrong.append(f"{name}: {type(error).__name__} {str(error)[:300]} ({where})")
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.alarm(0)

    def _refuse(self, name, said):
        self.refused += 1
        if not said.startswith("error: ") or said.count("\n") != 1:
            self.wrong.append(f"{name}: not one line: {said[:300]!r}")

    def __str__(self):
        return f"{self.taken} taken, {self.refused} refused in one line, {len(self.wrong)} wrong"


class _TooLong(BaseException):
    pass


def _too_long(number, frame):
    raise _TooLong(f"more than {LIMIT} s")


def _mutate(rng, data):
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        place, length = rng.randrange(max(len(data), 1)), rng.choice((1, 1, 2, 4, 8, 64))
        if rng.random() < 0.5:
            place = min(place, rng.randrange(64))  # headers
        match rng.randrange(6):
            case 0:
                data[place : place + length] = rng.randbytes(length)
            case 1:
                data[place : place + length] = rng.choice((b"\xff", b"\x00", b"\x7f")) * length
            case 2:
                del data[place : len(data) if rng.random() < 0.3 else place + length]
            case 3:
                data[place:place] = rng.randbytes(length)
            case 4:
                data[place:place] = data[place : place + 64]
            case 5:
                if place < len(data):
                    data[place] ^= 1 << rng.randrange(8)
    return bytes(data)


class _InMemory:
    """A store of the pipeline's sources."""

    def __init__(self, data):
        self._data = data

    def __len__(self):
        return len(self._data)

    def read(self, index):
        return self._data[index], 0

    def name(self, index):
        return f"number {index}"


def _pictures(rng):
    pixels = rng.integers(0, 256, (20, 28, 3), np.uint8)
    found = []
    kinds = {
        **{"JPEG": ("RGB", "L", "CMYK"), "PNG": ("RGB", "P", "RGBA", "1"), "WEBP": ("RGB", "RGBA")},
        **{"GIF": ("P",), "BMP": ("RGB", "P"), "TIFF": ("RGB", "CMYK")},
    }
    for form, mode in ((form, mode) for form, modes in kinds.items() for mode in modes):
        buffer = io.BytesIO()
        Image.fromarray(pixels).convert(mode).save(buffer, form)
        found.append(buffer.getvalue())
    for form in ("PNG", "TIFF"):
        buffer = io.BytesIO()
        Image.fromarray(pixels[..., 0].astype(np.uint16) * 257).save(buffer, form)
        found.append(buffer.getvalue())
    return found


def _loaders(folder):
    """(name, path, its bytes, loader) of each kind of file."""
    rng = np.random.default_rng(0)
    tree = {"a": {"kernel": rng.normal(size=(4, 6)).astype(np.float32)}, "b": np.ones(3, np.float32)}
    safetensors_tree.write(folder / "ours.safetensors", tree)
    np.savez(folder / "images.npz", arr_0=rng.integers(0, 256, (3, 8, 8, 3), np.uint8), arr_1=np.arange(3))
    np.savez_compressed(folder / "packed.npz", arr_0=rng.integers(0, 256, (3, 8, 8, 3), np.uint8))
    np.savez(folder / "moments.npz", mu=np.zeros(4), sigma=np.eye(4), mu_s=np.zeros(3), sigma_s=np.eye(3))

    def ours(path):
        safetensors_tree.read(path, tree)

    def theirs(path):
        for tensor in hub.open_checkpoint(str(path)).values():
            tensor.read()

    def pictures(path):
        source = evaluator_npz.open_images(path, 8)
        for index in range(0 if source is None else min(len(source), 8)):
            source[index]

    def moments(path):
        evaluator_npz.read_moments(path, {"pool": 4, "spatial": 3})

    kinds = [("ours.safetensors", ours), ("ours.safetensors", theirs)]
    kinds += [("images.npz", pictures), ("packed.npz", pictures), ("moments.npz", moments)]
    with contextlib.suppress(ImportError):
        import torch

        torch.save({"mean": torch.zeros(3, 4), "var": torch.ones(3, 4)}, folder / "stat.pt")
        kinds += [("stat.pt", theirs), ("stat.pt", theirs)]
    return [(name, folder / name, (folder / name).read_bytes(), load) for name, load in kinds]


def _misspelt(rng, key):
    return key if rng.random() > 0.03 else key[:-1]


def _start_up(arguments, folder, deep):
    """What rae_jax.main does before a training."""
    values = flags.FlagValues()
    path = str(Path(tiny.__file__))
    holder = config_flags.DEFINE_config_file("config", None, "", flag_values=values)
    sys.argv = ["main", f"--config={path}", *arguments]  # where ml_collections looks for overrides
    command_line.parser(holder, values)(sys.argv)
    config = holder.value
    mesh = sharding.make_mesh(config.mesh)
    checks.check(config, mesh)
    config_keys.check_workdir(config, folder)
    for split in ("train", "heldout"):
        models.source(config, split)
    if deep:
        for part in ("encoder", "decoder", "dit"):
            stages.part_shapes(config, part)


def main(num_images, num_files, num_configs, seed):
    """Prints what came of each; returns what went wrong."""
    wrong = []
    with tempfile.TemporaryDirectory() as folder:
        kinds = {
            "images": lambda: images(num_images, seed),
            "files": lambda: files(num_files, seed, folder),
            "configs": lambda: configs(num_configs, seed, Path(folder) / "run"),
        }
        for name, work in kinds.items():
            tally = work()
            print(f"{name}: {tally}", flush=True)
            wrong += tally.wrong
    return wrong


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("images", 2000), ("files", 500), ("configs", 500), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    given = parser.parse_args()
    found = main(given.images, given.files, given.configs, given.seed)
    print("\n".join(found))
    sys.exit(bool(found))
