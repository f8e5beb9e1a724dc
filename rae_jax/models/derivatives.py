"""Functions whose gradients are written by hand, and which have forward-mode derivatives (jax.jvp) too.

jax.custom_vjp refuses jax.jvp. Here the derivative of a function is a linear map that has a transpose of its own:
jax.jvp evaluates the map, a backward pass evaluates the transpose, and both have derivatives again.
"""

import jax
from jax.custom_derivatives import SymbolicZero
from jax.extend import core
from jax.interpreters import ad, batching, mlir


def linear_map(forward, transpose, residuals, x):
    """Return forward(residuals, x), which is linear in x; a backward pass computes transpose(residuals, cotangent).

    Arguments and results are trees of arrays. `forward` and `transpose` close over no traced values.
    """
    residuals, structure = jax.tree.flatten(residuals)
    x, x_structure = jax.tree.flatten(x)

    def of_leaves(residuals, x):
        return forward(structure.unflatten(residuals), x_structure.unflatten(x))

    # Traced here and not when it is lowered: here the context names the mesh.
    jaxpr, result = jax.make_jaxpr(of_leaves, return_shape=True)(residuals, x)
    result_structure = jax.tree.structure(result)

    def to_leaves(residuals, cotangent):
        found = transpose(structure.unflatten(residuals), result_structure.unflatten(cotangent))
        return x_structure.flatten_up_to(found)

    found = _linear_map.bind(*residuals, *x, jaxpr=jaxpr, transpose=to_leaves, count=len(residuals))
    return result_structure.unflatten(found)


def bilinear(function, left, right):
    """Give a jax.custom_jvp function(a, b, static), which is linear in a and in b, its derivatives.

    left(y, b, static) is the transpose in a, right(a, y, static) the transpose in b.
    """

    def rule(static, primals, tangents):
        (a, b), (da, db) = primals, tangents
        terms = []
        if not isinstance(da, SymbolicZero):
            terms.append(linear_map(lambda b, da: function(da, b, static), lambda b, y: left(y, b, static), b, da))
        if not isinstance(db, SymbolicZero):
            terms.append(linear_map(lambda a, db: function(a, db, static), lambda a, y: right(a, y, static), a, db))
        return function(a, b, static), sum(terms[1:], terms[0])

    function.defjvp(rule, symbolic_zeros=True)


def with_backward(function, forward, backward, plain):
    """Return a function, arrays -> array, whose gradient `forward` and `backward` compute, as in jax.custom_vjp.

    forward(*arguments) is (result, residuals); backward(arguments, residuals, cotangent) is one cotangent an argument.
    `plain` computes the same as `function`. All other derivatives are derivatives of `plain`.
    """

    @jax.custom_jvp
    def value(*arguments):
        return function(*arguments)

    @value.defjvp
    def _(arguments, tangents):
        # No derivative goes through `forward`: the result gets its own from `returned`.
        result, residuals = forward(*jax.lax.stop_gradient(arguments))
        return returned(arguments, residuals, result), push(arguments, residuals, tangents)

    @jax.custom_jvp
    def returned(arguments, residuals, result):
        return result

    @returned.defjvp
    def _(primals, tangents):
        return returned(*primals), push(*primals[:2], tangents[0])

    def push(arguments, residuals, tangents):
        return linear_map(lambda kept, x: jax.jvp(plain, kept[0], x)[1], pull, (arguments, residuals), tangents)

    @jax.custom_jvp
    def pull(kept, cotangent):
        return backward(*kept, cotangent)

    @pull.defjvp
    def _(primals, tangents):
        ((arguments, _), cotangent), ((moved, _), cotangent_moved) = primals, tangents

        def plain_pull(arguments, cotangent):
            return jax.vjp(plain, *arguments)[1](cotangent)

        return pull(*primals), jax.jvp(plain_pull, (arguments, cotangent), (moved, cotangent_moved))[1]

    return value


_linear_map = core.Primitive("linear_map")
_linear_map.multiple_results = True


def _evaluate(*inputs, jaxpr, **_):
    return core.jaxpr_as_fun(jaxpr)(*inputs)


def _jvp(primals, tangents, *, count, **params):
    """Return the map of x's tangents, plus the change of the map with the residuals."""
    moved = [i for i in range(count) if not isinstance(tangents[i], ad.Zero)]

    def of_moved(*values):
        new = dict(zip(moved, values, strict=True))
        return _evaluate(*(new.get(i, value) for i, value in enumerate(primals)), **params)

    terms = []
    if moved:
        found, term = jax.jvp(of_moved, [primals[i] for i in moved], [tangents[i] for i in moved])
        terms.append(term)
    else:
        found = _linear_map.bind(*primals, count=count, **params)
    if not all(isinstance(tangent, ad.Zero) for tangent in tangents[count:]):
        dx = map(ad.instantiate_zeros, tangents[count:])
        terms.append(_linear_map.bind(*primals[:count], *dx, count=count, **params))
    return found, [sum(pair[1:], pair[0]) for pair in zip(*terms, strict=True)]


def _transpose(cotangents, *inputs, transpose, count, **_):
    found = transpose(inputs[:count], map(ad.instantiate_zeros, cotangents))
    unknown = map(ad.is_undefined_primal, inputs[count:])
    return [None] * count + [new if of_it else None for new, of_it in zip(found, unknown, strict=True)]


def _batch(inputs, axes, *, transpose, count, **params):
    """Map a batch, which is the first axis of x and of the result."""
    size = next(value.shape[axis] for value, axis in zip(inputs, axes, strict=True) if axis is not None)
    x = [batching.bdim_at_front(*pair, size) for pair in zip(inputs[count:], axes[count:], strict=True)]

    def forward(residuals, x):
        return _evaluate(*residuals, *x, **params)

    both = (jax.vmap(one, (list(axes[:count]), 0), axis_size=size) for one in (forward, transpose))
    found = linear_map(*both, list(inputs[:count]), x)
    return found, [0] * len(found)


_linear_map.def_impl(_evaluate)
_linear_map.def_abstract_eval(lambda *_, jaxpr, **__: jaxpr.out_avals)
ad.primitive_jvps[_linear_map] = _jvp
ad.primitive_transposes[_linear_map] = _transpose
batching.primitive_batchers[_linear_map] = _batch
mlir.register_lowering(_linear_map, mlir.lower_fun(_evaluate, multiple_results=True))
