"""Construction of the learning-rate schedule and the optimiser from a stage's section `train`."""

import jax
import jax.numpy as jnp
import optax
import optax.contrib


def schedule(train):
    """Return the schedule: linear warm-up, constant until `decay_start`, cosine or linear decay to `decay_end`.

    A `decay_end` of 0 is the last step. After the decay the learning rate is constant.
    """
    peak, final = train.learning_rate, train.final_learning_rate
    decay_steps = max((train.decay_end or train.num_steps) - max(train.decay_start, train.warmup_steps), 1)
    match train.decay:
        case "cosine":
            decay = optax.cosine_decay_schedule(peak, decay_steps, final / peak)
        case "linear":
            decay = optax.linear_schedule(peak, final, decay_steps)
        case other:
            raise ValueError(f"unknown decay {other!r}")
    warmup = optax.linear_schedule(0.0, peak, train.warmup_steps) if train.warmup_steps else decay
    boundaries = [train.warmup_steps, max(train.decay_start, train.warmup_steps)]
    whole = optax.join_schedules([warmup, optax.constant_schedule(peak), decay], boundaries)
    return lambda count: jnp.asarray(whole(count), jnp.float32)


def optimiser(train):
    """Return the optimiser of a stage's `train` section; a clip_norm of 0 means no clipping."""
    clip = optax.clip_by_global_norm(train.clip_norm) if train.clip_norm else optax.identity()
    whole = optax.chain(clip, _descent(train))

    def update(grads, state, params):
        updates, state = whole.update(grads, state, params)
        return jax.tree_util.tree_map_with_path(_unless_constant, updates), state

    return optax.GradientTransformation(whole.init, update)


def _descent(train):
    match train.optimizer:
        case "adamw":
            return optax.adamw(schedule(train), b1=train.b1, b2=train.b2, weight_decay=train.weight_decay)
        case "muon":
            # Updates of about AdamW's size (arXiv 2502.16982), so that learning rates of the same order suit both.
            return optax.contrib.muon(
                schedule(train),
                weight_decay=train.weight_decay,
                adam_b1=train.b1,
                adam_b2=train.b2,
                adam_weight_decay=train.weight_decay,
                muon_weight_dimension_numbers=_block_kernels,
                consistent_rms=0.2,
            )
        case "muon_all":
            return _in_parts(_muon_for_all_matrices(train))
        case other:
            raise ValueError(f"unknown optimizer {other!r}")


# Coefficients of the five steps of Newton and Schulz (arXiv 2505.16932, algorithm 1), with the safety factor 1.01.
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


def _muon_for_all_matrices(train):
    """Return Muon for the matrices that `_matrix` names, and AdamW for the rest."""
    rate, options = schedule(train), {"weight_decay": train.weight_decay}
    muon = optax.contrib.muon(
        rate,
        ns_coeffs=POLAR_EXPRESS,
        consistent_rms=0.2,
        muon_weight_dimension_numbers=lambda params: jax.tree_util.tree_map_with_path(_matrix, params),
        **options,
    )
    return optax.partition(
        {"muon": muon, "adamw": optax.adamw(rate, b1=train.b1, b2=train.b2, **options)},
        lambda params: jax.tree_util.tree_map_with_path(
            lambda path, param: "adamw" if _matrix(path, param) is None else "muon", params
        ),
    )


_PARTS = {"qkv": 3, "w12": 2}  # {our layer: the number of matrices that its kernel joins}
_PATCH_EMBEDDINGS = ("embed", "patch_embed", "trunk_embed", "head_embed")


def _in_parts(inner):
    """Return an optimiser that sees joined kernels [..., in, parts * out] as [..., in, parts, out].

    Its state is stored in the shapes of the parameters, for which sharding.RULES are made.
    """

    def apart(tree):
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: leaf.reshape(*leaf.shape[:-1], parts, -1) if (parts := _parts(path)) else leaf, tree
        )

    def together(tree):
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: leaf.reshape(*leaf.shape[:-2], -1) if _parts(path) else leaf, tree
        )

    def update(grads, state, params):
        updates, state = inner.update(apart(grads), apart(state), apart(params))
        return together(updates), together(state)

    return optax.GradientTransformation(lambda params: together(inner.init(apart(params))), update)


def _parts(path):
    """Return the number of matrices that a leaf of parameters or moments joins; 0 for other leaves."""
    *_, layer, leaf = (None, *(getattr(key, "key", None) for key in path))
    return _PARTS.get(layer, 0) if leaf == "kernel" else 0


def _matrix(path, param):
    """Return the dimensions of a parameter that 'muon_all' updates by Muon, given in parts: see _in_parts; or None.

    AdamW updates patch embeddings, which are convolutions in RAEv2's code, other convolutions, norms and biases.
    """
    *_, layer, leaf = (None, *(key.key for key in path))
    if leaf in ("table", "tokens", "time_tokens"):
        return optax.contrib.MuonDimensionNumbers(0, 1)
    in_block = any(key.key in _BLOCKS for key in path)
    if leaf != "kernel" or layer in _PATCH_EMBEDDINGS or param.ndim != 2 + in_block + (layer in _PARTS):
        return None
    return optax.contrib.MuonDimensionNumbers(int(in_block), param.ndim - 1)


def _unless_constant(path, update):
    """Return the update; zeros for the time embedding's frequencies, which get no gradient and no weight decay."""
    return jnp.zeros_like(update) if path[-1].key == "frequencies" else update


_BLOCKS = ("blocks", "base", "trunk", "head")  # names of the parameters of layers.scan_blocks


def _block_kernels(params):
    """Return the dimensions of the parameters that Muon updates: the kernels of the blocks, [depth, in, out].

    AdamW updates embeddings, outputs, norms, biases and convolutions.
    """

    def axes(path, param):
        kernel = path[-1].key == "kernel" and param.ndim == 3 and any(key.key in _BLOCKS for key in path)
        return optax.contrib.MuonDimensionNumbers(reduction_axis=1, output_axis=2) if kernel else None

    return jax.tree_util.tree_map_with_path(axes, params)
