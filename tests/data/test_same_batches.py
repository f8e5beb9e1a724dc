"""The same photographs as a folder, an archive, a list, tar files and parquet files give the same batches."""

import zipfile
from pathlib import Path

import numpy as np
import pytest
from shard_cases import write_parquet, write_tar

from rae_jax.data import pipeline, shard_index, sources

PHOTOGRAPHS = Path(__file__).parents[3] / "shared" / "data" / "imagenet_sample"
FILES = sorted(PHOTOGRAPHS.glob("*/*"))
pytestmark = [
    pytest.mark.skipif(not FILES, reason="../shared/data/imagenet_sample is not there"),
    pytest.mark.usefixtures("nothing_kept"),
]
CLASSES = sorted({file.parent.name for file in FILES})
OPTIONS = {"heldout_path": "", "split": "train", "image_size": 32, "num_classes": len(CLASSES)}
BATCH = 16


def _label(file):
    return CLASSES.index(file.parent.name)


def _zip(folder):
    with zipfile.ZipFile(folder / "images.zip", "w") as archive:
        for file in FILES:
            archive.write(file, file.relative_to(PHOTOGRAPHS.parent))
    return sources.image_folder(path=str(folder / "images.zip"), **OPTIONS)


def _list(folder):
    (folder / "list.txt").write_text("".join(f"{file} {_label(file)}\n" for file in FILES))
    return sources.image_folder(path=str(folder / "list.txt"), **OPTIONS)


def _tars(folder):
    for shard in range(4):
        members = {}
        for n in range(shard * len(FILES) // 4, (shard + 1) * len(FILES) // 4):
            members |= {f"{n:06d}.jpg": FILES[n].read_bytes(), f"{n:06d}.cls": str(_label(FILES[n]))}
        write_tar(folder / f"{shard}.tar", members)
    return sources.webdataset(path=str(folder / "{0..3}.tar"), **OPTIONS)


def _parquet(folder):
    rows = [{"image": {"bytes": f.read_bytes(), "path": f.name}, "label": _label(f)} for f in FILES]
    for shard in range(2):
        part = rows[shard * len(rows) // 2 : (shard + 1) * len(rows) // 2]
        write_parquet(folder / f"{shard}.parquet", part, class_names=CLASSES, rows_per_group=10)
    return sources.parquet(path=str(folder), **OPTIONS)


def _copied_parquet(folder):
    shard_index.keep_in(folder / "index", copies=True)
    return _parquet(folder)


FORMS = {"zip": _zip, "list": _list, "tar": _tars, "parquet": _parquet, "copied parquet": _copied_parquet}


def _batches(source, rows=None, num_workers=0):
    reading = {"batch_size": BATCH, "seed": 5, "random_crop": True, "flip": True, "num_threads": 2, "rows": rows}
    reading["num_workers"] = num_workers
    return iter(pipeline.training_batches(source, **reading))


@pytest.fixture(scope="module")
def expected():
    iterator = _batches(sources.image_folder(path=str(PHOTOGRAPHS), **OPTIONS))
    return [next(iterator) for _ in range(8)]  # more than an epoch


@pytest.mark.parametrize("form", FORMS)
def test_the_same_photographs_give_the_same_batches(tmp_path, form, expected):
    """Also when reading is resumed by two processes."""
    source = FORMS[form](tmp_path)
    iterator = _batches(source)
    first = [next(iterator) for _ in range(4)]
    halves = [_batches(source, rows) for rows in (range(BATCH // 2), range(BATCH // 2, BATCH))]
    for half in halves:
        half.set_state(iterator.get_state())
    pairs = [[next(half) for half in halves] for _ in range(4)]
    rest = [{key: np.concatenate([half[key] for half in pair]) for key in pair[0]} for pair in pairs]
    for ours, theirs in zip(first + rest, expected, strict=True):
        np.testing.assert_array_equal(ours["image"], theirs["image"])
        np.testing.assert_array_equal(ours["label"], theirs["label"])
    assert len(source) == 95


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_worker_processes_read_the_same_batches(tmp_path, form, expected):
    iterator = _batches(FORMS[form](tmp_path), num_workers=2)
    for theirs in expected:
        ours = next(iterator)
        np.testing.assert_array_equal(ours["image"], theirs["image"])
        np.testing.assert_array_equal(ours["label"], theirs["label"])
    iterator.close()
