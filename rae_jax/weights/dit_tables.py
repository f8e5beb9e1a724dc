"""Tables of published diffusion transformers; see tables."""

from rae_jax.weights.tables import SAME, Table, convolution, linear


def dit(channels):
    """Return the table of a plain DiT on latents with `channels` channels."""
    embed = linear("embed", "x_embedder.proj", layout=convolution(channels))
    return Table(
        {**_time(), **_LABEL, **embed, **_final("final_layer", "norm_final", "adaLN"), **_adaln_blocks("blocks")}
    )


def dit_dh(channels, depth, base_depth):
    """Return the table of a DiT^DH on latents of `channels` channels.

    The head's blocks follow the trunk's `depth` blocks, the first `base_depth` of which come before the base output.
    """
    return Table(
        {
            **{**_time(), **_LABEL, **_embeddings(channels)},
            **{**_adaln_blocks("base"), **_adaln_blocks("trunk"), **_adaln_blocks("head")},
            **_final("final_layer", "norm_final", "adaLN"),
            **_final("base_final_layer", "norm_final", "adaLN"),
        },
        first=_first(depth, base_depth),
    )


def in_context(channels, depth, base_depth):
    """Return the table of RAEv2's diffusion transformer; the arguments are those of `dit_dh`."""
    return Table(
        {
            **{**_time(), **_embeddings(channels)},
            "time_tokens": (SAME, "t_embedder.learnable_tokens"),
            "label_embed/table": (SAME, "ctx_embedder.embedding_table.weight"),
            "label_embed/tokens": (SAME, "ctx_embedder.learnable_tokens"),
            **{**_plain_blocks("base"), **_plain_blocks("trunk"), **_plain_blocks("head")},
            **linear("head/modulation/linear", "blocks.{}.adaln_modulation.1"),
            **_final("final_layer", "norm", "adaln"),
            **_final("base_final_layer", "norm", "adaln"),
        },
        first=_first(depth, base_depth),
    )


_LABEL = {"label_embed/table": (SAME, "y_embedder.embedding_table.weight")}


def _first(depth, base_depth):
    return {"base": 0, "trunk": base_depth, "head": depth}


def _time():
    """Return the entries of the time, and of the interval of a mean velocity (MF-RAE's names)."""
    entries = {}
    for our, their in (("time_embed", "t_embedder"), ("interval_embed", "r_embedder")):
        entries[f"{our}/frequencies"] = (SAME, f"{their}.W")
        entries |= linear(f"{our}/fc1", f"{their}.mlp.0") | linear(f"{our}/fc2", f"{their}.mlp.2")
    return entries


def _embeddings(channels):
    return {
        **linear("head_embed", "x_embedder.proj", layout=convolution(channels)),
        **linear("trunk_embed", "s_embedder.proj", layout=convolution(channels)),
        **linear("condition_proj", "s_projector"),
    }


def _final(name, norm, adaln):
    return {
        f"{name}/norm/scale": (SAME, f"{name}.{norm}.weight"),
        **linear(f"{name}/linear", f"{name}.linear"),
        **linear(f"{name}/modulation/linear", f"{name}.{adaln}_modulation.1"),
    }


def _adaln_blocks(ours):
    return {
        **_common(ours),
        **linear(f"{ours}/attention/qkv", "blocks.{}.attn.qkv"),
        **linear(f"{ours}/mlp/w12", "blocks.{}.mlp.w12"),
        **linear(f"{ours}/modulation/linear", "blocks.{}.adaLN_modulation.1"),
    }


def _plain_blocks(ours):
    return {
        **_common(ours),
        **linear(f"{ours}/attention/qkv", *(f"blocks.{{}}.attn.{part}" for part in "qkv")),
        **linear(f"{ours}/mlp/w12", "blocks.{}.mlp.w1", "blocks.{}.mlp.w2"),
    }


def _common(ours):
    """Return the entries that the blocks of all kinds have: norms, and the second layer of both branches."""
    norms = {"norm1": "norm1", "norm2": "norm2", "attention/q_norm": "attn.q_norm", "attention/k_norm": "attn.k_norm"}
    return {
        **{f"{ours}/{our}/scale": (SAME, f"blocks.{{}}.{their}.weight") for our, their in norms.items()},
        **linear(f"{ours}/attention/proj", "blocks.{}.attn.proj"),
        **linear(f"{ours}/mlp/w3", "blocks.{}.mlp.w3"),
    }
