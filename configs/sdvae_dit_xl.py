"""The paper's baseline: DiT-XL on the latents of Stable Diffusion's VAE, ImageNet at 256 px.

    python -m rae_jax.main --config=configs/sdvae_dit_xl.py --workdir=runs/sdvae_dit_xl --config.data.path=IMAGENET

The paper's FID after 80 epochs, 100,080 steps: 7.13. Not yet run here.
"""

from configs import encoders, small

EPOCH = 1_281_167 // 1024  # steps


def get_config():
    """The published hyperparameters; the patch size 2 of the paper's DiT is still to come."""
    c = small.get_config()
    c.name, c.stages, c.unroll = "sdvae_dit_xl", ("judge", "dit"), False
    c.data.update({"source": "image_folder", "image_size": 256, "num_classes": 1000, "flip": True})
    c.encoder.update(encoders.sd_vae())
    c.decoder.update({"weights": c.encoder.weights, "patch_size": 8})
    c.statistics.weights = "none"
    c.dit.update({"width": 1152, "depth": 28, "num_heads": 16})
    c.dit.train.update({"num_steps": 800 * EPOCH, "batch_size": 1024, "learning_rate": 2e-4})
    c.dit.train.update({"final_learning_rate": 2e-5, "decay_start": 40 * EPOCH, "decay": "linear", "ema_decay": 0.9995})
    c.dit.train.update({"warmup_steps": 0, "time_mean": 0.0})
    c.sampler.num_steps = 50
    c.guidance.method = "none"
    return c
