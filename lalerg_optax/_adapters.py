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

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ._anchor import copy_params
from ._checks import check_state_type, check_transformation


def without_value(
    tx: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    r"""Judges by the gradient norm alone: for callers that pass no loss.

    .. math::

        update(g, s, p) = tx.update(g, s, p, value=None)

    A NaN, an infinity and an outlier among the gradient norms are skipped and reverted
    as ever. A loss that rises under gradients of the usual size is not seen, and a
    macro level goes by its audits alone. A ``value`` that *is* passed is dropped, which
    serves an objective that is meant to rise (one side of a GAN) where a library passes
    it.

    Args:
      tx: an optimizer with a part of this package in it, at any depth.

    Returns:
      An ``optax.GradientTransformationExtraArgs`` with the state of ``tx``.

    Raises:
      TypeError: if ``tx`` is no transformation.

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
      tracked_params: what the params of the caller are, a tree like them.
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
    r"""Keeps the params itself: for callers that pass none to ``update``.

    With :math:`q_1` the params that ``init`` was called with,

    .. math::

        u_t &= tx.update(g_t, s_t, q_t) \\
        q_{t+1} &= q_t + u_t

    The caller has to do the same, ``optax.apply_updates`` to all of :math:`u_t`, and
    nothing else: params that are projected, replaced or averaged between two steps are
    not those that are tracked. Rounding is the same for both where XLA adds after it
    has rounded :math:`u_t`; where it fuses the sum with the product before it, the two
    may part by a rounding error a step, which no later step takes back. A revert then
    leads to the anchor plus that difference: neither exact reverts nor the mending of a
    parameter that was hit from outside (`apply_updates`) are to be had. It costs one
    more copy of the params in memory. Params that are passed nevertheless are taken,
    and tracked from there on.

    Args:
      tx: an optimizer; `without_value` around it if there is no loss either.

    Returns:
      An ``optax.GradientTransformationExtraArgs`` whose ``update`` needs no params.

    Raises:
      TypeError: if ``tx`` is no transformation, or a state that of another one.

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


class Carrier(NamedTuple):
    """Params with a slot beside them through which the loss travels as a gradient.

    Attributes:
      params: a tree of parameters.
      slot: 0, always; in the gradient that `carry_value` makes, the loss.

    Example:
      >>> import lalerg_optax as lo
      >>> carrier = lo.Carrier({"w": 1.0})
      >>> carrier.params, float(carrier.slot)
      ({'w': 1.0}, 0.0)
    """

    params: Any
    slot: Any = np.float32(0.0)  # not jnp: an import must not start the devices


@jax.custom_jvp
def _loss_with_slot(loss: jax.Array, slot: jax.Array) -> jax.Array:
    """Returns the loss; its derivative in the slot is the loss.

    It is what ``loss + slot * stop_gradient(loss)`` would be if 0 * inf were 0.
    """
    del slot
    return loss


@_loss_with_slot.defjvp
def _loss_with_slot_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    (loss, _), (loss_dot, slot_dot) = primals, tangents
    loss_of_slot = jax.lax.stop_gradient(loss) * slot_dot
    return loss, loss_dot + loss_of_slot.astype(loss.dtype)


def carry_value(
    loss_fn: Callable[..., Any], *, has_aux: bool = False
) -> Callable[..., Any]:
    r"""Makes the loss travel in the gradient: for callers that pass no loss.

    For params :math:`p` and a slot :math:`z` that is 0 at all times, the function that
    is returned has

    .. math::

        f(p, z) = L(p), \qquad
        \partial f / \partial p = \nabla L(p), \qquad
        \partial f / \partial z = L(p)

    and `value_from_gradient` takes the loss out again. What averages gradients over
    devices or micro-batches averages the loss as well.

    Args:
      loss_fn: a function of the params and anything else that returns a scalar loss.
      has_aux: whether it returns ``(loss, aux)``.

    Returns:
      The same function of a `Carrier` in place of the params.

    Example:
      >>> import jax, jax.numpy as jnp, optax, lalerg_optax as lo
      >>> from flax.training.train_state import TrainState  # which passes no value
      >>> loss_fn = lo.carry_value(lambda params, x: jnp.mean((params * x - 3.0) ** 2))
      >>> state = TrainState.create(
      ...     apply_fn=None,
      ...     params=lo.Carrier(jnp.array(1.0)),
      ...     tx=lo.value_from_gradient(lo.lalerg(1e-3)),
      ... )
      >>> loss, grads = jax.value_and_grad(loss_fn)(state.params, jnp.ones(8))
      >>> state = state.apply_gradients(grads=grads)
      >>> float(loss), float(lo.metrics(state.opt_state)["avg_value"])
      (4.0, 4.0)
      >>> params = state.params.params
    """

    def carrying(carrier: Carrier, *args: Any, **kwargs: Any) -> Any:
        _check_carrier("carry_value", carrier)
        out = loss_fn(carrier.params, *args, **kwargs)
        loss, *aux = out if has_aux else (out,)
        loss = _loss_with_slot(loss, jnp.asarray(carrier.slot))
        return (loss, *aux) if has_aux else loss

    return carrying


def value_from_gradient(
    tx: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    r"""Takes the loss from the gradient that `carry_value` put it into.

    .. math::

        update((g, L), s, (p, 0)) = (tx.update(g, s, p, value=L), 0)

    The slot is no parameter: ``tx`` never sees it, and it is in no norm. Put this
    outermost, because what changes gradients outside (a clip, a loss scale) changes the
    loss with them.

    Args:
      tx: an optimizer with a part of this package in it, at any depth.

    Returns:
      An ``optax.GradientTransformationExtraArgs`` for params that are a `Carrier`, with
      the state of ``tx`` for ``carrier.params``.

    Raises:
      TypeError: if ``tx`` is no transformation, or params or gradients no `Carrier`.

    Example:
      >>> import jax.numpy as jnp, optax, lalerg_optax as lo
      >>> tx = lo.value_from_gradient(lo.error_regulate(optax.sgd(0.1)))
      >>> carrier = lo.Carrier(jnp.array([1.0, -2.0]))
      >>> grads = lo.Carrier(jnp.array([2.0, -4.0]), slot=5.0)  # the loss is 5
      >>> updates, state = tx.update(grads, tx.init(carrier), carrier)
      >>> float(updates.slot), float(lo.metrics(state)["avg_value"])
      (0.0, 5.0)
    """
    check_transformation("tx", tx)
    chained = optax.with_extra_args_support(tx)

    def init_fn(params: Carrier) -> optax.OptState:
        _check_carrier("value_from_gradient", params)
        return chained.init(params.params)

    def update_fn(
        updates: Carrier,
        state: optax.OptState,
        params: Carrier | None = None,
        **extra_args: Any,
    ) -> tuple[Carrier, optax.OptState]:
        _check_carrier("value_from_gradient", updates)
        if params is not None:
            _check_carrier("value_from_gradient", params)
        extra_args["value"] = updates.slot
        inner_params = None if params is None else params.params
        inner_updates, state = chained.update(
            updates.params, state, inner_params, **extra_args
        )
        slot = jnp.zeros_like(updates.slot)
        return Carrier(inner_updates, slot), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _check_carrier(name: str, tree: Any) -> None:
    """Raises a TypeError unless a tree is a `Carrier`."""
    if not isinstance(tree, Carrier):
        raise TypeError(
            f"{name} needs params and gradients of the type lalerg_optax.Carrier, "
            f"got {type(tree).__name__}: start from lalerg_optax.Carrier(params)."
        )
