"""FLOPs of a function, counted from its jaxpr: matrix products and convolutions, loops with their trip counts."""

import math

import jax
from jax.extend import core


def count(function, *arguments):
    """Return the FLOPs of function(*arguments), two for each multiplication with its addition; nothing is computed.

    Arguments are pytrees of arrays or shapes (jax.ShapeDtypeStruct). The count is before XLA's optimisations. It holds
    rematerialised blocks each time, so give a function without rematerialisation to count a model's own FLOPs. It holds
    the most expensive branch of a cond, the default of jax.lax.platform_dependent, and one pass of a while loop. Other
    arithmetic is not counted.
    """
    return _flops(jax.make_jaxpr(function)(*arguments).jaxpr)


def _flops(jaxpr):
    return sum(_equation_flops(equation) for equation in jaxpr.eqns)


def _equation_flops(equation):
    match equation.primitive.name:
        case "dot_general":
            return 2 * math.prod(equation.outvars[0].aval.shape) * _contracted(equation)
        case "conv_general_dilated":
            kernel = equation.invars[1].aval.shape
            outputs = equation.params["dimension_numbers"].rhs_spec[0]  # the other axes of a kernel make one output
            return 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(kernel) // kernel[outputs]
        case "scan":
            return equation.params["length"] * _flops(equation.params["jaxpr"].jaxpr)
        case "cond":
            return max(_flops(branch.jaxpr) for branch in _branches(equation.params))
        case "shard_map":  # its jaxpr is the function of one device
            return equation.params["mesh"].size * _flops(equation.params["jaxpr"])
        case "pallas_call":
            raise ValueError("the FLOPs of a kernel cannot be counted: set config.attention='xla'")
        case _:
            return sum(map(_flops, _inner_jaxprs(equation.params)))


def _branches(params):
    """Return the branches of a cond; of jax.lax.platform_dependent only the default branch."""
    platforms = params.get("branches_platforms")
    return [params["branches"][platforms.index(None)]] if platforms else params["branches"]


def _contracted(equation):
    """Return the number of products in the sum of one element of the result."""
    (axes, _), _ = equation.params["dimension_numbers"]
    return math.prod(equation.invars[0].aval.shape[axis] for axis in axes)


def _inner_jaxprs(params):
    """Yield the jaxprs in an equation: of functions that are compiled, differentiated or rematerialised."""
    kinds = (core.Jaxpr, core.ClosedJaxpr)
    for value in jax.tree.leaves(list(params.values()), is_leaf=lambda value: isinstance(value, kinds)):
        if isinstance(value, kinds):
            yield getattr(value, "jaxpr", value)
