"""Convert published checkpoints to parameters and back, by tables, with strict checks."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from rae_jax.errors import UserError
from rae_jax.weights import checks
from rae_jax.weights.tables import Layout


class _Piece(NamedTuple):
    """A part of one of our parameters that is one tensor of the file."""

    name: str  # of the file's tensor
    index: tuple  # its place in our parameter
    layout: Layout
    shape: tuple  # in the file


def load(source, tensors, tables, shapes, shardings):
    """Return parameters of these shapes and shardings from `tensors`, {name: hub.Tensor} of the checkpoint `source`.

    Of several tables the table that has most of the file's names is used. Parameters are put on their devices one by
    one: the host never holds a second copy of all. Raises UserError that names a tensor that is missing, unknown,
    contained twice, of another shape, not finite, or not equal to its fixed values; and for a parameter of ours that
    no file of this kind has.
    """
    leaves = traverse_util.flatten_dict(shapes, sep="/")
    for path in sorted(leaves.keys() - tables[0].leaves.keys()):
        raise UserError(f"published weights of this kind have no {path!r}: change the config's model")
    table = max(tables, key=lambda table: _matches(tensors, table, leaves))
    file, tensors = tensors, _ours(tensors, table, source)
    fixed = {name: table.fixed[name] for name in sorted(tensors.keys() & table.fixed.keys())}
    wanted = _wanted(table, leaves) | {name: value.shape for name, value in fixed.items()}
    checks.same_tensors(source, wanted, _shapes(tensors), _shapes(file))
    for name, value in fixed.items():
        _check_fixed(source, name, tensors[name].read(), value)

    def read(path, leaf, sharding):
        array = np.zeros(leaf.shape, leaf.dtype)
        for piece in _pieces(table, path, leaf.shape):
            array[piece.index] = piece.layout.convert(tensors[piece.name].read())
            checks.finite(source, piece.name, array[piece.index])
        return jax.make_array_from_callback(leaf.shape, sharding, lambda index: array[index]).block_until_ready()

    placed = traverse_util.flatten_dict(shardings, sep="/")
    params = {path: read(path, leaf, placed[path]) for path, leaf in leaves.items()}
    return traverse_util.unflatten_dict(params, sep="/")


def unload(params, table):
    """Return {name: array} of a file, by its table: the inverse of `load`, with fixed tensors, without the prefix."""
    tensors = {name: np.asarray(value, np.float32) for name, value in table.fixed.items()}
    for path, leaf in traverse_util.flatten_dict(params, sep="/").items():
        leaf = np.asarray(leaf)
        for piece in _pieces(table, path, leaf.shape):
            array = piece.layout.restore(leaf[piece.index])
            tensors[piece.name] = np.ascontiguousarray(array, np.float32).reshape(piece.shape)
    return tensors


def _wanted(table, leaves):
    """Return {the file's name: shape} of the tensors that our parameters consist of."""
    return {piece.name: piece.shape for path, leaf in leaves.items() for piece in _pieces(table, path, leaf.shape)}


def _matches(tensors, table, leaves):
    """Return the number of the file's names that the table has."""
    return len({name.removeprefix(table.prefix) for name in tensors} & _wanted(table, leaves).keys())


def _ours(tensors, table, source):
    """Return the tensors by the table's names, without the tensors that the table ignores."""
    ours = {}
    for name, tensor in tensors.items():
        short = name.removeprefix(table.prefix)
        if short in ours:
            raise UserError(f"{source} holds tensor {short!r} twice, with and without {table.prefix!r}")
        if not short.startswith(table.ignored):
            ours[short] = tensor
    return ours


def _shapes(tensors):
    return {name: tensor.shape for name, tensor in tensors.items()}


def _check_fixed(source, name, found, fixed):
    """Raise UserError if a tensor that is not learned has other values than ours, at the precision of the file."""
    rounding = jnp.finfo(found.dtype).eps if jnp.issubdtype(found.dtype, jnp.floating) else 0
    if not np.allclose(found.astype(np.float32), fixed, rtol=max(1e-5, float(rounding)), atol=1e-4):
        raise UserError(
            f"{source}: {name!r} has other values than this project computes: it was made for another model"
        )


def _pieces(table, path, shape):
    """Yield the pieces of our parameter at `path`."""
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
