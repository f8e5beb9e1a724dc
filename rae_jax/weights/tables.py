"""Tables of published checkpoints: the place of each of our parameters, with one table for each kind of file.

Names are the names in the files, which differ from the names of transformers' modules in memory. If our parameter is
stacked over depth, '{}' stands for the number of the block. Several names are joined along our last axis; None is a
bias that the family does not have, and stays zero. Entries for parameters that a variant does not have (registers, the
other kind of MLP) are ignored.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np


class Layout(NamedTuple):
    """Conversion between the file's array and ours."""

    shape: Callable  # our shape -> the file's
    convert: Callable  # the file's array -> ours
    restore: Callable  # our array -> the file's


def convolution(channels):
    """Return the layout of a linear map of patches that the file holds as a convolution [D, C, p, p]."""

    def shape(ours):
        return ours[1], channels, *(math.isqrt(ours[0] // channels),) * 2

    return Layout(
        shape,
        lambda array: array.transpose(2, 3, 1, 0).reshape(-1, array.shape[0]),
        lambda array: array.reshape(*shape(array.shape)[2:], channels, -1).transpose(3, 2, 0, 1),
    )


def _channels_first(shape):
    return shape[-1], *shape[:-1]


def _without_keys(bias):
    """Return the bias of queries, keys and values with zeros for the keys."""
    query, key, value = np.split(bias, 3)
    return np.concatenate([query, np.zeros_like(key), value])


SAME = Layout(lambda shape: shape, lambda array: array, lambda array: array)
LINEAR = Layout(lambda shape: shape[::-1], np.transpose, np.transpose)  # [out, in]
PATCHES = convolution(3)
ROWS = Layout(lambda shape: shape[1:], lambda array: array[None], lambda array: array[0])  # without the batch axis
LATENT = Layout(_channels_first, lambda array: np.moveaxis(array, 0, -1), lambda array: np.moveaxis(array, -1, 0))
WITHOUT_KEYS = Layout(lambda shape: shape, _without_keys, lambda array: array)
# diffusers divides by std + 1e-5, and this project by sqrt(variance + 1e-5).
DEVIATION = Layout(
    _channels_first,
    lambda array: np.square(np.moveaxis(array, 0, -1).astype(np.float64) + 1e-5) - 1e-5,
    lambda array: np.sqrt(np.moveaxis(array, -1, 0).astype(np.float64) + 1e-5) - 1e-5,
)


@dataclasses.dataclass(frozen=True)
class Table:
    """The tensors of one kind of file.

    `leaves`: {our path: (layout, names...)}. `prefix` is removed from the file's names. Names that then start with one
    of `ignored` are not used: heads, text towers, mask tokens, and the affine part of the final norm. `first`: the
    number of the first block in each of our stacks. `fixed`: tensors of the file that are never learned.
    """

    leaves: dict
    ignored: tuple = ()
    prefix: str = ""
    first: dict = dataclasses.field(default_factory=lambda: {"blocks": 0})
    fixed: dict = dataclasses.field(default_factory=dict)

    def renamed(self, replacements, **changes):
        """Return the table with these (old, new) parts of names replaced, and with `changes` of its fields."""

        def rename(name):
            for old, new in replacements:
                name = name and name.replace(old, new)
            return name

        leaves = {path: (layout, *map(rename, names)) for path, (layout, *names) in self.leaves.items()}
        return dataclasses.replace(self, leaves=leaves, **changes)


def linear(ours, *theirs, layout=LINEAR):
    """Return the entries of a table for a linear layer; several of the file's layers are joined to ours."""
    return {
        f"{ours}/kernel": (layout, *(f"{name}.weight" for name in theirs)),
        f"{ours}/bias": (SAME, *(f"{name}.bias" for name in theirs)),
    }


def _norm(ours, theirs):
    return {f"{ours}/scale": (SAME, f"{theirs}.weight"), f"{ours}/bias": (SAME, f"{theirs}.bias")}


def _scales(block):
    return {f"blocks/scale{i}": (SAME, f"{block}.layer_scale{i}.lambda1") for i in (1, 2)}


def _attention(*query_key_value, output):
    return linear("blocks/attention/qkv", *query_key_value) | linear("blocks/attention/proj", output)


def _mlp(first, second):
    return linear("blocks/mlp/fc1", first) | linear("blocks/mlp/fc2", second)


_LAYER = "encoder.layer.{}"
_VIT = {  # parameters that DINOv2 and MAE have in common
    **linear("patch_embed", "embeddings.patch_embeddings.projection", layout=PATCHES),
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
        **linear("blocks/mlp/w12", f"{_LAYER}.mlp.weights_in"),
        **linear("blocks/mlp/w3", f"{_LAYER}.mlp.weights_out"),
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
        **linear("patch_embed", "embeddings.patch_embedding", layout=PATCHES),
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
        **linear("patch_embed", "embeddings.patch_embeddings", layout=PATCHES),
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

# Meta's own files of DINOv3. The keys' part of the bias is masked there: in use it is zero, whatever the file holds.
DINOV3_META = Table(
    {
        **linear("patch_embed", "patch_embed.proj", layout=PATCHES),
        "cls_token": (SAME, "cls_token"),
        "registers": (SAME, "storage_tokens"),
        **_norm("blocks/norm1", "blocks.{}.norm1"),
        **_norm("blocks/norm2", "blocks.{}.norm2"),
        **_attention("blocks.{}.attn.qkv", output="blocks.{}.attn.proj"),
        "blocks/attention/qkv/bias": (WITHOUT_KEYS, "blocks.{}.attn.qkv.bias"),
        **_mlp("blocks.{}.mlp.fc1", "blocks.{}.mlp.fc2"),
        **{f"blocks/scale{i}": (SAME, f"blocks.{{}}.ls{i}.gamma") for i in (1, 2)},
    },
    ignored=("mask_token", "norm.", "rope_embed."),
)

# DINO in transformers has MAE's names except for the ignored tensors; the authors' file has timm's names.
DINO = dataclasses.replace(MAE, ignored=("layernorm.", "pooler."))
DINO_TIMM = Table(
    {
        **linear("patch_embed", "patch_embed.proj", layout=PATCHES),
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
_RAE = ("encoder.", "encoder_", "_latents_")  # other tensors of an autoencoder's file
DECODER = Table(
    {
        **linear("embed", "decoder_embed"),
        "cls_token": (SAME, "trainable_cls_token"),
        **_norm("blocks/norm1", f"{_LAYER}.layernorm_before"),
        **_norm("blocks/norm2", f"{_LAYER}.layernorm_after"),
        **_attention(
            *(f"{_LAYER}.attention.attention.{part}" for part in ("query", "key", "value")),
            output=f"{_LAYER}.attention.output.dense",
        ),
        **_mlp(f"{_LAYER}.intermediate.dense", f"{_LAYER}.output.dense"),
        **_norm("norm", "decoder_norm"),
        **linear("pred", "decoder_pred"),
    },
    ignored=_RAE,
    prefix="decoder.",
)
STATISTICS = Table({"mean": (LATENT, "mean"), "var": (LATENT, "var")})

# diffusers' AutoencoderRAE: encoder, decoder and statistics in one file, in which the encoder has the names of
# transformers' modules in memory. These names changed in version 5 of transformers; files of both kinds exist.
NEW_DINOV2 = (
    *((f".attention.attention.{part}.", f".attention.{part[0]}_proj.") for part in ("query", "key", "value")),
    (".attention.output.dense.", ".attention.o_proj."),
)
NEW_MAE = (
    *NEW_DINOV2,
    *((".intermediate.dense.", ".mlp.fc1."), (".output.dense.", ".mlp.fc2."), ("encoder.layer.", "layers.")),
)


def in_diffusers(table, renames=(), prefix="encoder."):
    """Return the table of an encoder in a file of AutoencoderRAE."""
    return table.renamed(renames, prefix=prefix, ignored=(*table.ignored, *_RAE[1:], "decoder."))


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
