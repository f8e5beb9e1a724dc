"""Where each parameter of our encoders is in the published checkpoints: one table a family.

Names are the files', which differ from those that transformers' modules have in memory. In 'blocks/...' ours are
stacked over depth, and '{}' stands for the block's number. Several names are joined along our last axis; None is a
bias that the family does not have, and stays zero. Entries of parameters that a variant lacks (registers, the other
kind of MLP) are passed over.
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


SAME = Layout(lambda shape: shape, lambda array: array)
LINEAR = Layout(lambda shape: shape[::-1], np.transpose)  # [out, in]
PATCHES = Layout(  # a convolution [D, 3, p, p]
    lambda shape: (shape[1], 3, *(math.isqrt(shape[0] // 3),) * 2),
    lambda array: array.transpose(2, 3, 1, 0).reshape(-1, array.shape[0]),
)
ROWS = Layout(lambda shape: shape[1:], lambda array: array[None])  # without the leading batch axis


@dataclasses.dataclass(frozen=True)
class Table:
    """`leaves`: our path -> (layout, names...). `prefix` is left off the file's names where it is there; those that
    then start with one of `ignored` are not ours: heads, text towers, mask tokens, and the final norm's affine part.
    `old_names`: (old, new) parts of names, where files of another age have the old one."""

    leaves: dict
    ignored: tuple
    prefix: str = ""
    old_names: tuple = ()


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
