"""One released file of every kind, with made-up weights: shared by cli/test_convert.py and weights/test_refused.py."""

import functools

import autoencoder_cases
import dit_cases
import encoder_cases
import numpy as np
import pytest
import raev2_oracle
from safetensors.numpy import load_file, save_file

from configs import encoders
from rae_jax import convert

DINO = {**encoders.dino(), "width": 16, "depth": 2, "num_heads": 2, "input_size": 32, "position_size": 32}


def dino_shapes(width=16, depth=2, patch_size=8, tokens=16):
    """{name: shape} of DINO's file with timm's names."""
    shapes = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, 1 + tokens, width),
        "patch_embed.proj.weight": (width, 3, patch_size, patch_size),
        "patch_embed.proj.bias": (width,),
        "norm.weight": (width,),
        "norm.bias": (width,),
    }
    sizes = {"attn.qkv": (48, 16), "attn.proj": (16, 16), "mlp.fc1": (64, 16), "mlp.fc2": (16, 64)}
    for i in range(depth):
        for name, size in sizes.items():
            shapes.update({f"blocks.{i}.{name}.weight": size, f"blocks.{i}.{name}.bias": size[:1]})
        for name in ("norm1", "norm2"):
            shapes.update({f"blocks.{i}.{name}.weight": (width,), f"blocks.{i}.{name}.bias": (width,)})
    return shapes


def _dit(name):
    case = dit_cases.TINY[name]
    return "dit", dit_cases.config_of(case), dit_cases.weights(case)


def _statistics(*names):
    """The variances are as small as they get, and larger than one."""
    arrays = encoder_cases.weights(dict.fromkeys(names, (24, 4, 4)))
    return "statistics", dit_cases.config_of(dit_cases.TINY["plain"]), {k: np.abs(v) for k, v in arrays.items()}


def _decoder():
    config = autoencoder_cases.config_of(autoencoder_cases.TINY["mae"])
    return "decoder", config, encoder_cases.weights(autoencoder_cases.decoder_shapes())


def _dino():
    config = autoencoder_cases.config_of(DINO, image_size=8)
    return "encoder", config, encoder_cases.weights(dino_shapes())


@functools.cache
def kind(name):
    """(part, config, arrays of a released file) of a kind of file."""
    match name:
        case "plain" | "plain_qk_norm_patch" | "dh_equal" | "dh_qk_norm":
            return _dit(name)
        case "raev2":
            case = raev2_oracle.CASES["unequal"]
            return "dit", raev2_oracle.config_of(case), raev2_oracle.weights(case)
        case "student":
            _, config, arrays = _dit("dh_qk_norm")
            interval = {name: array.shape for name, array in arrays.items() if name.startswith("t_embedder.")}
            interval = {name.replace("t_embedder", "r_embedder"): shape for name, shape in interval.items()}
            return "few_step", config, {**arrays, **encoder_cases.weights(interval)}
        case "decoder":
            return _decoder()
        case "statistics":
            return _statistics("mean", "var")
        case "statistics_without_mean":
            return _statistics("var")
        case "dino":
            return _dino()


KINDS = (
    "plain_qk_norm_patch",
    "dh_qk_norm",
    "raev2",
    "student",
    "decoder",
    "statistics",
    "statistics_without_mean",
    "dino",
)


def write(path, arrays):
    """A safetensors file, or a torch file where it is called otherwise."""
    path.parent.mkdir(exist_ok=True)
    if path.suffix == ".safetensors":
        save_file(arrays, path)
    else:
        torch = pytest.importorskip("torch")
        torch.save({k: torch.tensor(v) if isinstance(v, np.ndarray) else v for k, v in arrays.items()}, path)


def read(path):
    """Return the tensors that `write` wrote."""
    if path.suffix == ".safetensors":
        return load_file(path)
    torch = pytest.importorskip("torch")
    return {k: v.numpy() for k, v in torch.load(path, weights_only=True).items() if v is not None}


def convert_kind(name, source, output, form="rae_jax"):
    """Convert weights of that kind; returns the written file."""
    part, config, _ = kind(name)
    config = config.copy_and_resolve_references()
    config[part].weights = str(source)
    (path,) = convert.export(None, output, config=config, parts=[part], form=form)
    return path
