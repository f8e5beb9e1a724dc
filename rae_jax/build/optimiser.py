"""Construction of the learning-rate schedule and the optimiser from a stage's section `train`."""

import jax
import jax.numpy as jnp
import optax

from rae_jax.build import muon


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
            return muon.muon(schedule(train), muon.NEWTON_SCHULZ, _block_kernel, **_adamw_options(train))
        case "muon_all":
            return _muon_for_all_matrices(train)
        case other:
            raise ValueError(f"unknown optimizer {other!r}")


def _adamw_options(train):
    return {"b1": train.b1, "b2": train.b2, "weight_decay": train.weight_decay}


def _muon_for_all_matrices(train):
    """Return Muon for the matrices that `_matrices` counts, and AdamW without Nesterov's momentum for the rest."""
    rate, options = schedule(train), _adamw_options(train)
    return optax.partition(
        {
            "muon": muon.muon(rate, muon.POLAR_EXPRESS, _matrices, **options),
            "adamw": optax.adamw(rate, **options),
        },
        lambda params: jax.tree_util.tree_map_with_path(
            lambda path, param: "muon" if _matrices(path, param) else "adamw", params
        ),
    )


_PARTS = {"qkv": 3, "w12": 2}  # {our layer: the number of matrices that its kernel joins}
_PATCH_EMBEDDINGS = ("embed", "patch_embed", "trunk_embed", "head_embed")


def _matrices(path, param):
    """Return the number of matrices that a parameter joins; 0 for those that 'muon_all' leaves to AdamW.

    Those are patch embeddings, which are convolutions in RAEv2's code, other convolutions, norms and biases.
    """
    *_, layer, leaf = (None, *(key.key for key in path))
    if leaf in ("table", "tokens", "time_tokens"):
        return 1
    if leaf != "kernel" or layer in _PATCH_EMBEDDINGS or param.ndim != 2 + _in_block(path):
        return 0
    return _PARTS.get(layer, 1)


def _unless_constant(path, update):
    """Return the update; zeros for the time embedding's frequencies, which get no gradient and no weight decay."""
    return jnp.zeros_like(update) if path[-1].key == "frequencies" else update


_BLOCKS = ("blocks", "base", "trunk", "head")  # names of the parameters of layers.scan_blocks


def _in_block(path):
    return any(key.key in _BLOCKS for key in path)


def _block_kernel(path, param):
    """Return 1 for what 'muon' updates by Muon, the kernels of the blocks [depth, in, out], and 0 for the rest.

    AdamW updates embeddings, outputs, norms, biases and convolutions.
    """
    return int(path[-1].key == "kernel" and param.ndim == 3 and _in_block(path))
