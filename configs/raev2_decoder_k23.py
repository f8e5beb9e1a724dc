"""RAEv2's ViT-XL decoder on DINOv3-L, latents of K=23 layers, 256 px: as raev2_decoder_k7, with sharper images.

The paper reports 27.0 dB for the decoder trained on ImageNet, and 29.1 dB for ':general'.

    python -m rae_jax.main --config=configs/raev2_decoder_k23.py:general --workdir=runs/raev2_k23 \
        --mode=reconstruct --images=FOLDER
"""

from configs import raev2_decoder_k7


def get_config(images="imagenet"):
    """raev2_decoder_k7 with the latents of blocks 1 to 23."""
    return raev2_decoder_k7.with_layers(23, images)
