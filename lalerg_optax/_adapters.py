"""Adapters: for libraries that call ``update`` themselves and leave something out.

==============================  ======================================================
the library calls               wrap the optimizer in
==============================  ======================================================
update(g, s, p, value=loss)     nothing
update(g, s, p)                 `without_value`; `value_from_gradient` where the loss
                                function is yours
update(g, s)                    `tracks_params` around one of the two
==============================  ======================================================
"""

from typing import Any, NamedTuple

import optax

from ._anchor import copy_params
from ._checks import check_state_type, check_transformation


def without_value(
    tx: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    r"""Judges by the gradient norm alone: for callers that pass no loss.

    Args:
      tx: an optimizer with a part of this package in it, at any depth.

    Returns:
      An ``optax.GradientTransformationExtraArgs`` with the state of ``tx``.

    Raises:
      TypeError: if ``tx`` is not a transformation.

    Example:
      >>> import jax.numpy as jnp, optax, lalerg_optax as lo
      >>> tx = lo.without_value(lo.error_regulate(optax.sgd(0.1)))
      >>> params = jnp.array([1.0, -2.0])
      >>> updates, state = tx.update(2 * params, tx.init(params), params)
      >>> [round(float(u), 3) for u in updates]
      [-0.2, 0.4]
      >>> _, state = tx.update(jnp.nan * params, state, params)
      >>> int(lo.metrics(state)["verdict"])
      1

    Its update of a gradient :math:`g`, a state :math:`s` and params :math:`p` is

    .. math::

        update(g, s, p) = tx.update(g, s, p, value=None)

    A NaN, an infinity and an outlier among the gradient norms are skipped and reverted
    as usual. A loss that rises under gradients of the usual size is not seen, and a
    macro level uses its audits only. A ``value`` that *is* passed is dropped: this
    suits an objective that is meant to rise (one side of a GAN).
    """
    check_transformation("tx", tx)
    chained = optax.with_extra_args_support(tx)

    def update_fn(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        return chained.update(updates, state, params, **{**extra_args, "value": None})

    return optax.GradientTransformationExtraArgs(chained.init, update_fn)


class TracksParamsState(NamedTuple):
    """State of `tracks_params`.

    Attributes:
      tracked_params: a copy of the caller's params, a tree like them.
      inner_state: the state of the wrapped optimizer.

    Example:
      >>> import jax.numpy as jnp, optax, lalerg_optax as lo
      >>> tx = lo.tracks_params(lo.without_value(lo.error_regulate(optax.sgd(0.1))))
      >>> tx.init(jnp.array([1.0, -2.0])).tracked_params.tolist()
      [1.0, -2.0]
    """

    tracked_params: optax.Params
    inner_state: optax.OptState


def tracks_params(
    tx: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    r"""Keeps its own copy of the params: for callers that pass none to ``update``.

    Args:
      tx: an optimizer; `without_value` around it if there is no loss either.

    Returns:
      An ``optax.GradientTransformationExtraArgs`` whose ``update`` needs no params.

    Raises:
      TypeError: if ``tx`` is not a transformation, or a state is that of another one.

    Example:
      >>> import jax.numpy as jnp, optax, lalerg_optax as lo
      >>> tx = lo.tracks_params(lo.without_value(lo.error_regulate(optax.sgd(0.1))))
      >>> params = jnp.array([1.0, -2.0])
      >>> state = tx.init(params)
      >>> for _ in range(3):
      ...     updates, state = tx.update(2 * params, state)
      ...     params = optax.apply_updates(params, updates)
      >>> [round(float(p), 3) for p in params]
      [0.512, -1.024]
      >>> bool(jnp.allclose(state.tracked_params, params))
      True

    With :math:`q_1` the params that ``init`` was called with,

    .. math::

        u_t &= tx.update(g_t, s_t, q_t) \\
        q_{t+1} &= q_t + u_t

    The caller has to do the same, ``optax.apply_updates`` with all of :math:`u_t`, and
    nothing else: params that are projected, replaced or averaged between two steps
    differ from the tracked ones. Both are rounded alike where XLA adds after it has
    rounded :math:`u_t`. Where it fuses the sum with the product before it, the two may
    drift apart by a rounding error per step, which no later step removes. A revert then
    leads to the anchor plus that difference: neither exact reverts nor the repair of a
    parameter that was corrupted from outside (`apply_updates`) is available. It costs
    one more copy of the params in memory. Params that are passed nevertheless are used,
    and tracked from then on.
    """
    check_transformation("tx", tx)
    chained = optax.with_extra_args_support(tx)

    def init_fn(params: optax.Params) -> TracksParamsState:
        return TracksParamsState(copy_params(params), chained.init(params))

    def update_fn(
        updates: optax.Updates,
        state: TracksParamsState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, TracksParamsState]:
        check_state_type("tracks_params", state, TracksParamsState)
        params = state.tracked_params if params is None else params
        updates, inner_state = chained.update(
            updates, state.inner_state, params, **extra_args
        )
        tracked = optax.apply_updates(params, updates)
        return updates, TracksParamsState(tracked, inner_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
