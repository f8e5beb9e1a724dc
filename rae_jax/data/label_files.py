"""Lists of images, and files with the labels of images: text as editors and other programs write it."""

import csv
import io
import os
import tarfile
import zlib
from pathlib import Path

import numpy as np
import scipy.io
from scipy.io.matlab import MatReadError

from rae_jax.errors import UserError, one_line

GROUND_TRUTH, META = "ILSVRC2012_validation_ground_truth.txt", "meta.mat"  # in ImageNet's development kit
KAGGLE = "LOC_val_solution.csv"
MOST_CLASSES = 10**6  # of labels that are numbers
_SHOWN = 80  # characters of a wrong line in a message


def lines(data):
    """Yield (number from 1, line) of the lines of a text, bytes, that are not blank.

    The text is UTF-8 or UTF-16, with or without a byte order mark, with line ends of any system. Raises ValueError for
    other data.
    """
    text = data.decode("utf-16" if data.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig")
    if "\0" in text:
        raise ValueError("it is not text")
    for number, line in enumerate(text.replace("\r\n", "\n").replace("\r", "\n").split("\n"), 1):
        if line := line.strip():
            yield number, line


def read_list(path, num_classes):
    """Return (names, labels) of a text file with a line `IMAGE LABEL` for each image.

    Raises UserError for a line of another form, and for a label from `num_classes` on, unless it is None. Raises
    ValueError for a file that is not a text.
    """
    names, labels, most = [], [], num_classes or MOST_CLASSES
    for number, line in lines(Path(path).read_bytes()):
        name, label = _name_and_label(line)
        if not name or not label.isdecimal():
            raise UserError(
                f"{path}, line {number}: {line[:_SHOWN]!r} is not `IMAGE LABEL` with a label from 0: correct it"
            )
        if int(label) >= most:
            raise UserError(f"{path}, line {number}: label {label} is outside of 0 to {most - 1}: correct it")
        names.append(name)
        labels.append(int(label))
    return names, labels


def labels_of(path, names, class_names, given):
    """Return the labels, int32 [N], of the images `names` from a file of labels.

    The file is ImageNet's development kit (its folder, its .tar.gz, or the ground truth next to meta.mat), Kaggle's
    LOC_val_solution.csv (or a folder that holds it), or a text or .csv file with `IMAGE CLASS` in each line, CLASS a
    name or a number. `given`: the key and the value that name the file, for messages. Raises UserError for an image
    without a label or with two, and for an unknown class.

    IMAGE may lack folder and suffix, if it then still names one image.
    """
    numbers = {**{str(i): i for i in range(len(class_names))}, **{name: i for i, name in enumerate(class_names)}}
    try:
        found = _read(Path(os.path.expanduser(path)), names, numbers)
    except _DAMAGED as error:
        raise UserError(
            f"{given} cannot be read ({one_line(error, longest=200)}): name ImageNet's development kit, {KAGGLE}, or a "
            f"text file with a line `IMAGE CLASS` for each image"
        ) from error
    whole, stems = {}, {}
    for image, label in found:
        whole.setdefault(_plain(image), set()).add(label)
        stems.setdefault(_stem(image), set()).add(label)
    labels = np.empty(len(names), np.int32)
    for i, name in enumerate(names):
        candidates = whole.get(_plain(name)) or stems.get(_stem(name), ())
        if len(candidates) != 1:
            problem = f"gives {name} several labels: correct it" if candidates else f"has no label of {name}: add it"
            raise UserError(f"{given} {problem}, or leave the labels out")
        (label,) = candidates
        if label not in numbers:
            raise UserError(
                f"{given} gives {name} the class {label!r}, which the training images do not have: correct it, or "
                f"leave the labels out"
            )
        labels[i] = numbers[label]
    return labels


# The errors of readers of damaged text, tar and .mat files.
_DAMAGED = (OSError, ValueError, LookupError, TypeError, AttributeError, EOFError, zlib.error)
_DAMAGED += (tarfile.TarError, csv.Error, MatReadError)


def _read(path, names, known):
    """Return [(image, class)]; `known`: the names of classes."""
    if path.is_dir():
        inside = [path / KAGGLE, *path.glob(f"**/{GROUND_TRUTH}")]
        path = next((file for file in inside if file.is_file()), path / KAGGLE)
    if path.name.endswith((".tar.gz", ".tgz", ".tar")):
        with tarfile.open(path) as kit:
            members = {Path(member.name).name: member for member in kit if member.isfile()}
            truth, meta = (kit.extractfile(members[name]).read() for name in (GROUND_TRUTH, META))
        return _of_development_kit(truth, meta, names)
    data = path.read_bytes()
    if path.name == GROUND_TRUTH:
        return _of_development_kit(data, (path.parent / META).read_bytes(), names)
    if path.suffix.lower() == ".csv":
        rows = [row for row in csv.reader(line for _, line in lines(data)) if len(row) > 1 and row[1].strip()]
        # Kaggle's second field also holds boxes.
        return [(row[0], row[1].strip() if row[1].strip() in known else row[1].split()[0]) for row in rows]
    found = [_image_and_class(line, known) for _, line in lines(data)]
    for number, (image, _) in enumerate(found, 1):
        if not image:
            raise ValueError(f"entry {number} is not `IMAGE CLASS`")
    return found


def _image_and_class(line, known):
    """Return (image, class) of a line; both may hold spaces if a tab is between them, or if the class is known."""
    if "\t" in line:
        image, _, label = line.rpartition("\t")
        return image.strip(), label.strip()
    spaces = (place for place, character in enumerate(line) if character == " ")
    place = next((place for place in spaces if line[place + 1 :] in known), None)
    return _name_and_label(line) if place is None else (line[:place].strip(), line[place + 1 :])


def _of_development_kit(truth, meta, names):
    """Return [(image, class)] of ImageNet's validation images: line n of `truth` is the number in `meta` of image n."""
    synsets = scipy.io.loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"]
    classes = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in np.atleast_1d(synsets)}
    numbers = [int(line) for _, line in lines(truth)]
    if len(numbers) != len(names):
        raise ValueError(f"it has labels of {len(numbers)} images, and there are {len(names)}")
    return [(name, classes[number]) for name, number in zip(sorted(names), numbers, strict=True)]


def _name_and_label(line):
    name, *label = line.rsplit(None, 1)
    return (name, label[0]) if label else ("", name)


def _plain(name):
    """Return the name of an image with '/' and without './' or '/' in front."""
    return name.replace("\\", "/").removeprefix("./").lstrip("/")


def _stem(name):
    """Return the name of an image without folder and suffix."""
    name = _plain(name).rpartition("/")[2]
    stem, dot, suffix = name.rpartition(".")
    return stem if dot and suffix.isalpha() else name
