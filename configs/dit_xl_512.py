"""DiT^DH-XL at 512 px, on 1024 tokens of DINOv2-B at 448 px. This samples the released weights, of 400 epochs:

    python -m rae_jax.main --config=configs/dit_xl_512.py --workdir=runs/dit_xl_512 --mode=sample

The paper reports gFID 1.13 with AutoGuidance.
"""

from configs import dit_xl
from configs.dit_b import RELEASED


def get_config():
    """dit_xl at twice the size."""
    c = dit_xl.get_config()
    c.name = "dit_xl_512"
    c.data.image_size = 512
    c.encoder.input_size = 448
    c.decoder.weights = f"{RELEASED}:decoders/dinov2/wReg_base/ViTXL_n08_i512/model.pt"
    c.statistics.weights = f"{RELEASED}:stats/dinov2/wReg_base/imagenet1k_512/stat.pt"
    c.dit.weights = f"{RELEASED}:DiTs/Dinov2/wReg_base/ImageNet512/DiTDH-XL_ep400/stage2_model.pt"
    return c
