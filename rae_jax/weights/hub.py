"""Checkpoints that others published: found in a local folder or on the model hub, read tensor by tensor."""

import functools
import json
import pickle
from pathlib import Path
from typing import Any, NamedTuple

import huggingface_hub
import numpy as np
from huggingface_hub import errors
from safetensors import SafetensorError, safe_open

from rae_jax.errors import UserError

WHOLE, DIFFUSERS = "model.safetensors", "diffusion_pytorch_model.safetensors"
INDEX, PICKLED = "model.safetensors.index.json", "pytorch_model.bin"
NAMES = (WHOLE, DIFFUSERS, INDEX, PICKLED)  # in order of choice


class Tensor(NamedTuple):
    """A tensor still in its file."""

    shape: tuple
    read: Any  # () -> numpy array


def open_checkpoint(source):
    """{name: Tensor} of a checkpoint. `source`: a folder, or a hub id, whose files the hub's library caches.

    Raises UserError where there is none, where a file is damaged, or where two files hold the same tensor.
    """
    folder = Path(source).expanduser()
    finders = [lambda name: _in_folder(folder, name)]
    if not folder.is_dir():
        # All of the cache before any of the network: what is there needs no connection.
        finders = [lambda name: _in_cache(source, name), lambda name: _from_hub(source, name)]
    for find in finders:
        for name in NAMES:
            if path := find(name):
                return _open(path, finders)
    raise UserError(f"{source} holds none of {', '.join(NAMES)}: put the model's weights there")


def _open(path, finders):
    if path.name in (WHOLE, DIFFUSERS):
        return _safetensors(path)
    if path.name == PICKLED:
        return _torch_tensors(path)
    try:
        shards = sorted(set(json.loads(path.read_text())["weight_map"].values()))
    except (ValueError, KeyError) as error:
        raise UserError(f"{path} is not a whole index of safetensors files: fetch it again") from error
    tensors = {}
    for shard in shards:
        found = next((file for find in finders if (file := find(shard))), None)
        if found is None:
            raise UserError(f"{path} names {shard}, which is not there: fetch it again")
        for name, tensor in _safetensors(found).items():
            if name in tensors:
                raise UserError(f"{found} holds tensor {name!r}, which another file of {path} holds as well")
            tensors[name] = tensor
    return tensors


def _safetensors(path):
    try:
        file = safe_open(path, "numpy")
    except SafetensorError as error:
        raise UserError(f"{path} is not a whole safetensors file ({error}): fetch it again") from error
    return {
        name: Tensor(tuple(file.get_slice(name).get_shape()), functools.partial(file.get_tensor, name))
        for name in file.keys()  # noqa: SIM118  it is no dict
    }


def _torch_tensors(path):
    try:
        import torch
    except ImportError as error:
        raise UserError(f"reading {path} takes torch: install it, or put {WHOLE} beside it") from error
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        return {name: Tensor(tuple(t.shape), functools.partial(np.asarray, t.float())) for name, t in state.items()}
    except (pickle.UnpicklingError, RuntimeError, EOFError, AttributeError) as error:
        raise UserError(f"{path} is not a whole file of tensors: fetch it again") from error


def _in_folder(folder, name):
    path = folder / name
    return path if path.exists() else None


def _in_cache(repo, name):
    try:
        path = huggingface_hub.try_to_load_from_cache(repo, name)
    except errors.HFValidationError as error:
        raise UserError(f"{repo!r} is neither a folder here nor a hub id such as facebook/dinov2-base") from error
    return Path(path) if isinstance(path, str) else None


def _from_hub(repo, name):
    try:
        return Path(huggingface_hub.hf_hub_download(repo, name))
    except errors.RemoteEntryNotFoundError:
        return None
    except errors.GatedRepoError as error:
        raise UserError(f"{repo} wants its terms accepted on the hub, and `hf auth login` here") from error
    except errors.RepositoryNotFoundError as error:
        raise UserError(f"the hub has no {repo!r}: name another, or a folder here") from error
    except OSError as error:
        raise UserError(
            f"{repo} is not in the cache, and the hub cannot be reached: on a machine with network download {WHOLE} of "
            f"{repo}, put it in a folder here, and name that folder instead of the hub id (a VAE's file is {DIFFUSERS})"
        ) from error
