"""Folders, archives and lists of images as people bring them: taken as they are meant, or refused in one line."""

import os

import pytest
from brought_cases import SIZE, bring, labels_of, open_images, png, refusal_of

from rae_jax.build import data as build_data
from rae_jax.data import decode, listing
from rae_jax.errors import UserError

KINDS = ("folder", "zip")


@pytest.mark.parametrize("kind", KINDS)
def test_a_flat_folder_is_one_class(tmp_path, kind):
    path = bring(tmp_path, kind, [f"{n:02d}.png" for n in range(40)])
    found = open_images(path, heldout_path="", num_classes=1)
    assert found.class_names == ("images",) and len(found) == 38 and set(labels_of(found)) == {0}
    assert len(open_images(path, heldout_path="", split="heldout")) == 2


@pytest.mark.parametrize("kind", KINDS)
def test_images_at_any_depth_belong_to_their_class_folder(tmp_path, kind):
    found = open_images(bring(tmp_path, kind, ["ant/a/1.png", "ant/2.png", "cat/b/c/3.png", "cat/b/4.png"]))
    assert found.class_names == ("ant", "cat") and sorted(labels_of(found)) == [0, 0, 1, 1]


def test_a_folder_around_the_class_folders_is_one_class_and_said(tmp_path, capfd):
    found = open_images(bring(tmp_path, "folder", ["test/ant/1.png", "test/cat/2.png"]))
    assert found.class_names == ("test",)
    assert "all images are in 'test'; if the folders inside are the classes, name this folder" in capfd.readouterr().err


@pytest.mark.parametrize("kind", KINDS)
def test_hidden_files_and_folders_are_left_out(tmp_path, kind):
    names = [
        "ant/1.png",
        "ant/._1.png",
        "cat/2.png",
        "cat/.x/3.png",
        ".ipynb_checkpoints/4.png",
        "__MACOSX/ant/._1.png",
    ]
    path = bring(tmp_path, kind, names, folders=(".empty",))
    found = open_images(path)
    assert found.class_names == ("ant", "cat") and labels_of(found) == [0, 1]
    if kind == "folder":
        assert [file.name for file in decode.find_images(path)] == ["1.png", "2.png"]


@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_class_folder_is_counted_and_said(tmp_path, kind, capfd):
    found = open_images(bring(tmp_path, kind, ["ant/1.png", "cat/2.png"], folders=("bee",)))
    assert found.class_names == ("ant", "bee", "cat") and labels_of(found) == [0, 2]
    said = capfd.readouterr().err
    assert "class folders without images count as classes: 'bee' (1 in all)" in said and said.count("\n") == 1


@pytest.mark.parametrize("kind", KINDS)
def test_images_outside_of_class_folders_are_left_out_and_said(tmp_path, kind, capfd):
    found = open_images(bring(tmp_path, kind, ["ant/1.png", "cat/2.png", "preview.png"]))
    assert (
        labels_of(found) == [0, 1]
        and "images outside of its class folders are left out (1 in all)" in capfd.readouterr().err
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("splits", [("train", "val"), ("Training", "test"), ("train2017", "val2017"), ("train", "dev")])
def test_a_folder_of_splits_is_refused(tmp_path, kind, splits):
    names = [f"{split}/{name}" for split in splits for name in ("ant/1.png", "cat/2.png")]
    message = refusal_of(bring(tmp_path, kind, [*names, "annotations/1.xml"]), num_classes=2)
    assert f"holds the splits {splits[0]!r} and {splits[1]!r}, not classes: " in message
    if kind == "folder":
        paths = [tmp_path / "images" / split for split in splits]
        assert f"set config.data.path={paths[0]} and config.data.heldout_path={paths[1]}" in message
    else:
        assert "put each into an archive of its own" in message


@pytest.mark.parametrize("names", [("train", "car"), ("express_train", "mail_train"), ("train",), ("test", "val")])
def test_classes_that_are_called_like_a_split_are_classes(tmp_path, names):
    found = open_images(bring(tmp_path, "folder", [f"{name}/1.png" for name in names]))
    assert found.class_names == tuple(sorted(names))


def test_an_archive_of_windows_is_read_as_folders(tmp_path):
    found = open_images(bring(tmp_path, "zip", ["data\\cat\\1.png", "data\\ant\\2.png", "data\\ant\\deep\\3.png"]))
    assert found.class_names == ("ant", "cat") and labels_of(found) == [0, 0, 1]


def test_an_archive_of_one_class_with_folders(tmp_path):
    path = bring(tmp_path, "zip", ["cat/a/1.png", "cat/b/2.png"])
    assert open_images(path, num_classes=1).class_names == ("cat",)
    assert open_images(path, num_classes=2).class_names == ("a", "b")  # a folder around the class folders


def test_links_to_folders_are_followed_and_loops_end(tmp_path):
    path = bring(tmp_path, "folder", ["ant/1.png"])
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "2.png").write_bytes(png(2))
    os.symlink(tmp_path / "elsewhere", f"{path}/cat")
    os.symlink(path, f"{path}/cat/again")
    found = open_images(path)
    assert found.class_names == ("ant", "cat") and len(found) == 2
    (tmp_path / "images" / "ant" / "deep").mkdir()
    (tmp_path / "images" / "ant" / "deep" / "3.png").write_bytes(png(3))
    assert len(open_images(path)) == 3


ENCODINGS = {
    "plain": lambda text: text.encode(),
    "byte order mark": lambda text: text.encode("utf-8-sig"),
    "windows": lambda text: text.replace("\n", "\r\n").encode("utf-8-sig") + b"\r\n\r\n",
    "utf-16": lambda text: text.replace("\n", "\r\n").encode("utf-16"),
    "blank lines": lambda text: b"\n \n" + text.replace("\n", "\n\n").encode() + b"\n",
    "tabs": lambda text: text.replace(" 0", "\t0").replace(" 1", "\t1").encode(),
    "backslashes": lambda text: text.replace("/", "\\").encode(),
    "old mac": lambda text: text.replace("\n", "\r").encode(),
}


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_lists_of_other_editors_are_read(tmp_path, encoding):
    bring(tmp_path, "folder", ["bär/1 a.png", "cat/2.png"])
    text = "images/bär/1 a.png 0\nimages/cat/2.png 1\n"
    (tmp_path / "list.txt").write_bytes(ENCODINGS[encoding](text))
    found = open_images(str(tmp_path / "list.txt"), num_classes=2)
    assert labels_of(found) == [0, 1] and found.name(0) == str(tmp_path / "images/bär/1 a.png")


def test_a_list_that_names_missing_files_is_refused_at_the_start(tmp_path, capfd):
    bring(tmp_path, "folder", [f"{n}.png" for n in range(20)])
    lines = [f"images/{n}.png 0\n" for n in range(24)]
    (tmp_path / "list.txt").write_text("".join(lines))
    message = refusal_of(str(tmp_path / "list.txt"), num_classes=1)
    first = ", ".join(str(tmp_path / "images" / f"{n}.png") for n in (20, 21, 22))
    assert f"4 of 24 files that were looked for do not exist: {first}; correct the list, or" in message
    assert len(open_images(str(tmp_path / "list.txt"), num_classes=1, on_error="skip")) == 24
    assert "4 of 24 files that were looked for do not exist" in capfd.readouterr().err


def test_the_look_at_the_files_of_a_list_is_bounded_in_time(tmp_path, monkeypatch):
    bring(tmp_path, "folder", ["1.png"])
    (tmp_path / "list.txt").write_text("images/1.png 0\n" * 50_000)
    monkeypatch.setattr(listing, "LOOK_SECONDS", 0.0)
    looked, exists = [], os.path.exists
    monkeypatch.setattr(os.path, "exists", lambda path: looked.append(path) or exists(path))
    open_images(str(tmp_path / "list.txt"), num_classes=1)
    assert len([path for path in looked if path.endswith("1.png")]) == 1


def test_classes_of_one_set_and_folders_of_the_other(tmp_path):
    """Unconditional training images in one folder, held-out images in class folders: all are one class."""
    flat = bring(tmp_path / "a", "folder", [f"{n}.png" for n in range(4)])
    classes = bring(tmp_path / "b", "zip", ["ant/1.png", "cat/2.png"])
    found = open_images(flat, heldout_path=classes, split="heldout")
    assert found.class_names == ("images",) and labels_of(found) == [0, 0]
    other = bring(tmp_path / "c", "folder", ["ant/1.png", "dog/2.png"])
    assert "'cat' is in only one" in refusal_of(classes, heldout_path=other, split="heldout")


def test_held_out_images_can_be_read_without_the_training_images(tmp_path):
    path = bring(tmp_path, "folder", ["ant/1.png", "cat/2.png"])
    found = open_images(str(tmp_path / "nowhere"), heldout_path=path, split="heldout")
    assert found.class_names == ("ant", "cat") and labels_of(found) == [0, 1]


def test_the_number_of_classes_is_said_with_their_names(tmp_path, tiny_config):
    path = bring(tmp_path, "folder", [f"{c}/1.png" for c in ("ant", "bee", "cat", "dog")])
    tiny_config.data.update({"source": "image_folder", "path": path, "heldout_path": path, "image_size": SIZE})
    with pytest.raises(UserError, match=r"has 4 classes \(ant, bee, cat, ...\), set --config.data.num_classes=4"):
        build_data.source(tiny_config, "train")


@pytest.mark.parametrize("suffix, source", [(".tar", "webdataset"), (".parquet", "parquet")])
def test_shards_as_an_image_folder_name_their_source(tmp_path, suffix, source):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / f"0{suffix}").write_bytes(b"\xff\x00")
    for path in (tmp_path / "images", tmp_path / "images" / f"0{suffix}"):
        assert f"for its {suffix} files set source={source!r}" in refusal_of(str(path))


@pytest.mark.parametrize(
    "names, refused",
    [
        (("training_set", "test_set"), True),
        (("seg_train", "seg_test", "seg_pred"), True),
        (("train", "val", "extra"), True),
        (("trainA", "trainB", "testA", "testB"), True),
        (("bullet_train", "crash_test"), False),
        (("constraint", "latest"), False),
    ],
)
def test_words_of_splits_in_names(tmp_path, names, refused):
    path = bring(tmp_path, "folder", [f"{name}/1.png" for name in names])
    if refused:
        assert "holds the splits" in refusal_of(path)
    else:
        assert open_images(path).class_names == tuple(sorted(names))


@pytest.mark.parametrize("kind", KINDS)
def test_splits_one_folder_deeper_are_refused(tmp_path, kind):
    names = [f"ILSVRC/{split}/{name}" for split in ("train", "val") for name in ("ant/1.png", "cat/2.png")]
    assert "holds the splits" in refusal_of(bring(tmp_path, kind, [*names, "ILSVRC/logo.png"]), num_classes=2)


def test_digits_as_names_of_class_folders_are_names(tmp_path):
    train = bring(tmp_path / "a", "folder", ["0/1.png", "1/2.png"])
    other = bring(tmp_path / "b", "folder", ["ant/1.png", "bee/2.png"])
    assert "has other classes than" in refusal_of(train, heldout_path=other, split="heldout")
    (tmp_path / "list.txt").write_text(f"{train}/1/2.png 1\n")
    found = open_images(train, heldout_path=str(tmp_path / "list.txt"), split="heldout")
    assert found.class_names == ("0", "1") and labels_of(found) == [1]


def test_flat_held_out_images_may_be_in_one_folder(tmp_path):
    train = bring(tmp_path / "a", "folder", ["ant/1.png", "bee/2.png"])
    for kind in KINDS:
        found = open_images(train, heldout_path=bring(tmp_path / f"b{kind}", kind, ["val/1.png"]), split="heldout")
        assert not found.labelled and found.class_names == ("ant", "bee")


def test_names_in_a_list_of_the_current_folder_stay_what_they_were(tmp_path, monkeypatch):
    """The record of a run depends on them."""
    bring(tmp_path, "folder", ["cat/1.png"])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "list.txt").write_text("images/cat/1.png 0\n")
    for path in ("list.txt", "./list.txt"):
        assert tuple(open_images(path).image_names()) == (("images/cat/1.png", 0),)
    monkeypatch.chdir(tmp_path / "images")
    assert tuple(open_images(".").image_names()) == (("cat/1.png", 0),)


def test_a_backslash_that_is_part_of_a_name_and_a_link_to_itself(tmp_path):
    path = bring(tmp_path, "folder", ["cat\\1.png", "cat/2.png"])
    os.symlink("again", f"{path}/cat/again")
    (tmp_path / "list.txt").write_text("images/cat\\1.png 0\n")
    assert open_images(str(tmp_path / "list.txt")).name(0) == f"{path}/cat\\1.png"
    assert len(open_images(path)) == 1


@pytest.mark.parametrize(
    "text, message", [("", "put a line `IMAGE LABEL`"), ("images/1.png 0\n", "holds a single image")]
)
def test_too_few_images_are_said(tmp_path, text, message):
    bring(tmp_path, "folder", ["1.png"])
    (tmp_path / "list.txt").write_text(text)
    assert message in refusal_of(str(tmp_path / "list.txt"), heldout_path="")


@pytest.mark.parametrize("label", [10**6, 10**12])
def test_ids_in_the_place_of_labels_are_refused(tmp_path, label):
    """Packing does not know the number of classes."""
    (tmp_path / "list.txt").write_text(f"1.png {label}\n")
    assert f"line 1: label {label} is outside of 0 to 999999: correct it" in refusal_of(str(tmp_path / "list.txt"))
