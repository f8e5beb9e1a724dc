"""Labels of validation images in one folder, as ImageNet and others distribute them."""

import tarfile

import numpy as np
import pytest
import scipy.io
from brought_cases import SIZE, bring, labels_of, open_images, png, refusal_of

from rae_jax.data import pack, packed_images, pipeline


def _imagenet(tmp_path, count=6):
    """Training folders of three classes, and flat validation images."""
    train = bring(tmp_path, "folder", [f"n0{c}/{n}.png" for c in (3, 1, 2) for n in range(3)])
    (tmp_path / "val").mkdir()
    for n in range(1, count + 1):
        (tmp_path / "val" / f"ILSVRC2012_val_{n:08d}.png").write_bytes(png(100 + n))
    return train, str(tmp_path / "val")


TRUTH = [2, 0, 1, 1, 2, 0]  # of the six validation images, as numbers of the sorted folders


def _development_kit(folder):
    """The ground truth of ImageNet: numbers in an order of their own, with internal nodes of the tree behind them."""
    folder.mkdir()
    kinds = [("ILSVRC2012_ID", "f8"), ("WNID", "O"), ("words", "O"), ("num_children", "f8")]
    rows = [(1, "n02", "b", 0), (2, "n03", "c", 0), (3, "n01", "a", 0), (4, "n09", "thing", 3)]
    scipy.io.savemat(folder / "meta.mat", {"synsets": np.array(rows, kinds)})
    numbers = {"n02": 1, "n03": 2, "n01": 3}
    text = "".join(f"{numbers[f'n0{label + 1}']}\n" for label in TRUTH)
    (folder / "ILSVRC2012_validation_ground_truth.txt").write_text(text)
    return folder


def _tar_of_the_kit(folder):
    _development_kit(folder / "data")
    with tarfile.open(folder / "ILSVRC2012_devkit_t12.tar.gz", "w:gz") as archive:
        archive.add(folder / "data", "ILSVRC2012_devkit_t12/data")
    return folder / "ILSVRC2012_devkit_t12.tar.gz"


def _kaggle(folder):
    rows = [f"ILSVRC2012_val_{n:08d},n0{label + 1} 1 2 3 4 n07 5 6 7 8" for n, label in enumerate(TRUTH, 1)]
    (folder / "LOC_val_solution.csv").write_text(
        "\r\n".join(["ImageId,PredictionString", *reversed(rows)]), "utf-8-sig"
    )
    return folder / "LOC_val_solution.csv"


def _plain(folder):
    rows = [f"val/ILSVRC2012_val_{n:08d}.png n0{label + 1}" for n, label in enumerate(TRUTH, 1)]
    (folder / "labels.txt").write_bytes("\r\n".join([*rows, ""]).encode("utf-16"))
    return folder / "labels.txt"


def _numbers(folder):
    rows = [f"ILSVRC2012_val_{n:08d}.png {label}" for n, label in enumerate(TRUTH, 1)]
    (folder / "numbers.txt").write_text("\n".join(rows))
    return folder / "numbers.txt"


LABEL_FILES = {
    "development kit": lambda folder: _development_kit(folder / "data"),
    "its parent": lambda folder: _development_kit(folder / "data").parent,
    "ground truth": lambda folder: _development_kit(folder / "data") / "ILSVRC2012_validation_ground_truth.txt",
    "its archive": _tar_of_the_kit,
    "kaggle": _kaggle,
    "names": _plain,
    "numbers": _numbers,
}


@pytest.mark.parametrize("kind", LABEL_FILES)
def test_flat_validation_images_have_the_labels_of_a_file(tmp_path, kind):
    train, val = _imagenet(tmp_path)
    labels = str(LABEL_FILES[kind](tmp_path))
    found = open_images(train, heldout_path=val, split="heldout", heldout_labels=labels)
    assert labels_of(found) == TRUTH and found.class_names == ("n01", "n02", "n03") and found.labelled
    parts = {s: open_images(train, heldout_path=val, split=s, heldout_labels=labels) for s in ("train", "heldout")}
    assert len(parts["train"]) == 9


def test_wrong_files_of_labels_are_refused(tmp_path):
    train, val = _imagenet(tmp_path, count=7)

    def refusal(path):
        return refusal_of(train, heldout_path=val, split="heldout", heldout_labels=str(path))

    assert "it has labels of 6 images, and there are 7" in refusal(_development_kit(tmp_path / "data"))
    assert "has no label of ILSVRC2012_val_00000007.png: add it" in refusal(_plain(tmp_path)).replace(
        "/ILSVRC", "ILSVRC"
    )
    assert "cannot be read" in refusal(tmp_path / "nowhere")
    (tmp_path / "labels.txt").write_text("".join(f"ILSVRC2012_val_{n:08d} n77\n" for n in range(1, 8)))
    assert "the class 'n77', which the training images do not have" in refusal(tmp_path / "labels.txt")
    message = refusal_of(train, heldout_path="", heldout_labels="labels.txt")
    assert (
        message == "config.data.heldout_labels='labels.txt' needs config.data.heldout_path: set it to the images with "
        "these labels"
    )


def test_flat_validation_images_without_labels(tmp_path):
    train, val = _imagenet(tmp_path)
    found = open_images(train, heldout_path=val, split="heldout")
    assert not found.labelled and found.class_names == ("n01", "n02", "n03") and found[0].keys() == {"image"}
    batch = next(iter(pipeline.one_pass(found, batch_size=4, num_threads=0)))
    assert batch.keys() == {"image", "mask"}
    parts = {"train": open_images(train, heldout_path=val), "heldout": found}
    form = {"image_size": SIZE, "crop": "centre", "encoding": "png", "quality": 95, "on_error": "stop"}
    pack.pack(parts, tmp_path / "packed", **form, images_per_shard=5, num_workers=1)
    for split, source in parts.items():
        packed = packed_images.PackedImages(path=tmp_path / "packed", split=split, image_size=SIZE)
        assert packed.labelled == (split == "train")
        for i in range(len(source)):
            assert packed[i].keys() == source[i].keys()
            np.testing.assert_array_equal(packed[i]["image"], source[i]["image"])


def _two_folders(tmp_path):
    train = bring(tmp_path / "a", "folder", ["golden retriever/1.png", "tabby/2.png"])
    return train, bring(tmp_path / "b", "folder", ["x/a.png", "y/a.png", "y/b.png"])


@pytest.mark.parametrize(
    "name, text",
    [
        ("labels.txt", "x/a.png golden retriever\ny/a.png tabby\nb 1\n"),
        ("labels.txt", "x/a.png\tgolden retriever\ny/a.png\ttabby\ny/b\t1\n"),
        ("labels.csv", "file,class\nx/a.png,golden retriever\ny/a.png,tabby\nb.png,1\n"),
    ],
)
def test_classes_with_spaces_and_images_of_one_name(tmp_path, name, text):
    train, val = _two_folders(tmp_path)
    (tmp_path / name).write_text(text)
    found = open_images(train, heldout_path=val, split="heldout", heldout_labels=str(tmp_path / name))
    assert labels_of(found) == [0, 1, 1]


def test_labels_of_two_images_of_one_name_are_refused(tmp_path):
    train, val = _two_folders(tmp_path)
    (tmp_path / "labels.txt").write_text("a.png tabby\na.jpg golden retriever\nb 1\n")
    message = refusal_of(train, heldout_path=val, split="heldout", heldout_labels=str(tmp_path / "labels.txt"))
    assert "gives /x/a.png several labels: correct it" in message


@pytest.mark.parametrize("damage", ["truth", "meta", "archive"])
def test_damaged_development_kits_are_one_line(tmp_path, damage):
    train, val = _imagenet(tmp_path)
    path = _tar_of_the_kit(tmp_path)
    if damage == "archive":
        path.write_bytes(path.read_bytes()[:200])
    else:
        path = tmp_path / "data"
        name = {"truth": "ILSVRC2012_validation_ground_truth.txt", "meta": "meta.mat"}[damage]
        (path / name).write_bytes((path / name).read_bytes()[:9])
    assert "cannot be read" in refusal_of(train, heldout_path=val, split="heldout", heldout_labels=str(path))
