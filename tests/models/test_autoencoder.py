"""The whole autoencoder (encode, normalise, decode): parity with diffusers' AutoencoderRAE, and the decoder's grid.

The goldens (tests/goldens/autoencoders.npz, by make_autoencoder_goldens.py) stand in for diffusers where it is absent.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from autoencoder_cases import (
    DECODER,
    TINY,
    TOLERANCE,
    config_of,
    diffusers_model,
    diffusers_outcome,
    goldens,
    images,
    load,
    outcome,
    write,
)
from conftest import random_like
from safetensors.numpy import load_file

from configs import dit_b
from rae_jax import convert
from rae_jax.build import models, part_weights
from rae_jax.config import keys as config_keys
from rae_jax.models.autoencoder import denormalise, normalise
from rae_jax.models.decoder import Decoder


def _ours(config):
    """Our normalised latents and decoded images, by diffusers' names."""
    encoder, decoder, statistics = load(config, "encoder", "decoder", "statistics")
    autoencoder = models.autoencoder(config)
    latents = jax.jit(lambda x: normalise(autoencoder.encode(encoder, x), statistics))(images())
    decoded = jax.jit(lambda z: autoencoder.decode(decoder, denormalise(z, statistics)))(latents)
    return outcome(latents, decoded)


@pytest.mark.parametrize("name", TINY)
def test_latents_and_images_are_the_goldens(tmp_path, name):
    write(name, tmp_path)
    for key, value in _ours(config_of(TINY[name], tmp_path)).items():
        assert np.abs(value - goldens()[f"{name}/{key}"]).max() <= TOLERANCE, key


@pytest.mark.parametrize("name", TINY)
def test_diffusers_makes_the_goldens_and_loads_our_export(tmp_path, name):
    pytest.importorskip("diffusers")
    from diffusers import AutoencoderRAE

    model = diffusers_model(name)
    golden = {key: goldens()[f"{name}/{key}"] for key in ("latents", "images")}
    for key, value in diffusers_outcome(model).items():
        assert np.abs(value - golden[key]).max() <= TOLERANCE
    model.save_pretrained(tmp_path / "theirs")
    convert.export(None, tmp_path / "ours", config=config_of(TINY[name], tmp_path / "theirs"), form="diffusers")

    again = AutoencoderRAE.from_pretrained(tmp_path / "ours")
    again.load_state_dict(_torch(load_file(tmp_path / "ours" / "diffusion_pytorch_model.safetensors")), strict=True)
    for key, value in diffusers_outcome(again.eval()).items():
        assert np.abs(value - golden[key]).max() <= TOLERANCE


def _torch(arrays):
    import torch

    return {key: torch.from_numpy(value) for key, value in arrays.items()}


@pytest.mark.slow
@pytest.mark.by_hand
@pytest.mark.parametrize("size, grid, patch", [("b", 16, 16), ("l", 16, 32), ("xl", 16, 16), ("xl", 32, 16)])
def test_full_size_decoders_are_diffusers_own(size, grid, patch):
    pytest.importorskip("diffusers")
    import torch
    from diffusers.models.autoencoders.autoencoder_rae import RAEDecoder
    from diffusers.models.embeddings import get_2d_sincos_pos_embed

    sizes = {**dit_b.DECODERS[size], "patch_size": patch}
    theirs = RAEDecoder(
        hidden_size=768,
        decoder_hidden_size=sizes["width"],
        decoder_num_hidden_layers=sizes["depth"],
        decoder_num_attention_heads=sizes["num_heads"],
        decoder_intermediate_size=sizes["hidden"],
        num_patches=grid**2,
        patch_size=patch,
        image_size=patch * grid,
    ).eval()
    theirs.decoder_pos_embed[0, 1:] = get_2d_sincos_pos_embed(sizes["width"], grid, base_size=grid)  # one a token
    torch.manual_seed(0)
    z = torch.randn(1, grid**2, 768)
    with torch.no_grad():
        expected = theirs.unpatchify(theirs(z).logits).permute(0, 2, 3, 1).numpy()
    ours = Decoder(**sizes)
    encoder = {**TINY["dinov2"], "width": 768, "num_heads": 12, "input_size": 14 * grid}
    config = config_of(encoder, decoder=sizes, image_size=patch * grid)
    params = _from_torch(config, theirs.state_dict())
    latents = jnp.asarray(z.numpy()).reshape(1, grid, grid, 768)
    image = jax.jit(lambda p, z: ours.apply({"params": p}, z))(params, latents)
    print(f"{size}, {grid}x{grid} tokens, patch {patch}: {np.abs(image - expected).max():.1e}")
    assert np.abs(image - expected).max() <= TOLERANCE


def _from_torch(config, state):
    """Parameters of our decoder from theirs, by way of a file."""
    import tempfile
    from pathlib import Path

    from safetensors.numpy import save_file

    with tempfile.TemporaryDirectory() as folder:
        config.decoder.weights = str(Path(folder) / "decoder.model.safetensors")
        save_file({key: np.ascontiguousarray(value.numpy()) for key, value in state.items()}, config.decoder.weights)
        return load(config, "decoder")[0]


def test_a_decoder_with_its_own_grid_resizes_the_latents(tmp_path):
    """As torch does: positions between the centres of four tokens, the edge beyond the edge."""
    config = config_of(TINY["mae"], tmp_path)
    write("mae", tmp_path)
    params = load(config, "decoder")[0]
    latents = jax.random.normal(jax.random.key(0), (1, 2, 2, 64))
    config.decoder.grid_size = 4
    own = models.autoencoder(config).decoder
    line = np.array([[1, 0], [0.75, 0.25], [0.25, 0.75], [0, 1]])
    resized = jnp.einsum("ih,jw,bhwc->bijc", line, line, latents)
    ours = jax.jit(own.apply)({"params": params}, latents)
    assert ours.shape == (1, 8, 8, 3)
    np.testing.assert_allclose(ours, jax.jit(Decoder(**DECODER).apply)({"params": params}, resized), atol=1e-5)


def test_the_decoder_s_norms_have_hardly_an_epsilon():
    """1e-12: however small the class token is, patches see the same in it. They see it in the first block's norm alone,
    where there is one block."""
    decoder = Decoder(**{**DECODER, "depth": 1})
    latents = jax.random.normal(jax.random.key(0), (1, 4, 4, 64))
    shapes = jax.eval_shape(decoder.init, jax.random.key(0), latents)["params"]
    params = random_like(shapes, seed=0, scale=0.3)
    draw = jax.jit(lambda params: decoder.apply({"params": params}, latents))
    small, none = ({**params, "cls_token": params["cls_token"] * scale} for scale in (1e-3, -1.0))
    np.testing.assert_allclose(draw(small), draw(params), rtol=1e-4, atol=1e-4)
    assert np.abs(draw(none) - draw(params)).max() > 1e-2


def test_an_image_decoder_s_output_is_the_picture():
    """RAEv2's: the last layer's output, which RAE's decoders have in the encoder's normalisation."""
    config = config_of(TINY["mae"])
    params = random_like(part_weights.shapes(config, "decoder"), seed=0, scale=0.2)
    latents = np.random.default_rng(1).normal(size=(2, *config_keys.latent_shape(config))).astype(np.float32)
    outputs = {}
    for output in ("normalised", "image"):
        config.decoder.output = output
        outputs[output] = np.asarray(models.autoencoder(config).decode(params, latents))
    expected = outputs["image"] * np.float32(config.encoder.std) + np.float32(config.encoder.mean)
    np.testing.assert_allclose(outputs["normalised"], expected, atol=1e-5)
