"""Latents of the training images, encoded once: a DiT stage that reads them needs no encoder. Disk for FLOPs.

    python -m rae_jax.pack_latents --config=configs/dit_b.py --config.data.path=IMAGENET/train \
        --config.data.heldout_path=IMAGENET/val --output=LATENTS
    python -m rae_jax.main --config=configs/dit_b.py --config.data.path=IMAGENET/train \
        --config.data.heldout_path=IMAGENET/val --config.data.latents=LATENTS ...

The images are those that the config's DiT stage would see, centre-cropped, and the encoder is config.encoder, with the
weights that it names; --config.dtype has to be the run's (--dtype is only how latents are stored). Every image is
encoded as it is and mirrored (--nomirrored leaves that out). Evaluation still takes images and the encoder. Every shard
is read back and compared before it counts; the same command goes on where it was interrupted.
"""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from rae_jax.build import data as build_data
from rae_jax.build import models, part_weights, stages
from rae_jax.config import checks, command_flag
from rae_jax.config import keys as config_keys
from rae_jax.data import packed_images, packed_latents, pipeline, shard_writer
from rae_jax.errors import UserError
from rae_jax.models.autoencoder import to_float
from rae_jax.runtime import atomic_files, command_line, host_allocator, logs, sharding

IMAGES_PER_SHARD = 1024


def pack(config, output, mesh, *, dtype, mirrored, images_per_shard):
    """Write the latents of config's training images to the folder `output`; returns the index as written.

    Raises UserError where shards do not have whole batches, where the folder holds something else, for an image that
    cannot be read (with config.data.on_error='stop'), and where what was read back is not what was written.
    """
    output, batch_size = Path(output), config.statistics.batch_size
    if images_per_shard % batch_size:
        raise UserError(
            f"--images_per_shard={images_per_shard} cannot work: it must be a multiple of "
            f"config.statistics.batch_size={batch_size}"
        )
    sharding.check_batch(batch_size, mesh, "config.statistics.batch_size")
    source = build_data.source(config, "train", crop="centre")
    params = part_weights.load(config, "encoder", "", mesh)
    index = {
        **{"form": stages.latent_form(config, params), "dtype": dtype, "mirrored": mirrored},
        **{"shape": list(config_keys.latent_shape(config)), "class_names": list(source.class_names)},
    }
    data = {key: value for key, value in config.data.to_dict().items() if key not in _ONLY_HOW}
    sizes = {"num_images": len(source), "images_per_shard": images_per_shard, "batch_size": batch_size}
    shard_writer.claim(output, {**index, "data": data, **sizes})
    encode = _encoder(config, params, mesh, dtype, mirrored)
    index["shards"] = _write_shards(config, source, output, encode, mirrored, images_per_shard)
    atomic_files.write_text(output / packed_images.INDEX, json.dumps(index, indent=1))
    return index


_ONLY_HOW = ("num_threads", "num_workers", "num_heldout", "latents")  # what latents do not depend on


def _encoder(config, params, mesh, dtype, mirrored):
    """Function batch -> latents [B, 1 or 2 (plain, mirrored), h, w, D] on the devices, not waited for."""
    autoencoder = models.autoencoder(config)

    def encode(params, batch):
        images = to_float(batch["image"])
        views = (images, images[:, :, ::-1]) if mirrored else (images,)
        return jnp.stack([autoencoder.encode(params, view) for view in views], 1).astype(dtype)

    encode = sharding.jit(encode, mesh)
    return lambda batch: encode(params, sharding.put_batch(batch, mesh))


def _write_shards(config, source, output, encode, mirrored, images_per_shard):
    """The index's entries of all shards; those that are not there yet are written, with progress."""
    batch_size = config.statistics.batch_size
    reading = {key: config.data[key] for key in ("num_threads", "num_workers", "on_error")}
    iterator = iter(pipeline.one_pass(source, batch_size=batch_size, **reading))
    count, written = -(-len(source) // images_per_shard), []
    with logs.Progress("pack", total=len(source), unit="image") as progress:
        for shard in range(count):
            file = output / shard_writer.name("train", shard, count)
            end = min((shard + 1) * images_per_shard, len(source))
            result = shard_writer.finished(file)
            if result is None:
                numbers = range(shard * images_per_shard // batch_size, -(-end // batch_size))
                if iterator.get_state()["position"] != numbers.start:
                    iterator.set_state({**iterator.get_state(), "position": numbers.start})
                rows = _records(iterator, encode, numbers, batch_size, progress)
                num_records = shard_writer.write(file, rows, packed_images.parse)
                num_images = num_records // 2 if mirrored else num_records
                result = shard_writer.finish(file, {"file": file.name, "num_images": num_images})
            written.append(result)
            progress.update(end)
    return written


def _records(iterator, encode, numbers, batch_size, progress):
    """Bytes of the records of the batches of these numbers; one is encoded while the one before it is written."""
    ahead = []
    for number in (*numbers, None):
        if number is not None:
            batch = next(iterator)
            ahead.append((number * batch_size, batch, encode(batch)))
        if len(ahead) == 2 or number is None:
            first, batch, found = ahead.pop(0)
            there = np.flatnonzero(batch["mask"])
            yield from packed_latents.records(jax.device_get(found)[there], batch["label"][there], first + there)
            progress.update(first + len(there))


def main():
    """Define the flags and run the command."""
    app.run(_run, flags_parser=command_flag.parser(_define_flags()))


def _define_flags():
    flags.DEFINE_string("output", None, "Folder for the shards.", required=True)
    flags.DEFINE_enum("dtype", "bfloat16", packed_latents.DTYPES, "Of the latents as they are stored.")
    flags.DEFINE_bool("mirrored", True, "Also the latents of the mirrored images, for config.dit.train.flip.")
    flags.DEFINE_integer("images_per_shard", IMAGES_PER_SHARD, "Images in a shard.", lower_bound=1)
    return config_flags.DEFINE_config_file("config", None, "Config file; override its keys with --config.KEY=VALUE.")


def _run(argv):
    logging.set_verbosity(logging.ERROR)
    given = flags.FLAGS
    try:
        host_allocator.keep_freed_memory()
        config = ConfigDict({**given.config, "stages": ()})  # nothing is trained here
        mesh = sharding.make_mesh(config.mesh)
        checks.check(config, mesh)
        options = {name: given[name].value for name in ("dtype", "mirrored", "images_per_shard")}
        index = pack(config.lock(), given.output, mesh, **options)
    except UserError as error:
        command_line.fail(str(error))
    print(f"{sum(s['num_images'] for s in index['shards'])} images in {len(index['shards'])} shards: {given.output}")


if __name__ == "__main__":
    main()
