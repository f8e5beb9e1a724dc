"""Images through encoder and decoder: pairs, metrics, and files of them side by side."""

from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np

from rae_jax.build import models
from rae_jax.data.decode import ImageFiles, find_images
from rae_jax.inference import batched, image_grid, perceptual_metrics
from rae_jax.models.autoencoder import to_float, to_uint8

SHOWN = 10


def make(config):
    """Returns pure (parts, images uint8 [B, H, W, 3]) -> (latents, what came of them by name).

    That is 'decoded' (uint8), 'psnr' and 'ssim' [B]; with LPIPS among the parts 'lpips' [B]; with Inception 'seen' and
    'seen_decoded', of its features those that FID and sFID take of the images, and those that FID takes of the others.
    """
    autoencoder = models.autoencoder(config)

    def redraw(parts, pixels):
        images = to_float(pixels)
        latents = autoencoder.encode(parts["encoder"], images)
        decoded = to_uint8(autoencoder.decode(parts["decoder"], latents) + 0.5 / 255.0)
        again = to_float(decoded)
        results = {"decoded": decoded, **perceptual_metrics.compare(parts, again, images)}
        if "inception" in parts:
            both = jax.lax.map(  # one after the other: the network is compiled once
                lambda seen: perceptual_metrics.features(parts["inception"], seen), jnp.stack([images, again])
            )
            results["seen"] = {name: both[name][0] for name in perceptual_metrics.MOMENTS_OF}
            results["seen_decoded"] = {"pool": both["pool"][1]}
        return latents, results

    return redraw


class PairMoments:
    """rFID from batches of what `make`'s function returns, where Inception is among the parts.

    `given` is what Inception sees of the images; with `as_reference`, all that others can be compared with.
    """

    def __init__(self, *, as_reference=False):
        self._kinds = perceptual_metrics.MOMENTS_OF if as_reference else ("pool",)
        self.given, self._decoded = (
            perceptual_metrics.Seen(keep=("pool",) if as_reference else ()),
            perceptual_metrics.Seen(),
        )

    def add(self, out):
        """Takes in a batch."""
        if "seen" in out:
            self.given.add({kind: out["seen"][kind] for kind in self._kinds})
            self._decoded.add(out["seen_decoded"])

    def rfid(self):
        """{'rfid': Fréchet distance of the reconstructions to the images}; {} without, or of fewer than two."""
        if not self.given.moments:
            return {}
        return perceptual_metrics.frechet("rfid", self.given.moments["pool"], self._decoded.moments["pool"])


def reconstruct(config, parts, path, mesh, folder):
    """Returns ({metric: number}, picture of the first pairs); writes each pair to FOLDER/given and FOLDER/decoded.

    `path`: an image, a folder of images, or of such folders. Raises UserError where there is no image, and for a broken
    one where config.data.on_error is not 'skip'.
    """
    files = find_images(path)
    root = path if path.is_dir() else path.parent
    redraw = make(config)
    view = batched.compiled(lambda parts, batch: {**batch, **redraw(parts, batch["image"])[1]}, mesh)
    batches = batched.batches(
        ImageFiles(files, config.data.image_size),
        mesh,
        batch_size=config.evaluate.batch_size,
        **{key: config.data[key] for key in ("num_threads", "on_error")},
        name="reconstruct",
    )
    scores, pairs, moments = [], [], PairMoments()
    for out in batched.look(view, parts, batches):
        moments.add(out)
        _write(folder, [files[i].relative_to(root) for i in out["index"]], out)
        pairs += list(zip(out["image"], out["decoded"], strict=True))[: SHOWN - len(pairs)]
        scores.append({key: out[key] for key in ("psnr", "ssim", "lpips") if key in out})
    scores = {key: np.concatenate([score[key] for score in scores]) for key in scores[0]}
    results = {**{key: float(of.mean()) for key, of in scores.items()}, **moments.rfid()}
    picture = image_grid.grid(np.concatenate([np.stack(images) for images in zip(*pairs, strict=True)]), len(pairs))
    results["num_images"] = len(scores["psnr"])
    return results, image_grid.with_captions(picture, ("given", "decoded"), scale=3)


def _write(folder, names, out):
    """The pairs as PNG files, whose names are the given ones' with .png behind."""
    if jax.process_index() != 0:
        return
    with ThreadPoolExecutor() as pool:
        for kind, images in (("given", out["image"]), ("decoded", out["decoded"])):
            list(pool.map(image_grid.save, [folder / kind / f"{name}.png" for name in names], images))
