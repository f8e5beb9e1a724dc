"""Reconstructions of images by encoder and decoder, their metrics, and files of both."""

from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np

from rae_jax.build import models
from rae_jax.data.decode import ImageFiles, find_images
from rae_jax.inference import batched, image_grid, perceptual_metrics
from rae_jax.inference.collector import Collector
from rae_jax.models.autoencoder import to_float, to_uint8
from rae_jax.runtime import processes

SHOWN = 10  # pairs in the picture
SCORES = ("psnr", "ssim", "lpips")  # per pair of images
MOMENTS = ("pool", "decoded_pool")  # from which rfid is computed


def make(config):
    """Return the pure function (parts, images uint8 [B, H, W, 3]) -> (latents, outputs by name).

    Outputs are 'decoded' (uint8) and the SCORES [B], 'lpips' only if LPIPS is among the parts. If Inception is, outputs
    also are the features of the images that FID and sFID take, and 'decoded_pool' of the reconstructions.
    """
    autoencoder = models.autoencoder(config)

    def encode_and_decode(parts, pixels):
        images = to_float(pixels)
        latents = autoencoder.encode(parts["encoder"], images)
        decoded = to_uint8(autoencoder.decode(parts["decoder"], latents) + 0.5 / 255.0)
        reconstructions = to_float(decoded)
        outputs = {"decoded": decoded, **perceptual_metrics.compare(parts, reconstructions, images)}
        if "inception" in parts:
            both = jax.lax.map(  # one after the other: the network is compiled once
                lambda x: perceptual_metrics.features(parts["inception"], x), jnp.stack([images, reconstructions])
            )
            outputs.update({name: both[name][0] for name in perceptual_metrics.MOMENTS_OF})
            outputs["decoded_pool"] = both["pool"][1]
        return latents, outputs

    return encode_and_decode


def mean_scores(collector):
    """Return {name: mean over all pairs} of the SCORES that the Collector holds."""
    scores = {name: collector.array(name) for name in SCORES}
    return {name: float(values.mean()) for name, values in scores.items() if values is not None}


def rfid(collector):
    """Return {'rfid': Fréchet distance of reconstructions to images}, or {} without the moments of MOMENTS."""
    if not set(MOMENTS) <= collector.moments.keys():
        return {}
    return perceptual_metrics.frechet("rfid", *(collector.moments[name] for name in MOMENTS))


def reconstruct(config, parts, path, mesh, folder):
    """Write each pair to FOLDER/given and FOLDER/decoded. Returns ({metric: number}, a picture of the first pairs).

    `path`: an image, a folder of images, or a folder of such folders. Raises UserError if no image exists, and for an
    image that cannot be read unless config.data.on_error is 'skip'.
    """
    files = find_images(path)
    root = path if path.is_dir() else path.parent
    function = make(config)
    compiled = batched.compiled(lambda parts, batch: {**batch, **function(parts, batch["image"])[1]}, mesh)
    batches = batched.batches(
        ImageFiles(files, config.data.image_size),
        mesh,
        batch_size=config.evaluate.batch_size,
        **{key: config.data[key] for key in ("num_threads", "on_error")},
        name="reconstruct",
    )
    collector, pairs = Collector(arrays=SCORES, moments=MOMENTS), []
    for out in batched.outputs(compiled, parts, batches):
        collector.add(out)
        _write(folder, [files[i].relative_to(root) for i in out["index"]], out)
        pairs += list(zip(out["image"], out["decoded"], strict=True))[: SHOWN - len(pairs)]
    num_images = len(collector.array("psnr"))
    results = {**mean_scores(collector), **rfid(collector), "num_images": num_images}
    picture = image_grid.grid(np.concatenate([np.stack(images) for images in zip(*pairs, strict=True)]), len(pairs))
    return results, image_grid.with_captions(picture, ("given", "decoded"), scale=3)


def _write(folder, names, out):
    """Write the pairs as PNG files; each name is the name of the given file with .png appended."""
    if not processes.is_first():
        return
    with ThreadPoolExecutor() as pool:
        for kind, images in (("given", out["image"]), ("decoded", out["decoded"])):
            list(pool.map(image_grid.save, [folder / kind / f"{name}.png" for name in names], images))
