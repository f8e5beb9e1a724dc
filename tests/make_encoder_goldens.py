"""Writes tests/goldens/encoders.npz, with torch and transformers.

PYTHONPATH=. python tests/make_encoder_goldens.py
"""

import json
import tempfile
from pathlib import Path

import numpy as np
from encoder_cases import GOLDENS, TINY, images, torch_model, torch_tokens


def main():
    """One entry a case: the checkpoint's shapes, and the tokens at each size and of the chosen layers."""
    goldens = {}
    for name, case in TINY.items():
        with tempfile.TemporaryDirectory() as folder:
            model, shapes = torch_model(case, Path(folder))
        goldens[f"{name}/shapes"] = json.dumps(shapes)
        for height, width in case.sizes:
            goldens[f"{name}/{height}x{width}"] = torch_tokens(case, model, images(height, width))
        if case.layers:
            goldens[f"{name}/layers"] = torch_tokens(case, model, images(*case.sizes[-1]), case.layers)
    np.savez_compressed(GOLDENS, **goldens)


if __name__ == "__main__":
    main()
