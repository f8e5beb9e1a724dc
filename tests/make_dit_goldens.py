"""Writes tests/goldens/dits.npz, with torch.

PYTHONPATH=. python tests/make_dit_goldens.py
"""

import numpy as np
from dit_cases import GOLDENS, TINY, inputs, outcome, weights


def main():
    """The oracle's outcome of every case; models/test_dit.py compares the oracle with the authors' own golden."""
    goldens = {}
    for name, case in TINY.items():
        for key, value in outcome(case, weights(case), *inputs(case)).items():
            goldens[f"{name}/{key}"] = value
    np.savez_compressed(GOLDENS, **goldens)


if __name__ == "__main__":
    main()
