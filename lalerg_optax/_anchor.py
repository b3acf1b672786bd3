"""Anchor: the copy of the params that a revert goes back to."""

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


def look_back(
    grads: PyTree, grad_norm: jax.Array, anchor: PyTree, params: PyTree
) -> tuple[jax.Array, jax.Array]:
    """Looks back at the anchor: whether there was anything to see, and the alignment.

    The alignment is ``<g, a - p> / (|g| |a - p|)`` for gradient ``g``, anchor ``a``
    and params ``p``, and 0 where the params have not moved. There is nothing to see
    where the gradient is zero or anything is not finite.
    """
    product = sum_entries(lambda g, a, p: g * (a - p), grads, anchor, params)
    # p - a, not a - p: what two sums have in common, XLA would store
    square = sum_entries(lambda a, p: lax.square(p - a), anchor, params)
    length = grad_norm * jnp.sqrt(square)
    cosine = jnp.where(length > 0.0, product / length, 0.0)
    is_seen = jnp.isfinite(cosine) & jnp.isfinite(length) & (grad_norm > 0.0)
    return is_seen, jnp.where(is_seen, jnp.clip(cosine, -1.0, 1.0), 0.0)


def move(is_moved: jax.Array, anchor: PyTree, params: PyTree) -> PyTree:
    """Moves the anchor to the params; an entry that is not finite stays where it is."""
    return jax.tree.map(
        lambda a, p: jnp.where(is_moved & jnp.isfinite(p), p, a), anchor, params
    )
