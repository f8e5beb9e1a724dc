"""DiT^DH in plain PyTorch after the paper's description, for torch_step.py, with the released files' parameter names.

Fused qkv, scaled_dot_product_attention and SwiGLU make it as fast as plain PyTorch allows.
"""

import torch
from torch import nn
from torch.nn import functional as F


class DiTDH(nn.Module):
    """Velocity [B, D, h, w] for x_t [B, D, h, w], times t [B] and labels [B]; one latent element is one token."""

    def __init__(self, *, trunk, head, channels, grid, num_classes):
        """`trunk` and `head`: (width, depth, number of attention heads)."""
        super().__init__()
        (width, depth, heads), (head_width, head_depth, head_heads) = trunk, head
        self.depth, self.grid = depth, grid
        self.t_embedder = _TimeEmbedding(width)
        self.y_embedder = nn.ModuleDict({"embedding_table": nn.Embedding(num_classes + 1, width)})
        self.s_embedder = nn.ModuleDict({"proj": nn.Conv2d(channels, width, 1)})
        self.x_embedder = nn.ModuleDict({"proj": nn.Conv2d(channels, head_width, 1)})
        self.s_projector = nn.Identity() if width == head_width else nn.Linear(width, head_width)
        sizes = [(width, heads)] * depth + [(head_width, head_heads)] * head_depth
        self.blocks = nn.ModuleList(_Block(*size) for size in sizes)
        self.final_layer = _FinalLayer(head_width, channels)
        self.pos_embed = nn.Parameter(torch.empty(1, grid * grid, width), requires_grad=False)  # read from the file
        for name, size in (("enc_feat_rope", width // heads), ("dec_feat_rope", head_width // head_heads)):
            tables = {f"freqs_{part}": nn.Buffer(torch.empty(grid * grid, size)) for part in ("cos", "sin")}
            self.add_module(name, _Rotation(**tables))

    def forward(self, x, t, labels):
        time = self.t_embedder(t)[:, None]
        condition = F.silu(time + self.y_embedder["embedding_table"](labels)[:, None])
        s = _tokens(self.s_embedder["proj"](x)) + self.pos_embed
        for block in self.blocks[: self.depth]:
            s = block(s, condition, self.enc_feat_rope)
        s = self.s_projector(F.silu(time + s))
        y = _tokens(self.x_embedder["proj"](x))
        for block in self.blocks[self.depth :]:
            y = block(y, s, self.dec_feat_rope)
        return self.final_layer(y, s).transpose(1, 2).unflatten(-1, (self.grid, self.grid))


class _TimeEmbedding(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.W = nn.Parameter(torch.empty(256), requires_grad=False)
        self.mlp = nn.Sequential(nn.Linear(512, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t):
        angles = 2 * torch.pi * t[:, None] * self.W
        return self.mlp(torch.cat([angles.sin(), angles.cos()], -1))


class _Block(nn.Module):
    def __init__(self, width, num_heads):
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(width, 1e-6), nn.RMSNorm(width, 1e-6)
        self.attn, self.mlp = _Attention(width, num_heads), _SwiGlu(width)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x, condition, rotation):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(condition).chunk(6, -1)
        x = x + gate1 * self.attn(self.norm1(x) * (1 + scale1) + shift1, rotation)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class _Attention(nn.Module):
    def __init__(self, width, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x, rotation):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(rotation(q), rotation(k), v)
        return self.proj(x.transpose(1, 2).flatten(-2))


class _SwiGlu(nn.Module):
    def __init__(self, width):
        super().__init__()
        hidden = int(2 / 3 * 4 * width)
        self.w12, self.w3 = nn.Linear(width, 2 * hidden), nn.Linear(hidden, width)

    def forward(self, x):
        gate, value = self.w12(x).chunk(2, -1)
        return self.w3(F.silu(gate) * value)


class _Rotation(nn.Module):
    def __init__(self, freqs_cos, freqs_sin):
        super().__init__()
        self.freqs_cos, self.freqs_sin = freqs_cos, freqs_sin

    def forward(self, x):
        a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
        return x * self.freqs_cos + torch.stack([-b, a], -1).flatten(-2) * self.freqs_sin


class _FinalLayer(nn.Module):
    def __init__(self, width, channels):
        super().__init__()
        self.norm_final, self.linear = nn.RMSNorm(width, 1e-6), nn.Linear(width, channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x, condition):
        shift, scale = self.adaLN_modulation(condition).chunk(2, -1)
        return self.linear(self.norm_final(x) * (1 + scale) + shift)


def _tokens(image):
    return image.flatten(2).transpose(1, 2)
