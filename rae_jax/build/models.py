"""From config to modules, data and steps: the only place that matches on names."""

import functools

import jax.numpy as jnp

from rae_jax.build import sampler
from rae_jax.config.keys import input_size, latent_shape
from rae_jax.data import sources
from rae_jax.data.packed_images import PackedImages
from rae_jax.data.packed_latents import PackedLatents
from rae_jax.data.shapes import Shapes
from rae_jax.errors import UserError
from rae_jax.models import attention, resize, sd_vae
from rae_jax.models.autoencoder import Autoencoder, Backbone, SdVae
from rae_jax.models.classifier import ConvNet
from rae_jax.models.decoder import Decoder
from rae_jax.models.discriminator import DiscriminatorHeads
from rae_jax.models.dit import DiT
from rae_jax.models.dit_dh import DiTDH
from rae_jax.models.layers import Mlp, SwiGlu
from rae_jax.models.lpips import Lpips
from rae_jax.models.vit import ViT
from rae_jax.training import adversarial, classifier, statistics
from rae_jax.training import decoder as decoder_lib
from rae_jax.training import dit as dit_lib
from rae_jax.training import encoder as encoder_lib
from rae_jax.training.adversarial import diff_augment


def autoencoder(config):
    """The frozen encoder and the decoder as one pair of functions."""
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
    )


def encoder(config, e):
    """The module of an encoder, or of a backbone, from its section: what its family fixes, and what is chosen."""
    match e.family:
        case "small":
            fixed = {}
        case "dino":
            fixed = {"layer_scale": False}
        case "dinov2":
            # transformers antialiases the resized positions in its class with registers, and only there.
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


def _computation(config):
    """The fields of a model that say how it computes, not what."""
    how = {"unroll": config.unroll, "remat": config.remat, "attend": _attend(config)}
    return {"dtype": jnp.dtype(config.dtype), **how}


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


def discriminator(config):
    """What judges the decoder's images; None where the adversarial loss has no weight.

    A backbone of its own sees images resized bilinearly, as the published one does; the encoder sees them as always.
    """
    d = config.discriminator
    if not config.decoder.train.adversarial_weight:
        return None
    same = d.backbone.family == "encoder"
    b = config.encoder if same else d.backbone
    backbone = Backbone(
        encoder(config, b),
        tuple(b.mean),
        tuple(b.std),
        input_size=input_size(config, b),
        resize=resize.bicubic if same else resize.bilinear,
        layers=tuple(d.layers),
    )
    augment = functools.partial(diff_augment, prob=d.augment.prob, cutout=d.augment.cutout)
    return decoder_lib.Discriminator(backbone, DiscriminatorHeads(), augment, _discriminator_loss(d.loss))


def _perceptual(config):
    """The decoder's perceptual loss (params, images, images) -> [B]; None where it has no weight."""
    if not config.decoder.train.lpips_weight:
        return None
    lpips = Lpips(jnp.dtype(config.dtype))
    return lambda params, a, b: lpips.apply({"params": params}, a, b)


def _discriminator_loss(name):
    match name:
        case "hinge":
            return adversarial.hinge_loss
        case "vanilla":
            return adversarial.vanilla_loss
        case other:
            raise ValueError(f"unknown discriminator loss {other!r}")


def dit(config, sizes=None):
    """The diffusion transformer: DiT^DH, or a plain DiT where its head has no blocks. `sizes`: the guide's, or else."""
    c = config.dit if sizes is None else sizes
    trunk = {
        "width": c.width,
        "depth": c.depth,
        "num_heads": c.num_heads,
        "num_classes": config.data.num_classes if c.class_conditional else 0,
        "patch_size": c.patch_size,
        "qk_norm": c.qk_norm,
        **_computation(config),
    }
    if c.head_depth == 0:
        return DiT(**trunk)
    return DiTDH(head_width=c.head_width, head_depth=c.head_depth, head_num_heads=c.head_num_heads, **trunk)


def judge(config):
    """The classifier that judges generated images."""
    return ConvNet(tuple(config.judge.widths), config.data.num_classes)


def source(config, split, crop=None):
    """Random-access source of 'train' or 'heldout' images; `crop`, if given, is what will be asked of it.

    Raises UserError where its classes are not the config's.
    """
    data = config.data
    match data.source:
        case "shapes":
            num_images = {"train": data.num_train, "heldout": data.num_heldout}[split]
            found = Shapes(split=split, num_images=num_images, image_size=data.image_size, seed=config.seed)
        case "image_folder":
            found = sources.image_folder(
                path=data.path,
                heldout_path=data.heldout_path,
                split=split,
                image_size=data.image_size,
                num_classes=data.num_classes,
            )
        case "array_record":
            options = {"image_size": data.image_size, "crop": crop, "on_error": data.on_error}
            found = PackedImages(path=data.path, split=split, **options)
        case "tfds":
            part = {"train": data.tfds.split, "heldout": data.tfds.heldout_split}[split]
            found = sources.tfds(name=data.tfds.name, data_dir=data.path, split=part, image_size=data.image_size)
        case other:
            raise ValueError(f"unknown data source {other!r}")
    return _of_classes(found, data.num_classes)


def packed_latents(config, form):
    """Random-access source of the latents that config.data.latents names, for the DiT stage; see PackedLatents."""
    options = {"form": form, "mirrored": config.dit.train.flip, "on_error": config.data.on_error}
    return _of_classes(PackedLatents(path=config.data.latents, **options), config.data.num_classes)


def _of_classes(source, expected):
    count = len(source.class_names)
    if count != expected:
        raise UserError(f"the data has {count} classes: set --config.data.num_classes={count}, not {expected}")
    return source


def init_and_step(config, name):
    """The two functions that make a stage: init(key) -> state, and its pure step."""
    parts = {"autoencoder": autoencoder(config)}
    size, classes = config.data.image_size, config.data.num_classes
    match name:
        case "encoder":
            return encoder_lib.make(
                **parts,
                patch_size=config.encoder.patch_size,
                num_classes=classes,
                image_size=size,
                train=config.encoder.train,
            )
        case "judge":
            return classifier.make(judge=judge(config), image_size=size, train=config.judge.train)
        case "decoder":
            return decoder_lib.make(
                **parts,
                discriminator=discriminator(config),
                perceptual=_perceptual(config),
                latent_shape=latent_shape(config),
                train=config.decoder.train,
            )
        case "statistics":
            return statistics.make(**parts, latent_shape=latent_shape(config))
        case "dit":
            return dit_lib.make(
                **parts,
                dit=dit(config),
                num_classes=classes,
                latent_shape=latent_shape(config),
                path=sampler.path(config),
                target_fn=sampler.target_fn(config),
                time_fn=sampler.time_fn(config),
                shift_factor=sampler.shift_factor(config),
                train=config.dit.train,
            )
        case other:
            raise ValueError(f"unknown stage {other!r}")
