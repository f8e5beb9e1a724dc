"""The notebooks run from top to bottom, on a CPU, with the small weights."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "colab").glob("*.ipynb"))
FIGURES = {"1_reconstruct": 1, "2_sample": 2, "3_train_and_look": 6}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_have_no_outputs_and_are_plain_python(path):
    notebook = json.loads(path.read_text())
    assert notebook["nbformat"] == 4
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    for cell in code:
        assert cell["outputs"] == [] and cell["execution_count"] is None
        ast.parse("".join(cell["source"]))
    first = json.loads(NOTEBOOKS[0].read_text())["cells"][1]
    assert code[0]["source"] == first["source"]  # the same installation everywhere


@pytest.mark.slow
@pytest.mark.parametrize("name", FIGURES)
def test_it_runs_from_top_to_bottom(name, tmp_path):
    """Run a notebook; RAE_JAX_SHOTS names a folder that keeps its figures."""
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    folder = Path(os.environ.get("RAE_JAX_SHOTS", tmp_path))
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "RAE_JAX_STEPS": "12",
        "RAE_JAX_WORKDIR": str(tmp_path / "run"),
    }
    command = [sys.executable, ROOT / "tests" / "run_notebook.py", ROOT / "colab" / f"{name}.ipynb", folder]
    done = subprocess.run(command, cwd=ROOT / "colab", env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    figures = list(folder.glob(f"{name}_*.png"))
    assert len(figures) == FIGURES[name]
    for figure in figures:
        assert np.asarray(Image.open(figure)).std() > 5
