"""Writes tests/goldens/sd_vae.npz, with torch and diffusers.

PYTHONPATH=. python tests/make_sd_vae_goldens.py
"""

import json
import tempfile
from pathlib import Path

import numpy as np
from sd_vae_cases import GOLDENS, SIZE, TINY, inputs, theirs, torch_model


def main():
    """The checkpoint's shapes, the latents of an image and the image of other latents."""
    with tempfile.TemporaryDirectory() as folder:
        model, shapes = torch_model(TINY, Path(folder))
    np.savez_compressed(GOLDENS, shapes=json.dumps(shapes), **theirs(model, *inputs(TINY, *SIZE)))


if __name__ == "__main__":
    main()
