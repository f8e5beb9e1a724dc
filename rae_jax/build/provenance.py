"""The encoder of the latents that decoders, statistics and DiTs were made for, as far as files and their names tell."""

import json
import re

from rae_jax.build import saved_config
from rae_jax.config import inputs, run_config, scopes
from rae_jax.config.keys import flatten
from rae_jax.errors import UserError
from rae_jax.weights import safetensors_tree

ON_LATENTS = ("decoder", "statistics", "dit", "few_step")  # the parts that take or make latents
# The released files, and the repositories of diffusers: family, registers, size.
_NAMES = (
    re.compile(r"(?:decoders|stats|DiTs)/(dinov2|dinov3|siglip2|mae)/(wReg_)?(small|base|large)/", re.IGNORECASE),
    re.compile(r"/RAE-(dinov2|dinov3|siglip2|mae)-(wReg-)?(small|base|large)-", re.IGNORECASE),
)
# RAEv2's released files: latents of K layers of DINOv3-L; the decoder's output is the image itself.
_RAEV2 = re.compile(r"[/:]stage[12]/\w+/dinov3l-k(\d+)/")
_WIDTHS = {"small": 384, "base": 768, "large": 1024}
# Keys on which latents depend, but which may differ for the same decoder: another size of images, another precision.
_FREE = re.compile(r"dtype|data\..*|encoder\.(input_size|position_size)")


def check(config, part, source):
    """Raise UserError if the weights `source` of a part were made for the latents of another encoder than config's."""
    if part not in ON_LATENTS:
        return
    for pattern in _NAMES:
        if found := pattern.search(f"/{source}"):
            _compare_name(config, *found.groups())
            _compare_output(config, part, "normalised")
    if found := _RAEV2.search(f"/{source}"):
        _compare_layers(config, int(found[1]))
        _compare_output(config, part, "image")
    folder = saved_config.folder_of(source, part)
    if "://" not in source and (folder / run_config.FILE).exists():
        try:
            theirs = saved_config.read_nested(folder)
        except UserError:  # the config.json of another program tells nothing
            return
        if part == "decoder" and "output" in theirs.get("decoder", {}):
            _compare_output(config, part, theirs["decoder"]["output"])
        ours = _latent_keys(json.loads(config.to_json()))
        for key, value in _latent_keys(json.loads(json.dumps(theirs))).items():
            if ours.get(key, value) != value:
                raise UserError(f"these weights are for latents of config.{key}={value!r}, not {ours[key]!r}: {_FIX}")


_FIX = "choose encoder, decoder, statistics and DiT that were made for each other"


def _compare_name(config, family, registers, size):
    e = config.encoder
    words = f"{family.lower()} {size.lower()}{' with registers' if registers else ''}"
    ours = f"{e.family}, width {e.width}, {e.num_registers} registers"
    same = (e.family, e.width) == (family.lower(), _WIDTHS[size.lower()])
    if not same or (family.lower() == "dinov2" and bool(registers) != bool(e.num_registers)):
        raise UserError(
            f"by their name these weights are for latents of {words}, not of config.encoder ({ours}): {_FIX}"
        )


def _compare_layers(config, number):
    e = config.encoder
    if (e.family, e.width, len(e.layers) or 1) != ("dinov3", 1024, number):
        raise UserError(
            f"by their name these weights are for latents of {number} layers of dinov3 large, not of config.encoder "
            f"({e.family}, width {e.width}, {len(e.layers) or 1} layers): {_FIX}"
        )


def _compare_output(config, part, output):
    if part == "decoder" and config.decoder.output != output:
        raise UserError(
            f"these weights are for config.decoder.output={output!r}, not {config.decoder.output!r}: {_FIX}"
        )


def _latent_keys(nested):
    keys = scopes.select(flatten(nested), scopes.LATENTS)
    return {key: value for key, value in keys.items() if not _FREE.fullmatch(key)}


def check_encoder(config, part, encoder_params):
    """Raise UserError if the folder of a part's weights records another encoder than `encoder_params`."""
    weights = config[part].weights if part in ON_LATENTS else ""
    if not weights or part in config.stages or "://" in weights:
        return
    recorded = inputs.read(saved_config.folder_of(weights, part)).get("weights", {}).get("encoder")
    if recorded and recorded != safetensors_tree.digest(encoder_params):
        raise UserError(f"config.{part}.weights={weights!r} are for latents of another encoder's weights: {_FIX}")
