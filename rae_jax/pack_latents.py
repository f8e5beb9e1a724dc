"""Encode the training images once and store their latents; a DiT stage that reads latents needs no encoder.

    python -m rae_jax.pack_latents --config=configs/dit_b.py --config.data.path=IMAGENET/train \
        --config.data.heldout_path=IMAGENET/val --output=LATENTS
    python -m rae_jax.main --config=configs/dit_b.py --config.data.path=IMAGENET/train \
        --config.data.heldout_path=IMAGENET/val --config.data.latents=LATENTS ...

The images are the training images of the config, centre-cropped. The encoder is config.encoder with the weights that
it names. --config.dtype must be the run's; --dtype is only the type of the stored latents. Every image is encoded
plain and mirrored (--nomirrored: only plain). Evaluation still needs images and the encoder. Every shard is read back
and compared before it counts as finished; the same command resumes after an interruption.
"""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from rae_jax.build import command_line_weights, models, part_weights, stages
from rae_jax.build import data as build_data
from rae_jax.config import checks, command_flag
from rae_jax.config import keys as config_keys
from rae_jax.data import packed_images, packed_latents, pipeline, shard_index, shard_writer
from rae_jax.errors import UserError
from rae_jax.models.autoencoder import to_float
from rae_jax.runtime import atomic_files, command_line, host_allocator, logs, sharding

IMAGES_PER_SHARD = 1024


def pack(config, output, mesh, *, dtype, mirrored, images_per_shard):
    """Write the latents of config's training images to the folder `output`; returns the index as written.

    Raises UserError if a shard is not a whole number of batches, the folder holds something else, an image cannot be
    read (with config.data.on_error='stop'), or the records read back differ from the written ones.
    """
    output, batch_size = Path(output), config.statistics.batch_size
    if images_per_shard % batch_size:
        raise UserError(
            f"--images_per_shard={images_per_shard} cannot work: it must be a multiple of "
            f"config.statistics.batch_size={batch_size}"
        )
    sharding.check_batch(batch_size, mesh, "config.statistics.batch_size")
    source = build_data.source(config, "train", crop="centre")
    params = part_weights.load(config, "encoder", None, mesh)
    index = {
        **{"form": stages.latent_form(config, params), "dtype": dtype, "mirrored": mirrored},
        **{"shape": list(config_keys.latent_shape(config)), "class_names": list(source.class_names)},
    }
    sizes = {"images_per_shard": images_per_shard, "batch_size": batch_size}
    shard_writer.claim(output, {**index, "data": build_data.identity(source), **sizes})
    encode = _encoder(config, params, mesh, dtype, mirrored)
    index["shards"] = _write_shards(config, source, output, encode, mirrored, images_per_shard)
    atomic_files.write_text(output / packed_images.INDEX, json.dumps(index, indent=1))
    return index


def _encoder(config, params, mesh, dtype, mirrored):
    """Return the asynchronous function batch -> latents [B, 1 or 2 (plain, mirrored), h, w, D] on the devices."""
    autoencoder = models.autoencoder(config)

    def encode(params, batch):
        images = to_float(batch["image"])
        views = (images, images[:, :, ::-1]) if mirrored else (images,)
        return jnp.stack([autoencoder.encode(params, view) for view in views], 1).astype(dtype)

    encode = sharding.jit(encode, mesh)
    return lambda batch: encode(params, sharding.put_batch(batch, mesh))


def _write_shards(config, source, output, encode, mirrored, images_per_shard):
    """Write the shards that do not exist yet; return the index entries of all shards."""
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
    """Yield the records of the batches with these numbers as bytes; the next batch is encoded at the same time."""
    ahead = []
    for number in (*numbers, None):
        if number is not None:
            batch = next(iterator)
            ahead.append((number * batch_size, batch, encode(batch)))
        if len(ahead) == 2 or number is None:
            first, batch, latents = ahead.pop(0)
            rows = np.flatnonzero(batch["mask"])
            yield from packed_latents.records(jax.device_get(latents)[rows], batch["label"][rows], first + rows)
            progress.update(first + len(rows))


def main():
    """Define the flags and run the command."""
    app.run(_run, flags_parser=command_flag.parser(_define_flags(), command_line_weights.complete))


def _define_flags():
    flags.DEFINE(command_line.PATH, "output", None, "Folder to which the shards are written.", required=True)
    flags.DEFINE_enum("dtype", "bfloat16", packed_latents.DTYPES, "Type of the stored latents.")
    flags.DEFINE_bool("mirrored", True, "Also store latents of mirrored images, for config.dit.train.flip.")
    flags.DEFINE_integer("images_per_shard", IMAGES_PER_SHARD, "Images in a shard.", lower_bound=1)
    config = config_flags.DEFINE_config_file(
        "config", None, "Config, by file or by name; --config.KEY=VALUE overrides."
    )
    flags.register_validator("config", lambda value: value is not None, "name a config, such as dit_b, or its file")
    return config


def _run(argv):
    logging.set_verbosity(logging.ERROR)
    given = flags.FLAGS
    command_line.use_own_jax_options()
    try:
        host_allocator.keep_freed_memory()
        shard_index.keep_in(Path(given.output) / shard_writer.INDEX_OF_SHARDS, copies=False)
        config = ConfigDict({**given.config, "stages": ()})  # nothing is trained here
        mesh = sharding.make_mesh(config.mesh)
        checks.check(config, mesh, trains=False, evaluates=False)
        options = {name: given[name].value for name in ("dtype", "mirrored", "images_per_shard")}
        index = pack(config.lock(), given.output, mesh, **options)
    except UserError as error:
        command_line.fail(str(error))
    print(f"{sum(s['num_images'] for s in index['shards'])} images in {len(index['shards'])} shards: {given.output}")


if __name__ == "__main__":
    main()
