"""The ViT-XL decoder on DINOv2-B with registers, 256 px. rFID 0.49 by the paper.

    python -m rae_jax.main --config=configs/decoder_xl.py --workdir=runs/decoder_xl --config.data.path=IMAGENET/train

The released weights draw photographs again by

    python -m rae_jax.main --config=configs/decoder_xl.py --workdir=runs/decoder_xl --mode=reconstruct --images=FOLDER
"""

from configs import decoder_b
from configs.dit_b import DECODERS, RELEASED


def get_config():
    """decoder_b with the largest decoder, which was released."""
    c = decoder_b.get_config()
    c.name = "decoder_xl"
    c.decoder.update(DECODERS["xl"])
    c.decoder.weights = f"{RELEASED}:decoders/dinov2/wReg_base/ViTXL_n08/model.pt"
    return c
