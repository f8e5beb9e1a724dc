"""RAEv2's diffusion transformer (XL) on DINOv3-L with K=7 layers, ImageNet at 256 px, with internal guidance.

    python -m rae_jax.main --config=configs/raev2_xl.py --workdir=runs/raev2 --mode=sample

Training takes 80 epochs at batch 1024, with Muon:

    python -m rae_jax.main --config=configs/raev2_xl.py --workdir=runs/raev2 --config.dtype=bfloat16 \
        --config.data.path=IMAGENET/train --config.data.heldout_path=IMAGENET/val

The paper (arXiv 2605.18324) reports gFID 1.65 without guidance and 1.06 with internal guidance, both after 80 epochs.
--config.guidance.method=none samples without guidance.
"""

from configs import dit_b, raev2_decoder_k7


def get_config():
    """dit_b with RAEv2's latents, network, prediction, optimiser and guidance."""
    c = dit_b.get_config()
    c.name = "raev2_xl"
    raev2_decoder_k7.on_dinov3(c, 7, "imagenet")
    c.dit.update(
        {"width": 1440, "depth": 28, "num_heads": 20, "head_width": 2048, "head_depth": 2, "head_num_heads": 16}
    )
    c.dit.update({"conditioning": "in_context", "base_depth": 8, "qk_norm": True, "prediction": "data_in_velocity"})
    c.dit.weights = f"{raev2_decoder_k7.RELEASED}:stage2/imagenet/dinov3l-k7/checkpoint.pt"
    c.dit.train.update({"num_steps": 80, "decay_start": 25, "decay_end": 50, "optimizer": "muon_all"})
    c.sampler.update({"grid": "plain", "num_steps": 100})
    c.guidance.update({"method": "internal", "scale": 1.78, "t_min": 0.1, "t_max": 1.0})
    return c
