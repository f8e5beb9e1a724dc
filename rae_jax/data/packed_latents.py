"""Latents that were encoded once, so that the DiT stage needs no encoder: a source, and its records.

A folder holds shards, as in rae_jax.data.packed_images, and index.json: 'form' ({name: value} of the settings that the
latents depend on), 'dtype' ('bfloat16' or 'float16'), 'shape' (h, w, D), 'mirrored', 'class_names', 'shards'. A record
holds the numbers of a latent in the place of the encoded image. With 'mirrored', each record is followed by the record
of the mirrored image.
"""

import os
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from rae_jax.data import decode, packed_images
from rae_jax.errors import UserError

DTYPES = ("bfloat16", "float16")


class PackedLatents:
    """Random-access source of {'latent': [h, w, D] in the stored dtype, 'label': int32}.

    Raises UserError if the latents were packed with another `form`, if `mirrored` latents are needed and were not
    packed, and for missing shards. With `on_error`='skip' missing shards are reported instead, and left out.
    """

    def __init__(self, *, path, form, mirrored, on_error="stop"):
        folder, given = Path(os.path.expanduser(path)), f"config.data.latents={path!r}"
        index = packed_images.read_index(folder, given, "rae_jax.pack_latents")
        for key, ours in form.items():
            theirs = index["form"].get(key)
            if theirs != ours:
                raise UserError(
                    f"{given} was packed with {key}={theirs!r}, not {ours!r}: set the key back, or pack again into "
                    f"another folder"
                )
        if mirrored and not index["mirrored"]:
            raise UserError(f"{given} holds no mirrored latents: pack again, or set config.dit.train.flip=False")
        self.class_names = tuple(index["class_names"])
        shards = [(shard["file"], shard["num_images"]) for shard in index["shards"]]
        self._identity = [*sorted(index["form"].items()), ("dtype", index["dtype"]), *shards]
        self._dtype, self._shape = jnp.dtype(index["dtype"]), tuple(index["shape"])
        self._each = 2 if index["mirrored"] else 1
        exists = packed_images.shard_exists
        shards = [shard for shard in index["shards"] if exists(folder / shard["file"], shard, on_error)]
        if not sum(shard["num_images"] for shard in shards):
            raise UserError(f"{given} holds no latents: pack again")
        counts = [self._each * shard["num_images"] for shard in shards]
        self._records = packed_images.Records([str(folder / shard["file"]) for shard in shards], counts)

    def __len__(self):
        return len(self._records) // self._each

    def __getitem__(self, index):
        return self._example(self._each * index)

    def image_names(self):
        """Return the names and sizes of the shards, and the form and the type of the latents."""
        return self._identity

    def mirrored(self, index):
        """Return self[index] of the mirrored image."""
        return self._example(self._each * index + 1)

    def _example(self, row):
        name = self._records.name(row)
        with decode.naming(name):
            label, _, data = packed_images.parse(self._records[row])
            latent = np.frombuffer(data, self._dtype).reshape(self._shape)
        if not 0 <= label < len(self.class_names):
            raise UserError(f"{name} has label {label}, outside of 0 to {len(self.class_names) - 1}: pack again")
        return {"latent": latent, "label": np.int32(label)}


def records(latents, labels, numbers):
    """Yield the records, bytes, of latents [B, 1 or 2 (plain, mirrored), h, w, D] of the images with `numbers`.

    Raises UserError for a latent that is not finite in its dtype.
    """
    for pair, label, number in zip(latents, labels, numbers, strict=True):
        if not np.isfinite(pair).all():
            raise UserError(f"the latent of image {number} is not finite in {pair.dtype}: choose another --dtype")
        for latent in pair:
            yield packed_images.record(int(label), str(number), latent.tobytes())
