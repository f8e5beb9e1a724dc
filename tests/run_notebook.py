"""Runs a notebook's code cells in order, in one namespace; figures go to files in one folder.

python tests/run_notebook.py NOTEBOOK FOLDER
"""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt  # noqa: E402


def main(notebook, folder):
    """Whatever a cell raises ends it."""
    names = {"__name__": "__main__"}
    for number, cell in enumerate(json.loads(Path(notebook).read_text())["cells"]):
        if cell["cell_type"] != "code":
            continue
        exec(compile("".join(cell["source"]), f"cell {number}", "exec"), names)
        for figure in plt.get_fignums():
            plt.figure(figure).savefig(Path(folder) / f"{Path(notebook).stem}_{number}_{figure}.png", dpi=100)
        plt.close("all")


if __name__ == "__main__":
    plt.show = lambda: None  # which would clear nothing, and warn
    main(*sys.argv[1:])
