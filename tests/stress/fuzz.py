"""Read damaged images, damaged files of weights and wrong configs: each must be accepted, or rejected in one line.

    python -m tests.stress.fuzz [--images=2000] [--files=500] [--configs=500] [--seed=0]

Images go through the reader of the data pipeline; safetensors, npz and torch files through the loaders; random
overrides of config keys through the flags' parser and the checks before training, one in ten also through the models'
shapes. An input that raises anything but a UserError of one line, or needs more than `LIMIT` seconds of work, is
printed with its number, and the exit status is 1.
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

from rae_jax.build import data as build_data
from rae_jax.build import part_weights
from rae_jax.config import checks, command_flag, run_config
from rae_jax.config import keys as config_keys
from rae_jax.data import evaluator_npz, pipeline, sources
from rae_jax.errors import UserError
from rae_jax.runtime import sharding
from rae_jax.weights import hub, safetensors_tree

from . import tiny_run

LIMIT = 20  # CPU seconds for one input


def images(count, seed):
    """Read mutated images with the pipeline; return the tally."""
    rng, originals = random.Random(seed), _pictures(np.random.default_rng(seed))
    mutated = [_mutate(rng, rng.choice(originals)) for _ in range(count)]
    source = sources.ImageSource(_InMemory(mutated), ("only",), 16)
    tally = _Tally()
    for number in range(count):
        tally.attempt(f"image {number}", source.random_crop, number, np.random.default_rng(number))
    with contextlib.redirect_stderr(io.StringIO()) as stderr:
        batches = list(pipeline.one_pass(source, batch_size=8, num_threads=2, on_error="skip"))
    shown = int(sum(batch["mask"].sum() for batch in batches))
    if shown + (skipped := stderr.getvalue().count("skipped: ")) != count:
        tally.wrong.append(f"pipeline: {shown} images read + {skipped} reported as skipped != {count} images")
    return tally


def files(count, seed, folder):
    """Load mutated files of weights, images and moments; return the tally."""
    rng, tally, loaders = random.Random(seed), _Tally(), _loaders(Path(folder))
    for number in range(count):
        name, path, intact, load = loaders[number % len(loaders)]
        damaged = path.with_name(f"damaged{number}{path.suffix}")
        damaged.write_bytes(_mutate(rng, intact))
        tally.attempt(f"{name} {number}", load, damaged)
        damaged.unlink()
    return tally


def configs(count, seed, folder):
    """Start up with random overrides of the keys of tiny_run.py; return the tally."""
    rng, tally = random.Random(seed), _Tally()
    keys = sorted(config_keys.flatten(tiny_run.get_config().to_dict()))
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
    """Count of accepted and rejected inputs; `wrong` describes the others."""

    def __init__(self):
        self.accepted, self.rejected, self.wrong = 0, 0, []

    def attempt(self, name, function, *arguments):
        """Call the function, which may return, or raise UserError, or exit with status 2."""
        for number in (signal.SIGPROF, signal.SIGALRM):
            signal.signal(number, _raise_too_long)
        signal.setitimer(signal.ITIMER_PROF, LIMIT)  # CPU time: other programs may use the machine
        signal.alarm(20 * LIMIT)  # wall-clock time, for an endless wait
        stderr = io.StringIO()
        try:
            with contextlib.redirect_stderr(stderr):
                function(*arguments)
            self.accepted += 1
        except UserError as error:
            self._reject(name, f"error: {error}\n")
        except SystemExit as status:
            self._reject(name, stderr.getvalue() if status.code == 2 else f"exit status {status.code}")
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            frame = traceback.extract_tb(error.__traceback__)[-2 if isinstance(error, _TooLong) else -1]
            line = f"{Path(frame.filename).name}:{frame.lineno}"
            self.wrong.append(f"{name}: {type(error).__name__} {str(error)[:300]} ({line})")
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.alarm(0)

    def _reject(self, name, message):
        self.rejected += 1
        if not message.startswith("error: ") or message.count("\n") != 1:
            self.wrong.append(f"{name}: not one line: {message[:300]!r}")

    def __str__(self):
        return f"{self.accepted} accepted, {self.rejected} rejected in one line, {len(self.wrong)} wrong"


class _TooLong(BaseException):
    pass


def _raise_too_long(number, frame):
    raise _TooLong(f"takes more than {LIMIT} s")


def _mutate(rng, data):
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        place, length = rng.randrange(max(len(data), 1)), rng.choice((1, 1, 2, 4, 8, 64))
        if rng.random() < 0.5:
            place = min(place, rng.randrange(64))  # damages the header
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
    """A store of encoded images for pipeline sources."""

    def __init__(self, data):
        self._data = data

    def __len__(self):
        return len(self._data)

    def read(self, index):
        return self._data[index], 0

    def name(self, index):
        return f"image {index}"


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
    """Write one file of each kind; return [(name, path, bytes, loader)]."""
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


def _start_up(arguments, folder, with_shapes):
    """Do what rae_jax.main does before training; `with_shapes`: also compute the shapes of the models."""
    values = flags.FlagValues()
    path = str(Path(tiny_run.__file__))
    holder = config_flags.DEFINE_config_file("config", None, "", flag_values=values)
    sys.argv = ["main", f"--config={path}", *arguments]  # ml_collections reads the overrides here
    command_flag.parser(holder, values)(sys.argv)
    config = holder.value
    mesh = sharding.make_mesh(config.mesh)
    checks.check(config, mesh)
    run_config.check(config, folder, *config.stages)
    for split in ("train", "heldout"):
        build_data.source(config, split)
    if with_shapes:
        for part in ("encoder", "decoder", "dit"):
            part_weights.shapes(config, part)


def main(num_images, num_files, num_configs, seed):
    """Print a tally for each kind of input; return [description] of what is wrong."""
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
    for name, default in (("images", 2000), ("files", 500), ("configs", 500)):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"number of damaged {name}")
    parser.add_argument("--seed", type=int, default=0, help="of the random damage")
    args = parser.parse_args()
    wrong = main(args.images, args.files, args.configs, args.seed)
    print("\n".join(wrong))
    sys.exit(bool(wrong))
