"""Read and write torch files of tensors. Reading runs no code that a file asks for."""

import pickle
import re
import struct

import jax.numpy as jnp

from rae_jax.errors import UserError

OLDEST = (2, 6)  # older versions run the code of files made on purpose, also with weights_only (CVE-2025-32434)
_WEIGHTS = ("ema", "model", "state_dict")  # keys of training checkpoints, first the weights that are evaluated


class _Placeholder:
    """Replaces an object of a file that is not a tensor. It ignores the content of the object."""

    def __new__(cls, *args):
        return super().__new__(cls)

    def __setstate__(self, state):
        pass


def _plain_dict(*args):
    return {}


_SYSTEMS = ("Posix", "Windows")
# Objects that training checkpoints hold besides tensors. None of them is created: torch gets a placeholder instead.
_REPLACED = (
    *("argparse.Namespace", "types.SimpleNamespace", "torch.torch_version.TorchVersion"),
    *(f"pathlib.{place}{pure}{kind}Path" for place in ("", "_local.") for pure in ("", "Pure") for kind in _SYSTEMS),
    *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("scalar", "_reconstruct")),
    *("numpy.dtype", "numpy.ndarray"),
    *(f"builtins.{name}" for name in ("dict", "list", "int", "float")),  # what makes a defaultdict's values
)
_KNOWN = [*((_Placeholder, name) for name in _REPLACED), (_plain_dict, "collections.defaultdict")]

# The errors of torch's reader for files that are cut off or garbled, or that hold other objects.
_GARBLED = (pickle.UnpicklingError, struct.error, RuntimeError, EOFError, OSError, ValueError, LookupError)
_GARBLED += (TypeError, AttributeError)
_OTHER_OBJECT = re.compile(r"GLOBAL ([\w.]+) (?:was not an allowed|whose module)|``([\w.]+)``.* must be imported")


def read(path):
    """Return {name: array} of a torch file, in the file's precision; of a training checkpoint, of its average.

    Entries that are not tensors are left out. Raises UserError for a file that is not whole, that holds no dict of
    tensors, or that holds objects other than tensors, plain values and _KNOWN.
    """
    torch = _torch(f"reading {path}", "put model.safetensors next to it")
    try:
        with torch.serialization.safe_globals(_KNOWN):
            content = torch.load(path, map_location="cpu", weights_only=True)
        arrays = {name: _array(torch, tensor) for name, tensor in _state(torch, content).items()}
    except _GARBLED as error:
        raise UserError(f"{path} {_complaint(error)}") from error
    if not arrays:
        raise UserError(f"{path} holds no dict of tensors: save the state dict of a model, {_SAVE}")
    return arrays


def write(path, arrays):
    """Write {name: array or None} as a torch file. Raises UserError if torch is not installed."""
    torch = _torch(f"writing {path}", "write safetensors instead")
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({name: None if a is None else torch.from_numpy(a.copy()) for name, a in arrays.items()}, path)


_SAVE = "torch.save(model.state_dict(), FILE)"


def _state(torch, content):
    """Return {name: tensor} of the weights in the content of a file; {} if it holds none."""

    def tensors(value):
        items = value.items() if isinstance(value, dict) else ()
        return {name: tensor for name, tensor in items if isinstance(name, str) and isinstance(tensor, torch.Tensor)}

    inner = [content.get(key) for key in _WEIGHTS] if isinstance(content, dict) else []
    return next((found for value in (*inner, content) if (found := tensors(value))), {})


def _array(torch, tensor):
    """Return the NumPy array of a tensor, without a copy if NumPy has its type."""
    tensor = tensor.detach()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(jnp.bfloat16)
    if tensor.is_floating_point() and tensor.element_size() == 1:  # NumPy has none of the 8-bit types
        tensor = tensor.float()
    return tensor.numpy()


def _complaint(error):
    """Return why a file is refused, and the fix."""
    if found := _OTHER_OBJECT.search(str(error)):
        return (
            f"holds an object of {found[1] or found[2]}, which could run code: "
            f"save only the state dict where you trust the file, {_SAVE}"
        )
    return "is not a whole file of tensors: fetch it again"


def _torch(task, instead):
    """Return the module torch. Raises UserError that names a task, and another way, if torch is missing or too old."""
    try:
        import torch
    except ImportError as error:
        raise UserError(f"{task} needs torch: install it, or {instead}") from error
    if torch.__version__ < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        raise UserError(f"{task} needs torch {oldest} or newer, not {torch.__version__}: upgrade it, or {instead}")
    return torch
