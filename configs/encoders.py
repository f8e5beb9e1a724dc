"""The published encoders as values of config.encoder; this file is not a config.

    c.encoder.update(encoders.dinov2("base"))
    c.encoder.update(encoders.described("facebook/dinov2-with-registers-base"))  # the same, from its config.json

The weights come from the hub. c.encoder.weights may also name a folder that has the same files. The hub gives DINOv3's
weights only to users who have accepted its terms there.
"""

_IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
_SIZES = {
    "small": {"width": 384, "depth": 12, "num_heads": 6},
    "base": {"width": 768, "depth": 12, "num_heads": 12},
    "large": {"width": 1024, "depth": 24, "num_heads": 16},
    "giant": {"width": 1536, "depth": 40, "num_heads": 24},
}
_MLP = {"mlp": "gelu", "mlp_ratio": 4.0}


def described(weights, *, input_size=0):
    """Return the values that `weights`, a folder or a hub id, has in its config.json and preprocessor_config.json.

    Known families: those below, of any size. `input_size`: 0 is the size for 16x16 tokens; a VAE resizes no images.
    Raises UserError for weights without a description, and for models that are not supported.
    """
    from rae_jax.build import encoder_description  # late: the other functions are data alone
    from rae_jax.errors import UserError

    values = encoder_description.read(weights)
    if values is None:
        raise UserError(f"{weights} has no config.json of transformers or diffusers: name a folder or a hub id")
    return {"input_size": input_size or 16 * values["patch_size"], **values, "weights": str(weights)}


def dinov2(size, *, registers=True, input_size=224):
    """Return DINOv2 'small', 'base', 'large' or 'giant'.

    The paper's encoder is 'base' with registers; for images of 512 px its input_size is 448.
    """
    return {
        "family": "dinov2",
        "weights": f"facebook/dinov2-{'with-registers-' if registers else ''}{size}",
        **_SIZES[size],
        **({"mlp": "swiglu", "mlp_ratio": 4096 / 1536} if size == "giant" else _MLP),
        "patch_size": 14,
        "input_size": input_size,
        "position_size": 518,
        "num_registers": 4 if registers else 0,
        **_IMAGENET,
    }


def siglip2(size):
    """Return SigLIP2's image tower: 'base' (patch 16 at 256 px) or 'so400m' (patch 14 at 224 px)."""
    patch_size, input_size = {"base": (16, 256), "so400m": (14, 224)}[size]
    so400m = {"width": 1152, "depth": 27, "num_heads": 16, "mlp_ratio": 4304 / 1152}
    return {
        "family": "siglip2",
        "weights": f"google/siglip2-{size}-patch{patch_size}-{input_size}",
        **(so400m if size == "so400m" else {**_SIZES[size], "mlp_ratio": 4.0}),
        "mlp": "gelu_tanh",
        "patch_size": patch_size,
        "input_size": input_size,
        "position_size": input_size,
        "num_registers": 0,
        "mean": (0.5, 0.5, 0.5),
        "std": (0.5, 0.5, 0.5),
    }


def dino():
    """Return DINO ViT-S/8 at 224 px, the backbone of the paper's discriminator.

    The discriminator uses the tanh approximation of the GELU. The weights are the file that was released with the
    method; facebook/dino-vits8 on the hub is the same model.
    """
    return {
        "family": "dino",
        "weights": "nyu-visionx/RAE-collections:discs/dino_vit_small_patch8_224.pth",
        **_SIZES["small"],
        "mlp": "gelu_tanh",
        "mlp_ratio": 4.0,
        "patch_size": 8,
        "input_size": 224,
        "position_size": 224,
        "num_registers": 0,
        **_IMAGENET,
    }


def mae(size):
    """Return the encoder of a masked autoencoder, 'base' or 'large', at 256 px; its 224 px positions are resized."""
    return {
        "family": "mae",
        "weights": f"facebook/vit-mae-{size}",
        **_SIZES[size],
        **_MLP,
        "patch_size": 16,
        "input_size": 256,
        "position_size": 224,
        "num_registers": 0,
        **_IMAGENET,
    }


def dinov3(size):
    """Return DINOv3 'small', 'base' or 'large' at 256 px.

    The published multi-layer latent takes 'large' with `layers` 11, 13, ..., 23.
    """
    return {
        "family": "dinov3",
        "weights": f"facebook/dinov3-vit{size[0]}16-pretrain-lvd1689m",
        **_SIZES[size],
        **_MLP,
        "patch_size": 16,
        "input_size": 256,
        "position_size": 0,  # positions are rotary, without a table
        "num_registers": 4,
        **_IMAGENET,
    }


def sd_vae():
    """Return Stable Diffusion's VAE.

    The same file holds its decoder, and its latents are not normalised: a config also needs

    c.decoder.update({"weights": c.encoder.weights, "patch_size": 8})
    c.statistics.weights = "none"
    """
    return {
        "family": "sd_vae",
        "weights": "stabilityai/sd-vae-ft-ema:diffusion_pytorch_model.safetensors",
        "widths": (128, 256, 512, 512),
        "width": 4,  # of the latent
        "depth": 2,  # residual blocks of a level
        "num_heads": 1,
        "patch_size": 8,
        "input_size": 0,
        "position_size": 0,
        "num_registers": 0,
        "mean": (0.5, 0.5, 0.5),
        "std": (0.5, 0.5, 0.5),
    }
