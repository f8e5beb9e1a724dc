"""Tar and parquet files: what is read, what is kept, and what becomes of damage."""

import io
import json
import os
import pickle
import tarfile

import numpy as np
import pytest
from brought_cases import SIZE, labels_of, png
from PIL import Image
from shard_cases import write_parquet, write_tar

from rae_jax.build import data as build_data
from rae_jax.data import pack, packed_images, shard_index, shards, sources, tar_shards
from rae_jax.errors import UserError

PNGS = [png(seed) for seed in range(8)]


@pytest.fixture(autouse=True)
def no_index(monkeypatch):
    """Nothing is kept from one test to the next."""
    for name, value in (("_folder", None), ("_copies", False), ("_indices", {})):
        monkeypatch.setattr(shard_index, name, value)


def _samples(*, first=0, count=4, **members):
    """{name: content} of samples with an image and further members; `{}` in a content is the number of the sample."""
    found = {}
    for n in range(first, first + count):
        found[f"{n:06d}.png"] = PNGS[n]
        found |= {f"{n:06d}.{extension}": text.replace("{}", str(n)) for extension, text in members.items()}
    return found


def _tar(path, **options):
    return sources.webdataset(
        **{"path": str(path), "heldout_path": str(path), "split": "train", "image_size": SIZE, **options}
    )


def _parquet(path, **options):
    return sources.parquet(
        **{"path": str(path), "heldout_path": str(path), "split": "train", "image_size": SIZE, **options}
    )


def _pixels(source):
    return np.stack([source[i]["image"] for i in range(len(source))])


def _expected(count):
    return np.stack([np.asarray(Image.open(io.BytesIO(png))) for png in PNGS[:count]])


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
    write_tar(tmp_path / "0.tar", _samples(**members))
    found = _tar(tmp_path, fields={**sources.NO_FIELDS, **fields})
    assert found.class_names == class_names and labels_of(found) == labels and found.captions(1) == captions
    np.testing.assert_array_equal(_pixels(found), _expected(4))
    assert found.name(1) == f"{tmp_path}/0.tar:000001"


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
    for label, class_names, expected in cases:
        write_parquet(tmp_path / "0.parquet", rows(label), class_names=class_names)
        found = _parquet(tmp_path)
        assert found.class_names == expected and labels_of(found) == [0, 1, 2, 3] and found.captions(2) == ["no 2"]
        np.testing.assert_array_equal(_pixels(found), _expected(4))
    assert found.name(3) == f"{tmp_path}/0.parquet:row 3"


def test_columns_of_other_names(tmp_path):
    rows = [{"photo": PNGS[n], "kind": n % 2, "alt": ["a", f"b{n}"], "id": n} for n in range(4)]
    write_parquet(tmp_path / "0.parquet", rows)
    found = _parquet(tmp_path)  # the only column of bytes
    assert found.class_names == ("images",)
    found = _parquet(tmp_path, fields={"image": "photo", "label": "kind", "caption": "alt"})
    assert labels_of(found) == [0, 1, 0, 1] and found.captions(3) == ["a", "b3"]
    for field, column in (("image", "alt"), ("label", "photo"), ("caption", "nowhere")):
        with pytest.raises(UserError, match=f"config.data.fields.{field}='{column}' is no column of .* choose from"):
            _parquet(tmp_path, fields={**sources.NO_FIELDS, field: column})


@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_shards_by_folder_file_and_pattern(tmp_path, kind):
    names = [f"train-{n:03d}" for n in (8, 9, 10, 11)]
    for n, name in enumerate(names):
        if kind == "tar":
            write_tar(tmp_path / f"{name}.tar", _samples(first=2 * n, count=2, cls="{}"))
        else:
            rows = [{"image": {"bytes": PNGS[i], "path": None}, "label": i} for i in (2 * n, 2 * n + 1)]
            write_parquet(tmp_path / f"{name}.parquet", rows)
    (tmp_path / f"._x.{kind}").write_bytes(b"")
    source = {"tar": _tar, "parquet": _parquet}[kind]
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
            _tar(path)
    with pytest.raises(UserError, match="name a folder, a file or a pattern"):
        _tar(tmp_path / "nowhere")


def test_an_index_is_built_once_and_kept(tmp_path, monkeypatch):
    write_tar(tmp_path / "0.tar", _samples(cls="{}", txt="picture {}"))
    built, index = [], tar_shards.index
    monkeypatch.setattr(tar_shards, "index", lambda files, fields: built.append(1) or index(files, fields))
    shard_index.keep_in(tmp_path / "run" / "index", copies=True)

    def again(count):
        shard_index._indices.clear()
        found = _tar(tmp_path / "0.tar")
        assert labels_of(found) == [0, 1, 2, 3] and found.captions(3) == ["picture 3"] and len(built) == count
        np.testing.assert_array_equal(_pixels(found), _expected(4))

    again(1)
    again(1)
    (kept,) = (tmp_path / "run" / "index").iterdir()
    kept.write_bytes(kept.read_bytes()[:200])
    again(2)
    os.utime(tmp_path / "0.tar", (1, 1))
    again(3)


def test_the_images_of_parquet_files_are_copied_once(tmp_path):
    rows = [{"image": {"bytes": png, "path": None}, "label": n, "text": f"no {n}"} for n, png in enumerate(PNGS)]
    rows[5]["image"] = {"bytes": None, "path": "elsewhere.png"}
    write_parquet(tmp_path / "0.parquet", rows)
    direct = _parquet(tmp_path / "0.parquet")
    shard_index.keep_in(tmp_path / "run" / "index", copies=True)
    found = _parquet(tmp_path / "0.parquet")
    images, ends = sorted((tmp_path / "run" / "index").iterdir(), key=lambda path: path.suffix)[::-1][:2]
    assert {images.suffix, ends.suffix} == {".images", ".npy"}
    before = [os.stat(path).st_mtime_ns for path in (images, ends)]
    for source in (pickle.loads(pickle.dumps(found)), _parquet(tmp_path / "0.parquet"), direct):
        assert tuple(source.image_names()) == tuple(direct.image_names()) and source.captions(2) == ["no 2"]
        for i in (7, 0, 3):
            np.testing.assert_array_equal(source[i]["image"], _expected(8)[i])
        with pytest.raises(UserError, match="0.parquet:row 5 .its row holds no bytes of an image"):
            source[5]
    assert before == [os.stat(path).st_mtime_ns for path in (images, ends)]


def test_captions_and_labels_are_kept_in_packs(tmp_path):
    write_tar(tmp_path / "0.tar", _samples(count=3, cls="{}", json='{"caption": ["one", "zwei — {}"]}'))
    rows = [{"image": {"bytes": PNGS[n], "path": None}, "label": n, "caption": f"bär {n}"} for n in range(3)]
    form = {"image_size": SIZE, "crop": "centre", "encoding": "png", "quality": 95, "on_error": "stop"}
    form |= {"images_per_shard": 2, "num_workers": 1}
    cases = {"tar": (_tar(tmp_path / "0.tar"), lambda n: ["one", f"zwei — {n}"])}
    cases["parquet"] = (_parquet(write_parquet(tmp_path / "0.parquet", rows)), lambda n: [f"bär {n}"])
    for kind, (source, captions) in cases.items():
        pack.pack({"train": source}, tmp_path / kind, **form)
        packed = packed_images.PackedImages(path=tmp_path / kind, split="train", image_size=SIZE)
        assert [packed.captions(n) for n in range(3)] == [captions(n) for n in range(3)] and labels_of(packed) == [
            0,
            1,
            2,
        ]
        np.testing.assert_array_equal(_pixels(packed), _expected(3))


def _of_negative_size(data):
    member = tarfile.TarInfo("000009.png")
    member.size = -1024
    return data[:-10240] + member.tobuf(tarfile.GNU_FORMAT) + data[-10240:]


DAMAGE = {
    "negative size": (_of_negative_size, "has a negative size|not in order|damaged at byte"),
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
    write_tar(path, _samples(cls="{}"))
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(UserError, match=message) as refusal:
        _tar(path)
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
    found = _tar(tmp_path / "0.tar")
    assert labels_of(found) == [1, 0]
    np.testing.assert_array_equal(_pixels(found), _expected(2))


@pytest.mark.parametrize(
    "members, message",
    [
        ({"0.png": PNGS[0], "0.cls": "1", "1.png": PNGS[1]}, "0.tar:1 has no label in the field 'cls'"),
        ({"0.png": PNGS[0], "0.json": "[1"}, "0.tar:0.json is not a JSON object"),
        ({"0.png": PNGS[0], "0.json": json.dumps({"label": [1]})}, "has no label in the field 'json.label'"),
        ({"0.md": "x"}, "holds no images: put more"),
    ],
)
def test_samples_without_what_is_needed_are_named(tmp_path, members, message):
    write_tar(tmp_path / "0.tar", members)
    for split in ("train", "heldout"):
        with pytest.raises(UserError, match=message):
            _tar(tmp_path / "0.tar", split=split)


def test_parquet_files_without_what_is_needed(tmp_path):
    with pytest.raises(UserError, match="has no column of images"):
        _parquet(write_parquet(tmp_path / "0.parquet", [{"label": 1}]))
    rows = [{"image": PNGS[0], "label": 0}, {"image": PNGS[1], "label": None}]
    with pytest.raises(UserError, match="0.parquet:row 1 has no 'label': add it"):
        _parquet(write_parquet(tmp_path / "0.parquet", rows))
    (tmp_path / "1.parquet").write_bytes((tmp_path / "0.parquet").read_bytes()[:-9])
    with pytest.raises(UserError, match="1.parquet is not a whole parquet file .*: fetch it again"):
        _parquet(tmp_path / "1.parquet")


def test_a_label_outside_of_the_classes_is_named(tmp_path):
    write_tar(tmp_path / "0.tar", _samples(cls="{}"))
    found = _tar(tmp_path / "0.tar", num_classes=2)
    with pytest.raises(UserError, match="0.tar:000003 has label 3, outside of 0 to 1"):
        found[3]


def test_shards_of_a_test_set_with_labels_of_minus_one_are_unlabelled(tmp_path):
    write_tar(tmp_path / "train.tar", _samples(cls="{}"))
    write_tar(tmp_path / "test.tar", _samples(cls="-1"))
    found = _tar(tmp_path / "train.tar", heldout_path=str(tmp_path / "test.tar"), split="heldout")
    assert not found.labelled and found.class_names == ("0", "1", "2", "3")


def test_a_config_names_shards(tmp_path, tiny_config):
    write_tar(tmp_path / "0.tar", _samples(txt="{}", cls="k{}"))
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
        shards.files_at("/nowhere/{0..999999999}.tar", "--path", ".tar")
