"""Local view: which leaf of the params moved the loss, and how far it went."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from ._numbers import LARGEST
from ._sums import sum_entries

PyTree = Any

_NUM_TURNS = 8


class LocalView(NamedTuple):
    r"""The effect of a step on each leaf of the params.

    All are float32 vectors of shape ``(num_leaves,)``, in the order of
    ``jax.tree.leaves(params)``, and always finite. With the gradient :math:`g` before
    clipping, the update :math:`u` as it left the regulator and the params :math:`p`
    before it, all of one leaf, and 2-norms that take the entries of a leaf as one
    vector:

    Attributes:
      leaf_grad_norm: :math:`|g|`, reported on rejected steps, too; 1e37 where it is not
        finite or its square overflows float32.
      effective_rate: :math:`|u| / |g|`; 0 on a rejected step.
      update_ratio: :math:`|u| / |p|`, the update-to-weight ratio; 0 on a rejected step.
      predicted_decrease: :math:`-\langle g, u \rangle`, by which the loss falls if it
        is linear; 0 on a rejected step.
    """

    leaf_grad_norm: jax.Array
    effective_rate: jax.Array
    update_ratio: jax.Array
    predicted_decrease: jax.Array


def init_local(params: optax.Params) -> LocalView:
    """Returns the view of a run that has not made a step."""
    # separate buffers: one that occurs twice cannot be donated
    num_leaves = len(jax.tree.leaves(params))
    return LocalView(*(jnp.zeros(num_leaves, jnp.float32) for _ in LocalView._fields))


class LeafSquares(NamedTuple):
    """Sums of squares of each leaf, known before the params are overwritten.

    Attributes:
      grads: of the gradient before clipping, float32, shape ``(num_leaves,)``.
      params: of the params, likewise.
    """

    grads: jax.Array
    params: jax.Array


def leaf_squares(grads: optax.Updates, params: optax.Params) -> LeafSquares:
    """Returns the sums of squares that are available before a step is made."""
    return LeafSquares(
        *(_stack(map(_square, jax.tree.leaves(t))) for t in (grads, params))
    )


def _square(leaf: jax.Array) -> jax.Array:
    # as in `global_norm`, so that XLA recognizes equal sums
    return sum_entries(lambda x: x * x, leaf)


def _stack(sums: Iterable[jax.Array]) -> jax.Array:
    return jnp.stack([jnp.zeros((), jnp.float32), *sums])[1:]  # there may be none


def _after(gate: jax.Array, squares: jax.Array) -> jax.Array:
    """Returns the gate, but not before some sums of squares are known.

    No such sum is negative, but XLA does not know it.
    """
    return jnp.where(jnp.any(squares < 0.0), 0.0, gate)


def act_in_turn(
    act: Callable[..., jax.Array],
    gate: jax.Array,
    trees: tuple[PyTree, ...],
    grads: optax.Updates,
    squares: LeafSquares,
    *,
    is_accepted: jax.Array,
    axis_name: str | tuple[str, ...] | None,
) -> tuple[optax.Updates, LocalView]:
    """Returns ``act(gate, *leaves)`` for all leaves, and the view of that step.

    XLA stores terms before it sums them up. So the leaves take turns: each eighth of
    the step waits for the sums before it. Then only an eighth is stored at a time, and
    no parameter is overwritten before its square is summed, which would cost a copy.

    Args:
      act: makes the step of a leaf.
      gate: its first argument, a scalar on which every entry depends.
      trees: its other arguments, trees like the params.
      grads: the gradient before clipping.
      squares: those of gradient and params.
      is_accepted: whether the step is, bool scalar.
      axis_name: mapped axes over which the sums of a leaf are averaged.
    """
    sizes = np.array([leaf.size for leaf in jax.tree.leaves(grads)], float)
    turns = (np.cumsum(sizes) - sizes) * _NUM_TURNS // max(sizes.sum(), 1.0)
    gate = _after(gate, squares.params)
    steps: list[jax.Array] = []
    moved: list[jax.Array] = []
    decrease: list[jax.Array] = []
    leaves = zip(jax.tree.leaves(grads), *map(jax.tree.leaves, trees), strict=True)
    for i, (grad, *others) in enumerate(leaves):
        if i and turns[i] != turns[i - 1]:
            gate = _after(gate, _stack(moved))
        steps.append(act(gate, *others))
        moved.append(_square(steps[-1]))
        decrease.append(sum_entries(lambda g, u: -g * u, grad, steps[-1]))
    view = _view(is_accepted, squares, _stack(moved), _stack(decrease), axis_name)
    return jax.tree.unflatten(jax.tree.structure(trees[0]), steps), view


def _view(
    is_accepted: jax.Array,
    squares: LeafSquares,
    moved: jax.Array,
    decrease: jax.Array,
    axis_name: str | tuple[str, ...] | None,
) -> LocalView:
    if axis_name is not None:
        squares, moved, decrease = lax.pmean((squares, moved, decrease), axis_name)

    def shown(x: jax.Array) -> jax.Array:
        bounded = jnp.clip(jnp.nan_to_num(x), -LARGEST, LARGEST)
        return jnp.where(is_accepted, bounded, 0.0)

    def ratio(square: jax.Array) -> jax.Array:
        return shown(jnp.where(square > 0.0, jnp.sqrt(moved) / jnp.sqrt(square), 0.0))

    grad_norm = jnp.sqrt(squares.grads)
    return LocalView(
        leaf_grad_norm=jnp.nan_to_num(grad_norm, nan=LARGEST, posinf=LARGEST),
        effective_rate=ratio(squares.grads),
        update_ratio=ratio(squares.params),
        predicted_decrease=shown(decrease),
    )
