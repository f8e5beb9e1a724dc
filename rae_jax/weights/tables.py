"""Where each of our parameters is in the published checkpoints: one table a kind of file.

Names are the files', which differ from those that transformers' modules have in memory. Where ours are stacked over
depth, '{}' stands for the block's number. Several names are joined along our last axis; None is a bias that the
family does not have, and stays zero. Entries of parameters that a variant lacks (registers, the other kind of MLP)
are passed over.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np


class Layout(NamedTuple):
    """How the file's array relates to ours."""

    shape: Callable  # our shape -> the file's
    convert: Callable  # the file's array -> ours
    restore: Callable  # our array -> the file's


def _convolution(channels):
    """The layout of a linear map of patches that the file holds as a convolution [D, C, p, p]."""

    def shape(ours):
        return ours[1], channels, *(math.isqrt(ours[0] // channels),) * 2

    return Layout(
        shape,
        lambda array: array.transpose(2, 3, 1, 0).reshape(-1, array.shape[0]),
        lambda array: array.reshape(*shape(array.shape)[2:], channels, -1).transpose(3, 2, 0, 1),
    )


def _channels_first(shape):
    return shape[-1], *shape[:-1]


SAME = Layout(lambda shape: shape, lambda array: array, lambda array: array)
LINEAR = Layout(lambda shape: shape[::-1], np.transpose, np.transpose)  # [out, in]
PATCHES = _convolution(3)
ROWS = Layout(lambda shape: shape[1:], lambda array: array[None], lambda array: array[0])  # without the batch axis
LATENT = Layout(_channels_first, lambda array: np.moveaxis(array, 0, -1), lambda array: np.moveaxis(array, -1, 0))
# diffusers divides by a deviation + 1e-5 where we divide by sqrt(variance + 1e-5).
DEVIATION = Layout(
    _channels_first,
    lambda array: np.square(np.moveaxis(array, 0, -1).astype(np.float64) + 1e-5) - 1e-5,
    lambda array: np.sqrt(np.moveaxis(array, -1, 0).astype(np.float64) + 1e-5) - 1e-5,
)


@dataclasses.dataclass(frozen=True)
class Table:
    """What one kind of file holds.

    `leaves`: our path -> (layout, names...). `prefix` is left off the file's names where it is there; those that then
    start with one of `ignored` are not ours: heads, text towers, mask tokens, and the final norm's affine part.
    `first`: the number of the first block in each of our stacks. `fixed`: tensors of the file that are never learned.
    """

    leaves: dict
    ignored: tuple = ()
    prefix: str = ""
    first: dict = dataclasses.field(default_factory=lambda: {"blocks": 0})
    fixed: dict = dataclasses.field(default_factory=dict)

    def renamed(self, replacements, **changes):
        """The same table for files that differ by these (old, new) parts of names, and by `changes` of its fields."""

        def rename(name):
            for old, new in replacements:
                name = name and name.replace(old, new)
            return name

        leaves = {path: (layout, *map(rename, names)) for path, (layout, *names) in self.leaves.items()}
        return dataclasses.replace(self, leaves=leaves, **changes)


def _linear(ours, *theirs, layout=LINEAR):
    return {
        f"{ours}/kernel": (layout, *(f"{name}.weight" for name in theirs)),
        f"{ours}/bias": (SAME, *(f"{name}.bias" for name in theirs)),
    }


def _norm(ours, theirs):
    return {f"{ours}/scale": (SAME, f"{theirs}.weight"), f"{ours}/bias": (SAME, f"{theirs}.bias")}


def _scales(block):
    return {f"blocks/scale{i}": (SAME, f"{block}.layer_scale{i}.lambda1") for i in (1, 2)}


def _attention(*query_key_value, output):
    return _linear("blocks/attention/qkv", *query_key_value) | _linear("blocks/attention/proj", output)


def _mlp(first, second):
    return _linear("blocks/mlp/fc1", first) | _linear("blocks/mlp/fc2", second)


_LAYER = "encoder.layer.{}"
_VIT = {  # what DINOv2 and MAE have in common
    **_linear("patch_embed", "embeddings.patch_embeddings.projection", layout=PATCHES),
    "cls_token": (SAME, "embeddings.cls_token"),
    "pos_embed": (SAME, "embeddings.position_embeddings"),
    **_attention(
        *(f"{_LAYER}.attention.attention.{part}" for part in ("query", "key", "value")),
        output=f"{_LAYER}.attention.output.dense",
    ),
}

DINOV2 = Table(
    {
        **_VIT,
        "registers": (SAME, "embeddings.register_tokens"),
        **_norm("blocks/norm1", f"{_LAYER}.norm1"),
        **_norm("blocks/norm2", f"{_LAYER}.norm2"),
        **_mlp(f"{_LAYER}.mlp.fc1", f"{_LAYER}.mlp.fc2"),
        **_linear("blocks/mlp/w12", f"{_LAYER}.mlp.weights_in"),
        **_linear("blocks/mlp/w3", f"{_LAYER}.mlp.weights_out"),
        **_scales(_LAYER),
    },
    ignored=("embeddings.mask_token", "layernorm."),
)

MAE = Table(
    {
        **_VIT,
        **_norm("blocks/norm1", f"{_LAYER}.layernorm_before"),
        **_norm("blocks/norm2", f"{_LAYER}.layernorm_after"),
        **_mlp(f"{_LAYER}.intermediate.dense", f"{_LAYER}.output.dense"),
    },
    ignored=("layernorm.", "decoder."),
    prefix="vit.",
)

_LAYER = "encoder.layers.{}"
SIGLIP2 = Table(
    {
        **_linear("patch_embed", "embeddings.patch_embedding", layout=PATCHES),
        "pos_embed": (ROWS, "embeddings.position_embedding.weight"),
        **_norm("blocks/norm1", f"{_LAYER}.layer_norm1"),
        **_norm("blocks/norm2", f"{_LAYER}.layer_norm2"),
        **_attention(*(f"{_LAYER}.self_attn.{p}_proj" for p in "qkv"), output=f"{_LAYER}.self_attn.out_proj"),
        **_mlp(f"{_LAYER}.mlp.fc1", f"{_LAYER}.mlp.fc2"),
    },
    ignored=("post_layernorm.", "head.", "text_model.", "logit_scale", "logit_bias"),
    prefix="vision_model.",
)

_LAYER = "layer.{}"
DINOV3 = Table(
    {
        **_linear("patch_embed", "embeddings.patch_embeddings", layout=PATCHES),
        "cls_token": (SAME, "embeddings.cls_token"),
        "registers": (SAME, "embeddings.register_tokens"),
        **_norm("blocks/norm1", f"{_LAYER}.norm1"),
        **_norm("blocks/norm2", f"{_LAYER}.norm2"),
        **_attention(*(f"{_LAYER}.attention.{p}_proj" for p in "qkv"), output=f"{_LAYER}.attention.o_proj"),
        "blocks/attention/qkv/bias": (
            SAME,
            f"{_LAYER}.attention.q_proj.bias",
            None,
            f"{_LAYER}.attention.v_proj.bias",
        ),
        **_mlp(f"{_LAYER}.mlp.up_proj", f"{_LAYER}.mlp.down_proj"),
        **_scales(_LAYER),
    },
    ignored=("embeddings.mask_token", "norm."),
)

# DINO as transformers has it is MAE by other names of what is left out; the authors' file has timm's names.
DINO = dataclasses.replace(MAE, ignored=("layernorm.", "pooler."))
DINO_TIMM = Table(
    {
        **_linear("patch_embed", "patch_embed.proj", layout=PATCHES),
        "cls_token": (SAME, "cls_token"),
        "pos_embed": (SAME, "pos_embed"),
        **_norm("blocks/norm1", "blocks.{}.norm1"),
        **_norm("blocks/norm2", "blocks.{}.norm2"),
        **_attention("blocks.{}.attn.qkv", output="blocks.{}.attn.proj"),
        **_mlp("blocks.{}.mlp.fc1", "blocks.{}.mlp.fc2"),
    },
    ignored=("norm.", "head."),
)

_LAYER = "decoder_layers.{}"
_RAE = ("encoder.", "encoder_", "_latents_")  # what else an autoencoder's file holds
DECODER = Table(
    {
        **_linear("embed", "decoder_embed"),
        "cls_token": (SAME, "trainable_cls_token"),
        **_norm("blocks/norm1", f"{_LAYER}.layernorm_before"),
        **_norm("blocks/norm2", f"{_LAYER}.layernorm_after"),
        **_attention(
            *(f"{_LAYER}.attention.attention.{part}" for part in ("query", "key", "value")),
            output=f"{_LAYER}.attention.output.dense",
        ),
        **_mlp(f"{_LAYER}.intermediate.dense", f"{_LAYER}.output.dense"),
        **_norm("norm", "decoder_norm"),
        **_linear("pred", "decoder_pred"),
    },
    ignored=_RAE,
    prefix="decoder.",
)
STATISTICS = Table({"mean": (LATENT, "mean"), "var": (LATENT, "var")})

# diffusers' AutoencoderRAE: encoder, decoder and statistics in one file, in which the encoder has the names of
# transformers' modules in memory. Those changed with its version 5; files of both kinds are about.
_NEW_ATTENTION = (
    *((f".attention.attention.{part}.", f".attention.{part[0]}_proj.") for part in ("query", "key", "value")),
    (".attention.output.dense.", ".attention.o_proj."),
)
_NEW_MLP = ((".intermediate.dense.", ".mlp.fc1."), (".output.dense.", ".mlp.fc2."), ("encoder.layer.", "layers."))


def diffusers_encoder(table):
    """The tables of an encoder in AutoencoderRAE: of today's transformers, then of those before version 5."""
    inside = {"prefix": "encoder.", "ignored": (*table.ignored, *_RAE[1:], "decoder.")}
    is_dinov2 = table.leaves is DINOV2.leaves
    renames = _NEW_ATTENTION if is_dinov2 else _NEW_ATTENTION + _NEW_MLP
    return table.renamed(renames, **inside), dataclasses.replace(table, **inside)


DIFFUSERS_DECODER = DECODER.renamed(
    (
        *((f".attention.attention.{part}.", f".attention.to_{part[0]}.") for part in ("query", "key", "value")),
        (".attention.output.dense.", ".attention.to_out.0."),
    )
)
DIFFUSERS_STATISTICS = Table(
    {"mean": (LATENT, "_latents_mean"), "var": (DEVIATION, "_latents_std")},
    ignored=("encoder", "decoder."),
)


def dit(channels):
    """The plain DiT on latents of that many channels."""
    return Table(
        {**_dit_common(), **_linear("embed", "x_embedder.proj", layout=_convolution(channels)), **_dit_blocks("blocks")}
    )


def dit_dh(channels, depth):
    """DiT^DH on latents of that many channels; the head's blocks are numbered after the trunk's `depth`."""
    return Table(
        {
            **_dit_common(),
            **_linear("head_embed", "x_embedder.proj", layout=_convolution(channels)),
            **_linear("trunk_embed", "s_embedder.proj", layout=_convolution(channels)),
            **_linear("condition_proj", "s_projector"),
            **_dit_blocks("trunk"),
            **_dit_blocks("head"),
        },
        first={"trunk": 0, "head": depth},
    )


def _dit_common():
    return {
        "time_embed/frequencies": (SAME, "t_embedder.W"),
        **_linear("time_embed/fc1", "t_embedder.mlp.0"),
        **_linear("time_embed/fc2", "t_embedder.mlp.2"),
        "label_embed/table": (SAME, "y_embedder.embedding_table.weight"),
        "final_layer/norm/scale": (SAME, "final_layer.norm_final.weight"),
        **_linear("final_layer/linear", "final_layer.linear"),
        **_linear("final_layer/modulation/linear", "final_layer.adaLN_modulation.1"),
    }


def _dit_blocks(ours):
    norms = {"norm1": "norm1", "norm2": "norm2", "attention/q_norm": "attn.q_norm", "attention/k_norm": "attn.k_norm"}
    return {
        **{f"{ours}/{our}/scale": (SAME, f"blocks.{{}}.{their}.weight") for our, their in norms.items()},
        **_linear(f"{ours}/attention/qkv", "blocks.{}.attn.qkv"),
        **_linear(f"{ours}/attention/proj", "blocks.{}.attn.proj"),
        **_linear(f"{ours}/mlp/w12", "blocks.{}.mlp.w12"),
        **_linear(f"{ours}/mlp/w3", "blocks.{}.mlp.w3"),
        **_linear(f"{ours}/modulation/linear", "blocks.{}.adaLN_modulation.1"),
    }
