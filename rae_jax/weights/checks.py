"""Strict checks of tensors against the model of the config, with messages that say what a file seems to be."""

import itertools
import re

import numpy as np

from rae_jax.errors import UserError
from rae_jax.weights import fingerprint

_SHOWN = 3  # differences that a message names


def same_tensors(source, wanted, found, file=None):
    """Raise UserError if {name: shape} differs between the model and `found`, tensors of the file `source`.

    `file`: {name: shape} of all tensors of the file, if `found` holds only a part of them, or by other names.
    """
    if differences := _differences(wanted, found):
        file = found if file is None else file
        theirs, ours = fingerprint.describe(file), fingerprint.describe(wanted)
        holds = f"seems to hold {theirs}" if theirs else f"holds {fingerprint.names(file)}"
        needs = f"; the config needs {ours or fingerprint.names(wanted)}" if theirs != ours or not ours else ""
        raise UserError(
            f"{source} {holds}{needs}; first differences: {', '.join(differences[:_SHOWN])}: "
            f"name another file, or change the config"
        )


def finite(source, name, array):
    """Raise UserError that names a tensor of the file `source` if its array holds NaN or Inf."""
    if not np.isfinite(array).all():
        raise UserError(f"{source}: {name!r} holds NaN or Inf: name weights of an earlier step, or another file")


def _differences(wanted, found):
    """Return descriptions of what differs, the kinds in turn, each in the order of the names."""
    kinds = (
        [f"lacks tensor {name!r}" for name in _ordered(wanted.keys() - found.keys())],
        [f"has an unknown tensor {name!r}" for name in _ordered(found.keys() - wanted.keys())],
        [
            f"{name!r} has shape {found[name]} and not {wanted[name]}"
            for name in _ordered(wanted.keys() & found.keys())
            if found[name] != wanted[name]
        ],
    )
    return [text for texts in itertools.zip_longest(*kinds) for text in texts if text]


def _ordered(names):
    """Return the names in order, with block 2 before block 10."""
    return sorted(names, key=lambda name: [int(p) if p.isdecimal() else p for p in re.split(r"(\d+)", name)])
