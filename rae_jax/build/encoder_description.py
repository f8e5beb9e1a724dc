"""Values of config.encoder from the files of its weights: config.json and preprocessor_config.json of transformers,
or diffusers' config.json.

transformers leaves out entries that have its default value; they are filled here, without transformers too.
"""

import os
from pathlib import Path

from rae_jax.build import published_weights
from rae_jax.config import run_config
from rae_jax.errors import UserError, prefixed
from rae_jax.weights import hub

PREPROCESSOR = "preprocessor_config.json"
FAMILIES = {  # {model_type of transformers: config.encoder.family}
    "dinov2": "dinov2",
    "dinov2_with_registers": "dinov2",
    "dinov3_vit": "dinov3",
    "siglip_vision_model": "siglip2",  # SigLIP2 of one resolution has the modules of SigLIP
    "vit_mae": "mae",
    "vit": "dino",
}
_VIT = {
    **{"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "hidden_act": "gelu"},
    **{"image_size": 224, "patch_size": 16, "num_channels": 3},
}
_DINOV2 = {**_VIT, "mlp_ratio": 4, "use_swiglu_ffn": False, "qkv_bias": True, "layer_norm_eps": 1e-6}
_MAE = {**_VIT, "intermediate_size": 3072, "qkv_bias": True, "layer_norm_eps": 1e-12}
_BIASES = {"query_bias": True, "key_bias": False, "value_bias": True, "proj_bias": True, "mlp_bias": True}
_DINOV3 = {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536, "num_register_tokens": 0}
DEFAULTS = {  # of transformers, for the entries that are read here
    "dinov2": {**_DINOV2, "patch_size": 14},
    "dinov2_with_registers": {**_DINOV2, "num_register_tokens": 4},
    "dinov3_vit": {
        **{**_VIT, **_DINOV3, **_BIASES},
        **{"layer_norm_eps": 1e-5, "rope_theta": 100.0, "use_gated_mlp": False},
    },
    "siglip_vision_model": {
        **{**_VIT, "intermediate_size": 3072},
        **{"hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6},
    },
    "vit_mae": _MAE,
    "vit": _MAE,
}
# Entries for which only the default value is computed here.
_FIXED = ("num_channels", "qkv_bias", "layer_norm_eps", "rope_theta", "use_gated_mlp", *_BIASES)
_PIXELS = {"do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True}  # how images in [0, 1] are normalised
_MLPS = {"gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}  # {hidden_act: config.encoder.mlp}


def read(source, *, optional=False):
    """Return the values of config.encoder that `source`, a folder or a hub id, describes; None without a description.

    The values lack `weights`, and `input_size` except for a VAE, which resizes no images. Raises UserError for models
    that are not supported, for damaged files, and for a hub id whose description can be neither found in the cache nor
    fetched: with `optional` this is no description.
    """
    folder = _folder(str(source), optional)
    if folder is None:
        return None
    found = run_config.read_json(folder / run_config.FILE)
    with prefixed(str(folder / run_config.FILE)):
        if "_class_name" in found:
            return _of_diffusers(found)
        if "model_type" not in found:  # such as the config.json of rae_jax.convert
            return None
        values = _of_transformers(*_vision(found))
    with prefixed(str(folder / PREPROCESSOR)):
        return {**values, **_colours(folder / PREPROCESSOR, values["family"])}


def _folder(source, optional):
    """Return the folder with the description of a source, after a fetch from the hub; None without a description."""
    path = Path(os.path.expanduser(source))
    if source not in ("", "small") and path.is_dir():
        return path if (path / run_config.FILE).exists() else None
    if source in ("", "small") or ":" in source or path.is_file() or path.suffix in hub.SUFFIXES:
        return None
    try:
        return Path(hub.fetch_folder(source, (run_config.FILE, PREPROCESSOR)))
    except UserError:
        if optional:
            return None
        raise


def _of_diffusers(found):
    try:
        values = published_weights.of_diffusers(found)["encoder"]
    except KeyError as error:
        raise UserError(f"the entry {error} is missing: fetch the file again") from error
    if values["family"] != "sd_vae":
        del values["input_size"]
    return {"position_size": 0, "num_registers": 0, **values, **{key: tuple(values[key]) for key in ("mean", "std")}}


def _vision(found):
    """Return (model_type, entries) of the image tower. Raises UserError for unknown types."""
    kind, known = found["model_type"], ", ".join(FAMILIES)
    if kind in ("siglip", "siglip2"):  # with a text tower
        found = found.get("vision_config") or {}
        kind = found.get("model_type", f"{kind}_vision_model")
    if kind == "siglip2_vision_model":
        fix = "name a checkpoint of one resolution, such as google/siglip2-base-patch16-256"
        raise UserError(f"model_type={kind!r}, SigLIP2 of any resolution (NaFlex), is not supported: {fix}")
    if kind not in FAMILIES:
        raise UserError(f"model_type={kind!r} is not supported: choose an encoder of type siglip, {known}")
    return kind, found


def _of_transformers(kind, found):
    entries = {**_defaults(kind, found), **found}
    for key in _FIXED:
        if key in DEFAULTS[kind]:
            _require(entries, key, DEFAULTS[kind][key], *_also_computed(kind, key))
    if kind == "dinov2_with_registers" and entries["num_register_tokens"] == 0:
        raise UserError("num_register_tokens=0 is not supported in dinov2_with_registers: it must be positive")
    family, width, patch = FAMILIES[kind], _count(entries, "hidden_size"), _side(entries, "patch_size")
    mlp, hidden = _mlp(entries, width)
    return {
        "family": family,
        "width": width,
        "depth": _count(entries, "num_hidden_layers"),
        "num_heads": _count(entries, "num_attention_heads"),
        "mlp": mlp,
        "mlp_ratio": hidden / width,
        "patch_size": patch,
        # The pixels that no patch covers have no position. DINOv3's positions are rotary, without a table.
        "position_size": 0 if family == "dinov3" else _side(entries, "image_size") // patch * patch,
        "num_registers": _count(entries, "num_register_tokens", least=0) if "num_register_tokens" in entries else 0,
    }


def _defaults(kind, found):
    """Return the entries that a description leaves out, as the installed transformers fills them, or from DEFAULTS."""
    missing = DEFAULTS[kind].keys() - found.keys()
    if not missing:  # the import of transformers takes seconds
        return {}
    try:
        from transformers import AutoConfig

        theirs = AutoConfig.for_model(kind).to_dict()
    except (ImportError, ValueError):  # not installed, or older than this type
        theirs = DEFAULTS[kind]
    return {key: theirs[key] for key in missing if key in theirs}


def _also_computed(kind, key):
    """Return further values of an entry that give the same model.

    The authors' DINO has 1e-6, with which it is computed here; the same weights on the hub are described with 1e-12.
    """
    return (1e-6,) if (kind, key) == ("vit", "layer_norm_eps") else ()


def _mlp(entries, width):
    """Return (kind, hidden size) of the MLP."""
    hidden = _count(entries, "intermediate_size") if "intermediate_size" in entries else _by_ratio(entries, width)
    if entries.get("use_swiglu_ffn"):
        return "swiglu", (int(hidden * 2 / 3) + 7) // 8 * 8
    _require(entries, "hidden_act", *_MLPS)
    return _MLPS[entries["hidden_act"]], hidden


def _by_ratio(entries, width):
    ratio = entries["mlp_ratio"]
    if not isinstance(ratio, int | float) or ratio <= 0:
        raise UserError(f"mlp_ratio={ratio!r} is not supported: it must be a positive number")
    return int(width * ratio)


def _colours(path, family):
    """Return mean and std of a preprocessor's file; without the file, the values of the published encoders."""
    if not path.exists():
        return _HALVES if family == "siglip2" else published_weights.IMAGENET
    found = run_config.read_json(path)
    for key, value in _PIXELS.items():
        _require({**_PIXELS, **found}, key, value)
    colours = {key: found.get(f"image_{key}") for key in ("mean", "std")}
    for key, values in colours.items():
        whole = isinstance(values, list) and all(isinstance(value, int | float) for value in values)
        if not whole or len(values) != 3:
            raise UserError(f"image_{key}={values!r} is not supported: it must hold three numbers")
    return {key: tuple(map(float, values)) for key, values in colours.items()}


_HALVES = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}


def _require(entries, key, *values):
    if entries[key] not in values:
        raise UserError(f"{key}={entries[key]!r} is not supported: it must be {' or '.join(map(repr, values))}")


def _count(entries, key, least=1):
    value = entries[key]
    if type(value) is not int or value < least:
        raise UserError(f"{key}={value!r} is not supported: it must be an integer from {least} on")
    return value


def _side(entries, key):
    """Return the side of a square, which may be given as two sides."""
    sides = entries[key] if isinstance(entries[key], list) else [entries[key]]
    if len(set(sides)) != 1:
        raise UserError(f"{key}={entries[key]!r} is not supported: it must be square")
    return _count({key: sides[0]}, key)
