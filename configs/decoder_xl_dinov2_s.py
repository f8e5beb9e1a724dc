"""decoder_xl on DINOv2-S with registers. The released weights encode and decode photographs by

    python -m rae_jax.main --config=configs/decoder_xl_dinov2_s.py --workdir=runs/dinov2_s \
        --mode=reconstruct --images=FOLDER
"""

from configs import decoder_xl


def get_config():
    """decoder_xl on the small encoder."""
    return decoder_xl.on_dinov2("small", name="decoder_xl_dinov2_s")
