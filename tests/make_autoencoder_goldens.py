"""Writes tests/goldens/autoencoders.npz, with torch and diffusers.

PYTHONPATH=. python tests/make_autoencoder_goldens.py
"""

import json

import numpy as np
from autoencoder_cases import GOLDENS, TINY, diffusers_model, diffusers_outcome


def main():
    """One entry a case: the file's shapes, the latents and the decoded images."""
    goldens = {}
    for name in TINY:
        model = diffusers_model(name)
        goldens[f"{name}/shapes"] = json.dumps({key: tuple(value.shape) for key, value in model.state_dict().items()})
        for key, value in diffusers_outcome(model).items():
            goldens[f"{name}/{key}"] = value
    np.savez_compressed(GOLDENS, **goldens)


if __name__ == "__main__":
    main()
