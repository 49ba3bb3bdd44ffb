"""A sum over positions that is computed for some of them at a time, and its gradient with it.

Logits are the largest array of a small model, and nobody needs them but the loss. A sum over
tokens can be taken stretch by stretch of time; and because it is one number, its gradient can be
taken there and then, while the stretch's logits are at hand: they are computed once, never all of
them are held, and what is left for the backward pass is a multiplication. (Computing them again
there would be a fourth product of the head's size beside three.) What is summed is not known here.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Sum = Callable[[Array, Array, Any, Any], tuple[Array, Any]]
"""Of features [batch, time, width], a table, rows [batch, time] and numbers: a sum over the
positions, and other sums beside it."""


def count(batch: int, time: int, *, most_tokens: int) -> int:
    """The fewest equal stretches with at most so many tokens, as far as time can be cut.

    Time is cut, never the batch, which is what devices share among them.
    """
    fitting = (n for n in range(1, time) if time % n == 0 and batch * time // n <= most_tokens)
    return next(fitting, time)


def cut(array: Array, chunks: int) -> Array:
    """[batch, time, ...] as [chunks, batch, time / chunks, ...]."""
    batch, time = array.shape[:2]
    return array.reshape(batch, chunks, time // chunks, *array.shape[2:]).swapaxes(0, 1)


def joined(array: Array) -> Array:
    """The inverse of `cut`."""
    chunks, batch, time = array.shape[:3]
    return array.swapaxes(0, 1).reshape(batch, chunks * time, *array.shape[3:])


def over(one: Callable[[Any], tuple[Any, Any]], chunks: int, whole: Any) -> tuple[Any, Any]:
    """The sum of the first of what `one` gives for each stretch, and the others side by side."""
    if chunks == 1:
        return one(whole)
    total, beside = sum_of(one, jax.tree.map(partial(cut, chunks=chunks), whole))
    return total, jax.tree.map(joined, beside)


def sum_of(one: Callable[[Any], tuple[Any, Any]], parts: Any) -> tuple[Any, Any]:
    """The sum of the first of what `one` gives for each row of `parts`, and the others in rows.

    One row's results are in memory at a time.
    """
    one = jax.jit(one, inline=True)  # traced once: for its shapes, and then in the loop
    shapes = jax.eval_shape(one, jax.tree.map(lambda x: x[0], parts))
    zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes[0])

    def add(total: Any, part: Any) -> tuple[Any, Any]:
        found, beside = one(part)
        return jax.tree.map(jnp.add, total, found), beside

    return jax.lax.scan(add, zero, parts)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def summed(
    of: Sum,
    chunks: int,
    features: Float[Array, "batch time width"],
    table: Float[Array, "rows width"],
    rows: Any,
    numbers: Any,
) -> tuple[Array, Any]:
    """What `of` gives for all positions. Its first sum has gradients, by features and table."""

    def one(part: tuple[Array, Any]) -> tuple[tuple[Array, Any], None]:
        return of(part[0], table, part[1], numbers), None

    return over(one, chunks, (features, rows))[0]


def _forward(
    of: Sum, chunks: int, features: Any, table: Any, rows: Any, numbers: Any
) -> tuple[tuple[Array, Any], tuple[Array, list[Array]]]:
    """With the gradients as for a cotangent of 1; a frozen table has none."""
    by = (0, 1) if table.perturbed else (0,)
    features, table, rows, numbers = (_values(x) for x in (features, table, rows, numbers))
    gradient = jax.value_and_grad(of, argnums=by, has_aux=True)

    def one(part: tuple[Array, Any]) -> tuple[Any, Array]:
        found, (dfeatures, *dtable) = gradient(part[0], table, part[1], numbers)
        return (found, dtable), dfeatures

    (found, dtable), dfeatures = over(one, chunks, (features, rows))
    return found, (dfeatures, dtable)


def _backward(
    of: Sum, chunks: int, saved: tuple[Array, list[Array]], cotangents: tuple[Array, Any]
) -> tuple[Array, Array | None, None, None]:
    dfeatures, dtable = saved
    factor = cotangents[0]
    table = factor * dtable[0] if dtable else None
    return factor.astype(dfeatures.dtype) * dfeatures, table, None, None


summed.defvjp(_forward, _backward, symbolic_zeros=True)


def _values(given: Any) -> Any:
    """What stands in JAX's pairs of a value and whether it has a gradient."""
    pair = jax.custom_derivatives.CustomVJPPrimal
    return jax.tree.map(lambda x: x.value, given, is_leaf=lambda x: isinstance(x, pair))
