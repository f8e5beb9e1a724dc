"""RAEv2's ViT-XL decoder on DINOv3-L, latents of K=7 layers, 256 px: its output is the image itself.

The paper (arXiv 2605.18324) reports 22.6 dB for the decoder that was trained on ImageNet, with the recipe of this
config. ':general' names the released decoder that was trained on more kinds of images.

    python -m rae_jax.main --config=configs/raev2_decoder_k7.py --workdir=runs/raev2_k7 --mode=reconstruct \
        --images=FOLDER
    python -m rae_jax.main --config=configs/raev2_decoder_k7.py:general --workdir=runs/raev2_general \
        --mode=reconstruct --images=FOLDER

DINOv3's weights are gated: see docs/weights.md.
"""

from configs import decoder_xl, encoders

RELEASED = "nyu-visionx/RAEv2-models"
LAYERS = {7: tuple(range(11, 24, 2)), 23: tuple(range(1, 24))}  # {K: blocks of DINOv3-L whose tokens are averaged}


def get_config(images="imagenet"):
    """decoder_xl on RAEv2's latents; `images`: 'imagenet' or 'general', the training images of the released weights."""
    return with_layers(7, images)


def with_layers(number, images):
    """Return the config for latents of a number of layers, 7 or 23."""
    c = decoder_xl.get_config()
    c.name = f"raev2_decoder_k{number}"
    on_dinov3(c, number, images)
    return c


def on_dinov3(c, number, images):
    """Set encoder, decoder and statistics of a config to RAEv2's, which are one set."""
    c.encoder.update({**encoders.dinov3("large"), "layers": LAYERS[number]})
    folder = f"{RELEASED}:stage1/{images}/dinov3l-k{number}"
    c.decoder.update({"weights": f"{folder}/decoder.pt", "output": "image"})
    c.statistics.weights = f"{folder}/stats.pt"
