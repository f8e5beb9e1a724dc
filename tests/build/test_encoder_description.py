"""Values of config.encoder by config.json and preprocessor_config.json of the hub, of transformers and of diffusers."""

import json
import sys

import encoder_cases as cases
import pytest
from conftest import tiny

from configs import encoders
from rae_jax.build import encoder_description, models
from rae_jax.config import files as config_files
from rae_jax.errors import UserError
from rae_jax.weights import hub

_COLOURS = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
_HALVES = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
_PIXELS = {"do_normalize": True, "do_rescale": True, "rescale_factor": 0.00392156862745098}
_SIZES = {
    "small": {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6},
    "base": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12},
    "large": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16},
    "giant": {"hidden_size": 1536, "num_hidden_layers": 40, "num_attention_heads": 24},
}
_HIDDEN = {"small": 1536, "base": 3072, "large": 4096}
_TEXT = {"text_config": {"model_type": "siglip_text_model", "vocab_size": 256000}}
_SO400M = {"hidden_size": 1152, "intermediate_size": 4304, "num_attention_heads": 16, "num_hidden_layers": 27}


def _dinov2(size, registers):
    kind = {"model_type": "dinov2_with_registers", "num_register_tokens": 4} if registers else {"model_type": "dinov2"}
    common = {"hidden_act": "gelu", "image_size": 518, "layer_norm_eps": 1e-6, "mlp_ratio": 4, "patch_size": 14}
    return {**kind, **_SIZES[size], **common, "qkv_bias": True, "use_swiglu_ffn": size == "giant"}


def _dinov3(size):
    common = {"image_size": 224, "patch_size": 16, "layer_norm_eps": 1e-5, "rope_theta": 100.0, "hidden_act": "gelu"}
    biases = {"query_bias": True, "key_bias": False, "value_bias": True, "proj_bias": True, "mlp_bias": True}
    sizes = {**_SIZES[size], "intermediate_size": _HIDDEN[size], "num_register_tokens": 4}
    return {"model_type": "dinov3_vit", **sizes, **common, **biases, "use_gated_mlp": False}


def _mae(size):
    common = {"hidden_act": "gelu", "image_size": 224, "layer_norm_eps": 1e-12, "patch_size": 16, "qkv_bias": True}
    return {"model_type": "vit_mae", **_SIZES[size], "intermediate_size": _HIDDEN[size], **common, "num_channels": 3}


_KL = {"_class_name": "AutoencoderKL", "block_out_channels": [128, 256, 512, 512], "latent_channels": 4}
_KL.update({"layers_per_block": 2, "sample_size": 256, "in_channels": 3, "act_fn": "silu"})
# Our values, the hub's config.json and the colours of its preprocessor_config.json. SigLIP leaves out default values.
PUBLISHED = [
    *((encoders.dinov2(s, registers=r), _dinov2(s, r), _COLOURS) for s in _SIZES for r in (True, False)),
    *((encoders.dinov3(size), _dinov3(size), _COLOURS) for size in _HIDDEN),
    *((encoders.mae(size), _mae(size), _COLOURS) for size in ("base", "large")),
    (encoders.siglip2("base"), {"model_type": "siglip", **_TEXT, "vision_config": {"image_size": 256}}, _HALVES),
    (
        encoders.siglip2("so400m"),
        {"model_type": "siglip", **_TEXT, "vision_config": {**_SO400M, "patch_size": 14, "image_size": 224}},
        _HALVES,
    ),
    (encoders.sd_vae() | {"weights": "stabilityai/sd-vae-ft-ema"}, _KL, None),
]


def write(folder, config, colours=None):
    """Write a description; return the folder."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if colours:
        (folder / "preprocessor_config.json").write_text(json.dumps({**_PIXELS, **colours}))
    return folder


@pytest.fixture
def without_transformers(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)


@pytest.mark.parametrize("values, config, colours", PUBLISHED, ids=[values["weights"] for values, _, _ in PUBLISHED])
def test_the_hub_describes_the_values_of_configs_encoders(
    tmp_path, monkeypatch, without_transformers, values, config, colours
):
    folder, asked = write(tmp_path, config, colours), []
    monkeypatch.setattr(hub, "fetch_folder", lambda repo, names: asked.append((repo, names)) or folder)
    assert encoders.described(values["weights"]) == values
    assert asked == [(values["weights"], ("config.json", "preprocessor_config.json"))]
    assert encoders.described(folder, input_size=448) == {
        **{**values, "weights": str(folder)},
        "input_size": 0 if colours is None else 448,
    }


def test_dino_of_the_hub_is_the_discriminator_s_backbone_without_the_tanh(tmp_path, without_transformers):
    config = {**_mae("base"), **_SIZES["small"], "model_type": "vit", "patch_size": 8, "intermediate_size": 1536}
    found = encoders.described(write(tmp_path, config, _COLOURS), input_size=224)
    assert found == {**encoders.dino(), "weights": str(tmp_path), "mlp": "gelu"}


@pytest.mark.parametrize("name", cases.TINY)
def test_every_family_has_the_values_of_its_case(tmp_path, without_transformers, name):
    """The cases' tokens are compared with the goldens: models/test_encoders.py."""
    case = cases.TINY[name]
    kinds = {"dinov2": "dinov2", "siglip2": "siglip", "mae": "vit_mae", "dino": "vit", "dinov3": "dinov3_vit"}
    kind = kinds.get(name, "dinov2_with_registers")
    found = encoders.described(write(tmp_path, {"model_type": kind, **case.theirs}))
    assert found == {**case.ours, "input_size": 64, "weights": str(tmp_path)}


@pytest.mark.parametrize("kind", encoder_description.DEFAULTS)
def test_transformers_fills_the_same_defaults(tmp_path, monkeypatch, kind):
    """Each entry is left out, and so are all entries."""
    pytest.importorskip("transformers")
    defaults = encoder_description.DEFAULTS[kind]
    assert encoder_description._defaults(kind, {}) == defaults
    described = [{"model_type": kind}]
    described += [{"model_type": kind, **{k: v for k, v in defaults.items() if k != left_out}} for left_out in defaults]
    if kind == "siglip_vision_model":
        described += [{"model_type": "siglip"}, {"model_type": "siglip", "vision_config": {"patch_size": 14}}]
    theirs = [encoder_description.read(write(tmp_path, config)) for config in described]
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert theirs == [encoder_description.read(write(tmp_path, config)) for config in described]
    assert all(values == theirs[0] for values in theirs[: len(defaults)])


@pytest.mark.parametrize("kind", encoder_description.DEFAULTS)
def test_the_norms_have_the_epsilon_that_is_accepted(tmp_path, without_transformers, kind):
    config = tiny()
    config.encoder.update(encoders.described(write(tmp_path, {"model_type": kind})))
    eps = models.encoder(config, config.encoder).norm_eps
    encoder_description.read(write(tmp_path, {"model_type": kind, "layer_norm_eps": eps}))


@pytest.mark.parametrize("name", cases.TINY)
def test_tokens_are_transformers_own_by_the_description_alone(tmp_path, name):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torch")
    case = cases.TINY[name]
    model, _ = cases.torch_model(case, tmp_path)
    colours = {f"image_{key}": list(case.ours[key]) for key in ("mean", "std")}
    transformers.ViTImageProcessor(**colours).save_pretrained(tmp_path)
    config = cases.config_of(case, tmp_path)
    config.encoder.update(encoders.described(tmp_path))
    config.encoder.input_size = 0
    pixels = cases.images(*case.sizes[-1])
    theirs = cases.torch_tokens(case, model, pixels)
    assert cases.difference(theirs, cases.tokens_of(config, cases.load(config), pixels)) <= cases.TOLERANCE


def _bad(**changes):
    return {"model_type": "dinov2", **changes}


@pytest.mark.parametrize(
    "config, message",
    [
        ({"model_type": "convnextv2"}, "model_type='convnextv2' is not supported: choose an encoder of type .*dinov2,"),
        ({"model_type": "siglip2"}, "NaFlex.* name a checkpoint of one resolution"),
        ({"model_type": "siglip2_vision_model", "num_patches": 256}, "NaFlex"),
        ({"_class_name": "AutoencoderTiny"}, "_class_name='AutoencoderTiny' of diffusers is not supported"),
        ({"_class_name": "AutoencoderKL"}, "the entry '.*' is missing"),
        (_bad(hidden_act="relu"), "hidden_act='relu' is not supported: it must be 'gelu' or 'gelu_pytorch_tanh'"),
        (_bad(qkv_bias=False), "qkv_bias=False is not supported: it must be True"),
        (_bad(num_channels=1), "num_channels=1 is not supported: it must be 3"),
        (_bad(layer_norm_eps=1e-5), "layer_norm_eps=1e-05 is not supported: it must be 1e-06"),
        (_bad(image_size=[224, 448]), r"image_size=\[224, 448\] is not supported: it must be square"),
        (_bad(patch_size=[14, 16]), r"patch_size=\[14, 16\] is not supported"),
        (_bad(hidden_size="wide"), "hidden_size='wide' is not supported: it must be an integer"),
        (_bad(mlp_ratio=0), "mlp_ratio=0 is not supported"),
        ({"model_type": "dinov2_with_registers", "num_register_tokens": 0}, "num_register_tokens=0 is not supported"),
        ({"model_type": "vit", "layer_norm_eps": 1e-5}, "layer_norm_eps=1e-05 .* it must be 1e-12 or 1e-06"),
        ({"model_type": "dinov3_vit", "rope_theta": 10000.0}, "rope_theta=10000.0 is not supported: it must be 100.0"),
        ({"model_type": "dinov3_vit", "use_gated_mlp": True}, "use_gated_mlp=True is not supported"),
        ({"model_type": "dinov3_vit", "key_bias": True}, "key_bias=True is not supported"),
    ],
)
def test_what_is_not_computed_here_is_refused(tmp_path, without_transformers, config, message):
    with pytest.raises(UserError, match=message) as caught:
        encoders.described(write(tmp_path, config))
    assert str(caught.value).startswith(f"{tmp_path}/config.json: ") and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "colours, message",
    [
        ({"image_mean": [0.5] * 3}, "image_std=None is not supported: it must hold three numbers"),
        ({**_HALVES, "image_mean": [0.5]}, r"image_mean=\[0.5\] is not supported"),
        ({**_HALVES, "do_normalize": False}, "do_normalize=False is not supported"),
        ({**_HALVES, "rescale_factor": 1.0}, "rescale_factor=1.0 is not supported"),
    ],
)
def test_a_wrong_preprocessor_is_refused(tmp_path, without_transformers, colours, message):
    with pytest.raises(UserError, match=f"{tmp_path}/preprocessor_config.json: {message}"):
        encoders.described(write(tmp_path, _bad(), colours))


def test_pixels_without_a_whole_patch_have_no_position(tmp_path, without_transformers):
    vision = {**_SO400M, "patch_size": 14, "image_size": 384}
    found = encoders.described(write(tmp_path, {"model_type": "siglip", "vision_config": vision}))
    assert (found["position_size"], found["input_size"], found["mean"]) == (378, 224, (0.5, 0.5, 0.5))


def test_diffusers_autoencoder_has_an_encoder_too(tmp_path):
    config = {"_class_name": "AutoencoderRAE", "encoder_type": "siglip2", "encoder_hidden_size": 768}
    config.update({"encoder_num_hidden_layers": 12, "encoder_patch_size": 16, "encoder_input_size": 256})
    config.update({f"decoder_{key}": 1 for key in ("hidden_size", "num_hidden_layers", "num_attention_heads")})
    config.update({"decoder_intermediate_size": 1, "patch_size": 16})
    config.update({"encoder_norm_mean": [0.5] * 3, "encoder_norm_std": [0.5] * 3})
    expected = {**encoders.siglip2("base"), "weights": str(tmp_path), "input_size": 512}
    assert encoders.described(write(tmp_path, config), input_size=512) == expected


@pytest.mark.parametrize("source", ["", "small", "OWNER/NAME:model.pt", "none.safetensors", "file.pt", "bare", "ours"])
def test_a_source_without_a_description_has_no_values(tmp_path, monkeypatch, source):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file.pt").touch()
    (tmp_path / "bare").mkdir()
    write(tmp_path / "ours", {"encoder": {"width": 16}, "stages": []})
    assert encoder_description.read(source) is None
    with pytest.raises(UserError, match="has no config.json of transformers or diffusers"):
        encoders.described(source)


def test_a_config_file_that_asks_for_a_description_is_refused_in_one_line(tmp_path):
    lines = ("from configs import encoders, small", "def get_config():", "    c = small.get_config()")
    lines += (f"    c.encoder.update(encoders.described({str(tmp_path)!r}))", "    return c")
    (tmp_path / "mine.py").write_text("\n".join(lines))
    with pytest.raises(UserError, match=f"cannot load the config .*mine.py: line 4: {tmp_path} has no config.json"):
        config_files.load(tmp_path / "mine.py")
    write(tmp_path, _dinov2("large", registers=False), _COLOURS)
    assert config_files.load(tmp_path / "mine.py").encoder.width == 1024
