"""The paper's baseline: DiT-XL on the latents of Stable Diffusion's VAE, ImageNet at 256 px.

    python -m rae_jax.main --config=configs/sdvae_dit_xl.py --workdir=runs/sdvae_dit_xl \
        --config.data.path=IMAGENET/train --config.data.heldout_path=IMAGENET/val

The paper reports gFID 7.13 after 80 epochs.
"""

from configs import encoders, plain_dit_xl


def get_config():
    """Return plain_dit_xl on 32x32 latents of 4 channels, as 16x16 patches."""
    c = plain_dit_xl.get_config()
    c.name = "sdvae_dit_xl"
    c.encoder.update(encoders.sd_vae())
    c.decoder.update({"weights": c.encoder.weights, "patch_size": 8})
    c.statistics.weights = "none"
    c.dit.patch_size = 2
    return c
