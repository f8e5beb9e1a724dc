"""Images as people bring them, in folders and in archives."""

import io
import zipfile

import numpy as np
import pytest
from PIL import Image

from rae_jax.data import sources
from rae_jax.errors import UserError

SIZE = 8


def png(seed):
    """A PNG file of random pixels."""
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (SIZE, SIZE, 3), np.uint8)).save(file, "PNG")
    return file.getvalue()


def bring(place, kind, names, folders=()):
    """Write images of these names, and other files, to a folder or an archive; return its path."""
    place.mkdir(exist_ok=True)
    contents = {name: png(seed) if name.endswith(".png") else b"no image" for seed, name in enumerate(names)}
    if kind == "zip":
        path = place / "images.zip"
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in contents.items():
                archive.writestr(name, data)
            for name in folders:
                archive.writestr(f"{name}/", b"")
        return str(path)
    for name, data in contents.items():
        (place / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        (place / "images" / name).write_bytes(data)
    for name in folders:
        (place / "images" / name).mkdir()
    return str(place / "images")


def open_images(path, *, split="train", heldout_path=None, **options):
    heldout_path = path if heldout_path is None else heldout_path
    return sources.image_folder(path=path, heldout_path=heldout_path, split=split, image_size=SIZE, **options)


def labels_of(source):
    """The labels of all images of a source."""
    return [int(source[i]["label"]) for i in range(len(source))]


def refusal_of(*args, **options):
    """The message of a refusal, which is one line."""
    with pytest.raises(UserError) as refusal:
        open_images(*args, **options)
    assert "\n" not in str(refusal.value)
    return str(refusal.value)
