"""Diffusion transformers with made-up weights, and a torch oracle of them written from the published equations.

Shared by models/test_dit.py, published_cases.py and make_dit_goldens.py. The weights are a function of each tensor's
name and shape, so that a golden is its outputs alone.
"""

import dataclasses
import functools
from pathlib import Path

import encoder_cases
import numpy as np
from conftest import tiny

GOLDENS = Path(__file__).parent / "goldens" / "dits.npz"
NUM_CLASSES = 5


@dataclasses.dataclass(frozen=True)
class Case:
    """One DiT; without a `head` (width, depth, num_heads) it is a plain one."""

    trunk: tuple = (8, 1, 1)  # width, depth, num_heads
    head: tuple | None = None
    qk_norm: bool = False
    patch_size: int = 1
    channels: int = 24
    num_classes: int = NUM_CLASSES

    @property
    def grid(self):
        """Latents a side: always 16 tokens."""
        return 4 * self.patch_size


TINY = {
    "plain": Case(trunk=(16, 2, 2)),
    "plain_qk_norm_patch": Case(qk_norm=True, patch_size=2, channels=4),
    "dh_equal": Case(head=(8, 1, 2)),
    "dh_qk_norm": Case(head=(16, 2, 2), qk_norm=True),
}


def config_of(case, weights=""):
    """A config with this DiT, on latents of the case's channels."""
    config = tiny()
    config.stages = ()
    config.data.update({"image_size": 8 * case.grid, "num_classes": case.num_classes})
    config.encoder.update({"width": case.channels, "patch_size": 8})
    config.decoder.patch_size = 8
    width, depth, num_heads = case.trunk
    head_width, head_depth, head_num_heads = case.head or (0, 0, 1)
    config.dit.update({"weights": str(weights), "width": width, "depth": depth, "num_heads": num_heads})
    config.dit.update({"head_width": head_width, "head_depth": head_depth, "head_num_heads": head_num_heads})
    config.dit.update({"qk_norm": case.qk_norm, "patch_size": case.patch_size})
    return config


def shapes(case):
    """{name: shape} of the learned tensors in a released file of this model."""
    width, depth, _ = case.trunk
    head_width, head_depth, _ = case.head or (width, 0, 1)
    found = {
        "t_embedder.W": (256,),
        **_linear("t_embedder.mlp.0", 512, width),
        **_linear("t_embedder.mlp.2", width, width),
        "y_embedder.embedding_table.weight": (case.num_classes + 1, width),
        **_patches("x_embedder.proj", case, head_width),
        "final_layer.norm_final.weight": (head_width,),
        **_linear("final_layer.linear", head_width, case.channels * case.patch_size**2),
        **_linear("final_layer.adaLN_modulation.1", head_width, 2 * head_width),
    }
    if case.head:
        found.update(_patches("s_embedder.proj", case, width))
        if width != head_width:
            found.update(_linear("s_projector", width, head_width))
    for i in range(depth + head_depth):
        found.update(_block(f"blocks.{i}", case, *(case.trunk if i < depth else case.head)))
    return found


def _linear(name, inputs, outputs):
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def _patches(name, case, width):
    return {f"{name}.weight": (width, case.channels, case.patch_size, case.patch_size), f"{name}.bias": (width,)}


def _block(name, case, width, _, num_heads):
    hidden = int(2 / 3 * 4 * width)
    norms = {"norm1": width, "norm2": width}
    if case.qk_norm:
        norms.update({"attn.q_norm": width // num_heads, "attn.k_norm": width // num_heads})
    return {
        **{f"{name}.{norm}.weight": (size,) for norm, size in norms.items()},
        **_linear(f"{name}.attn.qkv", width, 3 * width),
        **_linear(f"{name}.attn.proj", width, width),
        **_linear(f"{name}.mlp.w12", width, 2 * hidden),
        **_linear(f"{name}.mlp.w3", hidden, width),
        **_linear(f"{name}.adaLN_modulation.1", width, 6 * width),
    }


def weights(case):
    """{name: array}, random and nowhere zero."""
    return encoder_cases.weights(shapes(case))


def inputs(case):
    """x and noise [2, C, h, w], t [2] and labels [2]."""
    random = np.random.RandomState(0)
    x, noise = random.standard_normal((2, 2, case.channels, case.grid, case.grid)).astype(np.float32)
    return x, noise, np.array([0.25, 0.9], np.float32), np.array([1, case.num_classes - 1])


@functools.cache
def goldens():
    """{name: array} that make_dit_goldens.py wrote."""
    with np.load(GOLDENS) as file:
        return dict(file)


def outcome(case, arrays, x, noise, t, labels):
    """The oracle's velocity, unconditional velocity, loss and its gradients by the tensors' names."""
    import torch

    x, noise, t, labels = map(torch.as_tensor, (x, noise, t, labels))
    w = {name: torch.tensor(array, requires_grad=name != "t_embedder.W") for name, array in arrays.items()}
    x_t = (1 - t[:, None, None, None]) * x + t[:, None, None, None] * noise
    v = _velocity(w, case, x_t, t, labels)
    loss = ((v - (noise - x)) ** 2).mean()
    loss.backward()
    with torch.no_grad():
        v_null = _velocity(w, case, x_t, t, torch.full_like(labels, case.num_classes))
    grads = {f"grad/{name}": tensor.grad.numpy() for name, tensor in w.items() if tensor.grad is not None}
    return {"v": v.detach().numpy(), "v_null": v_null.numpy(), "loss": loss.detach().numpy(), **grads}


def _velocity(w, case, x, t, labels):
    """The paper's model on x [B, C, h, w]: DiT^DH, or a plain DiT without a head."""
    import torch
    from torch.nn.functional import conv2d, fold, linear, silu

    def affine(name, value):
        return linear(value, w[f"{name}.weight"], w[f"{name}.bias"])

    def embed(name):
        p = case.patch_size
        return conv2d(x, w[f"{name}.proj.weight"], w[f"{name}.proj.bias"], stride=p).flatten(2).transpose(1, 2)

    def modulated(name, value, condition, count):
        return affine(f"{name}.adaLN_modulation.1", silu(condition)).chunk(count, -1)

    def block(i, value, condition, num_heads):
        name = f"blocks.{i}"
        shift, scale, gate, shift2, scale2, gate2 = modulated(name, value, condition, 6)
        y = _rms(value, w[f"{name}.norm1.weight"]) * (1 + scale) + shift
        value = value + gate * affine(f"{name}.attn.proj", _attend(w, name, affine(f"{name}.attn.qkv", y), num_heads))
        y = _rms(value, w[f"{name}.norm2.weight"]) * (1 + scale2) + shift2
        a, b = affine(f"{name}.mlp.w12", y).chunk(2, -1)
        return value + gate2 * affine(f"{name}.mlp.w3", silu(a) * b)

    angles = 2 * torch.pi * t[:, None] * w["t_embedder.W"]
    time = affine("t_embedder.mlp.0", torch.cat([angles.sin(), angles.cos()], -1))
    time = affine("t_embedder.mlp.2", silu(time))[:, None]
    both = time + w["y_embedder.embedding_table.weight"][labels][:, None]
    width, depth, num_heads = case.trunk
    s = embed("s_embedder" if case.head else "x_embedder") + _positions(width)
    for i in range(depth):
        s = block(i, s, silu(both) if case.head else both, num_heads)
    if case.head:
        head_width, head_depth, head_num_heads = case.head
        condition = silu(time + s)
        condition = condition if head_width == width else affine("s_projector", condition)
        y = embed("x_embedder")
        for i in range(depth, depth + head_depth):
            y = block(i, y, condition, head_num_heads)
    else:
        y, condition = s, both
    shift, scale = modulated("final_layer", y, condition, 2)
    y = affine("final_layer.linear", _rms(y, w["final_layer.norm_final.weight"]) * (1 + scale) + shift)
    # A token's numbers are its patch, row by row, channels last; torch's fold wants channels first.
    p = case.patch_size
    y = y.unflatten(-1, (p * p, case.channels)).transpose(-1, -2).flatten(-2).transpose(1, 2)
    return fold(y, (case.grid, case.grid), kernel_size=p, stride=p)


def _rms(value, weight):
    return value / (value.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def _attend(w, name, qkv, num_heads):
    """Attention of [B, 16, 3 D]; a pair of channels is a complex number that its token's row or column turns."""
    import torch

    q, k, v = qkv.unflatten(-1, (3, num_heads, -1)).permute(2, 0, 3, 1, 4)  # each [B, H, 16, K]
    if f"{name}.attn.q_norm.weight" in w:
        q, k = _rms(q, w[f"{name}.attn.q_norm.weight"]), _rms(k, w[f"{name}.attn.k_norm.weight"])
    half = q.shape[-1] // 2
    frequencies = 10000.0 ** (-2.0 * torch.arange(half // 2, dtype=torch.float64) / half)
    token = torch.arange(16)
    angles = torch.cat([torch.outer(token // 4, frequencies), torch.outer(token % 4, frequencies)], -1)
    turn = torch.polar(torch.ones_like(angles), angles).to(torch.complex64)
    q, k = (torch.view_as_real(torch.view_as_complex(a.unflatten(-1, (-1, 2)).contiguous()) * turn) for a in (q, k))
    scores = (q.flatten(-2) @ k.flatten(-2).transpose(-1, -2)) / v.shape[-1] ** 0.5
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(-2)


def _positions(width):
    """Sin and cos of the column, then of the row, of 16 tokens."""
    import torch

    frequencies = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    token = torch.arange(16)
    column, row = torch.outer(token % 4, frequencies), torch.outer(token // 4, frequencies)
    return torch.cat([column.sin(), column.cos(), row.sin(), row.cos()], -1).float()
