"""Find published checkpoints in a local folder or on the model hub, and read them tensor by tensor."""

import contextlib
import functools
import hashlib
import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import huggingface_hub
import numpy as np
from huggingface_hub import errors
from safetensors import SafetensorError, safe_open

from rae_jax.errors import UserError
from rae_jax.weights import safetensors_tree, torch_files

# Files that a folder or a repository may hold, the preferred file first.
WHOLE, INDEX, PICKLED = "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"
DIFFUSERS = "diffusion_pytorch_model.safetensors"
SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")
# Names of torch's wrappers around a model: of DistributedDataParallel and AveragedModel, of torch.compile; and a
# tensor of AveragedModel itself.
_WRAPPERS, _COUNTER = ("module.", "_orig_mod."), "n_averaged"


class Tensor(NamedTuple):
    """A tensor that is not read from its file yet."""

    shape: tuple
    read: Any  # () -> numpy array, in the file's precision


def open_checkpoint(source):
    """Return {name: Tensor} of a checkpoint. `source`: a file, a folder, a hub id, or 'ID:PATH' of a file on the hub.

    Names are those of the model itself, without torch's wrappers. The hub's library caches the files that it fetches.
    Raises UserError if no checkpoint exists, if a file is damaged, or if two files hold the same tensor.
    """
    try:
        path = Path(source).expanduser()
    except RuntimeError as error:  # a user without a home directory
        raise UserError(f"{source}: the home directory is unknown; write the whole path") from error
    repo, _, file = source.partition(":")
    names = (file,) if file else (WHOLE, INDEX, PICKLED, DIFFUSERS)
    if path.is_file():
        folder, names = path.parent, (path.name,)
        finders = [lambda name: _in_folder(folder, name)]
    elif path.is_dir():
        finders = [lambda name: _in_folder(path, name)]
    elif path.suffix and not file and path.suffix in SUFFIXES:
        raise UserError(f"the file {source} does not exist: name another file, a folder, or a hub id")
    else:
        # First all names in the cache, then the network: cached files need no connection.
        finders = [lambda name: _in_cache(repo, name), lambda name: _from_hub(repo, name, file)]
    for find in finders:
        for name in names:
            if found := find(name):
                return _unwrapped(_open(found, finders))
    raise UserError(f"{repo} holds none of {', '.join(names)}: put the model's weights there, or name another file")


def fetch_folder(repo, names):
    """Return the folder of the cache with the files `names` of a hub repository, as far as they exist.

    Raises UserError if the first file does not exist.
    """
    first, *others = names
    found = _in_cache(repo, first) or _from_hub(repo, first, first)
    if found is None:
        raise UserError(f"{repo} holds no {first}: name another hub id, or a local folder")
    revision = found.parent.name  # the cache's name of the revision: all files must be of one revision
    for name in others:
        with contextlib.suppress(UserError):  # callers that need the file report that it is missing
            _in_cache(repo, name, revision) or _from_hub(repo, name, name, revision)
    return found.parent


def write(path, tensors, *, pickled):
    """Write {name: array} as safetensors, or `pickled` as a torch file. Raises UserError if torch is not installed."""
    if not pickled:
        return safetensors_tree.write(path, tensors)
    torch_files.write(path, tensors)


def _open(path, finders):
    """Return {name: Tensor} of a file, or of all files of an index; `finders` find them."""
    if path.suffix == ".safetensors":
        return _safetensors(path)
    if path.suffix != ".json":
        arrays = torch_files.read(path)
        return {name: Tensor(array.shape, functools.partial(np.asarray, array)) for name, array in arrays.items()}
    try:
        shards = sorted(set(json.loads(path.read_text())["weight_map"].values()))
    except (ValueError, KeyError) as error:
        raise UserError(f"{path} is not a whole index of safetensors files: fetch it again") from error
    tensors = {}
    for shard in shards:
        found = next((file for find in finders if (file := find(shard))), None)
        if found is None:
            raise UserError(f"{path} names {shard}, which does not exist: fetch it again")
        for name, tensor in _safetensors(found).items():
            if name in tensors:
                raise UserError(
                    f"{found} holds tensor {name!r}, which another file of {path} holds too: fetch them again"
                )
            tensors[name] = tensor
    return tensors


def _safetensors(path):
    try:
        file = safe_open(path, "numpy")
    except SafetensorError as error:
        raise UserError(f"{path} is not a whole safetensors file ({error}): fetch it again") from error

    def read(name):
        try:
            return file.get_tensor(name)
        except (AttributeError, TypeError, KeyError) as error:  # NumPy has no such type
            kind = file.get_slice(name).get_dtype()
            raise UserError(f"{path}: {name!r} has the type {kind}: write it as F32, F16 or BF16") from error

    return {
        name: Tensor(tuple(file.get_slice(name).get_shape()), functools.partial(read, name))
        for name in file.keys()  # noqa: SIM118  not a dict
    }


def _unwrapped(tensors):
    """Return the tensors by the model's own names. A wrapper's name is removed if all names begin with it."""
    tensors = {name: tensor for name, tensor in tensors.items() if name != _COUNTER}
    while prefix := next((p for p in _WRAPPERS if tensors and all(name.startswith(p) for name in tensors)), None):
        tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    # torch.compile of a part of the model puts its name in the middle.
    short = {re.sub(r"(?<=\.)_orig_mod\.", "", name): tensor for name, tensor in tensors.items()}
    return short if len(short) == len(tensors) else tensors


def _in_folder(folder, name):
    path = folder / name
    return path if path.exists() else None


def _in_cache(repo, name, revision=None):
    try:
        path = huggingface_hub.try_to_load_from_cache(repo, name, revision=revision)
    except errors.HFValidationError as error:
        raise UserError(
            f"{repo!r} is neither a local folder nor a hub id such as facebook/dinov2-base: name the folder that holds "
            f"the weights, a file, or a hub id"
        ) from error
    return Path(path) if isinstance(path, str) else None


def _verified(path):
    """Return the path of a fetched file after a check of its hash, which is its name in the cache.

    Large files have SHA-256, other files git's hash. Raises UserError, and removes the file, if the hash differs.
    """
    kept = path.resolve()
    if re.fullmatch("[0-9a-f]{64}", kept.name):
        found = hashlib.sha256()
    elif re.fullmatch("[0-9a-f]{40}", kept.name):
        found = hashlib.sha1(f"blob {kept.stat().st_size}\0".encode())
    else:
        return path
    with kept.open("rb") as file:
        while chunk := file.read(2**22):
            found.update(chunk)
    if found.hexdigest() == kept.name:
        return path
    path.unlink()
    kept.unlink(missing_ok=True)
    raise UserError(f"{path.name} is not as the hub has it (its hash differs): fetch it again")


def _from_hub(repo, name, file, revision=None):
    try:
        return _verified(Path(huggingface_hub.hf_hub_download(repo, name, revision=revision)))
    except errors.RemoteEntryNotFoundError:
        return None
    except errors.GatedRepoError as error:
        raise UserError(f"{repo} needs its terms accepted: accept them on the hub, then run `hf auth login`") from error
    except errors.RepositoryNotFoundError as error:
        raise UserError(f"the hub has no {repo!r}: name another hub id, or a local folder") from error
    except OSError as error:
        raise UserError(
            f"{repo} is not in the cache, and the hub cannot be reached: on a machine with network download "
            f"{file or WHOLE} of {repo}, put it in a local folder, and name that {'file' if file else 'folder'} "
            f"instead of the hub id"
        ) from error
