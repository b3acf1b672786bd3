"""Anchor: the copy of the params that a revert goes back to."""

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

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


def _real_parts(tree: PyTree) -> Iterator[jax.Array]:
    """Yields the leaves in float32, a complex one as its two parts."""
    for leaf in jax.tree.leaves(tree):
        if jnp.iscomplexobj(leaf):
            yield from (leaf.real.astype(jnp.float32), leaf.imag.astype(jnp.float32))
        else:
            yield leaf.astype(jnp.float32)


def global_norm(tree: PyTree) -> jax.Array:
    """Returns the global l2 norm, accumulated in float32 whatever the dtypes."""
    squares = [jnp.sum(jnp.square(x)) for x in _real_parts(tree)]
    return jnp.sqrt(sum(squares, start=jnp.zeros((), jnp.float32)))


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
        product = square = jnp.zeros((), jnp.float32)
        trees = map(_real_parts, (grads, anchor, params))
        for g, a, p in zip(*trees, strict=True):
            product += jnp.sum(g * (a - p))
            # p - a, not a - p: what two sums have in common, XLA would store
            square += jnp.sum(jnp.square(p - a))
        length = grad_norm * jnp.sqrt(square)
        cosine = jnp.where(length > 0.0, product / length, 0.0)
        is_taken = jnp.isfinite(cosine) & jnp.isfinite(length) & (grad_norm > 0.0)
        return is_taken, jnp.where(is_taken, jnp.clip(cosine, -1.0, 1.0), 0.0)

    def look_nowhere() -> tuple[jax.Array, jax.Array]:
        return jnp.zeros((), jnp.bool_), jnp.zeros((), jnp.float32)

    return lax.cond(is_due, look_back, look_nowhere)


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


def way_back(anchor: jax.Array, param: jax.Array) -> jax.Array:
    """Returns the finite update that leads from a param to its anchor."""
    return jnp.nan_to_num(anchor - param)
