"""Find config files by path or by name, and load them."""

import contextlib
import difflib
import importlib.machinery
import importlib.util
import sys
import traceback
import types
from pathlib import Path

from ml_collections import ConfigDict

from rae_jax.errors import UserError, one_line

_PACKAGE = Path(__file__).parents[1]
# In a wheel configs/ is a folder of the package (launch/wheel.py); in a checkout it is next to the package.
FOLDER = _PACKAGE / "configs" if (_PACKAGE / "configs").is_dir() else _PACKAGE.parent / "configs"


def names():
    """Return the names of the configs that ship with rae_jax."""
    return sorted(path.stem for path in FOLDER.glob("*.py") if "\ndef get_config(" in path.read_text())


def find(source):
    """Return the path of a config file. `source`: its path, or the name, without '.py', of a config of rae_jax.

    Raises UserError, which names the nearest configs, if the file does not exist.
    """
    path = Path(source)
    if path.is_file():
        return path
    if str(source) in names():
        return FOLDER / f"{source}.py"
    raise UserError(f"cannot load the config {source}: neither a file nor the name of a config; {nearest(path.stem)}")


def nearest(name):
    """Return the end of a message: the configs with names close to `name`, or all configs if no name is close."""
    known = names()
    found = difflib.get_close_matches(name, known)
    return f"did you mean {' or '.join(found)}?" if found else f"choose from {', '.join(known)}"


def load(source, *arguments):
    """Return the config that get_config(*arguments) of a file returns. `source`: see find."""
    path = find(source)
    if path.suffix == ".json":
        raise UserError(f"cannot load the config {source}: name a Python file with get_config(), or a config")
    loader = importlib.machinery.SourceFileLoader("config_file", str(path))  # of any suffix
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("config_file", loader))
    with _importable(path):
        try:
            loader.exec_module(module)
            config = module.get_config(*arguments) if hasattr(module, "get_config") else None
        except Exception as error:  # of any kind: the file is the user's program
            lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
            place = f"line {lines[-1]}: " if lines else ""
            kind = "" if isinstance(error, OSError | UserError) else f"{type(error).__name__}: "
            raise UserError(f"cannot load the config {source}: {place}{kind}{one_line(error)}") from error
    if not isinstance(config, ConfigDict) or "stages" not in config:
        raise UserError(
            f"cannot load the config {source}: get_config() must return a ConfigDict, as configs/small.py's does"
        )
    return config


@contextlib.contextmanager
def _importable(path):
    """Let a config file import the configs that ship with rae_jax, and the files next to it, as `configs`.

    The files next to it come first if their folder is called configs. A package `configs` of another project comes
    last: it is hidden meanwhile, and restored afterwards.
    """
    configs = types.ModuleType("configs")
    folder = path.resolve().parent
    own = [folder] if folder.name == "configs" else []
    configs.__path__ = [str(place) for place in (*own, FOLDER, *(Path(place, "configs") for place in sys.path))]
    others = _take_out("configs")
    sys.modules["configs"] = configs
    try:
        yield
    finally:
        _take_out("configs")
        sys.modules.update(others)


def _take_out(package):
    """Remove a package and its modules from sys.modules and return them, {name: module}."""
    found = [name for name in sys.modules if name == package or name.startswith(f"{package}.")]
    return {name: sys.modules.pop(name) for name in found}
