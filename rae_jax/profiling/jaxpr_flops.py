"""FLOPs of a function: its matrix products and convolutions, loops as often as they turn, nothing computed."""

import math

import jax
from jax.extend import core


def count(function, *arguments):
    """FLOPs of function(*arguments), two for each multiplication with its addition.

    Arguments are arrays or their shapes (jax.ShapeDtypeStruct), in trees. Counts what is asked for, whatever XLA makes
    of it: rematerialised blocks as often as they are computed, so that a model's own FLOPs take one without; of the
    branches of a condition the dearest, of jax.lax.platform_dependent the default; a loop that ends by what it computes
    once. Other arithmetic is not counted.
    """
    return _of(jax.make_jaxpr(function)(*arguments).jaxpr)


def _of(jaxpr):
    return sum(_of_equation(equation) for equation in jaxpr.eqns)


def _of_equation(equation):
    match equation.primitive.name:
        case "dot_general":
            return 2 * math.prod(equation.outvars[0].aval.shape) * _contracted(equation)
        case "conv_general_dilated":
            kernel = equation.invars[1].aval.shape
            outputs = equation.params["dimension_numbers"].rhs_spec[0]  # the rest of a kernel makes one output
            return 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(kernel) // kernel[outputs]
        case "scan":
            return equation.params["length"] * _of(equation.params["jaxpr"].jaxpr)
        case "cond":
            return max(_of(branch.jaxpr) for branch in _branches(equation.params))
        case "shard_map":  # the function of one device
            return equation.params["mesh"].size * _of(equation.params["jaxpr"])
        case "pallas_call":
            raise ValueError("a kernel's FLOPs cannot be counted: count the same without it (config.attention='xla')")
        case _:
            return sum(map(_of, _inside(equation.params)))


def _branches(params):
    """Those that a condition may take; of what platforms do each in its own way, the default alone."""
    platforms = params.get("branches_platforms")
    return [params["branches"][platforms.index(None)]] if platforms else params["branches"]


def _contracted(equation):
    """How many products one element of the result sums up."""
    (axes, _), _ = equation.params["dimension_numbers"]
    return math.prod(equation.invars[0].aval.shape[axis] for axis in axes)


def _inside(params):
    """The jaxprs that an equation holds: of functions compiled, differentiated or rematerialised."""
    kinds = (core.Jaxpr, core.ClosedJaxpr)
    for value in jax.tree.leaves(list(params.values()), is_leaf=lambda value: isinstance(value, kinds)):
        if isinstance(value, kinds):
            yield getattr(value, "jaxpr", value)
