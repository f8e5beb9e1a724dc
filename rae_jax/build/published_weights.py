"""Published weights: the tables that read and write each part, and the constants that its files also hold."""

import dataclasses
import functools
import json

import numpy as np

from rae_jax.config.keys import encoder_input_size, is_vae, latent_shape, section
from rae_jax.errors import UserError
from rae_jax.models.layers import rope_2d, sincos_2d
from rae_jax.weights import dit_tables, engine, hub, safetensors_tree, sd_vae_tables, tables


def tables_of(config, part):
    """Return the tables of a part's file formats, first the one that is written; () if the part is never published."""
    match part:
        case "encoder" | "decoder" if is_vae(config):
            return sd_vae_tables.tables(part, levels=len(config.encoder.widths), depth=config.encoder.depth)
        case "encoder" | "backbone":
            return _encoder_tables(section(config, part))
        case "decoder":
            fixed = {"decoder_pos_embed": _decoder_positions(config)}
            return tuple(dataclasses.replace(t, fixed=fixed) for t in (tables.DECODER, tables.DIFFUSERS_DECODER))
        case "statistics":
            return tables.STATISTICS, tables.DIFFUSERS_STATISTICS
        case "dit" | "few_step":
            return (_dit_table(config),)
        case _:
            return ()


def load(config, part, shapes, shardings):
    """Return parameters of these shapes and shardings from config.PART.weights: a file, a folder or a hub id.

    Raises UserError for weights that do not fit the config's model.
    """
    source = section(config, part).weights
    tensors = hub.open_checkpoint(source)
    if part == "statistics":
        tensors = _spread(tensors, shapes)
    return engine.load(source, tensors, tables_of(config, part), shapes, shardings)


def tensors_of(config, part, params):
    """Return {name: array} of a part under its authors' names. Raises UserError if no published format has the part."""
    known = tables_of(config, part)
    if not known:
        raise UserError(f"no published format has the part {part!r}: leave it out of --parts, or set --format=rae_jax")
    tensors = engine.unload(params, known[0])
    if part == "statistics" and not tensors["mean"].any():
        del tensors["mean"]  # as in the released file
    return tensors


def write_released(config, parts, folder, *, pickled):
    """Write {part: parameters} to FOLDER/PART/model.safetensors, or model.pt; return the paths."""
    paths = []
    for part, params in parts.items():
        tensors = tensors_of(config, part, params)
        if pickled and part == "statistics":
            tensors.setdefault("mean", None)
        paths.append(folder / part / ("model.pt" if pickled else hub.WHOLE))
        hub.write(paths[-1], tensors, pickled=pickled)
    return paths


def write_diffusers(config, parts, folder):
    """Write encoder, decoder and statistics as one folder of diffusers' AutoencoderRAE; return the paths.

    The family sd_vae is written for AutoencoderKL. The decoder of AutoencoderRAE gives the same results on 16x16 tokens
    only: on other grids it stretches its 16x16 positions. Raises UserError for an encoder that it does not support.
    """
    if is_vae(config):
        tensors = tensors_of(config, "encoder", parts["encoder"]) | tensors_of(config, "decoder", parts["decoder"])
        return _write_folder(folder, tensors, _autoencoder_kl(config))
    e = config.encoder
    if e.family not in ("dinov2", "mae") or (e.family == "dinov2" and e.num_registers == 0):
        raise UserError(
            f"config.encoder.family={e.family!r} cannot be written for diffusers: choose dinov2 with registers, or mae"
        )
    if e.layers:
        raise UserError(
            f"config.encoder.layers={tuple(e.layers)} cannot be written for diffusers, which takes the "
            f"last layer only: set it to ()"
        )
    if 64 * e.num_heads != e.width:
        reason = f"its heads have 64 channels, config.encoder.width={e.width} makes {e.width // 64} heads"
        raise UserError(f"config.encoder.num_heads={e.num_heads} cannot be written for diffusers: {reason}")
    encoder = engine.unload(parts["encoder"], tables_of(config, "encoder")[1])
    decoder = engine.unload(parts["decoder"], tables.DIFFUSERS_DECODER)
    latents = engine.unload(parts["statistics"], tables.DIFFUSERS_STATISTICS)
    latents = {name: array.ravel()[:1] if (array == array.flat[0]).all() else array for name, array in latents.items()}
    tensors = {
        **{f"encoder.{name}": array for name, array in encoder.items()},
        **{f"decoder.{name}": array for name, array in decoder.items()},
        **{f"encoder_{name}": np.asarray(e[name], np.float32).reshape(1, 3, 1, 1) for name in ("mean", "std")},
        **latents,
    }
    return _write_folder(folder, tensors, _autoencoder_rae(config, {k: v.tolist() for k, v in latents.items()}))


def of_diffusers(description):
    """Return the config of an AutoencoderRAE or an AutoencoderKL, a nested dict, from diffusers' config.json.

    Raises UserError for other models, and for encoders that are not supported.
    """
    match description["_class_name"]:
        case "AutoencoderRAE":
            return _of_autoencoder_rae(description)
        case "AutoencoderKL":
            return _of_autoencoder_kl(description)
        case other:
            raise UserError(
                f"_class_name={other!r} of diffusers is not supported: choose an AutoencoderRAE or an AutoencoderKL"
            )


def _of_autoencoder_rae(d):
    width, depth, patch = (d[f"encoder_{key}"] for key in ("hidden_size", "num_hidden_layers", "patch_size"))
    fixed = {  # constants of diffusers, for every width
        "dinov2": {"position_size": 518, "num_registers": 4, "mlp": "gelu", "mlp_ratio": 4.0},
        "mae": {"position_size": 224, "num_registers": 0, "mlp": "gelu", "mlp_ratio": 3072 / width},
        "siglip2": {"position_size": 256, "num_registers": 0, "mlp": "gelu_tanh", "mlp_ratio": 3072 / width},
    }
    family = d["encoder_type"]
    if family not in fixed:
        raise UserError(f"encoder_type={family!r} of AutoencoderRAE is not supported: choose from {', '.join(fixed)}")
    size = d["encoder_input_size"]
    encoder = {"width": width, "depth": depth, "num_heads": width // 64, "patch_size": patch, "input_size": size}
    mean, std = (d.get(f"encoder_norm_{key}") or IMAGENET[key] for key in ("mean", "std"))
    return {
        "unroll": False,
        "data": {"image_size": d["patch_size"] * (size // patch)},
        "encoder": {"family": family, **fixed[family], **encoder, "mean": mean, "std": std},
        "decoder": {
            "width": d["decoder_hidden_size"],
            "depth": d["decoder_num_hidden_layers"],
            "num_heads": d["decoder_num_attention_heads"],
            "hidden": d["decoder_intermediate_size"],
            "patch_size": d["patch_size"],
        },
    }


IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


def _of_autoencoder_kl(d):
    widths = tuple(d["block_out_channels"])
    smaller = 2 ** (len(widths) - 1)
    encoder = {"family": "sd_vae", "widths": widths, "width": d["latent_channels"], "depth": d["layers_per_block"]}
    encoder.update({"num_heads": 1, "patch_size": smaller, "input_size": 0, "mean": (0.5,) * 3, "std": (0.5,) * 3})
    return {
        "unroll": False,
        "data": {"image_size": d["sample_size"]},
        "encoder": encoder,
        "decoder": {"patch_size": smaller},
    }


def _write_folder(folder, tensors, description):
    safetensors_tree.write(folder / hub.DIFFUSERS, tensors)
    (folder / "config.json").write_text(json.dumps(description) + "\n")
    return [folder / hub.DIFFUSERS, folder / "config.json"]


def _autoencoder_kl(config):
    e = config.encoder
    return {
        "_class_name": "AutoencoderKL",
        "down_block_types": ["DownEncoderBlock2D"] * len(e.widths),
        "up_block_types": ["UpDecoderBlock2D"] * len(e.widths),
        "block_out_channels": list(e.widths),
        "layers_per_block": e.depth,
        "latent_channels": e.width,
        "norm_num_groups": 32,
        "sample_size": config.data.image_size,
    }


def _autoencoder_rae(config, latents):
    e, d = config.encoder, config.decoder
    return {
        "_class_name": "AutoencoderRAE",
        "encoder_type": e.family,
        "encoder_hidden_size": e.width,
        "encoder_patch_size": e.patch_size,
        "encoder_num_hidden_layers": e.depth,
        "encoder_input_size": encoder_input_size(config),
        "encoder_norm_mean": list(e.mean),
        "encoder_norm_std": list(e.std),
        "decoder_hidden_size": d.width,
        "decoder_num_hidden_layers": d.depth,
        "decoder_num_attention_heads": d.num_heads,
        "decoder_intermediate_size": d.hidden,
        "patch_size": d.patch_size,
        "latents_mean": latents["_latents_mean"],
        "latents_std": latents["_latents_std"],
    }


def _encoder_tables(e):
    """Return the tables of an encoder. `fixed` tensors (a last norm, mask tokens) are written, but never used."""
    width = e.width
    match e.family:
        case "small":
            return ()
        case "dino":
            norm = {"norm.weight": np.ones(width), "norm.bias": np.zeros(width)}
            return dataclasses.replace(tables.DINO_TIMM, fixed=norm), tables.DINO
        case "dinov2":
            mask = {"embeddings.mask_token": np.zeros((1, width))}
            whole = dataclasses.replace(tables.DINOV2, fixed=mask)
            return whole, *(tables.in_diffusers(whole, names) for names in (tables.NEW_DINOV2, ()))
        case "siglip2":
            return tables.SIGLIP2, tables.in_diffusers(tables.SIGLIP2, prefix="encoder.vision_model.")
        case "mae":
            return tables.MAE, *(tables.in_diffusers(tables.MAE, names) for names in (tables.NEW_MAE, ()))
        case "dinov3":
            masks = tuple(f"blocks.{block}.attn.qkv.bias_mask" for block in range(e.depth))
            meta = dataclasses.replace(tables.DINOV3_META, ignored=(*tables.DINOV3_META.ignored, *masks))
            return tables.DINOV3, meta
        case other:
            raise ValueError(f"unknown encoder family {other!r}")


def _dit_table(config):
    c, (height, width, channels) = config.dit, latent_shape(config)
    grid = height // c.patch_size, width // c.patch_size
    positions = {"pos_embed": sincos_2d(*grid, c.width)[None]}
    trunk = functools.partial(_rotations, grid=grid, head_dim=c.width // c.num_heads)
    if c.head_depth == 0:
        return dataclasses.replace(dit_tables.dit(channels), fixed=positions | trunk("feat_rope"))
    head = functools.partial(_rotations, grid=grid, head_dim=c.head_width // c.head_num_heads)
    match c.conditioning:
        case "adaln":
            fixed = positions | trunk("enc_feat_rope") | head("dec_feat_rope")
            table = dit_tables.dit_dh(channels, c.depth, c.base_depth)
        case "in_context":
            fixed = trunk("enc_rope", context=c.time_tokens + c.label_tokens) | head("dec_rope")
            table = dit_tables.in_context(channels, c.depth, c.base_depth)
        case other:
            raise ValueError(f"unknown conditioning {other!r}")
    return dataclasses.replace(table, fixed=fixed)


def _rotations(name, grid, head_dim, context=0):
    """Return the tensors of a file for the rotations of image tokens, and of `context` tokens that are not rotated."""
    angles = np.pad(rope_2d(*grid, head_dim), ((0, context), (0, 0)))
    return {f"{name}.freqs_cos": np.cos(angles), f"{name}.freqs_sin": np.sin(angles)}


def _decoder_positions(config):
    """Return the positions of the decoder's tokens, [1, 1 + N, width], with zeros for the class token first."""
    side = config.data.image_size // config.decoder.patch_size
    return np.pad(sincos_2d(side, side, config.decoder.width), ((1, 0), (0, 0)))[None]


def _spread(tensors, shapes):
    """Return statistics of full shape: a missing mean is zero, a single number stands for all latent elements."""
    height, width, channels = shapes["var"].shape
    if "var" in tensors and "mean" not in tensors:
        tensors = {**tensors, "mean": hub.Tensor((1,), lambda: np.zeros(1))}

    def spread(tensor):
        return hub.Tensor((channels, height, width), lambda: np.broadcast_to(tensor.read(), (channels, height, width)))

    return {name: spread(tensor) if tensor.shape == (1,) else tensor for name, tensor in tensors.items()}
