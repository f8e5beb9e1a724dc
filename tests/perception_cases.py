"""VGG16, LPIPS and Inception with made-up weights in files as others publish them, and what torch makes of them.

Shared by models/test_lpips.py, models/test_inception.py, inference/test_reconstruct.py and make_perception_goldens.py.
As in encoder_cases.py, weights are a function of each tensor's name and shape.
"""

import functools
import math
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from conftest import tiny
from flax import traverse_util
from safetensors.numpy import save_file

from rae_jax.models.inception import Inception
from rae_jax.models.lpips import Lpips
from rae_jax.weights import engine, perceptual_tables

GOLDENS = Path(__file__).parent / "goldens" / "perception.npz"
SHARED = Path(__file__).parents[2] / "shared/data"
LINEAR = SHARED / "reference/lpips_vgg_lin.pth"
SIZES = ((24, 40), (310, 305))  # of the images that Inception sees: one is enlarged, one is shrunk
VGG_INDICES = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)
VGG_TAKEN = (2, 7, 14, 21, 28)  # after the ReLU behind these


def made_up(shapes):
    """{name: array} for {name: shape}: convolutions that keep the scale of what they see, norms around one."""
    arrays = {}
    for name, shape in shapes.items():
        noise = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)  # a stream that never changes
        if len(shape) > 1:
            noise *= math.sqrt(2 / math.prod(shape[1:]))
        elif name.endswith((".bn.weight", "running_var")):
            noise = np.abs(1 + 0.2 * noise)
        else:
            noise *= 0.2
        arrays[name] = (np.abs(noise) if name.startswith("lin") else noise).astype(np.float32)
    return arrays


@functools.cache
def files():
    """{'vgg', 'linear', 'inception': {tensor: shape}} of the published files, as far as we read them."""
    image = jnp.zeros((1, 32, 32, 3))
    lpips = jax.eval_shape(Lpips().init, jax.random.key(0), image, image)["params"]
    inception = jax.eval_shape(Inception().init, jax.random.key(0), image)["params"]
    table = perceptual_tables.inception(traverse_util.flatten_dict(inception, sep="/"))
    parts = {
        "vgg": (lpips["vgg"], perceptual_tables.VGG16),
        "linear": (lpips["linear"], perceptual_tables.LPIPS),
        "inception": (inception, table),
    }
    zeros = {
        name: (jax.tree.map(lambda s: np.zeros(s.shape), shapes), table) for name, (shapes, table) in parts.items()
    }
    return {name: {k: a.shape for k, a in engine.unload(*given).items()} for name, given in zeros.items()}


def arrays_of(name):
    """{tensor: array} of such a file, with what else it holds; the caller may change the dictionary."""
    return dict(_arrays_of(name))


@functools.cache
def _arrays_of(name):
    shapes = dict(files()[name])
    match name:
        case "vgg":
            shapes["classifier.6.bias"] = (10,)
        case "inception":
            shapes["fc.bias"] = (1008,)
            shapes.update({k.replace("weight", "num_batches_tracked"): () for k in shapes if k.endswith("bn.weight")})
    return made_up(shapes)


def write(folder, *names):
    """Write such files as FOLDER/NAME.safetensors; returns the paths."""
    paths = {name: str(folder / f"{name}.safetensors") for name in names}
    for name, path in paths.items():
        save_file(arrays_of(name), path, metadata={"format": "pt"})
    return paths


def config_of(paths, config=None):
    """The tiny config (or another) with these networks."""
    config = config or tiny()
    config.lpips.update({name: paths.get(name, "") for name in ("vgg", "linear")})
    config.evaluate.inception = paths.get("inception", "")
    return config


def image(height, width, seed=0):
    """An 8-bit image [height, width, 3] of noise on all scales."""
    stream = np.random.RandomState(height + width + seed)
    pixels = sum(
        np.kron(stream.random_sample((-(-height // s), -(-width // s), 3)), np.ones((s, s, 1)))[:height, :width]
        for s in (1, 4, 16)
    )
    return np.round(pixels / 3 * 255).astype(np.uint8)


def pair():
    """Two batches of images [2, 32, 48, 3] in [0, 1], float32, that resemble each other."""
    a, b, noise = (np.stack([image(32, 48, seed + i) for i in (0, 1)]) / 255 for seed in (0, 0, 7))
    return a.astype(np.float32), (0.8 * b + 0.2 * noise).astype(np.float32)


def torch_lpips(vgg, linear, a, b):
    """LPIPS by torch, from its definition: distances [B] of images [B, H, W, 3] in [0, 1], all tensors."""
    import torch

    def features(x):
        x = 2 * x.permute(0, 3, 1, 2) - 1
        shift, scale = (torch.tensor(v, dtype=x.dtype).view(1, 3, 1, 1) for v in ((-0.030, -0.088, -0.188), SCALE))
        x = (x - shift) / scale
        for index in VGG_INDICES:
            if index in (5, 10, 17, 24):
                x = torch.nn.functional.max_pool2d(x, 2)
            weight, bias = (vgg[f"features.{index}.{kind}"] for kind in ("weight", "bias"))
            x = torch.relu(torch.nn.functional.conv2d(x, weight, bias, padding=1))
            if index in VGG_TAKEN:
                yield x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10)

    levels = enumerate(zip(features(a), features(b), strict=True))
    return sum(((x - y).square() * linear[f"lin{i}.model.1.weight"]).sum(1).mean((1, 2)) for i, (x, y) in levels)


SCALE = (0.458, 0.448, 0.450)


@functools.cache
def goldens():
    """{name: array} that make_perception_goldens.py wrote."""
    with np.load(GOLDENS) as file:
        return dict(file)
