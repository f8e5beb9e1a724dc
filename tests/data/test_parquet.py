"""Parquet files: columns, the copy for random order, and what becomes of damage."""

import multiprocessing
import os
import pickle

import numpy as np
import pytest
from brought_cases import SIZE, labels_of
from shard_cases import (
    PNGS,
    expected,
    open_parquet,
    pixels_of,
    write_parquet,
)

from rae_jax.data import shard_index, sources
from rae_jax.errors import UserError

pytestmark = pytest.mark.usefixtures("nothing_kept")


def test_labels_of_a_column_may_be_numbers_names_or_named_numbers(tmp_path):
    def rows(label):
        return [
            {"image": {"bytes": PNGS[n], "path": f"{n}.png"}, "label": label(n), "text": f"no {n}"} for n in range(4)
        ]

    cases = (
        (lambda n: n, None, ("0", "1", "2", "3")),
        (lambda n: n, ("a", "b", "c", "d", "e"), ("a", "b", "c", "d", "e")),
        (lambda n: f"k{n}", None, ("k0", "k1", "k2", "k3")),
    )
    for label, class_names, names in cases:
        write_parquet(tmp_path / "0.parquet", rows(label), class_names=class_names)
        found = open_parquet(tmp_path)
        assert found.class_names == names and labels_of(found) == [0, 1, 2, 3] and found.captions(2) == ["no 2"]
        np.testing.assert_array_equal(pixels_of(found), expected(4))
    assert found.name(3) == f"{tmp_path}/0.parquet:row 3"


def test_columns_of_other_names(tmp_path):
    rows = [{"photo": PNGS[n], "kind": n % 2, "alt": ["a", f"b{n}"], "id": n} for n in range(4)]
    write_parquet(tmp_path / "0.parquet", rows)
    found = open_parquet(tmp_path)  # the only column of bytes
    assert found.class_names == ("images",)
    found = open_parquet(tmp_path, fields={"image": "photo", "label": "kind", "caption": "alt"})
    assert labels_of(found) == [0, 1, 0, 1] and found.captions(3) == ["a", "b3"]
    for field, column in (("image", "alt"), ("label", "photo"), ("caption", "nowhere")):
        with pytest.raises(UserError, match=f"config.data.fields.{field}='{column}' is no column of .* choose from"):
            open_parquet(tmp_path, fields={**sources.NO_FIELDS, field: column})


def _rows_of_images():
    rows = [{"image": {"bytes": png, "path": None}, "label": n, "text": f"no {n}"} for n, png in enumerate(PNGS)]
    rows[5]["image"] = {"bytes": None, "path": "elsewhere.png"}
    return rows


def test_the_images_of_parquet_files_are_copied_once(tmp_path):
    """When the first image is read, or for a worker process; and again if the copy is not whole."""
    write_parquet(tmp_path / "0.parquet", _rows_of_images())
    direct, folder = open_parquet(tmp_path / "0.parquet"), tmp_path / "run" / "index"
    shard_index.keep_in(folder, copies=True)
    found = open_parquet(tmp_path / "0.parquet")
    assert not folder.exists()
    others = pickle.loads(pickle.dumps(found))
    files = sorted(path for path in folder.iterdir() if path.suffix in (".images", ".npy"))
    before = [os.stat(path).st_mtime_ns for path in files]
    for source in (others, found, open_parquet(tmp_path / "0.parquet"), direct):
        assert tuple(source.image_names()) == tuple(direct.image_names()) and source.captions(2) == ["no 2"]
        for i in (7, 0, 3):
            np.testing.assert_array_equal(source[i]["image"], expected(8)[i])
        with pytest.raises(UserError, match="0.parquet:row 5 .its row holds no bytes of an image"):
            source[5]
    assert len(files) == 2 and before == [os.stat(path).st_mtime_ns for path in files]
    for damaged, content in ((files[0], b"x"), (files[1], b""), (files[1], files[1].read_bytes()[:-3])):
        damaged.write_bytes(content)
        np.testing.assert_array_equal(open_parquet(tmp_path / "0.parquet")[3]["image"], expected(8)[3])


def _read_first(path, folder, barrier):
    shard_index.keep_in(folder, copies=True)
    source = open_parquet(path)
    barrier.wait()
    np.testing.assert_array_equal(source[0]["image"], expected(8)[0])


def test_processes_that_start_together_make_one_copy(tmp_path):
    write_parquet(tmp_path / "0.parquet", _rows_of_images())
    spawn = multiprocessing.get_context("spawn")
    barrier = spawn.Barrier(2)
    arguments = (tmp_path / "0.parquet", tmp_path / "index", barrier)
    children = [spawn.Process(target=_read_first, args=arguments) for _ in range(2)]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
    assert [child.exitcode for child in children] == [0, 0]
    assert not list((tmp_path / "index").glob("*.unfinished"))


def test_a_copy_that_cannot_be_written_is_one_line(tmp_path):
    write_parquet(tmp_path / "0.parquet", _rows_of_images())
    (tmp_path / "index").write_text("a file")
    shard_index.keep_in(tmp_path / "index", copies=True)
    with pytest.raises(UserError, match="cannot be written .*: make room, or pack the data"):
        open_parquet(tmp_path / "0.parquet")[0]


def test_parquet_files_without_what_is_needed(tmp_path):
    with pytest.raises(UserError, match="has no column of images"):
        open_parquet(write_parquet(tmp_path / "0.parquet", [{"label": 1}]))
    rows = [{"image": PNGS[0], "label": 0}, {"image": PNGS[1], "label": None}]
    with pytest.raises(UserError, match="0.parquet:row 1 has no 'label': add it"):
        open_parquet(write_parquet(tmp_path / "0.parquet", rows))
    (tmp_path / "1.parquet").write_bytes((tmp_path / "0.parquet").read_bytes()[:-9])
    with pytest.raises(UserError, match="1.parquet is not a whole parquet file .*: fetch it again"):
        open_parquet(tmp_path / "1.parquet")


@pytest.mark.parametrize("kind", ["dictionary", "bool", "float"])
def test_labels_of_other_types(tmp_path, kind):
    pa = pytest.importorskip("pyarrow", reason="needs the extra 'parquet'")
    import pyarrow.parquet as pq

    labels = {"dictionary": pa.array(list("abba")).dictionary_encode(), "bool": pa.array([False, True, True, False])}
    labels["float"] = pa.array([0.0, 1.0, 1.0, 0.0])
    table = pa.table({"image": pa.array(PNGS[:4]), "label": labels[kind]})
    pq.write_table(table, tmp_path / "0.parquet")
    if kind == "float":
        with pytest.raises(UserError, match="the column 'label' of double holds no labels: set config.data.fields"):
            open_parquet(tmp_path)
        return
    assert labels_of(open_parquet(tmp_path)) == [0, 1, 1, 0]


def test_files_of_other_columns_are_refused(tmp_path):
    write_parquet(tmp_path / "0.parquet", [{"image": PNGS[0], "label": 0}])
    write_parquet(tmp_path / "1.parquet", [{"image": {"bytes": PNGS[1], "path": ""}, "label": 0}])
    with pytest.raises(UserError, match="1.parquet has other columns than .*0.parquet"):
        open_parquet(tmp_path)


def test_a_flat_table_has_a_column_with_a_dot(tmp_path):
    write_parquet(tmp_path / "0.parquet", [{"image.bytes": PNGS[n], "label": n} for n in range(2)])
    np.testing.assert_array_equal(pixels_of(open_parquet(tmp_path)), expected(2))


def test_opening_the_held_out_images_copies_nothing_else(tmp_path):
    for n, name in enumerate(("train", "test")):
        rows = [{"image": PNGS[i], "label": i % 2} for i in range(4 * n, 4 * n + 4)]
        write_parquet(tmp_path / f"{name}.parquet", rows)
    shard_index.keep_in(tmp_path / "index", copies=True)
    paths = {"path": str(tmp_path / "train.parquet"), "heldout_path": str(tmp_path / "test.parquet")}
    found = sources.parquet(image_size=SIZE, **paths, split="heldout")
    np.testing.assert_array_equal(found[0]["image"], expected(5)[4])
    assert len(list((tmp_path / "index").glob("*.images"))) == 1
