"""The ViT-XL decoder on DINOv2-B with registers, 256 px.

The paper reports rFID 0.57 with the noise (tau 0.8) of this config, and 0.49 without
(--config.decoder.train.noise_tau=0).

    python -m rae_jax.main --config=configs/decoder_xl.py --workdir=runs/decoder_xl --config.data.path=IMAGENET/train \
        --config.data.heldout_path=IMAGENET/val

The released weights encode and decode photographs by

    python -m rae_jax.main --config=configs/decoder_xl.py --workdir=runs/decoder_xl --mode=reconstruct --images=FOLDER
"""

from configs import decoder_b, encoders
from configs.dit_b import DECODERS, RELEASED


def get_config():
    """decoder_b with the largest decoder, the one that was released."""
    return on_dinov2("base", name="decoder_xl")


def on_dinov2(size, *, name):
    """Return the config of the decoder that was released for DINOv2 'small', 'base' or 'large', with registers."""
    c = decoder_b.get_config()
    c.name = name
    c.encoder.update(encoders.dinov2(size))
    c.decoder.update(DECODERS["xl"])
    c.decoder.weights = f"{RELEASED}:decoders/dinov2/wReg_{size}/ViTXL_n08/model.pt"
    c.statistics.weights = f"{RELEASED}:stats/dinov2/wReg_{size}/imagenet1k/stat.pt"
    return c
