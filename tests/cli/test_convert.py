"""Weights of others in and out: every kind of file there and back, bit by bit."""

import json
from pathlib import Path

import autoencoder_cases
import encoder_cases
import jax
import numpy as np
import pytest
from huggingface_hub import constants
from published_cases import KINDS, convert_kind, kind, read, write
from safetensors.numpy import load_file, save_file

from configs import dit_b, encoders
from rae_jax import convert
from rae_jax.build import saved_config
from rae_jax.errors import UserError

RELEASED_STATISTICS = Path(__file__).parents[3] / "shared/data/reference/dinov2_wreg_base_stat.pt"


@pytest.mark.parametrize("suffix, form", [(".safetensors", "released"), (".pt", "released_pt")])
@pytest.mark.parametrize("name", KINDS)
def test_there_and_back(tmp_path, name, suffix, form):
    arrays = kind(name)[2]
    write(tmp_path / f"theirs{suffix}", arrays)
    first = convert_kind(name, tmp_path / f"theirs{suffix}", tmp_path / "first")
    back = convert_kind(name, tmp_path / "first", tmp_path / "back", form)
    assert convert_kind(name, back, tmp_path / "second").read_bytes() == first.read_bytes()
    found = read(Path(back))
    never_learned = {"pos_embed", "decoder_pos_embed", *(k for k in found if "rope.freqs" in k)}
    assert found.keys() - arrays.keys() <= never_learned and arrays.keys() <= found.keys()
    for key in arrays:
        if key not in ("norm.weight", "norm.bias"):  # DINO's last norm, which nobody uses
            np.testing.assert_array_equal(found[key], arrays[key], err_msg=key)


def test_an_autoencoder_of_diffusers_there_and_back(tmp_path):
    (tmp_path / "theirs").mkdir()
    arrays = autoencoder_cases.write("dinov2", tmp_path / "theirs")
    config = autoencoder_cases.config_of(autoencoder_cases.TINY["dinov2"], tmp_path / "theirs")
    convert.export(None, tmp_path / "ours", config=config, parts=["encoder", "decoder", "statistics"])
    for part in ("encoder", "decoder", "statistics"):
        config[part].weights = str(tmp_path / "ours")
    back, description = convert.export(None, tmp_path / "back", config=config, form="diffusers")
    assert json.loads(description.read_text())["decoder_hidden_size"] == 32
    found = load_file(back)
    assert found.keys() == arrays.keys()
    for key in arrays:
        if key != "encoder.embeddings.mask_token":  # nobody uses it
            np.testing.assert_array_equal(found[key], arrays[key], err_msg=key)


@pytest.mark.parametrize("stages", [(), ("statistics",)])
@pytest.mark.parametrize("workdir", [None, "run"])
def test_statistics_that_do_not_exist_are_not_written(tiny_config, tmp_path, workdir, stages):
    tiny_config.statistics.weights, tiny_config.stages = "none", stages
    with pytest.raises(UserError, match="config.statistics.weights='none' means that no statistics exist"):
        convert.export(workdir and tmp_path / workdir, tmp_path / "out", config=tiny_config, parts=["statistics"])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "encoder, decoder", [(encoders.dinov2("base"), "xl"), (encoders.siglip2("base"), "b"), (encoders.mae("large"), "l")]
)
def test_a_description_of_diffusers_is_the_published_encoder_and_decoder(tmp_path, encoder, decoder):
    """As AutoencoderRAE saves it. Of the encoder it names sizes alone, and no mean and std where they are ImageNet's:
    (0.485, 0.456, 0.406) and (0.229, 0.224, 0.225)."""
    sizes, own = dit_b.DECODERS[decoder], encoder["family"] == "siglip2"
    description = {
        "_class_name": "AutoencoderRAE",
        "encoder_type": encoder["family"],
        "encoder_hidden_size": encoder["width"],
        "encoder_patch_size": encoder["patch_size"],
        "encoder_num_hidden_layers": encoder["depth"],
        "encoder_input_size": encoder["input_size"],
        "encoder_norm_mean": [0.5, 0.5, 0.5] if own else None,
        "encoder_norm_std": [0.5, 0.5, 0.5] if own else None,
        "decoder_hidden_size": sizes["width"],
        "decoder_num_hidden_layers": sizes["depth"],
        "decoder_num_attention_heads": sizes["num_heads"],
        "decoder_intermediate_size": sizes["hidden"],
        "patch_size": 32,
    }
    (tmp_path / "config.json").write_text(json.dumps(description))
    found = saved_config.read(tmp_path)
    wanted = encoder
    if encoder["family"] == "mae":  # of any width it has 3072 hidden channels there
        wanted = {**encoder, "mlp_ratio": 3072 / encoder["width"]}
    for section, values in (("encoder", wanted), ("decoder", {**sizes, "patch_size": 32})):
        for key in values.keys() - {"weights"}:
            assert found[section][key] == values[key], key
    assert found.data.image_size == 512


@pytest.mark.parametrize("change, key", [({"layers": (0,)}, "layers"), ({"num_heads": 2}, "num_heads")])
def test_an_encoder_that_diffusers_lacks_is_not_written_for_it(tmp_path, change, key):
    autoencoder_cases.write("dinov2", tmp_path)
    config = autoencoder_cases.config_of({**autoencoder_cases.TINY["dinov2"], **change}, tmp_path)
    with pytest.raises(UserError, match=f"config.encoder.{key}=.* cannot be written for diffusers"):
        convert.export(None, tmp_path / "back", config=config, form="diffusers")


def test_transformers_before_version_5_named_the_encoder_otherwise(tmp_path):
    for folder in ("new", "old"):
        (tmp_path / folder).mkdir()
    arrays = autoencoder_cases.write("dinov2", tmp_path / "new")
    names = {
        "q_proj": "attention.query",
        "k_proj": "attention.key",
        "v_proj": "attention.value",
        "o_proj": "output.dense",
    }
    for key in list(arrays):
        for new, old in names.items():
            if f".attention.{new}." in key:
                arrays[key.replace(new, old)] = arrays.pop(key)
    save_file(arrays, tmp_path / "old" / "diffusion_pytorch_model.safetensors")
    old, new = (
        autoencoder_cases.load(autoencoder_cases.config_of(autoencoder_cases.TINY["dinov2"], tmp_path / f), "encoder")
        for f in ("old", "new")
    )
    jax.tree.map(np.testing.assert_array_equal, old, new)


def test_siglip2_in_an_autoencoder_of_diffusers(tmp_path):
    """Which today's diffusers and transformers cannot build together; older ones named it so."""
    whole = encoder_cases.weights(encoder_cases.shapes_of("siglip2"))
    inside = {f"encoder.{key}": value for key, value in whole.items() if key.startswith("vision_model.")}
    inside |= {"decoder.decoder_norm.bias": np.zeros(3), "encoder_mean": np.zeros(3), "_latents_std": np.ones(1)}
    params = []
    for name, arrays in (("whole", whole), ("inside", inside)):
        write(tmp_path / name / "model.safetensors", arrays)
        params.append(encoder_cases.load(encoder_cases.config_of(encoder_cases.TINY["siglip2"], tmp_path / name)))
    jax.tree.map(np.testing.assert_array_equal, *params)


def test_dino_has_the_same_weights_by_timm_s_names_and_by_transformers(tmp_path):
    timm = kind("dino")[2]
    renames = {
        "patch_embed.proj": "embeddings.patch_embeddings.projection",
        "pos_embed": "embeddings.position_embeddings",
        "cls_token": "embeddings.cls_token",
        "blocks.": "encoder.layer.",
        "attn.proj": "attention.output.dense",
        "norm1": "layernorm_before",
        "norm2": "layernorm_after",
        "mlp.fc1": "intermediate.dense",
        "mlp.fc2": "output.dense",
    }
    theirs = {}
    for key, array in timm.items():
        key = "layernorm." + key.removeprefix("norm.") if key.startswith("norm.") else key
        for old, new in renames.items():
            key = key.replace(old, new)
        if "attn.qkv" in key:
            for name, part in zip(("query", "key", "value"), np.split(array, 3), strict=True):
                theirs[key.replace("attn.qkv", f"attention.attention.{name}")] = part
        else:
            theirs[key] = array
    write(tmp_path / "timm.safetensors", timm)
    write(tmp_path / "theirs.safetensors", theirs)
    one, other = (convert_kind("dino", tmp_path / f"{n}.safetensors", tmp_path / n) for n in ("timm", "theirs"))
    assert one.read_bytes() == other.read_bytes()


def test_of_a_training_checkpoint_the_average_is_taken(tmp_path):
    torch = pytest.importorskip("torch")
    arrays = {key: torch.tensor(value) for key, value in kind("decoder")[2].items()}
    whole = {f"decoder.{key}": value for key, value in arrays.items()} | {"encoder.encoder.layer.0": torch.ones(1)}
    last = {key: value + 1 for key, value in arrays.items()}
    rest = {"optimizer": {"state": {}, "param_groups": [{"lr": 1e-4}]}, "scheduler": None, "step": 3}
    for i, ema in enumerate((arrays, whole)):
        torch.save({"model": last, "ema": ema, **rest}, tmp_path / f"{i}.pt")
    torch.save(arrays, tmp_path / "raw.pt")
    torch.save({"state_dict": {key: torch.nn.Parameter(of) for key, of in arrays.items()}, **rest}, tmp_path / "2.pt")
    names = ("0", "1", "2", "raw")
    written = [convert_kind("decoder", tmp_path / f"{name}.pt", tmp_path / name).read_bytes() for name in names]
    assert len(set(written)) == 1


def test_a_file_of_statistics_names_a_mean_as_the_released_one_does(tmp_path):
    """None, where they do not shift (../../shared/REFERENCE.md)."""
    torch = pytest.importorskip("torch")
    write(tmp_path / "theirs.safetensors", kind("statistics_without_mean")[2])
    written = torch.load(
        convert_kind("statistics_without_mean", tmp_path / "theirs.safetensors", tmp_path / "ours", "released_pt"),
        weights_only=True,
    )
    assert written.keys() == {"mean", "var"} and written["mean"] is None and written["var"].shape == (24, 4, 4)
    if RELEASED_STATISTICS.exists():
        released = torch.load(RELEASED_STATISTICS, weights_only=True)
        assert released.keys() == written.keys() and released["mean"] is None


def test_the_released_statistics():
    path = RELEASED_STATISTICS
    if not path.exists():
        pytest.skip("../shared/data/reference is not here")
    torch = pytest.importorskip("torch")
    config = dit_b.get_config()
    config.statistics.weights = str(path)
    (statistics,) = autoencoder_cases.load(config, "statistics")
    variance = torch.load(path, weights_only=True)["var"].permute(1, 2, 0).numpy()
    np.testing.assert_array_equal(statistics["var"], variance)
    assert statistics["mean"].shape == (16, 16, 768) and not statistics["mean"].any()


def test_a_file_of_the_hub_is_found_in_its_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    repo = tmp_path / "models--someone--models"
    for folder in ("refs", "snapshots/abc/decoders/xl"):
        (repo / folder).mkdir(parents=True)
    (repo / "refs" / "main").write_text("abc")
    write(repo / "snapshots/abc/decoders/xl/model.safetensors", kind("decoder")[2])
    one = convert_kind("decoder", "someone/models:decoders/xl/model.safetensors", tmp_path / "one")
    other = convert_kind("decoder", repo / "snapshots/abc/decoders/xl", tmp_path / "other")
    assert one.read_bytes() == other.read_bytes()
