"""A plain DiT-XL on DINOv2-B, 256 px: the baseline of the wide head.

    python -m rae_jax.main --config=configs/plain_dit_xl.py --workdir=runs/plain --config.data.path=IMAGENET/train \
        --config.data.heldout_path=IMAGENET/val

The paper reports gFID 4.28 after 80 epochs.
"""

from configs import dit_xl


def get_config():
    """dit_xl without its head."""
    c = dit_xl.get_config()
    c.name = "plain_dit_xl"
    c.dit.update({"weights": "", "head_depth": 0})
    return c
