"""Anchor: the copy of the params that a revert goes back to."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from ._sums import sum_entries

PyTree = Any


class Audit(NamedTuple):
    """What a look back from the current params to the anchor told.

    Attributes:
      is_taken: whether there was a look back at this step, bool scalar.
      alignment: cosine between the fresh gradient and the way back to the anchor,
        float32 scalar in [-1, 1]. Positive: by the light of a batch that they have
        not seen, the steps since the anchor led downhill, and the slope goes on.
        Exactly 0: params did not move at all, or no audit was taken.
      is_restart: whether params go back to where the run began because no audit was
        good yet, bool scalar: what was gathered on the way is void.
    """

    is_taken: jax.Array
    alignment: jax.Array
    is_restart: jax.Array


def copy_params(params: PyTree) -> PyTree:
    """Returns a real copy of the params: an alias would break buffer donation."""
    # with the dtype given, a weakly typed scalar becomes a strongly typed one
    return jax.tree.map(lambda p: jnp.array(p, jnp.result_type(p), copy=True), params)


def global_norm(tree: PyTree) -> jax.Array:
    """Returns the global l2 norm, accumulated in float32 whatever the dtypes."""
    return jnp.sqrt(sum_entries(lambda x: x * x, tree))


@functools.partial(jax.jit, inline=True)
def take_audit(
    is_due: jax.Array,
    grads: PyTree,
    grad_norm: jax.Array,
    anchor: PyTree,
    params: PyTree,
) -> tuple[jax.Array, jax.Array]:
    """Looks back at the anchor where that is due: was one taken, and the alignment.

    The alignment is ``<g, a - p> / (|g| |a - p|)`` for gradient ``g``, anchor ``a``
    and params ``p``, and 0 where the params have not moved. There is no audit where
    the gradient is zero or anything is not finite.
    """

    def look_back() -> tuple[jax.Array, jax.Array]:
        product = sum_entries(lambda g, a, p: g * (a - p), grads, anchor, params)
        # p - a, not a - p: what two sums have in common, XLA would store
        square = sum_entries(lambda a, p: (p - a) * (p - a), anchor, params)
        return product, square

    def look_nowhere() -> tuple[jax.Array, jax.Array]:
        return jnp.zeros((), jnp.float32), jnp.zeros((), jnp.float32)

    product, square = lax.cond(is_due, look_back, look_nowhere)
    length = grad_norm * jnp.sqrt(square)
    cosine = jnp.where(length > 0.0, product / length, 0.0)
    is_taken = is_due & jnp.isfinite(cosine) & jnp.isfinite(length) & (grad_norm > 0.0)
    return is_taken, jnp.where(is_taken, jnp.clip(cosine, -1.0, 1.0), 0.0)


@functools.partial(jax.jit, inline=True)
def refresh_anchor(
    is_due: jax.Array, anchor: PyTree, params: PyTree, gate: jax.Array
) -> tuple[PyTree, jax.Array]:
    """Moves the anchor to the params where that is due; returns it and ``gate``.

    An entry that is not finite never gets into the anchor. ``gate`` is the factor
    of the updates, and comes out of the conditional on purpose: the copy then lies
    before the in-place write of the params, and XLA needs no second one.
    """

    def move() -> tuple[PyTree, jax.Array]:
        return (
            jax.tree.map(lambda a, p: jnp.where(jnp.isfinite(p), p, a), anchor, params),
            gate,
        )

    def keep() -> tuple[PyTree, jax.Array]:
        return anchor, gate

    # The branch that passes a buffer through has to be the false one: as the true
    # one it costs a copy (https://github.com/jax-ml/jax/issues/39449).
    return lax.cond(is_due, move, keep)
