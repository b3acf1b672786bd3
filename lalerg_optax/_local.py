"""Local view: which leaf of the params moved the loss, and how far it went."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from ._numbers import LARGEST, SMALLEST, UNKNOWN
from ._sums import sum_entries

PyTree = Any

_NUM_TURNS = 8
_NORM_ERROR = 1e-3  # of a sum of millions of squares in float32
_STEP_ERROR = 1e-2  # of a step that was to lead to the anchor
INTERNAL = ("leaf_param_norm", "leaf_step_norm")


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
      jump: how far :math:`p` is, at least, from where the step before sent it, in units
        of :math:`|p| + |u|` there; 0 up to rounding.
      leaf_param_norm: :math:`|p|`; `UNKNOWN` where it is not finite, and at first.
      leaf_step_norm: :math:`|u|`, also of a revert.
    """

    leaf_grad_norm: jax.Array
    effective_rate: jax.Array
    update_ratio: jax.Array
    predicted_decrease: jax.Array
    jump: jax.Array
    leaf_param_norm: jax.Array
    leaf_step_norm: jax.Array


def init_local(params: optax.Params) -> LocalView:
    """Returns the view of a run that has not made a step."""
    # separate buffers: one that occurs twice cannot be donated
    num_leaves = len(jax.tree.leaves(params))
    view = LocalView(*(jnp.zeros(num_leaves, jnp.float32) for _ in LocalView._fields))
    return expect_nothing(view)


def expect_nothing(view: LocalView) -> LocalView:
    """Returns the view of a run of which it is not known where its params should be."""
    return view._replace(leaf_param_norm=jnp.full_like(view.leaf_param_norm, UNKNOWN))


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
    last: LocalView,
    *,
    is_home: jax.Array,
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
      last: the view of the step before.
      is_home: whether that step, and this one, leads to the anchor, bool scalar.
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
    sums = squares, _stack(moved), _stack(decrease)
    if axis_name is not None:
        sums = lax.pmean(sums, axis_name)
    dtypes = [leaf.dtype for leaf in jax.tree.leaves(trees[0])]
    jump = _jump(last, sums[0].params, sums[1], is_home, dtypes)
    view = _view(is_accepted, *sums, jump)
    return jax.tree.unflatten(jax.tree.structure(trees[0]), steps), view


def _jump(
    last: LocalView,
    square: jax.Array,
    moved: jax.Array,
    is_home: jax.Array,
    dtypes: Sequence[Any],
) -> jax.Array:
    r"""Returns how far params are, at least, from where the step before sent them.

    A step cannot change the norm by more than its own. And of the two steps of a revert
    the second shows how far from the anchor the first one has led. With the last params
    :math:`p'` and the last step :math:`u'`, the excess is

    .. math::

        |p - (p' + u')| \ge \big| |p| - |p'| \big| - |u'|

    Args:
      last: the view of the step before.
      square: sums of the squares of the params.
      moved: sums of the squares of this step.
      is_home: whether both steps lead to the anchor, bool scalar.
      dtypes: of the params.
    """
    before, step = last.leaf_param_norm, last.leaf_step_norm
    scale = before + step
    rounding = np.array([_resolution(dtype) for dtype in dtypes], np.float32)
    norm = jnp.nan_to_num(jnp.sqrt(square), nan=jnp.inf, posinf=jnp.inf)
    excess = jnp.abs(norm - before) - step
    is_far = excess > (_NORM_ERROR + rounding) * scale
    away = jnp.sqrt(moved)
    is_lost = is_home & (away > 4.0 * rounding * scale + _STEP_ERROR * step)
    excess = jnp.where(is_lost, jnp.maximum(excess, away), excess)
    jump = jnp.minimum(excess / jnp.maximum(scale, SMALLEST), LARGEST)
    return jnp.where((is_far | is_lost) & (before >= 0.0), jump, 0.0)


def _resolution(dtype: Any) -> float:
    return float(jnp.finfo(dtype).eps) if jnp.issubdtype(dtype, jnp.inexact) else 0.0


def _view(
    is_accepted: jax.Array,
    squares: LeafSquares,
    moved: jax.Array,
    decrease: jax.Array,
    jump: jax.Array,
) -> LocalView:
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
        jump=jump,
        leaf_param_norm=jnp.nan_to_num(
            jnp.sqrt(squares.params), nan=UNKNOWN, posinf=UNKNOWN
        ),
        leaf_step_norm=jnp.nan_to_num(jnp.sqrt(moved), nan=LARGEST, posinf=LARGEST),
    )
