"""DiT^DH-S on DINOv2-B, 256 px. The released weights, of 14 epochs, guide the larger models (AutoGuidance).

    python -m rae_jax.main --config=configs/dit_s.py --workdir=runs/dit_s --mode=sample

Train it with --config.data.path=IMAGENET/train --config.data.heldout_path=IMAGENET/val. The paper reports gFID 6.07
after 80 epochs.
"""

from configs import dit_b


def get_config():
    """dit_b with a smaller trunk."""
    c = dit_b.get_config()
    c.name = "dit_s"
    c.dit.update(dit_b.DITS["s"])
    c.dit.weights = f"{dit_b.RELEASED}:DiTs/Dinov2/wReg_base/ImageNet256/DiTDH-S_ep14/stage2_model.pt"
    return c
