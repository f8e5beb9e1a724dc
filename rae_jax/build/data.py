"""Construction of sources of images and latents from the config."""

import hashlib
import os

from rae_jax.data import sources
from rae_jax.data.packed_images import PackedImages
from rae_jax.data.packed_latents import PackedLatents
from rae_jax.data.shapes import Shapes
from rae_jax.errors import UserError


def source(config, split, crop=None):
    """Return the random-access source of 'train' or 'heldout' images; `crop`, if given, is the crop that callers need.

    Raises UserError if the number of its classes is not config.data.num_classes.
    """
    data = config.data
    images = {"path": data.path, "heldout_path": data.heldout_path, "split": split}
    images |= {"image_size": data.image_size, "num_classes": data.num_classes}
    match data.source:
        case "shapes":
            num_images = {"train": data.num_train, "heldout": data.num_heldout}[split]
            found = Shapes(split=split, num_images=num_images, image_size=data.image_size, seed=config.seed)
        case "image_folder":
            options = {"heldout_labels": data.heldout_labels, "on_error": data.on_error}
            found = sources.image_folder(**images, **options)
        case "webdataset":
            found = sources.webdataset(**images, fields=data.fields.to_dict())
        case "parquet":
            found = sources.parquet(**images, fields=data.fields.to_dict())
        case "array_record":
            options = {"image_size": data.image_size, "crop": crop, "on_error": data.on_error}
            found = PackedImages(path=data.path, split=split, **options)
        case "tfds":
            part = {"train": data.tfds.split, "heldout": data.tfds.heldout_split}[split]
            found = sources.tfds(
                name=data.tfds.name, data_dir=os.path.expanduser(data.path), split=part, image_size=data.image_size
            )
        case other:
            raise ValueError(f"unknown data source {other!r}")
    return _checked_classes(found, data.num_classes)


def packed_latents(config, form):
    """Return the random-access source of the latents in config.data.latents, for the DiT stage; see PackedLatents."""
    options = {"form": form, "mirrored": config.dit.train.flip, "on_error": config.data.on_error}
    return _checked_classes(PackedLatents(path=config.data.latents, **options), config.data.num_classes)


def identity(source):
    """Return the JSON values that identify the data of a source, wherever it lies: see config.inputs."""
    names = hashlib.sha256()
    for name, label in source.image_names():
        names.update(f"{name}\t{label}\n".encode(errors="surrogateescape"))
    return {"num_images": len(source), "names": names.hexdigest()[:16], "class_names": list(source.class_names)}


def _checked_classes(source, expected):
    count = len(source.class_names)
    if count != expected:
        names = ", ".join(source.class_names[:3]) + ", ..." * (count > 3)
        counted = f"{count} class{'es' * (count > 1)} ({names})"
        raise UserError(
            f"config.data.num_classes={expected} cannot work: the data has {counted}, set "
            f"--config.data.num_classes={count}"
        )
    return source
