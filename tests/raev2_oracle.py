"""RAEv2's diffusion transformer in torch, from its equations (../shared/FOLLOWUPS.md, section 1), on released names."""

import dataclasses

import encoder_cases
import numpy as np
from dit_cases import config_of as dit_config


@dataclasses.dataclass(frozen=True)
class Case:
    """Sizes of a network on 4x4 latents; trunk and head are (width, depth, heads)."""

    trunk: tuple = (16, 3, 2)
    head: tuple = (24, 2, 2)
    base_depth: int = 2
    time_tokens: int = 3
    label_tokens: int = 5
    channels: int = 12
    num_classes: int = 7
    qk_norm: bool = True
    patch_size: int = 1
    grid: int = 4


CASES = {
    "unequal": Case(),
    "equal widths": Case(trunk=(16, 2, 1), head=(16, 1, 2), base_depth=1, time_tokens=4, label_tokens=8),
    "no base": Case(trunk=(16, 2, 2), base_depth=0),
}


def config_of(case, weights=""):
    """A config with this network."""
    config = dit_config(case, weights)
    config.dit.update({"conditioning": "in_context", "base_depth": case.base_depth, "prediction": "data_in_velocity"})
    config.dit.update({"time_tokens": case.time_tokens, "label_tokens": case.label_tokens})
    return config


def weights(case):
    """{name: array} of the learned tensors of a released file, random and nowhere zero."""
    width, depth, heads = case.trunk
    head_width, head_depth, head_heads = case.head

    def linear(name, inputs, outputs):
        return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}

    def final(name, width):
        modulation = linear(f"{name}.adaln_modulation.1", width, 2 * width)
        return {f"{name}.norm.weight": (width,), **linear(f"{name}.linear", width, case.channels), **modulation}

    shapes = {
        **{f"{n}_embedder.proj.weight": (w, case.channels, 1, 1) for n, w in (("s", width), ("x", head_width))},
        **{f"{n}_embedder.proj.bias": (w,) for n, w in (("s", width), ("x", head_width))},
        **{"t_embedder.W": (256,), "t_embedder.learnable_tokens": (case.time_tokens, width)},
        **{**linear("t_embedder.mlp.0", 512, width), **linear("t_embedder.mlp.2", width, width)},
        "ctx_embedder.learnable_tokens": (case.label_tokens, width),
        "ctx_embedder.embedding_table.weight": (case.num_classes + 1, width),
        **(linear("s_projector", width, head_width) if width != head_width else {}),
        **final("final_layer", head_width),
        **(final("base_final_layer", width) if case.base_depth else {}),
    }
    for i in range(depth + head_depth):
        name, w = f"blocks.{i}", width if i < depth else head_width
        hidden, per_head = int(2 / 3 * 4 * w), w // (heads if i < depth else head_heads)
        shapes |= {f"{name}.{norm}.weight": (w,) for norm in ("norm1", "norm2")}
        shapes |= {f"{name}.attn.{norm}.weight": (per_head,) for norm in ("q_norm", "k_norm")}
        for part in ("q", "k", "v", "proj"):
            shapes |= linear(f"{name}.attn.{part}", w, w)
        shapes |= {**linear(f"{name}.mlp.w1", w, hidden), **linear(f"{name}.mlp.w2", w, hidden)}
        shapes |= linear(f"{name}.mlp.w3", hidden, w)
        shapes |= linear(f"{name}.adaln_modulation.1", w, 6 * w) if i >= depth else {}
    return encoder_cases.weights(shapes)


def outputs(w, case, x, t, labels):
    """The two predictions of x from x_t [B, C, 4, 4] in the argument `x`: (output, base output or None)."""
    import torch
    from torch.nn.functional import linear, silu

    def affine(name, value):
        return linear(value, w[f"{name}.weight"], w[f"{name}.bias"])

    def embed(name):
        weight = w[f"{name}.proj.weight"][:, :, 0, 0]
        return linear(x.flatten(2).transpose(1, 2), weight, w[f"{name}.proj.bias"])

    def block(i, value, heads, s=None):
        name = f"blocks.{i}"
        parts = affine(f"{name}.adaln_modulation.1", silu(s)).chunk(6, -1) if s is not None else (0, 0, 1, 0, 0, 1)
        shift, scale, gate, shift2, scale2, gate2 = parts
        y = _rms(value, w[f"{name}.norm1.weight"]) * (1 + scale) + shift
        q, k, v = (affine(f"{name}.attn.{part}", y).unflatten(-1, (heads, -1)).transpose(1, 2) for part in "qkv")
        q, k = (_rotated(_rms(a, w[f"{name}.attn.{n}_norm.weight"])) for a, n in ((q, "q"), (k, "k")))
        scores = (q @ k.transpose(-1, -2)) / q.shape[-1] ** 0.5
        value = value + gate * affine(f"{name}.attn.proj", (scores.softmax(-1) @ v).transpose(1, 2).flatten(-2))
        y = _rms(value, w[f"{name}.norm2.weight"]) * (1 + scale2) + shift2
        gated = silu(affine(f"{name}.mlp.w1", y)) * affine(f"{name}.mlp.w2", y)
        return value + gate2 * affine(f"{name}.mlp.w3", gated)

    def final(name, value, s):
        shift, scale = affine(f"{name}.adaln_modulation.1", silu(s)).chunk(2, -1)
        y = affine(f"{name}.linear", _rms(value, w[f"{name}.norm.weight"]) * (1 + scale) + shift)
        return y.transpose(1, 2).unflatten(-1, (4, 4))

    angles = 2 * torch.pi * t[:, None] * w["t_embedder.W"]
    time = affine("t_embedder.mlp.0", torch.cat([angles.sin(), angles.cos()], -1))
    time = affine("t_embedder.mlp.2", silu(time))[:, None]
    label = w["ctx_embedder.embedding_table.weight"][labels][:, None]
    context = [w["t_embedder.learnable_tokens"] + time, w["ctx_embedder.learnable_tokens"] + label]
    _, depth, heads = case.trunk
    y, base = torch.cat([embed("s_embedder"), *context], 1), None
    for i in range(depth):
        y = block(i, y, heads)
        if i + 1 == case.base_depth:
            tokens = silu(time + y[:, :16])
            base = final("base_final_layer", tokens, tokens)
    s = silu(time + y[:, :16])
    s = affine("s_projector", s) if "s_projector.weight" in w else s
    _, head_depth, head_heads = case.head
    y = embed("x_embedder")
    for i in range(depth, depth + head_depth):
        y = block(i, y, head_heads, s)
    return final("final_layer", y, s), base


def _rms(value, weight):
    return value / (value.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def _rotated(value):
    """Turn pairs of channels of the first 16 tokens by their row and column: [B, H, N, K]."""
    import torch

    half = value.shape[-1] // 2
    frequencies = 10000.0 ** (-2.0 * torch.arange(half // 2, dtype=torch.float64) / half)
    token = torch.arange(16)
    angles = torch.cat([torch.outer(token // 4, frequencies), torch.outer(token % 4, frequencies)], -1)
    angles = torch.nn.functional.pad(angles, (0, 0, 0, value.shape[2] - 16))
    turn = torch.polar(torch.ones_like(angles), angles).to(torch.complex64)
    pairs = torch.view_as_complex(value.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * turn).flatten(-2)


def velocity(prediction, x_t, t):
    """The velocity of predicted data, with the clamp of the loss and of the sampler."""
    return (x_t - prediction) / t.clamp(min=0.05)[:, None, None, None]


def inputs(case, batch=2):
    """x and noise [B, C, 4, 4], t [B] (one below the clamp) and labels [B]."""
    random = np.random.RandomState(0)
    x, noise = random.standard_normal((2, batch, case.channels, 4, 4)).astype(np.float32)
    return x, noise, np.array([0.03, 0.8], np.float32)[:batch], np.array([1, case.num_classes - 1])[:batch]
