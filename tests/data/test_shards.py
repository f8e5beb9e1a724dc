"""Tar files, and shards of both kinds: what is read, what is kept, and what becomes of damage."""

import json
import os
import tarfile

import numpy as np
import pytest
from brought_cases import SIZE, labels_of
from shard_cases import (
    PNGS,
    expected,
    open_parquet,
    open_tar,
    pixels_of,
    samples,
    write_parquet,
    write_tar,
)

from rae_jax.build import data as build_data
from rae_jax.data import shard_index, shards, sources, tar_shards
from rae_jax.errors import UserError

pytestmark = pytest.mark.usefixtures("nothing_kept")

LABELLED = {
    "cls": ({"cls": "{}"}, {}, ("0", "1", "2", "3"), [0, 1, 2, 3], []),
    "cls as a file of Windows": ({"cls": "\ufeff{}\r\n"}, {}, ("0", "1", "2", "3"), [0, 1, 2, 3], []),
    "cls with names": ({"cls": "n{}"}, {}, ("n0", "n1", "n2", "n3"), [0, 1, 2, 3], []),
    "json": ({"json": '{"label": {}, "caption": "no {}"}'}, {}, ("0", "1", "2", "3"), [0, 1, 2, 3], ["no 1"]),
    "json with a key": (
        {"json": '{"kind": "k{}", "alt": ["a", "b{}"]}'},
        {"label": "json.kind", "caption": "json.alt"},
        ("k0", "k1", "k2", "k3"),
        [0, 1, 2, 3],
        ["a", "b1"],
    ),
    "txt": ({"txt": "{}\n"}, {}, ("0", "1", "2", "3"), [0, 1, 2, 3], []),
    "caption": ({"txt": "picture {}\n"}, {}, ("images",), [0, 0, 0, 0], ["picture 1"]),
    "caption and label": ({"txt": "picture {}", "cls": "{}"}, {}, ("0", "1", "2", "3"), [0, 1, 2, 3], ["picture 1"]),
    "nothing": ({}, {}, ("images",), [0, 0, 0, 0], []),
}


@pytest.mark.parametrize("kind", LABELLED)
def test_tar_files_with_labels_and_captions(tmp_path, kind):
    members, fields, class_names, labels, captions = LABELLED[kind]
    write_tar(tmp_path / "0.tar", samples(**members))
    found = open_tar(tmp_path, fields={**sources.NO_FIELDS, **fields})
    assert found.class_names == class_names and labels_of(found) == labels and found.captions(1) == captions
    np.testing.assert_array_equal(pixels_of(found), expected(4))
    assert found.name(1) == f"{tmp_path}/0.tar:000001"


@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_shards_by_folder_file_and_pattern(tmp_path, kind):
    names = [f"train-{n:03d}" for n in (8, 9, 10, 11)]
    for n, name in enumerate(names):
        if kind == "tar":
            write_tar(tmp_path / f"{name}.tar", samples(first=2 * n, count=2, cls="{}"))
        else:
            rows = [{"image": {"bytes": PNGS[i], "path": None}, "label": i} for i in (2 * n, 2 * n + 1)]
            write_parquet(tmp_path / f"{name}.parquet", rows)
    (tmp_path / f"._x.{kind}").write_bytes(b"")
    source = {"tar": open_tar, "parquet": open_parquet}[kind]
    counts = {
        **{"": 8, f"train-009.{kind}": 2, f"train-{{009..011}}.{kind}": 6, f"train-0{{08,11}}.{kind}": 4},
        **{f"train-01*.{kind}": 4},
    }
    for pattern, count in counts.items():
        assert len(source(f"{tmp_path}/{pattern}", num_classes=8)) == count, pattern
    found = source(tmp_path, num_classes=8)
    assert labels_of(found) == list(range(8))
    assert found.name(3) == f"{tmp_path}/train-009.{kind}:{'000003' if kind == 'tar' else 'row 1'}"
    assert [len(source(tmp_path, heldout_path="", split=split)) for split in ("train", "heldout")] == [7, 1]
    with pytest.raises(UserError, match=f"train-012.{kind}' does not exist .1 in all"):
        source(f"{tmp_path}/train-{{010..012}}.{kind}")
    os.rename(tmp_path / f"train-011.{kind}", tmp_path / f"validation-000.{kind}")
    with pytest.raises(UserError, match=f"holds the splits .* config.data.path='.../train-\\*.{kind}'"):
        source(tmp_path)
    found = source(f"{tmp_path}/train-*.{kind}", heldout_path=f"{tmp_path}/val*.{kind}", split="heldout", num_classes=8)
    assert labels_of(found) == [6, 7]


@pytest.mark.parametrize("name, message", [("0.tar.gz", "decompress them once"), ("0.jpg", "source='image_folder'")])
def test_folders_without_shards_name_the_fix(tmp_path, name, message):
    (tmp_path / name).write_bytes(b"x")
    for path in (tmp_path, tmp_path / name):
        with pytest.raises(UserError, match=message):
            open_tar(path)
    with pytest.raises(UserError, match="name a folder, a file or a pattern"):
        open_tar(tmp_path / "nowhere")


def test_an_index_is_built_once_and_kept(tmp_path, monkeypatch):
    write_tar(tmp_path / "0.tar", samples(cls="{}", txt="picture {}"))
    built, index = [], tar_shards.index
    monkeypatch.setattr(tar_shards, "index", lambda files, **options: built.append(1) or index(files, **options))
    shard_index.keep_in(tmp_path / "run" / "index", copies=True)

    def again(count):
        shard_index._indices.clear()
        found = open_tar(tmp_path / "0.tar")
        assert labels_of(found) == [0, 1, 2, 3] and found.captions(3) == ["picture 3"] and len(built) == count
        np.testing.assert_array_equal(pixels_of(found), expected(4))

    again(1)
    again(1)
    (kept,) = (tmp_path / "run" / "index").iterdir()
    kept.write_bytes(kept.read_bytes()[:200])
    again(2)
    os.utime(tmp_path / "0.tar", (1, 1))
    again(3)


def _of_negative_size(data):
    member = tarfile.TarInfo("000009.png")
    member.size = -1024
    return data[:-10240] + member.tobuf(tarfile.GNU_FORMAT) + data[-10240:]


DAMAGE = {
    "negative size": (_of_negative_size, "has a negative size|invalid offset"),
    "cut in an image": (lambda data: data[:700], "unexpected end"),
    "cut in a header": (lambda data: data[: 512 * 4 + 100], "is damaged at byte|unexpected end"),
    "garbled header": (lambda data: data[:2048] + b"\x01" * 512 + data[2560:], "is damaged at byte"),
    "empty": (lambda data: b"", "is not a whole tar file"),
    "text": (lambda data: b"hello" * 300, "is not a whole tar file"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_tar_files_are_one_line(tmp_path, kind):
    change, message = DAMAGE[kind]
    path = tmp_path / "0.tar"
    write_tar(path, samples(cls="{}"))
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(UserError, match=message) as refusal:
        open_tar(path)
    assert str(path) in str(refusal.value) and "\n" not in str(refusal.value)


def test_members_that_are_no_images_do_not_disturb(tmp_path):
    members = {"./a/0.cls": "1", "./a/0.png": PNGS[0], "notes.md": "x", "a/._1.png": "x", "b/1.seg.png": "x"}
    members |= {"b/1.png": PNGS[1], "b/1.cls": "0"}
    write_tar(tmp_path / "0.tar", members)
    with tarfile.open(tmp_path / "0.tar", "a") as archive:
        for kind, target in ((tarfile.SYMTYPE, "/etc/passwd"), (tarfile.DIRTYPE, ""), (tarfile.LNKTYPE, "a/0.png")):
            member = tarfile.TarInfo("../../c.png")
            member.type, member.linkname = kind, target
            archive.addfile(member)
    found = open_tar(tmp_path / "0.tar")
    assert labels_of(found) == [1, 0]
    np.testing.assert_array_equal(pixels_of(found), expected(2))


@pytest.mark.parametrize(
    "members, message",
    [
        ({"0.png": PNGS[0], "0.cls": "1", "1.png": PNGS[1]}, "0.tar:1 has no label in the field 'cls'"),
        ({"0.png": PNGS[0], "0.json": "[1"}, "0.tar:0.json is not a JSON object"),
        ({"0.png": PNGS[0], "0.json": json.dumps({"label": [1]})}, "has no label in the field 'json.label'"),
        ({"0.md": "x"}, "holds no images: name shards whose samples have images"),
    ],
)
def test_samples_without_what_is_needed_are_named(tmp_path, members, message):
    write_tar(tmp_path / "0.tar", members)
    for split in ("train", "heldout"):
        with pytest.raises(UserError, match=message):
            open_tar(tmp_path / "0.tar", split=split)


def test_a_label_outside_of_the_classes_is_named_at_the_start(tmp_path):
    write_tar(tmp_path / "0.tar", samples(cls="{}"))
    with pytest.raises(UserError, match="0.tar:000003 has label 3, outside of 0 to 1: correct it, or the number"):
        open_tar(tmp_path / "0.tar", num_classes=2)
    write_tar(tmp_path / "1.tar", samples(cls="90000{}00"))  # no labels, but numbers of images
    with pytest.raises(UserError, match="1.tar:000003 has label 90000300, outside of 0 to 999999"):
        open_tar(tmp_path / "1.tar")


def test_shards_of_a_test_set_with_labels_of_minus_one_are_unlabelled(tmp_path):
    write_tar(tmp_path / "train.tar", samples(cls="{}"))
    write_tar(tmp_path / "test.tar", samples(cls="-1"))
    found = open_tar(tmp_path / "train.tar", heldout_path=str(tmp_path / "test.tar"), split="heldout")
    assert not found.labelled and found.class_names == ("0", "1", "2", "3")


def test_a_config_names_shards(tmp_path, tiny_config):
    write_tar(tmp_path / "0.tar", samples(txt="{}", cls="k{}"))
    tiny_config.data.update({"source": "webdataset", "path": str(tmp_path), "image_size": SIZE, "num_classes": 4})
    tiny_config.data.fields.label = "txt"
    assert build_data.source(tiny_config, "train").class_names == ("0", "1", "2", "3")
    rows = [{"image": PNGS[n], "label": f"k{n}"} for n in range(4)]
    write_parquet(tmp_path / "0.parquet", rows)
    tiny_config.data.update({"source": "parquet", "fields": dict(sources.NO_FIELDS)})
    assert build_data.source(tiny_config, "heldout").class_names == ("k0", "k1", "k2", "k3")


def test_patterns_of_too_many_files_are_refused(monkeypatch):
    monkeypatch.setattr(shards, "_MOST", 100)
    with pytest.raises(UserError, match="is a pattern of more than 100 files"):
        shards.files_at("/nowhere/{0..999999999}.tar", "--path", ".tar", sources.FLAGS)


@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_splits_in_folders_of_shards_are_refused(tmp_path, kind):
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        if kind == "tar":
            write_tar(tmp_path / split / "0.TAR", samples(cls="{}"))
        else:
            write_parquet(tmp_path / split / "0000.parquet", [{"image": PNGS[0], "label": 0}])
    source = {"tar": open_tar, "parquet": open_parquet}[kind]
    fix = f"set config.data.path={tmp_path}/train and config.data.heldout_path={tmp_path}/test"
    with pytest.raises(UserError, match=f"holds the splits 'train' and 'test', not classes: {fix}"):
        source(tmp_path)
    assert source(tmp_path / "train", num_classes=4).labelled


def test_the_patterns_for_splits_are_named(tmp_path):
    for name in ("imagenet1k-train-0000", "imagenet1k-validation-00"):
        write_tar(tmp_path / f"{name}.tar", samples(cls="{}"))
    patterns = "path='.../imagenet1k-train-*.tar' and config.data.heldout_path='.../imagenet1k-validation-*.tar'"
    with pytest.raises(UserError) as refusal:
        open_tar(tmp_path)
    assert patterns in str(refusal.value)


def test_files_of_one_name_size_and_time_have_an_index_each(tmp_path):
    shard_index.keep_in(tmp_path / "index", copies=True)
    for split, label in (("train", "{}"), ("val", "1")):
        (tmp_path / split).mkdir()
        write_tar(tmp_path / split / "0.tar", samples(cls=label))
        os.utime(tmp_path / split / "0.tar", (0, 0))
    found = [labels_of(open_tar(tmp_path / split, num_classes=4)) for split in ("train", "val")]
    assert found == [[0, 1, 2, 3], [1, 1, 1, 1]]


@pytest.mark.parametrize(
    "members, message",
    [
        ({"0.png": PNGS[0], "1.png": PNGS[1], "1.cls": "1"}, "0.tar:1 has a label, and the first image has none"),
        ({"0.png": PNGS[0], "1.png": PNGS[1], "0.cls": "1"}, "0.tar:0 has a label and no image: sort the members"),
    ],
)
def test_labels_do_not_vanish(tmp_path, members, message):
    write_tar(tmp_path / "0.tar", members)
    with pytest.raises(UserError, match=message):
        open_tar(tmp_path / "0.tar")


def test_what_is_left_out_is_said(tmp_path, capfd):
    write_tar(tmp_path / "0.tar", {"0.v2.png": PNGS[0], "1.md": "x", "2.txt": "no picture"})
    found = open_tar(tmp_path / "0.tar")
    assert len(found) == 1 and found.class_names == ("images",)
    said = capfd.readouterr().err
    assert "samples without an image are left out (2 in all)" in said and "the images have no labels" in said


def test_numbers_with_a_point_are_numbers_and_keys_may_be_nested(tmp_path):
    write_tar(tmp_path / "0.tar", samples(cls="{}.0"))
    assert labels_of(open_tar(tmp_path / "0.tar")) == [0, 1, 2, 3]
    write_tar(tmp_path / "1.tar", samples(json='{"meta": {"label": {}.0}}'))
    assert labels_of(open_tar(tmp_path / "1.tar", fields={**sources.NO_FIELDS, "label": "json.meta.label"})) == [
        0,
        1,
        2,
        3,
    ]


@pytest.mark.parametrize("text, captions", [('{"caption": 5}', []), ('\ufeff{"caption": ["a", null, 3]}', ["a"])])
def test_captions_of_other_types_are_no_captions(tmp_path, text, captions):
    write_tar(tmp_path / "0.tar", {"0.png": PNGS[0], "0.cls": "0", "0.json": text})
    assert open_tar(tmp_path / "0.tar").captions(0) == captions
