"""Encoders of every family with made-up weights, and what transformers' torch modules make of them.

Shared by models/test_encoders.py and make_encoder_goldens.py. The weights are a function of each tensor's name and
shape, so that a golden is its shapes and its outputs alone.
"""

import dataclasses
import functools
import json
import math
import zlib
from pathlib import Path

import jax
import numpy as np
from conftest import tiny
from safetensors.numpy import load_file, save_file

from configs import encoders
from rae_jax.build import models, part_weights
from rae_jax.runtime import sharding

GOLDENS = Path(__file__).parent / "goldens" / "encoders.npz"
TOLERANCE = 5e-5  # of tokens whose scale is one


@dataclasses.dataclass(frozen=True)
class Case:
    """`model` and `config` name transformers' classes; `tower` leads from the model to the encoder."""

    model: str
    config: str
    theirs: dict  # arguments of their config
    ours: dict  # changes of config.encoder
    tower: str = ""
    norm: str = "layernorm"
    sizes: tuple = ((16, 28),)  # height and width; the positions are for 24
    layers: tuple = ()
    call: dict = dataclasses.field(default_factory=dict)  # arguments of their forward


def _theirs(**changes):
    return {
        **{"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 4, "image_size": 24},
        **changes,
    }


def _ours(published, **changes):
    return {**published, "width": 16, "depth": 2, "num_heads": 2, "patch_size": 4, "input_size": 0, **changes}


_TABLE = {"position_size": 24}
_MAE = {"decoder_hidden_size": 8, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 1}
_TEXT = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "vocab_size": 4}
_ANY_SIZE = {"interpolate_pos_encoding": True}

TINY = {
    "dinov2": Case(
        "Dinov2Model",
        "Dinov2Config",
        _theirs(),
        _ours(encoders.dinov2("base", registers=False), **_TABLE),
        sizes=((24, 24), (16, 28)),
    ),
    "dinov2_registers": Case(
        "Dinov2WithRegistersModel",
        "Dinov2WithRegistersConfig",
        _theirs(),
        _ours(encoders.dinov2("base"), **_TABLE),
        layers=(0, 1),
    ),
    "dinov2_giant": Case(
        "Dinov2WithRegistersModel",
        "Dinov2WithRegistersConfig",
        _theirs(use_swiglu_ffn=True),
        _ours(encoders.dinov2("giant"), mlp_ratio=48 / 16, **_TABLE),
    ),
    "siglip2": Case(
        "SiglipModel",
        "SiglipConfig",
        {"vision_config": _theirs(intermediate_size=40), "text_config": _TEXT},
        _ours(encoders.siglip2("base"), mlp_ratio=40 / 16, **_TABLE),
        tower="vision_model",
        norm="post_layernorm",
        call=_ANY_SIZE,
    ),
    "mae": Case(
        "ViTMAEForPreTraining",
        "ViTMAEConfig",
        _theirs(intermediate_size=40, mask_ratio=0.0, decoder_intermediate_size=8, **_MAE),
        _ours(encoders.mae("base"), mlp_ratio=40 / 16, **_TABLE),
        tower="vit",
        call=_ANY_SIZE,
    ),
    "dino": Case(
        "ViTModel",
        "ViTConfig",
        _theirs(intermediate_size=64, hidden_act="gelu_pytorch_tanh", layer_norm_eps=1e-6),
        _ours(encoders.dino(), **_TABLE),
        sizes=((24, 24),),
    ),
    "dinov3": Case(
        "DINOv3ViTModel",
        "DINOv3ViTConfig",
        _theirs(intermediate_size=40, num_register_tokens=4),
        _ours(encoders.dinov3("base"), mlp_ratio=40 / 16),
        norm="norm",
        layers=(0, 1),
    ),
}


def weights(shapes):
    """{name: array} for {name: shape}: norms and scales around one, matrices that keep the scale of their input.

    Embeddings are small, so that a wrong epsilon in the first norm shows.
    """
    arrays = {}
    for name, shape in shapes.items():
        noise = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)  # a stream that never changes
        around_one = name.endswith("lambda1") or (len(shape) == 1 and name.endswith("weight"))
        scale = math.prod(shape[1:]) ** -0.5 if len(shape) in (2, 4) and name.endswith("weight") else 0.2
        scale *= 0.02 if "embeddings." in name else 1.0
        arrays[name] = (around_one + scale * noise).astype(np.float32)
    return arrays


def write(folder, shapes):
    """A checkpoint with made-up weights."""
    save_file(weights(shapes), folder / "model.safetensors", metadata={"format": "pt"})


def images(height, width, batch=2):
    """Images [batch, height, width, 3] in [0, 1]."""
    return np.random.RandomState(height + width).random_sample((batch, height, width, 3)).astype(np.float32)


@functools.cache
def goldens():
    """{name: array} that make_encoder_goldens.py wrote."""
    with np.load(GOLDENS) as file:
        return dict(file)


def shapes_of(name):
    """{tensor: shape} of a tiny case's checkpoint."""
    return json.loads(str(goldens()[f"{name}/shapes"]))


def config_of(case, folder, **changes):
    """A config with this encoder, its weights in `folder`."""
    config = tiny()
    config.stages = ()
    config.data.image_size = 24
    config.encoder.update({**case.ours, "weights": str(folder)})
    config.update(changes)
    return config


def load(config):
    """The config's encoder weights."""
    return part_weights.load(config, "encoder", "", sharding.make_mesh(config.mesh))


def tokens_of(config, params, pixels):
    """Our latents as tokens [B, N, D]."""
    latents = jax.jit(models.autoencoder(config).encode)(params, pixels)
    return np.asarray(latents.reshape(len(latents), -1, latents.shape[-1]))


def difference(a, b):
    """The largest one."""
    return float(np.abs(a - b).max())


def torch_model(case, folder):
    """Their encoder with made-up weights, written to `folder` and read again by transformers; and {name: shape}."""
    import transformers

    config = getattr(transformers, case.config)(**case.theirs)
    getattr(transformers, case.model)(config).save_pretrained(folder)
    shapes = {name: array.shape for name, array in load_file(folder / "model.safetensors").items()}
    write(folder, shapes)
    model = getattr(transformers, case.model).from_pretrained(folder).eval()
    model = getattr(model, case.tower) if case.tower else model
    norm = getattr(model, case.norm)
    norm.weight.data.fill_(1.0)
    norm.bias.data.fill_(0.0)
    return model, shapes


def torch_tokens(case, model, pixels, layers=()):
    """Their patch tokens [B, N, D] after the final norm without affine, or the multi-layer latent over `layers`."""
    import torch

    ours = case.ours
    pixels = (pixels - np.asarray(ours["mean"], np.float32)) / np.asarray(ours["std"], np.float32)
    pixels = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    num_patches = (pixels.shape[2] // ours["patch_size"]) * (pixels.shape[3] // ours["patch_size"])
    call = dict(case.call)
    if ours["family"] == "mae":
        call["noise"] = torch.arange(num_patches).expand(len(pixels), -1)  # patches stay in order
    with torch.no_grad():
        out = model(pixels, output_hidden_states=bool(layers), **call)
        if not layers:
            return out.last_hidden_state[:, -num_patches:].numpy()
        norm = getattr(model, case.norm)
        tokens = [norm(out.hidden_states[layer + 1])[:, -num_patches:] for layer in layers]
        latent = torch.stack(tokens).mean(0)
        if ours["family"] == "dinov3":
            latent = latent + tokens[-1].mean(1, keepdim=True)
        return latent.numpy()
