"""The one engine that turns published checkpoints into parameters and back, by tables, strictly."""

from typing import NamedTuple

import jax
import numpy as np
from flax import traverse_util

from rae_jax.errors import UserError
from rae_jax.weights import safetensors_tree
from rae_jax.weights.tables import Layout


class _Piece(NamedTuple):
    """A part of one of our leaves: the file's tensor, its place in the leaf, its layout and its shape in the file."""

    name: str
    index: tuple
    layout: Layout
    shape: tuple


def load(source, tensors, tables, shapes, shardings):
    """Parameters of these shapes and shardings from `tensors`, {name: hub.Tensor} of the checkpoint `source`.

    Of several tables the one that knows most of the file's names is meant. Leaf by leaf, each handed to its devices
    before the next is read: the host never holds a second copy of the whole. Raises UserError for a tensor that is
    missing, unknown, there twice, of another shape or not as it is fixed, and names it; and for a parameter of ours
    that the family never has.
    """
    leaves = traverse_util.flatten_dict(shapes, sep="/")
    for path in leaves.keys() - tables[0].leaves.keys():
        raise UserError(f"no encoder of config.encoder.family has {path!r}: take its values from configs/encoders.py")
    table = max(tables, key=lambda table: _matches(tensors, table, leaves))
    tensors = _learned(_ours(tensors, table, source), table, source)
    safetensors_tree.check(source, _wanted(table, leaves), {name: tensor.shape for name, tensor in tensors.items()})

    def read(path, leaf, sharding):
        array = np.zeros(leaf.shape, leaf.dtype)
        for piece in _pieces(table, path, leaf.shape):
            array[piece.index] = piece.layout.convert(tensors[piece.name].read())
        return jax.make_array_from_callback(leaf.shape, sharding, lambda index: array[index]).block_until_ready()

    placed = traverse_util.flatten_dict(shardings, sep="/")
    params = {path: read(path, leaf, placed[path]) for path, leaf in leaves.items()}
    return traverse_util.unflatten_dict(params, sep="/")


def unload(params, table):
    """`load` undone: {name: array} of a file as the table describes it, what is fixed included; without the prefix."""
    tensors = {name: np.asarray(value, np.float32) for name, value in table.fixed.items()}
    for path, leaf in traverse_util.flatten_dict(params, sep="/").items():
        leaf = np.asarray(leaf)
        for piece in _pieces(table, path, leaf.shape):
            array = piece.layout.restore(leaf[piece.index])
            tensors[piece.name] = np.ascontiguousarray(array, np.float32).reshape(piece.shape)
    return tensors


def _wanted(table, leaves):
    """{the file's name: shape} of what our leaves are made of."""
    return {piece.name: piece.shape for path, leaf in leaves.items() for piece in _pieces(table, path, leaf.shape)}


def _matches(tensors, table, leaves):
    return len({name.removeprefix(table.prefix) for name in tensors} & _wanted(table, leaves).keys())


def _ours(tensors, table, source):
    """Tensors under the table's names, without those that it ignores."""
    ours = {}
    for name, tensor in tensors.items():
        short = name.removeprefix(table.prefix)
        if short in ours:
            raise UserError(f"{source} holds tensor {short!r} twice, with and without {table.prefix!r}")
        if not short.startswith(table.ignored):
            ours[short] = tensor
    return ours


def _learned(tensors, table, source):
    """Tensors without the fixed ones, which need not be there but must be right."""
    for name in tensors.keys() & table.fixed.keys():
        found, fixed = tensors[name], table.fixed[name]
        if found.shape != fixed.shape:
            raise UserError(f"{source}: {name!r} has shape {found.shape}, the config's model needs {fixed.shape}")
        if not np.allclose(found.read(), fixed, atol=1e-4):
            raise UserError(f"{source}: {name!r} is not what this project computes: it was made for another model")
    return {name: tensor for name, tensor in tensors.items() if name not in table.fixed}


def _pieces(table, path, shape):
    layout, *names = table.leaves[path]
    first = table.first.get(path.split("/")[0])
    blocks = (None,) if first is None else range(shape[0])
    part = shape[-1] // len(names)
    piece_shape = (*shape[first is not None : -1], part)
    for block in blocks:
        for i, name in enumerate(names):
            if name is not None:
                index = (..., slice(i * part, (i + 1) * part))
                index = index if block is None else (block, *index)
                number = None if block is None else first + block
                yield _Piece(name.format(number), index, layout, layout.shape(piece_shape))
