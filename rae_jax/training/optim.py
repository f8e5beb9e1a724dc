"""Gradients of batches in parts, steps of an optimiser, and exponential moving averages of parameters."""

import jax
import jax.numpy as jnp
import optax


def value_and_grad(loss, params, examples, microbatches):
    """Return ((loss, metrics), gradient) of a batch, computed in `microbatches` equal parts of it.

    `loss(params, examples)` -> (mean loss, {name: mean over the examples}). All results are means over the parts;
    except for rounding they do not depend on the number of parts. Clipping and the optimiser see the whole gradient.
    """
    value_and_grad_of_part = jax.value_and_grad(loss, has_aux=True)
    if microbatches == 1:
        return value_and_grad_of_part(params, examples)

    def split(x):
        # Every device keeps its own part of each microbatch: neighbouring rows go to different microbatches.
        return x.reshape(-1, microbatches, *x.shape[1:]).swapaxes(0, 1)

    def add(total, part):
        return jax.tree.map(jnp.add, total, value_and_grad_of_part(params, part)), None

    parts = jax.tree.map(split, examples)
    shapes = jax.eval_shape(value_and_grad_of_part, params, jax.tree.map(lambda x: x[0], parts))
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    total, _ = jax.lax.scan(add, zeros, parts)
    return jax.tree.map(lambda x: x / microbatches, total)


def ema(average, params, decay):
    """Return average + (1 - decay) (params - average), which is exact for parameters that never change."""
    return jax.tree.map(lambda a, p: a + (1.0 - decay) * (p - a), average, params)


def init_state(params, optimiser, more_averages=0):
    """Return the state of a stage with one set of parameters; its 1 + `more_averages` averages start at them."""
    state = {
        "step": jnp.zeros((), jnp.int32),
        "params": params,
        "ema_params": params,
        "opt_state": optimiser.init(params),
    }
    return {**state, "more_ema_params": [params] * more_averages} if more_averages else state


def update(state, grads, optimiser, decay, more_decays=()):
    """Take one step of the optimiser and the averages; return the new state and the gradient's global norm."""
    updates, opt_state = optimiser.update(grads, state["opt_state"], state["params"])
    params = optax.apply_updates(state["params"], updates)
    new = {
        "step": state["step"] + 1,
        "params": params,
        "ema_params": ema(state["ema_params"], params, decay),
        "opt_state": opt_state,
    }
    if more_decays:
        averages = zip(state["more_ema_params"], more_decays, strict=True)
        new["more_ema_params"] = [ema(average, params, more) for average, more in averages]
    return {**state, **new}, optax.tree.norm(grads)
