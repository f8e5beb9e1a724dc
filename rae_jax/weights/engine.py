"""The one engine that turns a published checkpoint into parameters, by a table, strictly."""

from typing import NamedTuple

import jax
import numpy as np
from flax import traverse_util

from rae_jax.errors import UserError
from rae_jax.weights import hub, store
from rae_jax.weights.tables import Layout


class _Piece(NamedTuple):
    """A part of one of our leaves: the file's tensor, its place in the leaf, its layout and its shape in the file."""

    name: str
    index: tuple
    layout: Layout
    shape: tuple


def load(source, table, shapes, shardings):
    """Parameters of these shapes and shardings from the checkpoint `source`, a folder or a hub id.

    Leaf by leaf, each handed to its devices before the next is read: the host never holds a second copy of the whole.
    Raises UserError for a tensor that is missing, unknown, there twice or of another shape, and names it; and for a
    parameter of ours that the family never has.
    """
    leaves = traverse_util.flatten_dict(shapes, sep="/")
    for path in leaves.keys() - table.leaves.keys():
        raise UserError(f"no encoder of config.encoder.family has {path!r}: take its values from configs/encoders.py")
    pieces = {path: list(_pieces(path, leaf.shape, *table.leaves[path])) for path, leaf in leaves.items()}
    wanted = {piece.name: piece.shape for parts in pieces.values() for piece in parts}
    tensors = _ours(hub.open_checkpoint(source), table, source)
    store.check(source, wanted, {name: tensor.shape for name, tensor in tensors.items()})

    def read(path, leaf, sharding):
        array = np.zeros(leaf.shape, leaf.dtype)
        for piece in pieces[path]:
            array[piece.index] = piece.layout.convert(tensors[piece.name].read())
        return jax.make_array_from_callback(leaf.shape, sharding, lambda index: array[index]).block_until_ready()

    placed = traverse_util.flatten_dict(shardings, sep="/")
    params = {path: read(path, leaf, placed[path]) for path, leaf in leaves.items()}
    return traverse_util.unflatten_dict(params, sep="/")


def _ours(tensors, table, source):
    """Tensors under the table's names, without those that it ignores."""
    ours = {}
    for name, tensor in tensors.items():
        short = name.removeprefix(table.prefix)
        for old, new in table.old_names:
            short = short.replace(old, new)
        if short in ours:
            raise UserError(f"{source} holds tensor {short!r} under two names")
        if not short.startswith(table.ignored):
            ours[short] = tensor
    return ours


def _pieces(path, shape, layout, *names):
    stacked = path.startswith("blocks/")
    part = shape[-1] // len(names)
    piece_shape = (*shape[stacked:-1], part)
    for block in range(shape[0]) if stacked else (None,):
        for i, name in enumerate(names):
            if name is not None:
                index = (..., slice(i * part, (i + 1) * part))
                index = (block, *index) if stacked else index
                yield _Piece(name.format(block), index, layout, layout.shape(piece_shape))
