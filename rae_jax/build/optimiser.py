"""A stage's section `train` to its learning-rate schedule and optimiser."""

import jax
import jax.numpy as jnp
import optax
import optax.contrib


def schedule(train):
    """Linear warm-up, a constant stretch until `decay_start`, then cosine or linear decay to the last step."""
    peak, final = train.learning_rate, train.final_learning_rate
    decay_steps = max(train.num_steps - max(train.decay_start, train.warmup_steps), 1)
    match train.decay:
        case "cosine":
            decay = optax.cosine_decay_schedule(peak, decay_steps, final / peak)
        case "linear":
            decay = optax.linear_schedule(peak, final, decay_steps)
        case other:
            raise ValueError(f"unknown decay {other!r}")
    warmup = optax.linear_schedule(0.0, peak, train.warmup_steps) if train.warmup_steps else decay
    boundaries = [train.warmup_steps, max(train.decay_start, train.warmup_steps)]
    return optax.join_schedules([warmup, optax.constant_schedule(peak), decay], boundaries)


def optimiser(train):
    """The optimiser that a stage's `train` section names; a clip_norm of 0 means no clipping."""
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
            # Updates of about AdamW's size (arXiv 2502.16982): learning rates of the same order do for both.
            return optax.contrib.muon(
                schedule(train),
                weight_decay=train.weight_decay,
                adam_b1=train.b1,
                adam_b2=train.b2,
                adam_weight_decay=train.weight_decay,
                muon_weight_dimension_numbers=_block_kernels,
                consistent_rms=0.2,
            )
        case other:
            raise ValueError(f"unknown optimizer {other!r}")


def _unless_constant(path, update):
    """No weight decay of the time embedding's frequencies, which no gradient reaches."""
    return jnp.zeros_like(update) if path[-1].key == "frequencies" else update


_BLOCKS = ("blocks", "trunk", "head")  # what layers.scan_blocks has made


def _block_kernels(params):
    """Muon's share: the kernels of the blocks, [depth, in, out]. Embeddings, outputs, norms and biases are AdamW's, and
    so are convolutions."""

    def axes(path, param):
        kernel = path[-1].key == "kernel" and param.ndim == 3 and any(key.key in _BLOCKS for key in path)
        return optax.contrib.MuonDimensionNumbers(reduction_axis=1, output_axis=2) if kernel else None

    return jax.tree_util.tree_map_with_path(axes, params)
