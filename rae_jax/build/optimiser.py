"""Construction of the learning-rate schedule and the optimiser from a stage's section `train`."""

import jax
import jax.numpy as jnp
import optax
import optax.contrib


def schedule(train):
    """Return the schedule: linear warm-up, constant until `decay_start`, cosine or linear decay to the last step."""
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
        case other:
            raise ValueError(f"unknown optimizer {other!r}")


def _unless_constant(path, update):
    """Return the update; zeros for the time embedding's frequencies, which get no gradient and no weight decay."""
    return jnp.zeros_like(update) if path[-1].key == "frequencies" else update


_BLOCKS = ("blocks", "trunk", "head")  # names of the parameters of layers.scan_blocks


def _block_kernels(params):
    """Return the dimensions of the parameters that Muon updates: the kernels of the blocks, [depth, in, out].

    AdamW updates embeddings, outputs, norms, biases and convolutions.
    """

    def axes(path, param):
        kernel = path[-1].key == "kernel" and param.ndim == 3 and any(key.key in _BLOCKS for key in path)
        return optax.contrib.MuonDimensionNumbers(reduction_axis=1, output_axis=2) if kernel else None

    return jax.tree_util.tree_map_with_path(axes, params)
