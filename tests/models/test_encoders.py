"""Published encoders: parity with transformers' torch modules, bfloat16, resizing, sharding.

The goldens (tests/goldens/encoders.npz, by make_encoder_goldens.py) stand in for torch where it is absent.
"""

import encoder_cases as cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import random_like, tiny

from configs import encoders
from rae_jax.build import models, part_weights
from rae_jax.config import checks
from rae_jax.config import keys as config_keys
from rae_jax.models.autoencoder import to_latent
from rae_jax.runtime import sharding

EXPECTED = [name for name in cases.goldens() if not name.endswith("/shapes")]


def _inputs(expected):
    """Images and chosen layers of a golden."""
    name, kind = expected.split("/")
    case = cases.TINY[name]
    if kind == "layers":
        return cases.images(*case.sizes[-1]), case.layers
    return cases.images(*map(int, kind.split("x"))), ()


def _ours(expected, folder, **changes):
    """Our tokens for one golden, with the weights in `folder`."""
    config = cases.config_of(cases.TINY[expected.split("/")[0]], folder, **changes)
    pixels, config.encoder.layers = _inputs(expected)
    return cases.tokens_of(config, cases.load(config), pixels)


@pytest.mark.parametrize("expected", EXPECTED)
def test_tokens_are_the_goldens(tmp_path, expected):
    """Row by row, with as many rows as the image has patches in its height."""
    cases.write(tmp_path, cases.shapes_of(expected.split("/")[0]))
    config, golden = cases.config_of(cases.TINY[expected.split("/")[0]], tmp_path), cases.goldens()[expected]
    pixels, config.encoder.layers = _inputs(expected)
    latents = np.asarray(jax.jit(models.autoencoder(config).encode)(cases.load(config), pixels))
    height, width = (side // 4 for side in pixels.shape[1:3])
    assert latents.shape == (2, height, width, 16)
    assert cases.difference(latents, golden.reshape(latents.shape)) <= cases.TOLERANCE


@pytest.mark.parametrize("name, eps", [("dinov2", 1e-6), ("siglip2", 1e-6), ("mae", 1e-12), ("dinov3", 1e-5)])
def test_the_final_norm_has_the_family_s_epsilon(name, eps):
    """Seen in tokens whose variance is as small as that: all weights are."""
    config = cases.config_of(cases.TINY[name], "")
    autoencoder = models.autoencoder(config)
    params = random_like(part_weights.shapes(config, "encoder"), seed=0, scale=3e-4)
    pixels = autoencoder.encoder_input(cases.images(24, 24))
    tokens = np.float64(jax.jit(lambda p, x: autoencoder.encoder.apply({"params": p}, x))(params, pixels))[-1]
    assert tokens.var(-1).max() < 1e-4
    expected = (tokens - tokens.mean(-1, keepdims=True)) / np.sqrt(tokens.var(-1, keepdims=True) + eps)
    np.testing.assert_allclose(cases.tokens_of(config, params, cases.images(24, 24)), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("expected", [name for name in EXPECTED if "16x28" in name])
def test_bfloat16_stays_close(tmp_path, expected):
    cases.write(tmp_path, cases.shapes_of(expected.split("/")[0]))
    golden = cases.goldens()[expected]
    assert 1e-4 < np.linalg.norm(_ours(expected, tmp_path, dtype="bfloat16") - golden) / np.linalg.norm(golden) < 0.02


@pytest.mark.parametrize("name", cases.TINY)
def test_tokens_are_transformers_own(tmp_path, name):
    """Also: the goldens are what transformers makes today."""
    pytest.importorskip("transformers")
    pytest.importorskip("torch")
    model, shapes = cases.torch_model(cases.TINY[name], tmp_path)
    assert {key: list(shape) for key, shape in shapes.items()} == cases.shapes_of(name)
    for expected in (e for e in EXPECTED if e.startswith(f"{name}/")):
        theirs = cases.torch_tokens(cases.TINY[name], model, *_inputs(expected))
        assert cases.difference(theirs, cases.goldens()[expected]) <= cases.TOLERANCE
        assert cases.difference(theirs, _ours(expected, tmp_path)) <= cases.TOLERANCE


_REGISTERS = {"patch_size": 14, "image_size": 518}
_BASE = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12}
_LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
FULL = {
    "dinov2_b": cases.Case(
        "Dinov2WithRegistersModel",
        "Dinov2WithRegistersConfig",
        {**_BASE, **_REGISTERS},
        encoders.dinov2("base"),
        sizes=((224, 224), (448, 448)),
        layers=(5, 8, 11),
    ),
    "siglip2_b": cases.Case(
        "SiglipVisionModel",
        "SiglipVisionConfig",
        {**_BASE, "intermediate_size": 3072, "patch_size": 16, "image_size": 256},
        encoders.siglip2("base"),
        norm="post_layernorm",
        sizes=((256, 256),),
    ),
    "mae_b": cases.Case(
        "ViTMAEForPreTraining",
        "ViTMAEConfig",
        {**_BASE, "mask_ratio": 0.0},
        encoders.mae("base"),
        tower="vit",
        sizes=((256, 256),),
        call={"interpolate_pos_encoding": True},
    ),
    "dinov3_l": cases.Case(
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
@pytest.mark.by_hand
@pytest.mark.parametrize("name", FULL)
def test_full_size_tokens_are_transformers_own(tmp_path, name):
    pytest.importorskip("transformers")
    pytest.importorskip("torch")
    case = FULL[name]
    model, _ = cases.torch_model(case, tmp_path)
    config = cases.config_of(case, tmp_path)
    params = cases.load(config)
    config.encoder.input_size = 0  # the images as they are
    for size in case.sizes:
        for layers in {(), case.layers}:
            config.encoder.layers = layers
            pixels = cases.images(*size)
            theirs = cases.torch_tokens(case, model, pixels, layers)
            apart = cases.difference(cases.tokens_of(config, params, pixels), theirs)
            print(f"{name} {size} layers {layers}: {apart:.1e}")
            assert apart <= cases.TOLERANCE


def _bicubic(old, new):
    """[new, old]: the cubic kernel (a = -0.75) at half-pixel centres; beyond the edge, the edge's pixel again."""
    matrix = np.zeros((new, old))
    for i in range(new):
        centre = (i + 0.5) * old / new - 0.5
        for tap in range(int(np.floor(centre)) - 1, int(np.floor(centre)) + 3):
            x = abs(centre - tap)
            near, far = 1.25 * x**3 - 2.25 * x**2 + 1, -0.75 * (x**3 - 5 * x**2 + 8 * x - 4)
            matrix[i, np.clip(tap, 0, old - 1)] += near if x <= 1 else far
    return matrix


@pytest.mark.parametrize("height, width", [(32, 32), (24, 32), (32, 24)])
def test_images_are_resized_to_the_encoder_s_input(height, width):
    """Also where one of their sides has that size already."""
    config = cases.config_of(cases.TINY["dinov2"], "")
    config.encoder.input_size = 24
    autoencoder, pixels = models.autoencoder(config), cases.images(height, width)
    resized = np.einsum("ih,jw,bhwc->bijc", _bicubic(height, 24), _bicubic(width, 24), pixels)
    expected = (resized - config.encoder.mean) / config.encoder.std
    # Positions are in float32, to 1e-6 of a pixel; the std of 0.22 magnifies what comes of that.
    np.testing.assert_allclose(autoencoder.encoder_input(jnp.asarray(pixels)), expected, atol=3e-5)
    latents = jax.eval_shape(autoencoder.encode, part_weights.shapes(config, "encoder"), pixels)
    assert latents.shape == (2, *config_keys.latent_shape(config)) == (2, 6, 6, 16)


@pytest.mark.parametrize("add_mean", [False, True])
def test_tokens_in_bfloat16_are_normed_in_float32(add_mean):
    """To a latent: the mean of the normed layers, and the mean token of the last one where that is added."""
    tokens = jnp.asarray(np.random.default_rng(0).normal(3.0, 2.0, (3, 2, 5, 16)), jnp.bfloat16)
    exact = np.float64(tokens)
    normed = (exact - exact.mean(-1, keepdims=True)) / np.sqrt(exact.var(-1, keepdims=True) + 1e-2)
    expected = normed.mean(0) + add_mean * normed[2].mean(1, keepdims=True)
    latents = to_latent(tokens, eps=1e-2, add_mean=add_mean)
    assert latents.dtype == jnp.float32
    np.testing.assert_allclose(latents, expected, atol=1e-5)


def test_weights_and_batches_are_split_over_the_mesh(tmp_path):
    cases.write(tmp_path, cases.shapes_of("dinov3"))
    config = cases.config_of(cases.TINY["dinov3"], tmp_path)
    single = cases.tokens_of(config, cases.load(config), cases.images(16, 28, batch=8))
    config.mesh.update({"data": 2, "fsdp": 4})
    mesh = sharding.make_mesh(config.mesh)
    params = part_weights.load(config, "encoder", "", mesh)
    kernel = params["blocks"]["attention"]["qkv"]["kernel"]
    assert kernel.addressable_shards[0].data.size == kernel.size // 4
    batch = sharding.put_batch(cases.images(16, 28, batch=8), mesh)
    latents = jax.jit(models.autoencoder(config).encode)(params, batch)
    assert latents.sharding.shard_shape(latents.shape)[0] == 1
    assert cases.difference(np.asarray(latents).reshape(single.shape), single) <= 1e-5


# Width, depth, heads and hidden channels of the models on the hub, by their config.json.
_SIZES = {
    "small": (384, 12, 6, 1536),
    "base": (768, 12, 12, 3072),
    "large": (1024, 24, 16, 4096),
    "giant": (1536, 40, 24, 4096),
    "so400m": (1152, 27, 16, 4304),
}
_IMAGENET, _HALVES = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
# Hub id: our values, size, (patch, input, size that the positions are for, registers), MLP, mean and std.
PUBLISHED = {
    **{
        f"facebook/dinov2-{'with-registers-' * r}{s}": (
            *(encoders.dinov2(s, registers=r), s, (14, 224, 518, 4 * r)),
            *("swiglu" if s == "giant" else "gelu", _IMAGENET),
        )
        for s in ("small", "base", "large", "giant")
        for r in (True, False)
    },
    "google/siglip2-base-patch16-256": (encoders.siglip2("base"), "base", (16, 256, 256, 0), "gelu_tanh", _HALVES),
    "google/siglip2-so400m-patch14-224": (
        *(encoders.siglip2("so400m"), "so400m", (14, 224, 224, 0)),
        *("gelu_tanh", _HALVES),
    ),
    **{f"facebook/vit-mae-{s}": (encoders.mae(s), s, (16, 256, 224, 0), "gelu", _IMAGENET) for s in ("base", "large")},
    **{
        f"facebook/dinov3-vit{s[0]}16-pretrain-lvd1689m": (encoders.dinov3(s), s, (16, 256, 0, 4), "gelu", _IMAGENET)
        for s in ("small", "base", "large")
    },
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_are_right(name):
    values, size, sides, mlp, normalisation = PUBLISHED[name]
    width, depth, num_heads, hidden = _SIZES[size]
    config = tiny()
    config.stages = ()
    config.data.image_size = 256
    config.encoder.update(values)
    config.decoder.patch_size = 16
    config.discriminator.layers = (2, 5, 8, 11)
    checks.check(config, sharding.make_mesh(config.mesh))
    e = config.encoder
    assert (e.weights, e.mlp, (e.mean, e.std)) == (name, mlp, normalisation)
    assert (e.patch_size, e.input_size, e.position_size, e.num_registers) == sides
    module, blocks = models.encoder(config, e), part_weights.shapes(config, "encoder")["blocks"]
    assert (module.width, module.depth, module.num_heads) == (width, depth, num_heads)
    last = blocks["mlp"]["w3" if mlp == "swiglu" else "fc2"]["kernel"]
    assert last.shape == (depth, hidden, width)
    assert config_keys.latent_shape(config) == (16, 16, width)


def test_the_discriminator_s_dino_is_vit_s_8():
    values = encoders.dino()
    found = [values[key] for key in ("width", "depth", "num_heads", "mlp_ratio", "patch_size", "input_size")]
    assert found == [384, 12, 6, 4.0, 8, 224] and (values["position_size"], values["num_registers"]) == (224, 0)
    assert (values["mean"], values["std"]) == _IMAGENET
