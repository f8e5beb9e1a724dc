"""A tiny and the published VAE with made-up weights, and what diffusers' AutoencoderKL makes of them.

Shared by models/test_sd_vae.py and make_sd_vae_goldens.py; the weights are made as those of encoder_cases.py.
"""

import functools
import json
from pathlib import Path

import jax
import numpy as np
from conftest import one_device, tiny
from encoder_cases import weights
from safetensors.numpy import load_file, save_file

from configs import encoders
from rae_jax.build import models, part_weights

FILE = "diffusion_pytorch_model.safetensors"
GOLDENS = Path(__file__).parent / "goldens" / "sd_vae.npz"
TOLERANCE = 1e-4  # in diffusers' units: latents before their scale, images in [-1, 1]
TINY = {**encoders.sd_vae(), "widths": (32, 64), "depth": 1, "patch_size": 2}
SIZE = (16, 24)  # of the image that the tiny one sees


def config_of(values, folder, **changes):
    """A config with this VAE, its weights in `folder`."""
    config = tiny()
    config.stages = ()
    config.encoder.update({**values, "weights": str(folder)})
    config.decoder.update({"weights": str(folder), "patch_size": values["patch_size"]})
    config.statistics.weights = "none"
    config.update(changes)
    return config


def load(config):
    """The VAE's weights."""
    return {part: part_weights.load(config, part, "", one_device()) for part in ("encoder", "decoder")}


def made_up(shapes):
    """{name: array} for {name: shape}. What the first norms see is small, so that a wrong epsilon shows."""
    return {name: array * (0.005 if ".conv_in." in name else 1.0) for name, array in weights(shapes).items()}


def write(folder, arrays):
    """A checkpoint of these arrays."""
    save_file(arrays, folder / FILE, metadata={"format": "pt"})


def inputs(values, height, width):
    """An image [1, height, width, 3] in [0, 1], and latents of its size before their scale."""
    stream = np.random.RandomState(height + width)
    smaller = values["patch_size"]
    image = stream.random_sample((1, height, width, 3))
    return (a.astype(np.float32) for a in (image, stream.standard_normal((1, height // smaller, width // smaller, 4))))


def ours(config, image, latents):
    """{'latents': of the image, 'image': of the latents} in diffusers' units."""
    autoencoder, params = models.autoencoder(config), load(config)
    encoded = jax.jit(autoencoder.encode)(params["encoder"], image)
    decoded = jax.jit(autoencoder.decode)(params["decoder"], 0.18215 * latents)
    return {"latents": np.asarray(encoded) / 0.18215, "image": np.asarray(decoded) * 2.0 - 1.0}


def torch_model(values, folder):
    """Their VAE with made-up weights, written to `folder` and read again by diffusers; and {name: shape}."""
    import diffusers

    levels = len(values["widths"])
    diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=values["widths"],
        layers_per_block=values["depth"],
        latent_channels=values["width"],
        norm_num_groups=32,
    ).save_pretrained(folder)
    shapes = {name: array.shape for name, array in load_file(folder / FILE).items()}
    write(folder, made_up(shapes))
    return diffusers.AutoencoderKL.from_pretrained(folder, low_cpu_mem_usage=False).eval(), shapes


def theirs(model, image, latents):
    """As `ours`, by diffusers."""
    import torch

    image, latents = (torch.from_numpy(a).permute(0, 3, 1, 2) for a in (image * 2.0 - 1.0, latents))
    with torch.no_grad():
        outputs = {"latents": model.encode(image).latent_dist.mode(), "image": model.decode(latents).sample}
    return {name: array.permute(0, 2, 3, 1).numpy() for name, array in outputs.items()}


@functools.cache
def goldens():
    """{name: array} that make_sd_vae_goldens.py wrote."""
    with np.load(GOLDENS) as file:
        return dict(file)


def tiny_shapes():
    """{tensor: shape} of the tiny VAE's checkpoint."""
    return json.loads(str(goldens()["shapes"]))
