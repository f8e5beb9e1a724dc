"""The ViT-B decoder on DINOv2-B with registers, 256 px: the base of the other decoders.

    python -m rae_jax.main --config=configs/decoder_b.py --workdir=runs/decoder_b --config.data.path=IMAGENET/train \
        --config.data.heldout_path=IMAGENET/val

It trains the decoder for 16 epochs at batch 512, with noise (tau 0.8). The paper reports rFID 0.58 without noise
(--config.decoder.train.noise_tau=0).
"""

from configs import dit_b


def get_config():
    """Return dit_b's recipe for the decoder."""
    c = dit_b.get_config()
    c.name = "decoder_b"
    c.stages = ("decoder",)
    c.checkpoint.every = dit_b.epoch(512)
    c.decoder.update({"weights": "", **dit_b.DECODERS["b"]})
    return c
