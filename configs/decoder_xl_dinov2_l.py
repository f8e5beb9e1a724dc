"""The released ViT-XL decoder on DINOv2-L with registers, 256 px. It encodes and decodes photographs by

    python -m rae_jax.main --config=configs/decoder_xl_dinov2_l.py --workdir=runs/dinov2_l --mode=reconstruct \\
        --images=FOLDER

and trains such a decoder as configs/decoder_xl.py does.
"""

from configs import decoder_xl, encoders
from configs.dit_b import RELEASED


def get_config():
    """Return decoder_xl on another encoder."""
    c = decoder_xl.get_config()
    c.name = "decoder_xl_dinov2_l"
    c.encoder.update(encoders.dinov2("large"))
    c.decoder.weights = f"{RELEASED}:decoders/dinov2/wReg_large/ViTXL_n08/model.pt"
    c.statistics.weights = f"{RELEASED}:stats/dinov2/wReg_large/imagenet1k/stat.pt"
    return c
