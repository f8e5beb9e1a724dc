"""Construction of models from the config: it matches the families of encoders and the kinds of attention by name."""

import functools

import jax
import jax.numpy as jnp

from rae_jax.config import auto
from rae_jax.config.keys import input_size
from rae_jax.models import attention, conditions, layers, resize, sd_vae
from rae_jax.models.autoencoder import Autoencoder, Backbone, SdVae
from rae_jax.models.classifier import ConvNet
from rae_jax.models.decoder import Decoder
from rae_jax.models.dit import DiT
from rae_jax.models.dit_dh import DiTDH, InContextDiTDH
from rae_jax.models.layers import Mlp, SwiGlu
from rae_jax.models.vit import ViT


def autoencoder(config):
    """Return the frozen encoder and the decoder as one pair of functions."""
    e, d = config.encoder, config.decoder
    module = encoder(config, e)
    if e.family == "sd_vae":
        return SdVae(module, sd_vae.Decoder(tuple(e.widths), e.depth, jnp.dtype(config.dtype)))
    decoder = Decoder(
        width=d.width,
        depth=d.depth,
        num_heads=d.num_heads,
        hidden=d.hidden,
        patch_size=d.patch_size,
        grid_size=d.grid_size or None,
        **_computation(config),
    )
    return Autoencoder(
        module,
        decoder,
        tuple(e.mean),
        tuple(e.std),
        input_size=e.input_size or None,
        layers=tuple(e.layers) or None,
        add_mean=bool(e.layers) and e.family == "dinov3",
        norm_eps=module.norm_eps,
        normalised_output=_is_normalised(d.output),
    )


def _is_normalised(output):
    match output:
        case "normalised":
            return True
        case "image":
            return False
        case other:
            raise ValueError(f"unknown output of a decoder {other!r}")


def encoder(config, e):
    """Return the module of an encoder, or of a backbone, from its config section `e`."""
    match e.family:
        case "small":
            fixed = {}
        case "dino":
            fixed = {"layer_scale": False}
        case "dinov2":
            # transformers antialiases resized positions in its class with registers only.
            fixed = {"antialias": e.num_registers > 0}
        case "siglip2":
            fixed = {"cls_token": False, "layer_scale": False}
        case "mae":
            fixed = {"layer_scale": False, "norm_eps": 1e-12}
        case "dinov3":
            fixed = {"rope": True, "norm_eps": 1e-5}
        case "sd_vae":
            return sd_vae.Encoder(tuple(e.widths), e.depth, latent_width=e.width, dtype=jnp.dtype(config.dtype))
        case other:
            raise ValueError(f"unknown encoder family {other!r}")
    return ViT(
        width=e.width,
        depth=e.depth,
        num_heads=e.num_heads,
        mlp=_mlp(e.mlp, round(e.mlp_ratio * e.width)),
        patch_size=e.patch_size,
        position_size=e.position_size or input_size(config, e),
        num_registers=e.num_registers,
        **_computation(config),
        **fixed,
    )


def backbone(config):
    """Return the frozen `Backbone` of the discriminator.

    A separate backbone gets images resized bilinearly, like the published one; the encoder as backbone gets images
    resized bicubically, as everywhere.
    """
    d = config.discriminator
    same = d.backbone.family == "encoder"
    b = config.encoder if same else d.backbone
    return Backbone(
        encoder(config, b),
        tuple(b.mean),
        tuple(b.std),
        input_size=input_size(config, b),
        resize=resize.bicubic if same else resize.bilinear,
        layers=tuple(d.layers),
    )


def _computation(config):
    """Return the fields of a model for dtype, rematerialisation and attention; 'auto' means the devices here."""
    if auto.is_open(config):
        config = auto.settled(config, jax.devices()[0])
    options = {"unroll": config.unroll, "remat": _remat(config.remat), "attend": _attend(config)}
    return {"dtype": jnp.dtype(config.dtype), **options}


def _remat(name):
    match name:
        case "none":
            return None
        case "dots":
            return layers.KEEP_PRODUCTS
        case "full":
            return layers.KEEP_NOTHING
        case other:
            raise ValueError(f"unknown remat {other!r}")


def _attend(config):
    match config.attention:
        case "xla":
            return attention.recomputed if config.remat == "dots" else attention.xla
        case "cudnn":
            return attention.cudnn
        case "flash":
            return attention.flash
        case other:
            raise ValueError(f"unknown attention {other!r}")


def _mlp(name, hidden):
    match name:
        case "gelu":
            return functools.partial(Mlp, hidden)
        case "gelu_tanh":
            return functools.partial(Mlp, hidden, approximate=True)
        case "swiglu":
            return functools.partial(SwiGlu, hidden)
        case other:
            raise ValueError(f"unknown MLP {other!r}")


def dit(config, sizes=None, *, mean_velocity=False):
    """Return the diffusion transformer: DiT^DH, RAEv2's DiT^DH, or a plain DiT if its head has no blocks.

    `sizes`: the section of another model's sizes, such as config.guidance.dit. `mean_velocity`: with a second time.
    """
    c = config.dit if sizes is None else sizes
    trunk = {
        "width": c.width,
        "depth": c.depth,
        "num_heads": c.num_heads,
        "embed": condition(config, c).embed,
        "patch_size": c.patch_size,
        "qk_norm": c.qk_norm,
        "mean_velocity": mean_velocity,
        **_computation(config),
    }
    if c.head_depth == 0:
        return DiT(**trunk)
    head = {"head_width": c.head_width, "head_depth": c.head_depth, "head_num_heads": c.head_num_heads}
    match c.conditioning:
        case "adaln":
            return DiTDH(**trunk, **head, base_depth=c.base_depth)
        case "in_context":
            return InContextDiTDH(**trunk, **head, base_depth=c.base_depth, time_tokens=c.time_tokens)
        case other:
            raise ValueError(f"unknown conditioning {other!r}")


def condition(config, sizes=None):
    """Return the `Condition` of the diffusion transformer: a label."""
    c = config.dit if sizes is None else sizes
    tokens = c.label_tokens if c.conditioning == "in_context" else 0
    return conditions.labels(config.data.num_classes, used=c.class_conditional, tokens=tokens)


def classifier(config):
    """Return the classifier of the stage 'judge', which predicts the class of generated images."""
    return ConvNet(tuple(config.judge.widths), config.data.num_classes)
