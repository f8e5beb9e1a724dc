"""The class of each image of a tree of folders, on disk or in an archive, as torchvision's ImageFolder has it."""

import re

import numpy as np

from rae_jax.errors import UserError
from rae_jax.runtime import logs

ONE_CLASS = ("images",)  # the name of the class of images without class folders
_TRAIN, _OTHERS = r"train(?:ing)?", r"val(?:id(?:ation)?)?|test(?:ing)?|eval(?:uation)?|dev|held[-_]?out"
_SPLIT = re.compile(rf"(?:.*[-_.])?(?:(?P<train>{_TRAIN})|{_OTHERS})(?:[-_.]?\d.*)?", re.IGNORECASE)


def is_hidden(name):
    """Return whether a file or folder is hidden, or was added to an archive by macOS."""
    return name.startswith(".") or name == "__MACOSX"


def arrange(names, folders, given):
    """Return (names, labels int32, class names) of a tree of images, in the order of `names`.

    `names`: names of images, CLASS/.../IMAGE with '/', or IMAGE if no image is in a folder: these are one class.
    `folders`: names of all class folders. Images outside of class folders are left out, and class folders without
    images are classes: both are reported. `given`: the key and the value that name the tree, for messages.
    """
    classes = [name.partition("/")[0] if "/" in name else None for name in names]
    filled = {name for name in classes if name is not None}
    if not filled:
        return names, np.zeros(len(names), np.int32), ONE_CLASS
    inside = [name for name in names if "/" in name]
    if len(inside) < len(names):
        logs.say(f"{given}: {len(names) - len(inside)} images outside of its class folders are left out")
    if len(filled) == 1 and len({name.split("/")[1] for name in inside if name.count("/") > 1}) > 1:
        (outer,) = filled
        logs.say(f"{given}: all images are in {outer!r}; if the folders inside are the classes, name this folder")
    class_names = tuple(sorted(filled.union(folders)))
    empty = [name for name in class_names if name not in filled]
    if empty:
        first = ", ".join(map(repr, empty[:3]))
        logs.say(f"{given}: class folders without images count as classes: {first} ({len(empty)} in all)")
    numbers = {name: number for number, name in enumerate(class_names)}
    labels = np.array([numbers[name] for name in classes if name is not None], np.int32)
    return inside, labels, class_names


def splits(names):
    """Return the names if they are the names of splits, such as train and val, and not of classes; otherwise None."""
    found = [_SPLIT.fullmatch(name) for name in names]
    if not found or not all(found) or len({match["train"] is None for match in found}) < 2:
        return None
    return sorted(names, key=lambda name: (_SPLIT.fullmatch(name)["train"] is None, name))


def refuse_splits(names, given, fix):
    """Raise UserError if names of class folders, or of shards, are names of splits. `fix`: what to do about it."""
    found = splits(names)
    if found:
        raise UserError(f"{given} holds the splits {' and '.join(map(repr, found))}, not classes: {fix(*found[:2])}")
