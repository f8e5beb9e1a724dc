"""Tiny autoencoders with made-up weights, and what diffusers' AutoencoderRAE makes of them.

Shared by models/test_autoencoder.py, published_cases.py and make_autoencoder_goldens.py. The weights are a function of
each tensor's name and shape, so that a golden is its shapes and its outputs alone.
"""

import functools
import json
from pathlib import Path

import encoder_cases
import numpy as np
from conftest import tiny
from safetensors.numpy import save_file

from configs import encoders
from rae_jax.build import part_weights
from rae_jax.runtime import sharding

GOLDENS = Path(__file__).parent / "goldens" / "autoencoders.npz"
TOLERANCE = 5e-5
GRID = 16  # of any other, diffusers stretches the positions to this; the authors' decoder does not

# config.encoder of the families that today's diffusers and transformers can both build.
TINY = {
    "dinov2": {**encoders.dinov2("base", input_size=14 * GRID), "width": 64, "depth": 1, "num_heads": 1},
    "mae": {
        **encoders.mae("base"),
        "width": 64,
        "depth": 1,
        "num_heads": 1,
        "mlp_ratio": 48.0,
        "input_size": 16 * GRID,
    },
}
DECODER = {"width": 32, "depth": 2, "num_heads": 2, "hidden": 48, "patch_size": 2}


def config_of(encoder, weights="", decoder=DECODER, image_size=GRID * DECODER["patch_size"]):
    """A config with this encoder and decoder, the weights of all three parts from one place."""
    config = tiny()
    config.stages = ()
    config.data.image_size = image_size
    config.encoder.update(encoder)
    config.decoder.update(decoder)
    config.discriminator.layers = (0,)
    for part in ("encoder", "decoder", "statistics"):
        config[part].weights = str(weights)
    return config


def load(config, *parts):
    """Weights of the parts, as the config names them."""
    mesh = sharding.make_mesh(config.mesh)
    return [part_weights.load(config, part, "", mesh) for part in parts]


@functools.cache
def goldens():
    """{name: array} that make_autoencoder_goldens.py wrote."""
    with np.load(GOLDENS) as file:
        return dict(file)


def weights(name, shapes):
    """{tensor: array} of an AutoencoderRAE file; its image mean and std are the encoder's, deviations are positive."""
    arrays = encoder_cases.weights(shapes)
    for kind in ("mean", "std"):
        arrays[f"encoder_{kind}"] = np.float32(TINY[name][kind]).reshape(1, 3, 1, 1)
    arrays["_latents_std"] = 0.5 + np.abs(arrays["_latents_std"])
    return arrays


def write(name, folder):
    """The file of a tiny case, without diffusers; returns its arrays."""
    arrays = weights(name, json.loads(str(goldens()[f"{name}/shapes"])))
    save_file(arrays, folder / "diffusion_pytorch_model.safetensors")
    return arrays


def images():
    """Two images [2, H, W, 3] in [0, 1], of the decoder's size."""
    side = GRID * DECODER["patch_size"]
    return encoder_cases.images(side, side)


def diffusers_model(name):
    """AutoencoderRAE of a tiny case with made-up weights."""
    import torch
    from diffusers import AutoencoderRAE

    e = TINY[name]
    statistics = torch.ones(e["width"], GRID, GRID)
    model = AutoencoderRAE(
        encoder_type=name,
        encoder_hidden_size=e["width"],
        encoder_patch_size=e["patch_size"],
        encoder_num_hidden_layers=e["depth"],
        encoder_input_size=e["input_size"],
        encoder_norm_mean=list(e["mean"]),
        encoder_norm_std=list(e["std"]),
        decoder_hidden_size=DECODER["width"],
        decoder_num_hidden_layers=DECODER["depth"],
        decoder_num_attention_heads=DECODER["num_heads"],
        decoder_intermediate_size=DECODER["hidden"],
        patch_size=DECODER["patch_size"],
        latents_mean=statistics,
        latents_std=statistics,
    )
    made_up = weights(name, {key: tuple(value.shape) for key, value in model.state_dict().items()})
    model.load_state_dict({key: torch.from_numpy(value) for key, value in made_up.items()}, strict=True)
    return model.eval()


def diffusers_outcome(model):
    """A few of its normalised latents [B, 4, 4, D] of the images, and the images again [B, H, W, 3]."""
    import torch

    with torch.no_grad():
        latents = model.encode(torch.from_numpy(images()).permute(0, 3, 1, 2)).latent
        decoded = model.decode(latents).sample
    return outcome(latents.permute(0, 2, 3, 1).numpy(), decoded.permute(0, 2, 3, 1).numpy())


def outcome(latents, images):
    """Return the arrays to compare. A part of the latents is enough, and keeps the goldens small."""
    return {"latents": latents[:, 1::4, 2::4], "images": images}


def decoder_shapes(d=DECODER, channels=64):
    """{name: shape} of the learned tensors in a released decoder's file."""

    def linear(name, inputs, outputs):
        return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}

    def norm(name):
        return {f"{name}.weight": (d["width"],), f"{name}.bias": (d["width"],)}

    shapes = {
        "trainable_cls_token": (1, 1, d["width"]),
        **linear("decoder_embed", channels, d["width"]),
        **norm("decoder_norm"),
        **linear("decoder_pred", d["width"], 3 * d["patch_size"] ** 2),
    }
    for i in range(d["depth"]):
        block = f"decoder_layers.{i}"
        for name in ("query", "key", "value"):
            shapes.update(linear(f"{block}.attention.attention.{name}", d["width"], d["width"]))
        shapes.update(linear(f"{block}.attention.output.dense", d["width"], d["width"]))
        shapes.update(linear(f"{block}.intermediate.dense", d["width"], d["hidden"]))
        shapes.update(linear(f"{block}.output.dense", d["hidden"], d["width"]))
        shapes.update({**norm(f"{block}.layernorm_before"), **norm(f"{block}.layernorm_after")})
    return shapes
