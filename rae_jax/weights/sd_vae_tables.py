"""Tables of diffusers' files of Stable Diffusion's autoencoder, which hold encoder and decoder."""

from rae_jax.weights.tables import LINEAR, SAME, Layout, Table

CONV = Layout(  # [out, in, h, w]
    lambda shape: (*shape[:1:-1], *shape[:2]),
    lambda array: array.transpose(2, 3, 1, 0),
    lambda array: array.transpose(3, 2, 0, 1),
)

# (new, old): names of the layers of attention, in files of older versions of diffusers.
_OLD_NAMES = ((".to_q.", ".query."), (".to_k.", ".key."), (".to_v.", ".value."), (".to_out.0.", ".proj_attn."))


def tables(part, *, levels, depth):
    """Return the tables of 'encoder' or 'decoder', for current and for old files.

    `depth`: the residual blocks at each level of the encoder.
    """
    match part:
        case "encoder":
            quant, side, resample = "quant", "down_blocks", "downsamplers"
            ignored = ("decoder.", "post_quant_conv.")
        case "decoder":
            quant, side, resample = "post_quant", "up_blocks", "upsamplers"
            ignored = ("encoder.", "quant_conv.")
            depth += 1
        case other:
            raise ValueError(f"no part {other!r}")
    middle = f"{part}.mid_block"
    leaves = {
        **_layer(quant, f"{quant}_conv"),
        **_layer("conv_in", f"{part}.conv_in"),
        **_block("middle/block0", f"{middle}.resnets.0"),
        **_norm("middle/norm", f"{middle}.attentions.0.group_norm"),
        **_layer("middle/attention/qkv", *(f"{middle}.attentions.0.to_{p}" for p in "qkv"), layout=LINEAR),
        **_layer("middle/attention/proj", f"{middle}.attentions.0.to_out.0", layout=LINEAR),
        **_block("middle/block1", f"{middle}.resnets.1"),
        **_norm("norm_out", f"{part}.conv_norm_out"),
        **_layer("conv_out", f"{part}.conv_out"),
    }
    for level in range(levels):
        leaves |= _layer(f"level{level}_resample", f"{part}.{side}.{level}.{resample}.0.conv")
        for block in range(depth):
            leaves |= _block(f"level{level}_block{block}", f"{part}.{side}.{level}.resnets.{block}")
    table = Table(leaves, ignored)
    return table, table.renamed(_OLD_NAMES)


def _block(ours, theirs):
    return {
        **_norm(f"{ours}/norm1", f"{theirs}.norm1"),
        **_layer(f"{ours}/conv1", f"{theirs}.conv1"),
        **_norm(f"{ours}/norm2", f"{theirs}.norm2"),
        **_layer(f"{ours}/conv2", f"{theirs}.conv2"),
        **_layer(f"{ours}/shortcut", f"{theirs}.conv_shortcut"),
    }


def _norm(ours, theirs):
    return _layer(ours, theirs, layout=SAME, weight="scale")


def _layer(ours, *theirs, layout=CONV, weight="kernel"):
    return {
        f"{ours}/{weight}": (layout, *(f"{name}.weight" for name in theirs)),
        f"{ours}/bias": (SAME, *(f"{name}.bias" for name in theirs)),
    }
