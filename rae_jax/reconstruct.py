"""Images through encoder and decoder: pairs, metrics, and files of them side by side."""

from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np

from rae_jax import build, logs, perception, pictures, rae, sharding
from rae_jax.data import pipeline
from rae_jax.data.images import ImageFiles, find_images

SHOWN = 10


def make(config):
    """Returns pure (parts, images uint8 [B, H, W, 3]) -> (latents, what came of them by name).

    That is 'decoded' (uint8), 'psnr' and 'ssim' [B]; with LPIPS among the parts 'lpips' [B]; with Inception 'seen' and
    'seen_decoded', its pooled features [B, 2048] of both.
    """
    autoencoder = build.autoencoder(config)

    def redraw(parts, pixels):
        images = rae.to_float(pixels)
        latents = autoencoder.encode(parts["encoder"], images)
        decoded = rae.to_uint8(autoencoder.decode(parts["decoder"], latents) + 0.5 / 255.0)
        again = rae.to_float(decoded)
        results = {"decoded": decoded, **perception.compare(parts, again, images)}
        if "inception" in parts:
            pools = jax.lax.map(  # one after the other: the network is compiled once
                lambda seen: perception.features(parts["inception"], seen)["pool"], jnp.stack([images, again])
            )
            results.update(seen=pools[0], seen_decoded=pools[1])
        return latents, results

    return redraw


def look(function, parts, source, mesh, *, batch_size, num_threads, name, on_error="stop"):
    """Yield what pure `function(parts, batch)` makes of a source, batch by batch: {name: numpy array [<= B, ...]}.

    Every example once, whatever the batch size and the devices; `on_error` as in pipeline.one_pass.
    """

    def masked(parts, batch):
        return function(parts, batch), batch["mask"]

    masked = jax.jit(masked, out_shardings=sharding.replicated(mesh))  # so that every process can read all of it
    done = 0
    with logs.Progress(name, total=len(source), unit="image") as progress:
        for batch in pipeline.one_pass(source, batch_size=batch_size, num_threads=num_threads, on_error=on_error):
            out, mask = jax.device_get(masked(parts, sharding.put_batch(batch, mesh)))
            done += int(mask.sum())
            progress.update(done)
            yield {key: values[mask > 0] for key, values in out.items()}


def reconstruct(config, parts, path, mesh, folder):
    """Returns ({metric: number}, picture of the first pairs); writes each pair to FOLDER/given and FOLDER/decoded.

    `path`: an image, a folder of images, or of such folders. Raises UserError where there is no image, or a broken one.
    """
    files = find_images(path)
    root = path if path.is_dir() else path.parent
    redraw = make(config)
    looks = look(
        lambda parts, batch: {**batch, **redraw(parts, batch["image"])[1]},
        parts,
        ImageFiles(files, config.data.image_size),
        mesh,
        batch_size=min(config.evaluate.batch_size, sharding.round_up(len(files), mesh)),
        num_threads=config.data.num_threads,
        name="reconstruct",
    )
    scores, pairs, moments = [], [], perception.PairMoments()
    for out in looks:
        moments.add(out)
        _write(folder, [files[i].relative_to(root) for i in out["index"]], out)
        pairs += list(zip(out["image"], out["decoded"], strict=True))[: SHOWN - len(pairs)]
        scores.append({key: out[key] for key in ("psnr", "ssim", "lpips") if key in out})
    results = {key: float(np.concatenate([score[key] for score in scores]).mean()) for key in scores[0]}
    results.update(moments.rfid())
    picture = pictures.grid(np.concatenate([np.stack(images) for images in zip(*pairs, strict=True)]), len(pairs))
    return {**results, "num_images": len(files)}, pictures.with_captions(picture, ("given", "decoded"), scale=3)


def _write(folder, names, out):
    """The pairs as PNG files, whose names are the given ones' with .png behind."""
    if jax.process_index() != 0:
        return
    with ThreadPoolExecutor() as pool:
        for kind, images in (("given", out["image"]), ("decoded", out["decoded"])):
            list(pool.map(pictures.save, [folder / kind / f"{name}.png" for name in names], images))
