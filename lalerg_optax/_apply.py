"""Params from the state: updates applied, exact on a revert, healthy, averaged."""

import functools
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import optax

from ._anchor import as_params, fetched, is_masked
from ._find import find_states
from ._numbers import is_representable
from ._regulate import ErrorRegulateState
from ._verdict import Verdict

Params = TypeVar("Params")  # optax.Params is Any, which would lose their type


_map = functools.partial(jax.tree.map, is_leaf=is_masked)


def _home(
    state: ErrorRegulateState, params: optax.Params, is_needed: jax.Array
) -> optax.Params:
    """Returns the anchor of a regulator, with masked nodes for all other params."""
    anchor = as_params(state.anchor, params)
    own = _map(lambda a, p: a if is_masked(a) else p, anchor, params)
    return fetched(is_needed, anchor, own)


def apply_updates(
    params: Params, updates: optax.Updates, opt_state: optax.OptState
) -> Params:
    """Applies updates like ``optax.apply_updates``; on a REVERT takes the anchor.

    ``optax.apply_updates`` adds, and ``p + (a - p)`` is ``a`` up to rounding, and never
    for a ``p`` that is not finite. This function selects, so params equal the anchor
    bit for bit after a revert. On every step, an entry that is not finite, or whose
    square overflows float32 (after a bit flip between two steps, say), is replaced by
    that of the anchor. Otherwise an entry that few batches use, such as a row of an
    embedding, would never recover, because the steps that it spoils are too rare for a
    revert. An anchor in host memory is available only on a revert. All other entries
    are those of Optax.

    Args:
      params: a tree of parameters.
      updates: what ``update`` returned, a tree like the params.
      opt_state: the state that the *same* call of ``update`` returned. Regulators
        are found in it at any depth; one inside ``optax.masked`` or
        ``optax.partition`` decides for its own parameters. Of states under ``vmap``,
        with the axes of the members in front, each decides for its own member.

    Returns:
      The new params, with the shapes and dtypes of the old ones.

    Example:
      >>> import jax.numpy as jnp, optax, lalerg_optax as lo
      >>> tx = lo.error_regulate(optax.sgd(0.1))
      >>> good = jnp.array([1.0, 2.0])
      >>> state, params = tx.init(good), jnp.array([jnp.inf, 3e10])
      >>> for _ in range(2):  # the loss of such params is not finite either
      ...     updates, state = tx.update(params, state, params, value=jnp.inf)
      ...     params = lo.apply_updates(params, updates, state)
      >>> [float(p) for p in params]
      [1.0, 2.0]
    """
    params = optax.apply_updates(params, updates)
    for state in find_states(opt_state, ErrorRegulateState).values():
        is_reverted = state.verdict == Verdict.REVERT

        def select(a: Any, p: Any, pred: jax.Array = is_reverted) -> Any:
            if is_masked(a):
                return p
            # states made under vmap have their axes in front
            axes = range(pred.ndim, p.ndim) if pred.ndim else ()
            own = jnp.expand_dims(pred, axes)
            return jnp.where(own | ~is_representable(p), a, p).astype(p.dtype)

        params = _map(select, _home(state, params, is_reverted.any()), params)
    return params


def healthy_params(params: Params, opt_state: optax.OptState) -> Params:
    """Returns the last params that are known to be healthy: those of the anchor.

    The effect of an update shows at the next losses. So no loss has judged the last
    update of a run, or the one before a checkpoint. The anchor was judged: it holds the
    params before a step whose loss and gradient norm were ordinary, at most
    ``anchor_every`` accepted steps ago, or longer while anything is in doubt.

    Args:
      params: the current params, a tree; only those without a regulator are returned.
        With Flax NNX, ``nnx.state(model, nnx.Param)``.
      opt_state: the state of the optimizer. Regulators are found in it at any depth.

    Returns:
      A tree with the shapes and dtypes of the params: a copy, so that params and state
      can both be donated.

    Example:
      >>> import jax.numpy as jnp, optax, lalerg_optax as lo
      >>> tx, params = lo.error_regulate(optax.sgd(0.1)), jnp.array([1.0, 2.0])
      >>> state = tx.init(params)
      >>> updates, state = tx.update(params, state, params, value=1.0)
      >>> params = lo.apply_updates(params, updates, state)
      >>> [float(p) for p in lo.healthy_params(params, state)]  # not [0.9, 1.8]
      [1.0, 2.0]
    """
    for state in find_states(opt_state, ErrorRegulateState).values():
        home = _home(state, params, jnp.ones((), jnp.bool_))
        params = _map(
            lambda a, p: p if is_masked(a) else jnp.array(a, p.dtype), home, params
        )
    return params


def eval_params(opt_state: optax.OptState, params: Params) -> Params:
    r"""Returns the average of the params of late, for evaluation.

    Call it with the state of `lalerg` or `error_regulate` with ``average=True``. At a
    rate that does not fall to zero, params keep wandering around the place that they
    lead to; their average is there. Training goes on from ``params``, not from the
    average, so it may be read at any step, and the length of the run need not be known.

    The average of :math:`n` points is that of their last ninth or so: with :math:`k =
    8` the weight of point :math:`i` is in proportion to :math:`i^k`. A point is taken
    at every fifth accepted step, where nothing speaks against the params: not while
    losses are high, and never from params that are then taken back at once.

    Statistics of batch norm belong to ``params``. For the average compute them anew:
    some forward passes in training mode over training data.

    Args:
      opt_state: the state of the optimizer. Regulators are found in it at any depth.
      params: the current params, a tree; those without an average are returned as they
        are. With Flax NNX, ``nnx.state(model, nnx.Param)``. The order of the arguments
        is that of ``optax.contrib.schedule_free_eval_params``.

    Returns:
      A tree with the shapes and dtypes of the params, a copy.

    Raises:
      ValueError: if there is no average in the state.

    Example:
      >>> import jax.numpy as jnp, optax, lalerg_optax as lo
      >>> tx = lo.error_regulate(optax.sgd(0.75), average=True)
      >>> params = jnp.array([1.0, 2.0])
      >>> state = tx.init(params)
      >>> for _ in range(40):  # params jump over the optimum, which is at 0
      ...     updates, state = tx.update(2.66 * params, state, params, value=1.0)
      ...     params = lo.apply_updates(params, updates, state)
      >>> bool(jnp.all(abs(lo.eval_params(state, params)) < abs(params)))
      True

    References:
      The weights are those of `Shamir and Zhang <https://arxiv.org/abs/1212.1824>`_,
      2013; :math:`k = 8` is that of `DoG <https://arxiv.org/abs/2302.12022>`_, 2023.
    """
    found = [
        state.average.points
        for state in find_states(opt_state, ErrorRegulateState).values()
        if state.average is not None
    ]
    if not found:
        raise ValueError(
            "opt_state has no average in it: make the optimizer with average=True. "
            "The order is eval_params(opt_state, params)."
        )
    for points in found:
        params = _map(
            lambda a, p: p if is_masked(a) else jnp.array(a, p.dtype),
            as_params(points, params),
            params,
        )
    return params
