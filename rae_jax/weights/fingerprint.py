"""Describe the model of a file of weights, as far as the names and the shapes of its tensors tell."""

import re
from collections.abc import Callable
from typing import NamedTuple


class _Kind(NamedTuple):
    """A kind of file: every one of `marks`, regular expressions, matches a name. Of several kinds the first counts."""

    words: str
    marks: tuple
    sizes: tuple  # functions {name: shape} -> words, or None


def describe(shapes):
    """Return what a file's {name: shape} seem to be, such as 'a DiT of width 768, depth 12'; None if unknown."""
    for kind in _KINDS:
        if all(any(re.search(mark, name) for name in shapes) for mark in kind.marks):
            sizes = [words for size in kind.sizes if (words := size(shapes))]
            return f"{kind.words} of {', '.join(sizes)}" if sizes else kind.words
    return None


def names(shapes):
    """Return some names of the tensors of a file, in words."""
    return f"tensors such as {', '.join(map(repr, sorted(shapes)[:3]))}" if shapes else "no tensors"


def _size(words, pattern, value: int | Callable):
    """Return a function that puts a number into words: an axis, or a function, of the shapes of matching tensors."""

    def say(shapes):
        found = [shape for name, shape in shapes.items() if re.search(pattern, name)]
        try:
            return words.format(value(found) if callable(value) else found[0][value]) if found else None
        except IndexError:  # fewer axes than this kind has
            return None

    return say


def _head_and_trunk(shapes):
    """Return the depths of a DiT^DH: its file numbers the blocks of trunk and head together, of mostly two widths."""
    widths = [shape[:1] for name, shape in shapes.items() if re.search(r"\bblocks\.\d+\.norm1\.weight$", name)]
    trunk, head = (
        next((shape[:1] for name, shape in shapes.items() if re.search(rf"\b{p}_embedder\.proj\.bias$", name)), ())
        for p in "sx"
    )
    if trunk == head:
        return f"depth {len(widths)} with the head"
    return f"depth {widths.count(trunk)}, head width {'x'.join(map(str, head))}, head depth {widths.count(head)}"


def _classes(pattern):
    return _size("{} classes", pattern, lambda found: found[0][0] - 1)  # and the null label


_DIT = (
    _size("width {}", r"\bt_embedder\.mlp\.2\.weight$", 0),
    _size("depth {}", r"\bblocks\.\d+\.norm1\.weight$", len),
    _classes(r"\b(y|ctx)_embedder\.embedding_table\.weight$"),
    _size("latents of {} channels", r"\bx_embedder\.proj\.weight$", 1),
)
_DIT_DH = (_DIT[0], _head_and_trunk, *_DIT[2:])
_OUR_DIT = (
    _size("width {}", r"^(trunk_)?embed/kernel$", -1),
    _size("depth {}", r"^(base|trunk|blocks)/norm1/scale$", lambda found: sum(shape[0] for shape in found)),
    _size("head width {}", r"^head_embed/kernel$", -1),
    _size("head depth {}", r"^head/norm1/scale$", 0),
    _classes(r"^label_embed/table$"),
)
_DECODER = (
    _size("width {}", r"\bdecoder_embed\.weight$", 0),
    _size("depth {}", r"\bdecoder_layers\.\d+\.intermediate\.dense\.weight$", len),
    _size("latents of {} channels", r"\bdecoder_embed\.weight$", 1),
)
_OUR_DECODER = (
    _size("width {}", r"^embed/kernel$", -1),
    _size("depth {}", r"^blocks/norm1/scale$", 0),
    _size("latents of {} channels", r"^embed/kernel$", 0),
)
_DINOV2 = r"\bencoder\.layer\.\d+\.layer_scale1\."
_BLOCK = r"^(?!decoder|text_model)(.*\.)?(layers?|blocks)\.[\d.]+\.(norm1|layer_norm1|layernorm_before)\.weight$"
_ENCODER = (
    _size("width {}", r"\bpatch_embed\w*(\.proj\w*)?\.weight$", 0),
    _size("depth {}", _BLOCK, len),
    _size("{} registers", r"\b(register|storage)_tokens$", 1),
)
_OUR_ENCODER = (
    _size("width {}", r"^patch_embed/kernel$", -1),
    _size("depth {}", r"^blocks/norm1/scale$", 0),
    _size("{} registers", r"^registers$", 1),
)
_LATENTS = (_size("shape {}", r"^(var|_latents_std)$", lambda found: found[0]),)

_KINDS = (
    _Kind("a few-step student (rae_jax's format)", (r"^interval_embed/",), _OUR_DIT),
    _Kind("RAEv2's DiT^DH (rae_jax's format)", (r"^time_tokens$",), _OUR_DIT),
    _Kind("a DiT^DH (rae_jax's format)", (r"^trunk_embed/kernel$",), _OUR_DIT),
    _Kind("a DiT (rae_jax's format)", (r"^final_layer/linear/kernel$",), _OUR_DIT),
    _Kind("an RAE decoder (rae_jax's format)", (r"^pred/kernel$",), _OUR_DECODER),
    _Kind("a VAE encoder (rae_jax's format)", (r"^quant/kernel$",), ()),
    _Kind("a VAE decoder (rae_jax's format)", (r"^post_quant/kernel$",), ()),
    _Kind("an encoder (rae_jax's format)", (r"^patch_embed/kernel$",), _OUR_ENCODER),
    _Kind("a few-step student (r_embedder) of a DiT^DH", (r"\br_embedder\.", r"\bs_embedder\."), _DIT_DH),
    _Kind("a few-step student (r_embedder) of a DiT", (r"\br_embedder\.", r"\bx_embedder\."), _DIT),
    _Kind("RAEv2's DiT^DH", (r"\bs_embedder\.", r"\bctx_embedder\."), _DIT_DH),
    _Kind("a DiT^DH", (r"\bs_embedder\.",), _DIT_DH),
    _Kind("a DiT", (r"\bx_embedder\.", r"\bblocks\.\d+\.adaLN_modulation\."), _DIT),
    _Kind("an MAE encoder (transformers' names)", (r"^vit\.embeddings\.",), _ENCODER),
    _Kind("an AutoencoderRAE of diffusers with a decoder", (r"\bdecoder_layers\.", r"^_latents_std$"), _DECODER),
    _Kind("an RAE decoder (diffusers' names)", (r"\bdecoder_layers\.\d+\.attention\.to_q\.",), _DECODER),
    _Kind("an RAE decoder", (r"\bdecoder_layers\.",), _DECODER),
    _Kind("a DINOv3 encoder (transformers' names)", (r"\blayer\.\d+\.mlp\.up_proj\.",), _ENCODER),
    _Kind("a DINOv3 encoder (Meta's names)", (r"\bstorage_tokens$",), _ENCODER),
    _Kind("a DINOv2 encoder", (_DINOV2, r"\bregister_tokens$"), _ENCODER),
    _Kind("a DINOv2 encoder without registers", (_DINOV2,), _ENCODER),
    _Kind("a DINOv2 encoder (Meta's names)", (r"\bblocks\.[\d.]+\.ls1\.gamma$",), _ENCODER),
    _Kind("a SigLIP encoder", (r"\blayers\.\d+\.self_attn\.", r"\bpatch_embedding\."), _ENCODER),
    _Kind("an MAE or DINO encoder (transformers' names)", (r"\blayer\.\d+\.layernorm_before\.",), _ENCODER),
    _Kind("a DINO encoder (timm's names)", (r"\bblocks\.\d+\.attn\.qkv\.", r"\bpatch_embed\.proj\."), _ENCODER),
    _Kind("Stable Diffusion's VAE (diffusers' names)", (r"\b(down|up)_blocks\.\d+\.resnets\.",), ()),
    _Kind("a VGG16", (r"^features\.0\.", r"^features\.28\."), ()),
    _Kind("LPIPS' linear weights", (r"^lin0\.model\.1\.weight$",), ()),
    _Kind("an InceptionV3", (r"^Mixed_7c\.",), ()),
    _Kind("statistics of latents", (r"^(var|_latents_std)$",), _LATENTS),
)
