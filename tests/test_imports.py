"""An import has no effects: every module is imported in one process, in both orders, and nothing else changes."""

import ast
import atexit
import importlib.util
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("rae_jax", "configs", "launch")
EXTRAS = {"gradio", "setuptools", "torch"}  # what some modules need that an install may lack


def _files():
    """{module: path} of the package and of what is used from the checkout, where what they need is installed."""
    paths = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in paths]
    return {name: path for name, path in zip(names, paths, strict=True) if not _lacking(path)}


def _lacking(path):
    roots = {name.split(".")[0] for name in _imported_by(path)}
    return [root for root in roots & EXTRAS if importlib.util.find_spec(root) is None]


def _imported_by(path):
    """Modules of others that a file imports when it is imported itself."""
    found = []
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return [name for name in found if name.split(".")[0] not in PACKAGES]


def _state():
    """Return the state of the process that an import could change."""
    import jax
    import numpy as np
    from absl import flags
    from jax._src import xla_bridge
    from PIL import Image, ImageFile

    return {
        "flags": sorted(flags.FLAGS),
        "threads": sorted(os.listdir("/proc/self/task")) if sys.platform == "linux" else threading.enumerate(),
        "devices": xla_bridge.backends_are_initialized(),
        "jax": dict(jax.config.values),
        "numpy": (np.geterr(), np.get_printoptions()),
        "pillow": (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES),
        "environment": dict(os.environ),
        "paths": list(sys.path),
        "signals": {number: signal.getsignal(number) for number in signal.valid_signals()},
        "hooks": (sys.excepthook, threading.excepthook, sys.stdout, sys.stderr, atexit._ncallbacks()),
        "warnings": list(warnings.filters),
        "logging": (logging.root.level, list(logging.root.handlers), logging.root.manager.disable),
        "socket": socket.getdefaulttimeout(),
    }


def _import_all(order):
    """In a process of its own: first what others have written, then all of ours, and what has changed by the latter."""
    files = _files()
    for name in sorted({name for path in files.values() for name in _imported_by(path)}):
        try:
            importlib.import_module(name)
        except ImportError:  # a name in a module
            continue
    before = _state()
    for name in sorted(files, reverse=order == "backward"):
        importlib.import_module(name)
    after = _state()
    for kind, value in before.items():
        assert after[kind] == value, f"{kind}: {value} -> {after[kind]}"
    print(len(files))


@pytest.mark.parametrize("order", ["forward", "backward"])
def test_an_import_defines_starts_and_sets_nothing(order):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, __file__, order]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout) == len(_files()) > 90 and done.stderr == ""


if __name__ == "__main__":
    _import_all(sys.argv[1])
