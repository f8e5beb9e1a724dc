"""The ViT-L decoder on DINOv2-B with registers, 256 px.

It trains with noise (tau 0.8). The paper reports rFID 0.50 without noise (--config.decoder.train.noise_tau=0).

python -m rae_jax.main --config=configs/decoder_l.py --workdir=runs/decoder_l --config.data.path=IMAGENET/train \
    --config.data.heldout_path=IMAGENET/val
"""

from configs import decoder_b
from configs.dit_b import DECODERS


def get_config():
    """decoder_b with a larger decoder."""
    c = decoder_b.get_config()
    c.name = "decoder_l"
    c.decoder.update(DECODERS["l"])
    return c
