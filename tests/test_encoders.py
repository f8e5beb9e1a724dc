"""Published encoders: parity with transformers' torch modules, bfloat16, sharding, and damaged or wrong checkpoints.

The goldens (tests/encoders.npz, by make_encoder_goldens.py) stand in for torch where it is absent.
"""

import builtins
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import tiny
from encoder_cases import TINY, Case, images, torch_model, torch_tokens, weights, write
from huggingface_hub import constants
from safetensors.numpy import save_file

from configs import encoders
from rae_jax import build, sharding
from rae_jax import config as config_lib
from rae_jax.errors import UserError

GOLDENS = np.load(Path(__file__).parent / "encoders.npz")
TOLERANCE = 5e-5  # of tokens whose scale is one
EXPECTED = [name for name in GOLDENS.files if not name.endswith("/shapes")]


def _config(case, folder, **changes):
    config = tiny()
    config.stages = ()
    config.data.image_size = 24
    config.encoder.update({**case.ours, "weights": str(folder)})
    config.update(changes)
    return config


def _shapes(name):
    return json.loads(str(GOLDENS[f"{name}/shapes"]))


def _load(config):
    return build.load(config, "encoder", "", sharding.make_mesh(config.mesh))


def _tokens(config, params, pixels):
    latents = jax.jit(build.autoencoder(config).encode)(params, pixels)
    return np.asarray(latents.reshape(len(latents), -1, latents.shape[-1]))


def _difference(a, b):
    return float(np.abs(a - b).max())


def _golden(expected, folder, **changes):
    """Our tokens for one golden, with the made-up weights in `folder`."""
    name, kind = expected.split("/")
    case = TINY[name]
    write(folder, _shapes(name))
    config = _config(case, folder, **changes)
    size = case.sizes[-1] if kind == "layers" else tuple(map(int, kind.split("x")))
    if kind == "layers":
        config.encoder.layers = case.layers
    return _tokens(config, _load(config), images(*size))


@pytest.mark.parametrize("expected", EXPECTED)
def test_tokens_are_the_goldens(tmp_path, expected):
    ours = _golden(expected, tmp_path)
    assert _difference(ours, GOLDENS[expected]) <= TOLERANCE
    assert GOLDENS[expected].std() > 0.5


@pytest.mark.parametrize("expected", [name for name in EXPECTED if "16x28" in name])
def test_bfloat16_stays_close(tmp_path, expected):
    ours = _golden(expected, tmp_path, dtype="bfloat16")
    assert 1e-4 < np.linalg.norm(ours - GOLDENS[expected]) / np.linalg.norm(GOLDENS[expected]) < 0.02


@pytest.mark.parametrize("name", TINY)
def test_tokens_are_transformers_own(tmp_path, name):
    """Also: the goldens are what transformers makes today."""
    pytest.importorskip("transformers")
    pytest.importorskip("torch")
    case = TINY[name]
    model, shapes = torch_model(case, tmp_path)
    assert {key: list(shape) for key, shape in shapes.items()} == _shapes(name)
    for height, width in case.sizes:
        theirs = torch_tokens(case, model, images(height, width))
        assert _difference(theirs, GOLDENS[f"{name}/{height}x{width}"]) <= TOLERANCE


_REGISTERS = {"patch_size": 14, "image_size": 518}
_BASE = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12}
_LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
FULL = {
    "dinov2_b": Case(
        "Dinov2WithRegistersModel",
        "Dinov2WithRegistersConfig",
        {**_BASE, **_REGISTERS},
        encoders.dinov2("base"),
        sizes=((224, 224), (448, 448)),
        layers=(5, 8, 11),
    ),
    "siglip2_b": Case(
        "SiglipVisionModel",
        "SiglipVisionConfig",
        {**_BASE, "intermediate_size": 3072, "patch_size": 16, "image_size": 256},
        encoders.siglip2("base"),
        norm="post_layernorm",
        sizes=((256, 256),),
    ),
    "mae_b": Case(
        "ViTMAEForPreTraining",
        "ViTMAEConfig",
        {**_BASE, "mask_ratio": 0.0},
        encoders.mae("base"),
        tower="vit",
        sizes=((256, 256),),
        call={"interpolate_pos_encoding": True},
    ),
    "dinov3_l": Case(
        "DINOv3ViTModel",
        "DINOv3ViTConfig",
        {**_LARGE, "patch_size": 16, "num_register_tokens": 4},
        encoders.dinov3("large"),
        norm="norm",
        sizes=((256, 256),),
        layers=(11, 13, 15, 17, 19, 21, 23),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FULL)
def test_full_size_tokens_are_transformers_own(tmp_path, name):
    pytest.importorskip("transformers")
    pytest.importorskip("torch")
    case = FULL[name]
    model, _ = torch_model(case, tmp_path)
    config = _config(case, tmp_path)
    config.encoder.input_size = 0
    params = _load(config)
    for size in case.sizes:
        for layers in {(), case.layers}:
            config.encoder.layers = layers
            pixels = images(*size)
            difference = _difference(_tokens(config, params, pixels), torch_tokens(case, model, pixels, layers))
            print(f"{name} {size} layers {layers}: {difference:.1e}")
            assert difference <= TOLERANCE


def test_images_are_resized_to_the_encoder_s_input(tmp_path):
    write(tmp_path, _shapes("dinov2"))
    config = _config(TINY["dinov2"], tmp_path)
    params = _load(config)
    config.encoder.input_size = 24
    latents = jax.jit(build.autoencoder(config).encode)(params, images(32, 32))
    assert latents.shape == (2, *build.latent_shape(config)) == (2, 6, 6, 16)


def test_weights_and_batches_are_split_over_the_mesh(tmp_path):
    write(tmp_path, _shapes("dinov3"))
    config = _config(TINY["dinov3"], tmp_path)
    single = _tokens(config, _load(config), images(16, 28, batch=8))
    config.mesh.update({"data": 2, "fsdp": 4})
    mesh = sharding.make_mesh(config.mesh)
    params = build.load(config, "encoder", "", mesh)
    kernel = params["blocks"]["attention"]["qkv"]["kernel"]
    assert kernel.addressable_shards[0].data.size == kernel.size // 4
    batch = sharding.put_batch(images(16, 28, batch=8), mesh)
    latents = jax.jit(build.autoencoder(config).encode)(params, batch)
    assert latents.sharding.shard_shape(latents.shape)[0] == 1
    assert _difference(np.asarray(latents).reshape(single.shape), single) <= 1e-5


def test_published_configs_are_right():
    for values in (
        *(encoders.dinov2(size, registers=r) for size in ("small", "base", "large", "giant") for r in (True, False)),
        *(encoders.siglip2(size) for size in ("base", "so400m")),
        *(encoders.mae(size) for size in ("base", "large")),
        *(encoders.dinov3(size) for size in ("small", "base", "large")),
    ):
        config = tiny()
        config.stages = ()
        config.data.image_size = 256
        config.encoder.update(values)
        config.decoder.patch_size = 16
        config.discriminator.layers = (2, 5, 8, 11)
        config_lib.check(config, sharding.make_mesh(config.mesh))
        blank = build.autoencoder(config).encoder_input(jnp.zeros((1, 256, 256, 3)))
        jax.eval_shape(build.encoder(config).init, jax.random.key(0), blank)
        assert build.latent_shape(config) == (16, 16, config.encoder.width)


def _spoil(folder, name, change):
    arrays = weights(_shapes(name))
    change(arrays)
    save_file(arrays, folder / "model.safetensors")


def _pop(key):
    return lambda arrays: arrays.pop(key)


def _put(key, *shape):
    return lambda arrays: arrays.update({key: np.zeros(shape, np.float32)})


@pytest.mark.parametrize(
    "change, message",
    [
        (_pop("embeddings.register_tokens"), "lacks tensor 'embeddings.register_tokens'"),
        (_put("encoder.layer.2.norm1.weight", 16), "unknown tensor 'encoder.layer.2.norm1.weight'"),
        (_put("encoder.layer.1.norm1.weight", 24), r"'encoder.layer.1.norm1.weight' has shape \(24,\)"),
        (_put("embeddings.position_embeddings", 1, 17, 16), r"position_embeddings' has shape \(1, 17, 16\)"),
    ],
)
def test_wrong_tensors_are_named(tmp_path, change, message):
    _spoil(tmp_path, "dinov2_registers", change)
    with pytest.raises(UserError, match=message):
        _load(_config(TINY["dinov2_registers"], tmp_path))


def test_a_parameter_that_the_family_never_has_is_named(tmp_path):
    write(tmp_path, _shapes("dinov3"))
    config = _config(TINY["dinov3"], tmp_path)
    config.encoder.mlp = "swiglu"
    with pytest.raises(UserError, match="config.encoder.family has 'blocks/mlp/w"):
        _load(config)


def test_another_family_s_file_is_refused(tmp_path):
    write(tmp_path, _shapes("mae"))
    for name in ("dinov2", "siglip2", "dinov3"):
        with pytest.raises(UserError, match="tensor '.*made for another model"):
            _load(_config(TINY[name], tmp_path))


def test_a_tensor_under_two_names_is_refused(tmp_path):
    _spoil(tmp_path, "mae", _put("embeddings.cls_token", 1, 1, 16))
    with pytest.raises(UserError, match="'embeddings.cls_token' twice"):
        _load(_config(TINY["mae"], tmp_path))


def test_a_truncated_file_is_refused(tmp_path):
    write(tmp_path, _shapes("dinov2"))
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match="not a whole safetensors file"):
        _load(_config(TINY["dinov2"], tmp_path))


def _write_shards(folder, *shards):
    names = [f"model-{i}.safetensors" for i in range(len(shards))]
    for name, arrays in zip(names, shards, strict=True):
        save_file(arrays, folder / name)
    index = {key: name for name, arrays in zip(names, shards, strict=True) for key in arrays}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))


def test_a_checkpoint_in_several_files(tmp_path):
    arrays = weights(_shapes("dinov2"))
    keys = sorted(arrays)
    halves = [{key: arrays[key] for key in part} for part in (keys[:9], keys[9:])]
    _write_shards(tmp_path, *halves)
    config = _config(TINY["dinov2"], tmp_path)
    tokens = _tokens(config, _load(config), images(24, 24))
    assert _difference(tokens, GOLDENS["dinov2/24x24"]) <= TOLERANCE
    _write_shards(tmp_path, *halves, {keys[0]: arrays[keys[0]]})
    with pytest.raises(UserError, match=f"{keys[0]!r}, which another file"):
        _load(config)
    (tmp_path / "model-1.safetensors").unlink()
    with pytest.raises(UserError, match="names model-1.safetensors, which is not there"):
        _load(config)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a')
    with pytest.raises(UserError, match="not a whole index"):
        _load(config)


def test_pickled_weights_take_torch(tmp_path, monkeypatch):
    def no_torch(name, *args, **kwargs):
        if name == "torch":
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    (tmp_path / "pytorch_model.bin").write_bytes(b"damaged")
    real_import = builtins.__import__
    with monkeypatch.context() as patch:
        patch.setattr(builtins, "__import__", no_torch)
        with pytest.raises(UserError, match="takes torch: install it"):
            _load(_config(TINY["mae"], tmp_path))
    torch = pytest.importorskip("torch")
    with pytest.raises(UserError, match="not a whole file"):
        _load(_config(TINY["mae"], tmp_path))
    arrays = weights(_shapes("mae"))
    torch.save({key: torch.from_numpy(value) for key, value in arrays.items()}, tmp_path / "pytorch_model.bin")
    config = _config(TINY["mae"], tmp_path)
    assert _difference(_tokens(config, _load(config), images(16, 28)), GOLDENS["mae/16x28"]) <= TOLERANCE


@pytest.mark.parametrize(
    "weights, message",
    [
        ("facebook/dinov2-bas", "download model.safetensors of facebook/dinov2-bas, put it in a folder"),
        ("nowhere/at/all", "neither a folder here nor a hub id"),
    ],
)
def test_weights_that_are_not_there(tmp_path, monkeypatch, weights, message):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=message):
        _load(_config(TINY["dinov2"], weights))


def test_an_empty_folder_is_named(tmp_path):
    with pytest.raises(UserError, match="holds none of model.safetensors"):
        _load(_config(TINY["dinov2"], tmp_path))
