"""Muon: momentum whose matrices are replaced by orthogonal ones (arXiv 2502.16982).

optax.contrib.muon computes the same; but on a mesh, it computes nearly every matrix on all devices.
"""

import functools
import math

import jax
import jax.numpy as jnp
import optax
import optax.contrib
from jax.sharding import AbstractMesh, NamedSharding
from jax.sharding import PartitionSpec as P

from rae_jax.runtime import sharding

MOMENTUM = 0.95
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # coefficients of all five steps
# Coefficients of the five steps by Polar Express (arXiv 2505.16932, algorithm 1), with the safety factor 1.01.
POLAR_EXPRESS = tuple(
    (a / 1.01, b / 1.01**3, c / 1.01**5)
    for a, b, c in (
        (8.28721201814563, -23.595886519098837, 17.300387312530933),
        (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
        (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
        (3.3184196573706015, -2.488488024314874, 0.51004894012372),
        (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    )
)
STEPS = 5
# Largest number of groups of devices. The groups share the matrices, the devices of a group the columns of each of its
# matrices. Fewer groups send more; with more groups, some would have no matrix.
GROUPS = 16


def muon(rate, coefficients, parts, *, b1, b2, weight_decay):
    """Return Muon for the parameters that are matrices, and AdamW with Nesterov's momentum for the others.

    `parts` is a function (path, parameter [..., rows, columns]) -> number of matrices that the columns join, or 0 for
    AdamW. Updates have about AdamW's size, so that learning rates of the same order suit both. The tree of the state is
    that of optax.contrib.muon.
    """

    def label(path, param):
        return "muon" if parts(path, param) else "adam"

    return optax.partition(
        {
            "muon": optax.chain(
                _orthogonal_momentum(coefficients, parts),
                optax.stateless(functools.partial(_to_adamw_s_size, parts)),
                optax.add_decayed_weights(weight_decay),
                optax.scale_by_learning_rate(rate),
            ),
            "adam": optax.adamw(rate, b1=b1, b2=b2, weight_decay=weight_decay, nesterov=True),
        },
        lambda params: jax.tree_util.tree_map_with_path(label, params),
    )


def _orthogonal_momentum(coefficients, parts):
    def init(params):
        mu = optax.tree.zeros_like(params)
        return optax.contrib.MuonState(jnp.zeros([], jnp.int32), mu, jnp.asarray(coefficients))

    def update(grads, state, params=None):
        mu = optax.tree.update_moment(grads, state.mu, MOMENTUM, 1)
        count = optax.safe_increment(state.count)
        ahead = jax.tree.map(
            lambda m, g: MOMENTUM * m + (1 - MOMENTUM) * g,
            optax.tree.bias_correction(mu, MOMENTUM, optax.safe_increment(count)),
            optax.tree.bias_correction(grads, MOMENTUM, count),
        )
        updates = _orthogonal(ahead, parts, jnp.broadcast_to(state.ns_coeffs, (STEPS, 3)))
        return updates, optax.contrib.MuonState(count, mu, state.ns_coeffs)

    return optax.GradientTransformation(init, update)


def _to_adamw_s_size(parts, updates, params):
    def scaled(path, update):
        return 0.2 * math.sqrt(max(update.shape[-2], update.shape[-1] // parts(path, update))) * update

    return jax.tree_util.tree_map_with_path(scaled, updates)


def _orthogonal(tree, parts, coefficients):
    """Return the tree with all its matrices made orthogonal: `parts` of each leaf [..., rows, parts * columns]."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(tree)
    pieces = [jnp.split(leaf, parts(path, leaf), axis=-1) for path, leaf in leaves]
    found = iter(orthogonal([x.reshape(-1, *x.shape[-2:]) for of_leaf in pieces for x in of_leaf], coefficients))
    joined = [jnp.concatenate([next(found).reshape(x.shape) for x in of_leaf], axis=-1) for of_leaf in pieces]
    return jax.tree.unflatten(structure, joined)


def orthogonal(matrices, coefficients):
    """Return stacks of matrices [n, rows, columns] with the same singular vectors, and singular values near 1.

    On a mesh, the devices share the work. `coefficients` [steps, 3]: of the steps of Newton and Schulz.
    """
    same_shape = {}
    for place, x in enumerate(matrices):
        same_shape.setdefault(tuple(sorted(x.shape[1:])), []).append(place)
    found = list(matrices)
    for (_, columns), places in same_shape.items():
        wide = [_dealt(_wide(matrices[place])) for place in places]
        ends = [sum(map(len, wide[: end + 1])) for end in range(len(wide) - 1)]
        stack = _newton_schulz(jnp.concatenate(wide), coefficients)
        for place, x in zip(places, jnp.split(_split_over(stack, _COLUMNS), ends), strict=True):
            x = _split_over(x, _FURTHER, _AS_STORED)[..., :columns]
            found[place] = x if matrices[place].shape == x.shape else x.mT
    return found


def _wide(x):
    return x.mT if x.shape[1] > x.shape[2] else x


def _newton_schulz(stack, coefficients):
    def step(x, abc):
        a, b, c = abc
        gram = _in_groups(x @ x.mT, "rows")
        factor = _in_groups(b * gram + c * gram @ gram, "rows")
        return _in_groups(a * x + factor @ x, "columns"), None

    stack = _in_groups(stack, "columns")
    norm = jnp.linalg.norm(stack, axis=(1, 2), keepdims=True)
    return jax.lax.scan(step, stack / (norm + 1e-8), coefficients)[0]


# As parameters are stored by sharding.RULES; further split; and split over all devices by columns. Without the step
# between, the compiler gathers whole stacks.
_AS_STORED, _FURTHER, _COLUMNS = P(None, "fsdp"), P(None, "fsdp", ("data", "tensor")), P(None, None, sharding.AXES)


def _dealt(stack):
    """Return a stack with its columns split over all devices, and zeros behind to make their number a multiple."""
    mesh = sharding.current_mesh()
    if mesh is None:
        return stack
    stack = jnp.pad(_split_over(stack, _AS_STORED), ((0, 0), (0, 0), (0, -stack.shape[2] % mesh.size)))
    return _split_over(stack, _FURTHER, _COLUMNS)


def _in_groups(stack, axis):
    """Return a stack of which a group of devices holds each matrix, split by its rows or columns."""
    mesh = sharding.current_mesh()
    if mesh is None:
        return stack
    most = min(len(stack), GROUPS)
    groups = max(n for n in range(1, most + 1) if mesh.size % n == 0)
    grouped = AbstractMesh((groups, mesh.size // groups), ("group", "member"))
    return _split_over(stack, P("group", *(("member", None) if axis == "rows" else (None, "member"))), mesh=grouped)


def _split_over(stack, *axes, mesh=None):
    """Return a stack that the devices hold in parts by `axes`, reached by one after the other."""
    mesh = mesh or sharding.current_mesh()
    for step in axes if mesh else ():
        stack = jax.lax.with_sharding_constraint(stack, NamedSharding(mesh, step))
    return stack
