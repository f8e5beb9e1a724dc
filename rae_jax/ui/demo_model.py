"""The model behind the demo page: sampling trajectories, reconstructions, interpolations between two pictures."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from rae_jax.build import models, sampler
from rae_jax.config.keys import drawing_from
from rae_jax.data import decode
from rae_jax.diffusion import ode
from rae_jax.errors import UserError
from rae_jax.inference import generate, image_grid, reconstruct
from rae_jax.models.autoencoder import denormalise, to_uint8
from rae_jax.models.dit import in_dtype

NUM_IMAGES = 4  # images that are sampled at a time
SNAPSHOTS = 8  # pictures of a trajectory
BETWEEN = 7  # pictures of an interpolation, including both ends
MAX_PIXELS = 40_000_000  # pixels of an upload
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
LARGEST_ERROR = 0.25  # error, as a fraction of the range of a pixel, from which on the error map is white


class DemoModel:
    """A config and its weights `parts`, {name: params}; `trajectory` needs the DiT among them, `draw` the student.

    Guidance of the DiT is the config's; if the config has none and the DiT has classes, it is classifier-free. The
    scale and the number of steps are arguments of single compiled Euler steps, so that new values do not compile again.
    """

    def __init__(self, config, parts):
        self._config, self._parts = ConfigDict(drawing_from(config, "dit").to_dict()), parts
        if not sampler.is_guided(self._config) and self._config.dit.class_conditional:
            self._config.guidance.method = "cfg"
        self._autoencoder = models.autoencoder(config)

    @property
    def guided(self):
        """Return whether the guidance scale has an effect."""
        return sampler.is_guided(self._config)

    def has(self, part):
        """Return whether this part is there: 'dit', or 'few_step', the student."""
        return part in self._parts

    def trajectory(self, label, seed, scale, num_steps):
        """Yield (time, uint8 images [NUM_IMAGES, H, W, 3]): the DiT's predicted data at this time; last, samples."""
        config, parts = ConfigDict(self._config.to_dict()), self._parts
        config.sampler.update({"method": "euler", "num_steps": num_steps})  # one model call for each time
        times = np.asarray(generate.times(config))
        labels = jnp.full(NUM_IMAGES, label)
        x = self._noise(seed, np.float32(0.0))
        # More snapshots near the noise, where most of the image is decided. The last snapshot is the sample itself.
        snapshots = set((np.linspace(0.0, 1.0, SNAPSHOTS - 1) ** 2 * (len(times) - 2)).round().astype(int).tolist())
        for n in range(len(times) - 1):
            x, predicted = self._step(parts, x, times[n], times[n + 1], labels, np.float32(scale))
            if n in snapshots:
                yield float(times[n]), np.asarray(self._decode(parts, predicted))
        yield float(times[-1]), np.asarray(self._decode(parts, denormalise(x, parts["statistics"])))

    def draw(self, label, seed, angle, num_steps):
        """Return uint8 [NUM_IMAGES, H, W, 3]: the student's images from noise that is turned by `angle`, in degrees."""
        x = self._noise(seed, np.float32(np.deg2rad(angle)))
        return np.asarray(self._draw(self._parts, x, jnp.full(NUM_IMAGES, label), num_steps))

    def reconstruct(self, image):
        """Return (decoded uint8 [H, W, 3], latents [h, w, D], {'psnr': x, 'ssim': y}) of a uint8 image."""
        latents, out = jax.device_get(self._reconstruct(self._parts, image[None]))
        return out["decoded"][0], latents[0], {name: float(out[name][0]) for name in ("psnr", "ssim")}

    def between(self, one, other):
        """Return uint8 [BETWEEN, H, W, 3]: decoded points of the straight line between two images' latents."""
        ends, _ = self._reconstruct(self._parts, np.stack([one, other]))
        weights = jnp.linspace(0.0, 1.0, BETWEEN).reshape(-1, 1, 1, 1)
        return np.asarray(self._decode(self._parts, (1.0 - weights) * ends[:1] + weights * ends[1:]))

    @functools.cached_property
    def _noise(self):
        indices = jnp.arange(2 * NUM_IMAGES, dtype=jnp.uint32)

        def noise(seed, angle):
            drawn = generate.first_noise(self._config, jax.random.key(seed), indices)
            return jnp.cos(angle) * drawn[:NUM_IMAGES] + jnp.sin(angle) * drawn[NUM_IMAGES:]  # Gaussian noise too

        return jax.jit(noise)

    @functools.cached_property
    def _draw(self):
        def draw(parts, x, labels, num_steps):
            u = sampler.mean_velocity(self._config, in_dtype(parts["few_step"], self._config.dtype), labels)
            latents = denormalise(ode.jumps(u, x, ode.time_grid(num_steps, 1.0)), parts["statistics"])
            return to_uint8(self._autoencoder.decode(parts["decoder"], latents))

        return jax.jit(draw, static_argnames="num_steps")

    @functools.cached_property
    def _step(self):
        return jax.jit(functools.partial(generate.euler_step, self._config))

    @functools.cached_property
    def _decode(self):
        return jax.jit(lambda parts, latents: to_uint8(self._autoencoder.decode(parts["decoder"], latents)))

    @functools.cached_property
    def _reconstruct(self):
        return jax.jit(reconstruct.make(self._config))


def read_upload(path, size):
    """Return the image file as uint8 [size, size, 3], cropped. The message of a UserError is shown on the page."""
    name = Path(path).name
    try:
        with Image.open(path, formats=FORMATS) as image:  # reads only the header
            width, height = image.size
    except Exception as error:  # Pillow raises errors of many types
        raise UserError(f"{name} is no image that can be read here: choose a file of {', '.join(FORMATS)}") from error
    if width * height > MAX_PIXELS:
        largest = f"{MAX_PIXELS // 1_000_000} million pixels"
        raise UserError(f"{name} has {width}x{height} pixels, more than {largest}: choose a smaller image")
    try:
        return decode.read_image(path, size)
    except UserError as error:
        raise UserError(f"{name} is damaged, or not an ordinary picture: choose another file") from error


def error_map(image, decoded):
    """Return uint8 [H, W, 3]: mean absolute difference of two uint8 images' colours, white from LARGEST_ERROR on."""
    return image_grid.heat(np.abs(image.astype(np.float32) - decoded).mean(-1) / 255.0, LARGEST_ERROR)
