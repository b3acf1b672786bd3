"""Carry: the gradient carries the loss, for libraries that pass nothing else."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ._checks import check_transformation


class Carrier(NamedTuple):
    """Params, and a slot whose gradient is the loss.

    Attributes:
      params: a tree of parameters.
      slot: always 0; the loss, in the gradient that `carry_value` makes.

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

    It equals ``loss + slot * stop_gradient(loss)`` as if 0 * inf were 0.
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
    r"""Makes the gradient carry the loss: for callers that pass no loss.

    `value_from_gradient` takes the loss out again. An average of gradients over devices
    or micro-batches averages the loss as well.

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

    For params :math:`p` and a slot :math:`z` that is always 0, the returned function
    has

    .. math::

        f(p, z) = L(p), \qquad
        \partial f / \partial p = \nabla L(p), \qquad
        \partial f / \partial z = L(p)
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

    Args:
      tx: an optimizer with a part of this package in it, at any depth.

    Returns:
      An ``optax.GradientTransformationExtraArgs`` for params that are a `Carrier`, with
      the state of ``tx`` for ``carrier.params``.

    Raises:
      TypeError: if ``tx`` is not a transformation, or params or gradients are not a
        `Carrier`.

    Example:
      >>> import jax.numpy as jnp, optax, lalerg_optax as lo
      >>> tx = lo.value_from_gradient(lo.error_regulate(optax.sgd(0.1)))
      >>> carrier = lo.Carrier(jnp.array([1.0, -2.0]))
      >>> grads = lo.Carrier(jnp.array([2.0, -4.0]), slot=5.0)  # the loss is 5
      >>> updates, state = tx.update(grads, tx.init(carrier), carrier)
      >>> float(updates.slot), float(lo.metrics(state)["avg_value"])
      (0.0, 5.0)

    With the loss :math:`L` beside the gradient :math:`g`, the state :math:`s` and the
    params :math:`p`, its update is

    .. math::

        update((g, L), s, (p, 0)) = (tx.update(g, s, p, value=L), 0)

    The slot is not a parameter: ``tx`` never sees it, and it is in no norm. Put this
    outermost, because a transformation outside (a clip, a loss scale) would change the
    loss with the gradients.
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
