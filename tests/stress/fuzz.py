"""Read damaged images, damaged files of weights and wrong configs: each must be accepted, or rejected in one line.

    python -m tests.stress.fuzz [--images=2000] [--files=500] [--shards=500] [--configs=500] [--seed=0]

Images go through the reader of the data pipeline; safetensors, npz and torch files through the loaders; zip, tar and
parquet files through the sources, and nothing may be written; random overrides of config keys through the flags' parser
and the checks before training, one in ten also through the models' shapes. An input that raises anything but a
UserError of one line, or needs more than `damage.LIMIT` seconds of work, is printed with its number, and the exit
status is 1.
"""

import argparse
import contextlib
import io
import os
import random
import sys
import tempfile
from pathlib import Path

import numpy as np
from absl import flags
from ml_collections import config_flags

from rae_jax.build import command_line_weights, part_weights
from rae_jax.build import data as build_data
from rae_jax.config import checks, command_flag, run_config
from rae_jax.config import keys as config_keys
from rae_jax.data import evaluator_npz, pipeline, sources
from rae_jax.runtime import sharding
from rae_jax.weights import hub, safetensors_tree

from . import fuzz_shards, tiny_run
from .damage import Tally, mutate, pictures


def images(count, seed):
    """Read mutated images with the pipeline; return the tally."""
    rng, originals = random.Random(seed), pictures(np.random.default_rng(seed))
    mutated = [mutate(rng, rng.choice(originals)) for _ in range(count)]
    source = sources.ImageSource(_InMemory(mutated), ("only",), 16)
    tally = Tally()
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
    rng, tally, loaders = random.Random(seed), Tally(), _loaders(Path(folder))
    for number in range(count):
        name, path, intact, load = loaders[number % len(loaders)]
        damaged = path.with_name(f"damaged{number}{path.suffix}")
        damaged.write_bytes(mutate(rng, intact))
        tally.attempt(f"{name} {number}", load, damaged)
        damaged.unlink()
    return tally


def configs(count, seed, folder):
    """Start up with random overrides of the keys of tiny_run.py; return the tally."""
    rng, tally = random.Random(seed), Tally()
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


class _InMemory:
    """A store of encoded images for pipeline sources."""

    labelled = True

    def __init__(self, data):
        self._data = data

    def __len__(self):
        return len(self._data)

    def read(self, index):
        return self._data[index], 0

    def name(self, index):
        return f"image {index}"


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
        half = {"module.mean": torch.zeros(3, 4).bfloat16(), "module.var": torch.ones(3, 4).half()}
        training = {"ema": half, "args": argparse.Namespace(lr=np.float64(1e-4), path=Path("x"))}
        torch.save(training, folder / "training.pt")
        kinds += [("stat.pt", theirs), ("training.pt", theirs)]
    return [(name, folder / name, (folder / name).read_bytes(), load) for name, load in kinds]


def _misspelt(rng, key):
    return key if rng.random() > 0.03 else key[:-1]


def _start_up(arguments, folder, with_shapes):
    """Do what rae_jax.main does before training; `with_shapes`: also compute the shapes of the models."""
    values = flags.FlagValues()
    path = str(Path(tiny_run.__file__))
    holder = config_flags.DEFINE_config_file("config", None, "", flag_values=values)
    sys.argv = ["main", f"--config={path}", *arguments]  # ml_collections reads the overrides here
    command_flag.parser(holder, command_line_weights.complete, values)(sys.argv)
    config = holder.value
    mesh = sharding.make_mesh(config.mesh)
    checks.check(config, mesh)
    run_config.check(config, folder, *config.stages)
    for split in ("train", "heldout"):
        build_data.source(config, split)
    if with_shapes:
        for part in ("encoder", "decoder", "dit"):
            part_weights.shapes(config, part)


def main(num_images, num_files, num_shards, num_configs, seed):
    """Print a tally for each kind of input; return [description] of what is wrong."""
    wrong = []
    with tempfile.TemporaryDirectory() as folder:
        kinds = {
            "images": lambda: images(num_images, seed),
            "files": lambda: files(num_files, seed, folder),
            "shards": lambda: fuzz_shards.shards(num_shards, seed, Path(folder) / "archives"),
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
    for name, default in (("images", 2000), ("files", 500), ("shards", 500), ("configs", 500)):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"number of damaged {name}")
    parser.add_argument("--seed", type=int, default=0, help="of the random damage")
    args = parser.parse_args()
    wrong = main(args.images, args.files, args.shards, args.configs, args.seed)
    print("\n".join(wrong))
    sys.exit(bool(wrong))
