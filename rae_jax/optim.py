"""Optimisers, learning-rate schedules and the exponential moving average of parameters."""

import jax
import optax


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


def adamw(train):
    """AdamW as a stage's `train` section says; a clip_norm of 0 means no clipping."""
    clip = optax.clip_by_global_norm(train.clip_norm) if train.clip_norm else optax.identity()
    return optax.chain(clip, optax.adamw(schedule(train), b1=train.b1, b2=train.b2, weight_decay=train.weight_decay))


def ema(average, params, decay):
    """average + (1 - decay) (params - average): exact for parameters that never move."""
    return jax.tree.map(lambda a, p: a + (1.0 - decay) * (p - a), average, params)


def init_state(params, optimiser):
    """The state of a stage with one set of parameters. The average starts at the parameters themselves."""
    return {
        "step": jax.numpy.zeros((), "int32"),
        "params": params,
        "ema_params": params,
        "opt_state": optimiser.init(params),
    }


def update(state, grads, optimiser, decay):
    """One optimiser step and one step of the average; returns the new state and the gradient's global norm."""
    updates, opt_state = optimiser.update(grads, state["opt_state"], state["params"])
    params = optax.apply_updates(state["params"], updates)
    new = {
        "step": state["step"] + 1,
        "params": params,
        "ema_params": ema(state["ema_params"], params, decay),
        "opt_state": opt_state,
    }
    return {**state, **new}, optax.tree.norm(grads)
