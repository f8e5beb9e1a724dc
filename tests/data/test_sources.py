"""Folders, zip archives and lists of images: files as other programs write them."""

import io
import os
import zipfile

import numpy as np
import pytest
from PIL import Image

from rae_jax.data import decode, sources
from rae_jax.errors import UserError

SIZE = 16


def _zip(path, entries):
    file = io.BytesIO()
    Image.new("RGB", (20, 20), "red").save(file, "PNG")
    with zipfile.ZipFile(path, "w") as archive:
        for entry in entries:
            archive.writestr(entry, file.getvalue())
    return str(path)


def _open(path, **options):
    return sources.image_folder(path=path, heldout_path=path, split="train", image_size=SIZE, **options)


def test_archives_are_read_in_place(tmp_path):
    found = _open(_zip(tmp_path / "a.zip", ["train/cat/1.png", "train/ant/2.png", "train/ant/3.png", "train/read.me"]))
    assert found.class_names == ("ant", "cat") and len(found) == 3
    assert [int(found[i]["label"]) for i in range(3)] == [0, 0, 1] and found[2]["image"].shape == (SIZE, SIZE, 3)
    assert list(tmp_path.iterdir()) == [tmp_path / "a.zip"]
    data = bytearray((tmp_path / "a.zip").read_bytes())
    data[60:70] = bytes(10)
    (tmp_path / "a.zip").write_bytes(data)
    with pytest.raises(UserError, match="a.zip:train/cat/1.png"):
        _open(str(tmp_path / "a.zip"))[2]


@pytest.mark.parametrize("entry", ["../cat/1.png", "/cat/1.png", "cat/../../1.png", "cat\\..\\..\\1.png"])
def test_archives_that_climb_out_are_refused(tmp_path, entry):
    with pytest.raises(UserError, match="is outside of the archive"):
        _open(_zip(tmp_path / "a.zip", ["cat/2.png", entry]))


def test_lists_name_images_and_labels(tmp_path):
    for name in ("ant/001.png", "cat/000.png"):
        (tmp_path / "images" / name).parent.mkdir(parents=True)
        Image.new("RGB", (20, 20), "red").save(tmp_path / "images" / name)
    (tmp_path / "list.txt").write_text("images/cat/000.png 2\nimages/ant/001.png 0\n")
    found = _open(str(tmp_path / "list.txt"), num_classes=3)
    assert [int(found[i]["label"]) for i in range(2)] == [2, 0] and found.class_names == ("0", "1", "2")
    with pytest.raises(UserError, match="list.txt, line 1: label 2 is outside of 0 to 1"):
        _open(str(tmp_path / "list.txt"), num_classes=2)
    (tmp_path / "list.txt").write_text("images/cat/000.png\n")
    with pytest.raises(UserError, match="list.txt, line 1"):
        _open(str(tmp_path / "list.txt"))


def test_the_orientation_is_not_followed_and_the_extension_not_believed(tmp_path):
    pixels = np.zeros((20, 30, 3), np.uint8)
    pixels[:10] = 255
    image = Image.fromarray(pixels)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees
    image.save(tmp_path / "turned.jpg", exif=exif, quality=95)
    image.save(tmp_path / "liar.png", "JPEG", quality=95)
    for name in ("turned.jpg", "liar.png"):
        found = decode.read_image(tmp_path / name, SIZE).astype(int)
        assert found[:6].mean() > 250 and found[-6:].mean() < 5, name


def test_a_path_is_listed_once_until_it_changes(tmp_path, monkeypatch):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for i in range(3):
            Image.new("RGB", (8, 8)).save(tmp_path / name / f"{i}.png")
    listed, scandir = [], os.scandir

    def counted(path):
        listed.append(os.path.basename(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", counted)
    how = {"path": str(tmp_path), "heldout_path": "", "image_size": SIZE}
    counts = [len(sources.image_folder(split=split, **how)) for split in ("train", "heldout", "train")]
    assert counts == [5, 1, 5] and (listed.count("a"), listed.count("b")) == (1, 1)
    Image.new("RGB", (8, 8)).save(tmp_path / "b" / "3.png")
    assert len(sources.image_folder(split="train", **how)) == 6


def test_the_names_of_images_do_not_depend_on_the_place(tmp_path, monkeypatch):
    found = []
    for place in ("one", "two/three"):
        (tmp_path / place / "cat").mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / place / "cat" / "x.png")
        (tmp_path / place / "list.txt").write_text("cat/x.png 0\n")
        monkeypatch.setenv("HOME", str(tmp_path / place))
        for path in (str(tmp_path / place), "~", str(tmp_path / place / "list.txt"), "~/list.txt"):
            found.append(tuple(_open(path).image_names()))
    assert set(found) == {(("/cat/x.png", 0),)}
