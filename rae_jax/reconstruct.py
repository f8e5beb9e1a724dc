"""Images from files through encoder and decoder, side by side, with metrics."""

import jax
import numpy as np

from rae_jax import build, metrics, pictures, rae
from rae_jax.data.images import SUFFIXES, read_image
from rae_jax.errors import UserError

SHOWN = 10


def reconstruct(config, parts, path):
    """Returns ({'psnr', 'ssim', 'num_images'}, picture of the first pairs). `path`: an image, a folder of
    images, or of such folders.

    Raises UserError where there is no image.
    """
    inside = (*path.glob("*"), *path.glob("*/*")) if path.is_dir() else (path,)
    files = sorted(file for file in inside if file.suffix.lower() in SUFFIXES and file.exists())
    if not files:
        raise UserError(f"--images={path} holds no .jpg or .png image")
    autoencoder = build.autoencoder(config)

    @jax.jit
    def decode(image):
        image = rae.to_float(image)[None]
        decoded = autoencoder.decode(parts["decoder"], autoencoder.encode(parts["encoder"], image))
        decoded = rae.to_uint8(decoded + 0.5 / 255.0)
        scores = metrics.psnr(rae.to_float(decoded), image), metrics.ssim(rae.to_float(decoded), image)
        return decoded[0], *(score[0] for score in scores)

    images = [read_image(file, config.data.image_size) for file in files]
    decoded, psnr, ssim = (np.stack(values) for values in zip(*map(decode, images), strict=True))
    shown = min(SHOWN, len(images))
    pairs = np.concatenate([np.stack(images[:shown]), decoded[:shown]])
    picture = pictures.with_captions(pictures.grid(pairs, shown), ("given", "decoded"), scale=3)
    results = {"psnr": float(psnr.mean()), "ssim": float(ssim.mean()), "num_images": len(images)}
    return results, picture
