"""Damaged zip, tar and parquet files."""

import contextlib
import functools
import io
import random
import tarfile
import zipfile
from pathlib import Path

import numpy as np

from rae_jax.data import sources
from rae_jax.errors import UserError

from .damage import Tally, mutate, pictures


def shards(count, seed, folder):
    """Read all images of mutated zip, tar and parquet files in a new folder; return the tally."""
    rng, tally, around = random.Random(seed), Tally(), Path(folder).parent
    originals = _archives(Path(folder))
    before = set(around.rglob("*"))
    for number in range(count):
        name, intact, read = originals[number % len(originals)]
        damaged = Path(folder) / f"damaged{number}{Path(name).suffix}"
        damaged.write_bytes(mutate(rng, intact))
        tally.attempt(f"{name} {number}", read, damaged)
        damaged.unlink()
        if written := set(around.rglob("*")) - before:
            tally.wrong.append(f"{name} {number}: {written} were written")
    return tally


def _archives(folder):
    """Write one archive of each kind; return [(name, bytes, function that reads a damaged one)]."""
    folder.mkdir(parents=True)
    images = pictures(np.random.default_rng(0))[:6]
    with zipfile.ZipFile(folder / "images.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for n, image in enumerate(images):
            archive.writestr(f"class{n % 2}/{n}.png", image)
    with tarfile.open(folder / "shard.tar", "w") as archive:
        for n, image in enumerate(images):
            for suffix, data in (("png", image), ("json", b'{"label": %d, "caption": "no %d"}' % (n, n))):
                member = tarfile.TarInfo(f"{n:03d}.{suffix}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    kinds = {"images.zip": sources.image_folder, "shard.tar": sources.webdataset}
    with contextlib.suppress(ImportError):
        import pyarrow
        import pyarrow.parquet

        rows = [{"image": {"bytes": image, "path": f"{n}"}, "label": n, "text": "x"} for n, image in enumerate(images)]
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "shard.parquet", row_group_size=2)
        kinds["shard.parquet"] = sources.parquet

    def read(kind, path):
        source, wrong = kind(path=str(path), heldout_path=str(path), split="train", image_size=16), []
        for index in range(min(len(source), 8)):
            try:
                source[index]
                source.captions(index)
            except UserError as error:
                wrong.append(error)
        if wrong:
            raise wrong[0]

    return [(name, (folder / name).read_bytes(), functools.partial(read, kind)) for name, kind in kinds.items()]
