"""Messages about weights that do not fit say what the file seems to be, what the config needs, and what differs."""

import json

import autoencoder_cases
import dit_cases
import encoder_cases
import file_cases
import numpy as np
import pytest
from conftest import one_device
from flax import traverse_util
from published_cases import kind
from safetensors.numpy import save_file

from rae_jax.build import part_weights
from rae_jax.errors import UserError
from rae_jax.weights import checks, fingerprint, safetensors_tree

FIX = "name another file, or change the config"
FILES = {
    "plain_qk_norm_patch": "a DiT of width 8, depth 1, 5 classes, latents of 4 channels",
    "dh_qk_norm": "a DiT^DH of width 8, depth 1, head width 16, head depth 2, 5 classes, latents of 24 channels",
    "student": "a few-step student (r_embedder) of a DiT^DH of width 8, depth 1, head width 16, head depth 2, "
    "5 classes, latents of 24 channels",
    "raev2": "RAEv2's DiT^DH of width 16, depth 3, head width 24, head depth 2, 7 classes, latents of 12 channels",
    "decoder": "an RAE decoder of width 32, depth 2, latents of 64 channels",
    "statistics": "statistics of latents of shape (24, 4, 4)",
    "statistics_without_mean": "statistics of latents of shape (24, 4, 4)",
    "dino": "a DINO encoder (timm's names) of width 16, depth 2",
    "encoder/dinov2": "a DINOv2 encoder without registers of width 16, depth 2",
    "encoder/dinov2_registers": "a DINOv2 encoder of width 16, depth 2, 4 registers",
    "encoder/dinov2_giant": "a DINOv2 encoder of width 16, depth 2, 4 registers",
    "encoder/siglip2": "a SigLIP encoder of width 16, depth 2",
    "encoder/mae": "an MAE encoder (transformers' names) of width 16, depth 2",
    "encoder/dino": "an MAE or DINO encoder (transformers' names) of width 16, depth 2",
    "encoder/dinov3": "a DINOv3 encoder (transformers' names) of width 16, depth 2, 4 registers",
    "sd_vae": "Stable Diffusion's VAE (diffusers' names)",
    "backbone": "a DINO encoder (timm's names) of width 16, depth 2",
    "vgg": "a VGG16",
    "linear": "LPIPS' linear weights",
    "inception": "an InceptionV3",
}
_META = {"patch_embed.proj.weight": (8, 3, 14, 14), "cls_token": (1, 1, 8), "blocks.0.attn.qkv.weight": (24, 8)}
_META |= {f"blocks.{i}.norm1.weight": (8,) for i in range(3)}
XL = dit_cases.Case(trunk=(1152, 28, 16), head=(2048, 2, 16), channels=768, num_classes=1000)
_XL = "width 1152, depth 28, head width 2048, head depth 2, 1000 classes, latents of 768 channels"
OTHERS = {
    f"a DiT^DH of {_XL}": dit_cases.shapes(XL),
    f"a few-step student (r_embedder) of a DiT^DH of {_XL}": {**dit_cases.shapes(XL), "r_embedder.W": (256,)},
    "a few-step student (r_embedder) of a DiT of width 16, depth 2, 5 classes, latents of 24 channels": {
        **dit_cases.shapes(dit_cases.TINY["plain"]),
        "r_embedder.mlp.0.weight": (16, 512),
    },
    "a DiT^DH of width 8, depth 2 with the head, 5 classes, latents of 24 channels": dit_cases.shapes(
        dit_cases.TINY["dh_equal"]
    ),
    "a DINOv3 encoder (Meta's names) of width 8, depth 3, 4 registers": {**_META, "storage_tokens": (1, 4, 8)},
    "a DINOv2 encoder (Meta's names) of width 8, depth 3": {**_META, "blocks.0.ls1.gamma": (8,)},
    "an AutoencoderRAE of diffusers with a decoder of width 32, depth 2, latents of 64 channels": {
        name: tuple(shape) for name, shape in json.loads(str(autoencoder_cases.goldens()["dinov2/shapes"])).items()
    },
    "an RAE decoder (diffusers' names) of width 32, depth 2, latents of 64 channels": {
        name.replace("attention.attention.query", "attention.to_q"): shape
        for name, shape in autoencoder_cases.decoder_shapes().items()
    },
    "an RAE decoder of width 32, depth 2, latents of 64 channels": {
        f"decoder.{name}": shape for name, shape in autoencoder_cases.decoder_shapes().items()
    },
    "a DiT": {"x_embedder.proj.weight": (), "blocks.0.adaLN_modulation.1.bias": ()},  # sizes that it does not tell
}


def _shapes(arrays):
    return {name: array.shape for name, array in arrays.items()}


def test_every_kind_is_recognised():
    assert {name: fingerprint.describe(_shapes(file_cases.arrays(name))) for name in file_cases.ALL} == FILES


@pytest.mark.parametrize("words", OTHERS)
def test_other_files_are_recognised(words):
    assert fingerprint.describe(OTHERS[words]) == words


@pytest.mark.parametrize(
    "name, words",
    [
        ("plain_qk_norm_patch", "a DiT (rae_jax's format) of width 8, depth 1, 5 classes"),
        ("dh_qk_norm", "a DiT^DH (rae_jax's format) of width 8, depth 1, head width 16, head depth 2, 5 classes"),
        ("decoder", "an RAE decoder (rae_jax's format) of width 32, depth 2, latents of 64 channels"),
        ("dino", "an encoder (rae_jax's format) of width 16, depth 2"),
    ],
)
def test_our_own_files_are_recognised(name, words):
    part, config, _ = kind(name)
    assert (
        fingerprint.describe(_shapes(traverse_util.flatten_dict(part_weights.shapes(config, part), sep="/"))) == words
    )


def test_unknown_files_show_some_names():
    assert fingerprint.describe({"c": (1,), "a": (1,)}) is None
    with pytest.raises(UserError) as refusal:
        checks.same_tensors("x.pt", {"v": (1,)}, {name: (1,) for name in "dcba"})
    assert str(refusal.value) == (
        "x.pt holds tensors such as 'a', 'b', 'c'; the config needs tensors such as 'v'; "
        f"first differences: lacks tensor 'v', has an unknown tensor 'a', has an unknown tensor 'b': {FIX}"
    )
    with pytest.raises(UserError, match="x.pt holds no tensors; the config needs tensors such as 'v'; first diff"):
        checks.same_tensors("x.pt", {"v": (1,)}, {})


def test_differences_are_in_the_order_of_the_blocks():
    wanted = {f"blocks.{i}.weight": (4, 2) for i in range(12)}
    with pytest.raises(UserError) as refusal:
        checks.same_tensors("x.pt", wanted, {name: (8, 2) for name in wanted if name != "blocks.10.weight"})
    message = str(refusal.value)
    expected = [f"'blocks.{i}.weight' has shape (8, 2) and not (4, 2)" for i in (0, 1)]
    assert f"first differences: lacks tensor 'blocks.10.weight', {expected[0]}, {expected[1]}: {FIX}" in message
    with pytest.raises(UserError) as refusal:
        checks.same_tensors("x.pt", wanted, wanted | {f"blocks.{i}.weight": (8, 2) for i in (10, 2)})
    assert "first differences: 'blocks.2.weight' has shape (8, 2) and not (4, 2), 'blocks.10.w" in str(refusal.value)


def _refused(config, part):
    with pytest.raises(UserError) as refusal:
        part_weights.load(config, part, None, one_device())
    assert "\n" not in str(refusal.value)
    return str(refusal.value)


def test_a_dit_of_another_size(tmp_path):
    _, config, _ = kind("plain_qk_norm_patch")
    config = config.copy_and_resolve_references()
    wider = dit_cases.Case(trunk=(16, 2, 2), qk_norm=True, patch_size=2, channels=4, num_classes=7)
    path = tmp_path / "x.safetensors"
    save_file(dit_cases.weights(wider), path)
    config.dit.weights = str(path)
    assert _refused(config, "dit") == (
        f"config.dit.weights='{path}': {path} seems to hold a DiT of width 16, depth 2, 7 classes, latents of 4 "
        "channels; the config needs a DiT of width 8, depth 1, 5 classes, latents of 4 channels; first differences: "
        "has an unknown tensor 'blocks.1.adaLN_modulation.1.bias', 'blocks.0.adaLN_modulation.1.bias' has shape (96,) "
        f"and not (48,), has an unknown tensor 'blocks.1.adaLN_modulation.1.weight': {FIX}"
    )


def test_a_file_with_one_tensor_less_is_what_the_config_needs(tmp_path):
    _, config, arrays = kind("decoder")
    config = config.copy_and_resolve_references()
    save_file({key: a for key, a in arrays.items() if key != "decoder_norm.bias"}, tmp_path / "x.safetensors")
    config.decoder.weights = str(tmp_path / "x.safetensors")
    assert _refused(config, "decoder").endswith(
        "x.safetensors seems to hold an RAE decoder of width 32, depth 2, latents of 64 channels; "
        f"first differences: lacks tensor 'decoder_norm.bias': {FIX}"
    )


@pytest.mark.parametrize("name", [name for name in FILES if name not in ("plain_qk_norm_patch", "dh_qk_norm")])
def test_weights_of_another_part_are_named(tmp_path, name):
    """As config.dit.weights."""
    save_file(file_cases.arrays(name), tmp_path / "x.safetensors")
    with pytest.raises(UserError) as refusal:
        file_cases.load("dh_qk_norm", tmp_path / "x.safetensors", None)
    message = f"x.safetensors seems to hold {FILES[name]}; the config needs {FILES['dh_qk_norm']}; first differences: "
    assert message in str(refusal.value) and "\n" not in str(refusal.value)


def test_our_own_files_of_another_model(tmp_path):
    part, config, _ = kind("dino")
    tree = part_weights.shapes(config, part)
    wanted = part_weights.shapes(kind("decoder")[1], "decoder")
    arrays = {key: np.ones(leaf.shape, np.float32) for key, leaf in traverse_util.flatten_dict(tree, sep="/").items()}
    safetensors_tree.write(tmp_path / "decoder.safetensors", traverse_util.unflatten_dict(arrays, sep="/"))
    with pytest.raises(UserError) as refusal:
        safetensors_tree.read(tmp_path / "decoder.safetensors", wanted)
    assert (
        "decoder.safetensors seems to hold an encoder (rae_jax's format) of width 16, depth 2; the config needs an RAE "
        "decoder (rae_jax's format) of width 32, depth 2, latents of 64 channels; first differences: lacks tensor"
    ) in str(refusal.value)


def test_encoders_of_other_families_are_named(tmp_path):
    encoder_cases.write(tmp_path, encoder_cases.shapes_of("mae"))
    config = encoder_cases.config_of(encoder_cases.TINY["dinov2"], tmp_path)
    assert (
        "seems to hold an MAE encoder (transformers' names) of width 16, depth 2; "
        "the config needs a DINOv2 encoder without registers of width 16, depth 2; first differences: "
    ) in _refused(config, "encoder")
