"""decoder_xl on DINOv2-L with registers. The released weights encode and decode photographs by

    python -m rae_jax.main --config=configs/decoder_xl_dinov2_l.py --workdir=runs/dinov2_l \
        --mode=reconstruct --images=FOLDER
"""

from configs import decoder_xl


def get_config():
    """decoder_xl on the large encoder."""
    return decoder_xl.on_dinov2("large", name="decoder_xl_dinov2_l")
