"""Anchor: the copy of the params that a revert goes back to."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from ._numbers import is_representable, ratio, root
from ._sums import sum_entries

PyTree = Any

_HOST = "pinned_host"


def check_anchor_dtype(dtype: jax.typing.DTypeLike | None) -> None:
    """Raises a ValueError unless every param fits into the dtype."""
    if dtype is None:
        return
    try:
        is_wide = jnp.issubdtype(dtype, jnp.floating) and (
            jnp.finfo(dtype).maxexp >= jnp.finfo(jnp.float32).maxexp
        )
    except (TypeError, ValueError):  # no dtype at all, or no real one
        is_wide = False
    if not is_wide:
        raise ValueError(
            "anchor_dtype must be a floating point type with the range of float32 "
            f"(bfloat16, float32, ...) or None, got anchor_dtype = {dtype!r}."
        )


def check_anchor_memory(kind: str) -> None:
    """Raises a ValueError unless ``kind`` is the name of a memory."""
    if kind not in ("device", _HOST):
        raise ValueError(
            f"anchor_memory must be 'device' or '{_HOST}', got anchor_memory = "
            f"{kind!r}."
        )


def copy_params(
    params: PyTree, dtype: jax.typing.DTypeLike | None = None, memory: str = "device"
) -> PyTree:
    """Returns a real copy of the params: an alias would break buffer donation.

    Args:
      params: the params.
      dtype: dtype of real floating point leaves; None for that of the params.
      memory: ``"device"`` or ``"pinned_host"``.

    Raises:
      ValueError: if the devices have no such memory. Asking them starts them, which
        would be too early when an optimizer is made (``jax.distributed.initialize``).
    """

    def copy(p: jax.Array) -> jax.Array:
        # with the dtype given, a weakly typed scalar becomes a strongly typed one
        own = jnp.result_type(p)
        is_cast = dtype is not None and jnp.issubdtype(own, jnp.floating)
        return jnp.array(p, dtype if is_cast else own, copy=True)

    copies = jax.tree.map(copy, params)
    if memory == "device":
        return copies
    kinds = sorted({m.kind for m in jax.local_devices()[0].addressable_memories()})
    if memory not in kinds:
        raise ValueError(
            f"anchor_memory = '{memory}' is not available here: the memories of the "
            f"{jax.default_backend()} backend are {kinds}. Use 'device'."
        )
    return _put(copies, memory)


def _put(tree: PyTree, memory: str) -> PyTree:
    """Moves a tree to a memory: JAX refuses mixed memories in one operation."""
    space = jax.memory.Space.Host if memory == _HOST else jax.memory.Space.Device
    return jax.tree.map(lambda x: jax.device_put(x, space), tree)


def _is_on_host(tree: PyTree) -> bool:
    leaves = jax.tree.leaves(tree)
    return any(jax.typeof(x).memory_space == jax.memory.Space.Host for x in leaves)


def _on_device(anchor: PyTree) -> PyTree:
    return _put(anchor, "device") if _is_on_host(anchor) else anchor


def fetched(is_needed: jax.Array, anchor: PyTree, params: PyTree) -> PyTree:
    """Returns the anchor in device memory.

    An anchor in host memory is fetched only where it is needed; otherwise the params
    take its place.
    """
    if not _is_on_host(anchor):
        return anchor

    def fetch() -> PyTree:
        here = _on_device(anchor)
        return jax.tree.map(lambda a, p: a.astype(p.dtype), here, params)

    return lax.cond(is_needed, fetch, lambda: params)


def look_back(
    grads: PyTree,
    grad_norm: jax.Array,
    anchor: PyTree,
    params: PyTree,
    axis_name: str | tuple[str, ...] | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    r"""Looks back at the anchor.

    Returns whether there was anything to see, the alignment, the product of the lengths
    of gradient and way, and the distance to the anchor in units of its norm (0 where
    that is 0). There is nothing to see where the gradient is zero or anything is not
    finite.

    With gradient :math:`g`, anchor :math:`a` and params :math:`p`, the alignment is

    .. math::

        c_i = \frac{\langle g,\; a - p \rangle}{|g| \, |a - p|}

    It is 0 where the params have not moved. With mapped axes products and squares are
    averages over devices. For gradients that are the same on all of them, this changes
    nothing.
    """
    anchor = _on_device(anchor)
    grads, grad_norm, anchor, params = lax.stop_gradient(
        (grads, grad_norm, anchor, params)
    )
    # Both ends of the way in the precision of the anchor. A step below the resolution
    # of a narrow dtype changes single entries by a whole unit or not at all, which is
    # right on average.
    params = jax.tree.map(_rounded, params, anchor)
    product = sum_entries(lambda g, a, p: g * (a - p), grads, anchor, params)
    # p - a, not a - p: XLA would store a term that two sums have in common
    square = sum_entries(lambda a, p: lax.square(p - a), anchor, params)
    size = sum_entries(lambda a: a * a, anchor)
    if axis_name is not None:
        product, square, size = lax.pmean((product, square, size), axis_name)
    length = grad_norm * root(square)
    cosine = ratio(product, length)
    is_seen = jnp.isfinite(cosine) & jnp.isfinite(length) & (grad_norm > 0.0)
    reach = ratio(root(square), root(size))
    return (
        is_seen,
        jnp.where(is_seen, jnp.clip(cosine, -1.0, 1.0), 0.0),
        jnp.where(is_seen, length, 0.0),
        jnp.where(jnp.isfinite(reach), reach, 0.0),
    )


def _rounded(param: jax.Array, anchor: jax.Array) -> jax.Array:
    """Returns a param at the precision of its anchor."""
    if param.dtype == anchor.dtype:
        return param
    info = jnp.finfo(anchor.dtype)
    # XLA would remove a cast there and back
    return lax.reduce_precision(param, info.nexp, info.nmant)


def move(is_moved: jax.Array, anchor: PyTree, params: PyTree) -> PyTree:
    """Moves the anchor to the params, except for entries that are not sound."""

    def moved(a: jax.Array, p: jax.Array) -> jax.Array:
        p = p.astype(a.dtype)
        return jnp.where(is_moved & is_representable(p), p, a)

    there = jax.tree.map(moved, _on_device(anchor), params)
    return _put(there, _HOST) if _is_on_host(anchor) else there


def is_masked(node: Any) -> bool:
    """Returns whether a node stands for params that are no business of a regulator."""
    return isinstance(node, optax.MaskedNode)


def as_params(anchor: PyTree, params: PyTree) -> PyTree:
    """Returns an anchor in the containers of the params.

    They differ where Flax NNX keeps a state: its leaves are then paired by name. A
    masked node may stand for a whole subtree of params.

    Args:
      anchor: a tree like the params, with masked nodes in it.
      params: the params.

    Raises:
      ValueError: if names or shapes are those of other params.
    """
    leaves = jax.tree.leaves(anchor, is_leaf=is_masked)
    try:
        own: list[Any] = []
        jax.tree.map(lambda a, p: own.append(p), anchor, params, is_leaf=is_masked)
        fitted = anchor
    except (TypeError, ValueError):
        own = jax.tree.leaves(params)
        if _names(anchor) != _names(params):
            raise _misfit(leaves, own) from None
        fitted = jax.tree.unflatten(jax.tree.structure(params), leaves)
    pairs = [(a, p) for a, p in zip(leaves, own, strict=True) if not is_masked(a)]
    if any(jnp.shape(a) != jnp.shape(p) for a, p in pairs):
        raise _misfit(*zip(*pairs, strict=True))
    return fitted


def _names(tree: PyTree) -> list[list[Any]]:
    """Returns the names on the way to each leaf, whatever holds them."""
    paths = [p for p, _ in jax.tree.leaves_with_path(tree, is_leaf=is_masked)]
    return [[key.key for key in path if hasattr(key, "key")] for path in paths]


def _misfit(leaves: Any, others: Any) -> ValueError:
    shapes = [[jnp.shape(x) for x in tree] for tree in (leaves, others)]
    return ValueError(
        f"params do not fit the state: it was made for {len(shapes[0])} leaves, "
        f"{shapes[0]}, and not for {len(shapes[1])}, {shapes[1]}. Params come first, "
        "then the state; of states under vmap, call it under vmap. With Flax NNX "
        "params are nnx.state(model, nnx.Param). For other params make a new state, "
        "tx.init(params)."
    )
