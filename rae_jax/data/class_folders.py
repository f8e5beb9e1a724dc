"""The class of each image of a tree of folders, on disk or in an archive, as torchvision's ImageFolder has it."""

import re

import numpy as np

from rae_jax.errors import UserError
from rae_jax.runtime import logs

ONE_CLASS = ("images",)  # the name of the class of images without class folders
_WORDS = r"(?P<train>train(?:ing)?)|val(?:id(?:ation)?)?|test(?:ing)?|eval(?:uation)?|dev|held[-_]?out"
_SPLIT = re.compile(rf"(?<![a-zA-Z])(?i:{_WORDS})(?![a-z])")


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
        logs.say(f"{given}: images outside of its class folders are left out ({len(names) - len(inside)} in all)")
    if len(filled) == 1 and len(_second_folders(inside)) > 1:
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


def refuse_splits_of_tree(names, given, fix):
    """Raise UserError if the class folders of images `names` are splits, or the folders in their only folder.

    `fix(train, other)`: what to do about the two folders.
    """
    tops = {name.partition("/")[0] for name in names if "/" in name}
    refuse_splits(tops, given, fix)
    if len(tops) == 1:
        (outer,) = tops
        inside = _second_folders(names)
        refuse_splits(inside, given, lambda *both: fix(*(f"{outer}/{name}" for name in both)))


def refuse_splits(names, given, fix):
    """Raise UserError if two names are those of a training and of another split, such as train and val.

    They are, if they are equal but for the word of the split and for numbers. `fix(train, other)`: what to do.
    """
    trains, others = {}, {}
    for name in sorted(names):
        if match := _SPLIT.search(name):
            rest = re.sub(r"\d+", "", name[: match.start()] + "/" + name[match.end() :])
            (others if match["train"] is None else trains).setdefault(rest, name)
    for rest, train in trains.items():
        if rest in others:
            both = train, others[rest]
            raise UserError(f"{given} holds the splits {both[0]!r} and {both[1]!r}, not classes: {fix(*both)}")


def pattern_of_split(name):
    """Return the pattern of the names of a split's shards, from one of them: numbers after the split's word are '*'."""
    end = _SPLIT.search(name).end()
    return name[:end] + re.sub(r"\d+", "*", name[end:])


def _second_folders(names):
    """Return the names of the folders in the folders at the top."""
    return {name.split("/")[1] for name in names if name.count("/") > 1}
