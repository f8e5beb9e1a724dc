"""DiT^DH-L on DINOv2-B, 256 px.

python -m rae_jax.main --config=configs/dit_l.py --workdir=runs/dit_l --config.data.path=IMAGENET/train \
    --config.data.heldout_path=IMAGENET/val
"""

from configs import dit_b


def get_config():
    """dit_b with a larger trunk."""
    c = dit_b.get_config()
    c.name = "dit_l"
    c.dit.update(dit_b.DITS["l"])
    return c
