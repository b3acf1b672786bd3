"""Accumulate: one step of an optimizer from the means over several micro-batches."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from ._checks import (
    MISSING,
    as_arrays,
    as_loss,
    as_params,
    check_range,
    check_state_type,
    check_transformation,
    check_updates,
    given,
)
from ._find import find_states
from ._numbers import wide
from ._regulate import ErrorRegulateState
from ._scalars import count_if
from ._sums import global_norm


class AccumulateState(NamedTuple):
    """State of `accumulate`.

    Attributes:
      micro_step: micro-batches of the present group that were seen, dropped ones
        included; 0 after a step, int32 scalar.
      num_averaged: how many of them are in the means, int32 scalar.
      num_groups: groups that were completed, int32 scalar.
      num_dropped: micro-batches that were dropped in the whole run, int32 scalar.
      mean_value: mean loss of the present group, float32 scalar.
      mean_grads: mean gradient of the present group, a tree like the params, in
        float32 or wider. Right after a step it holds the update, which the next group
        does not take in.
      inner_state: the state of the wrapped optimizer.

    Example:
      >>> import jax.numpy as jnp, optax, lalerg_optax as lo
      >>> tx = lo.accumulate(lo.error_regulate(optax.sgd(0.1)), 4)
      >>> params = jnp.array([1.0, 2.0])
      >>> _, state = tx.update(params, tx.init(params), params, value=3.0)
      >>> int(state.micro_step), float(state.mean_value), state.mean_grads.tolist()
      (1, 3.0, [1.0, 2.0])
    """

    micro_step: jax.Array
    num_averaged: jax.Array
    num_groups: jax.Array
    num_dropped: jax.Array
    mean_value: jax.Array
    mean_grads: optax.Updates
    inner_state: optax.OptState


def has_regulator(state: Any) -> bool:
    """Returns whether an `error_regulate` is in the state of an optimizer."""
    return bool(find_states(state, ErrorRegulateState))


def _check_every_k(every_k: Any) -> None:
    if callable(every_k):
        return
    check_range("every_k", every_k, 1, float("inf"))
    if not isinstance(every_k, jax.Array) and every_k != int(every_k):
        raise ValueError(
            "every_k must be a whole number, or a function from the number of steps "
            f"to one, got every_k = {every_k}."
        )


def _added(
    mean: jax.Array, new: jax.Array, num_averaged: jax.Array, is_usable: jax.Array
) -> jax.Array:
    """Returns a running mean with one more value, which counts only if usable."""
    before = jnp.where(num_averaged > 0, mean, 0)  # else it is of the last group
    count = (num_averaged + 1).astype(mean.real.dtype)
    change = (new.astype(mean.dtype) - before) / count
    return before + jnp.where(is_usable, change, 0)


def _choose(
    pred: jax.Array, do: Callable[[], Any], keep: Callable[[], Any]
) -> tuple[Any, Any]:
    """Returns one of two results. Outside of ``jit`` only that one is computed.

    There a conditional would be compiled again at every call.
    """
    if isinstance(pred, jax.core.Tracer):
        return lax.cond(pred, do, keep)  # the buffers pass through the false branch
    return do() if pred else keep()


def accumulate(
    tx: optax.GradientTransformation,
    every_k: int | Callable[[jax.Array], jax.typing.ArrayLike],
    *,
    axis_name: str | tuple[str, ...] | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Takes one step of an optimizer from the means over ``every_k`` micro-batches.

    Args:
      tx: the optimizer, with `lalerg` or `error_regulate` in it or not.
      every_k: micro-batches per step, at least 1, or a function from the number of
        groups that were completed to it.
      axis_name: of mapped axes (``shard_map``) over which value and norm are averaged,
        so that devices drop the same micro-batches. Not needed under plain ``jit``.

    Returns:
      An ``optax.GradientTransformationExtraArgs``. Call ``update`` at each micro-batch
      with its gradient and its mean loss, ``value``, which ``tx`` may need or not.
      ``is_last=True``, also as a traced bool, completes a group early. Other keywords
      reach ``tx`` as of the last micro-batch. Updates have the dtypes of the params,
      and are zero until a group is complete.

    Raises:
      ValueError: for an ``every_k`` out of range; in ``update`` for a ``value`` that is
        not a scalar, gradients that do not match the params, or a regulator outside.
      TypeError: if ``tx`` is not a transformation or refuses extra arguments, or a
        ``value`` or a state is of a wrong type.

    Example:
      >>> import jax, jax.numpy as jnp, optax, lalerg_optax as lo
      >>> tx = lo.accumulate(lo.error_regulate(optax.sgd(0.1)), 4)
      >>> params = jnp.array([1.0, -2.0])
      >>> state, update = tx.init(params), jax.jit(tx.update)
      >>> for scale in (1.0, jnp.nan, 2.0, 3.0):  # one of four is spoilt
      ...     loss, grads = jax.value_and_grad(lambda p: scale * jnp.sum(p))(params)
      ...     updates, state = update(grads, state, params, value=loss)
      ...     params = lo.apply_updates(params, updates, state)
      >>> [round(float(p), 3) for p in params]
      [0.8, -2.2]
      >>> report = lo.metrics(state)
      >>> int(report["num_accepted"]), int(report["num_dropped"])
      (1, 1)

    A micro-batch whose loss or squared gradient norm is not finite is dropped, alone.
    With :math:`n` others before it in its group, each one adds to both means:

    .. math::

        \bar g \leftarrow \bar g + \frac{g - \bar g}{n + 1}, \qquad
        \bar L \leftarrow \bar L + \frac{L - \bar L}{n + 1}

    Means are kept in float32, or wider. If all of a group are dropped, a regulator in
    ``tx`` sees a step that is not finite, because the params may be damaged; any other
    ``tx`` is not run. ``tx`` runs once a group, in a conditional. The memory that this
    takes is the accumulator, where the update is kept as well: with JAX 0.12,
    temporaries are those of ``tx``, and for bfloat16 params 2 bytes a parameter more
    (``optax.MultiSteps``: 12 to 16 in float32). See ``docs/accumulate.md``.
    """
    check_transformation("tx", tx)
    _check_every_k(every_k)
    chained = optax.with_extra_args_support(tx)

    def init_fn(params: optax.Params) -> AccumulateState:
        params = as_params("accumulate", params)

        def count() -> jax.Array:  # each one a buffer of its own: they are donated
            return jnp.zeros((), jnp.int32)

        return AccumulateState(
            micro_step=count(),
            num_averaged=count(),
            num_groups=count(),
            num_dropped=count(),
            mean_value=jnp.zeros((), jnp.float32),
            mean_grads=jax.tree.map(lambda p: jnp.zeros_like(p, wide(p)), params),
            inner_state=chained.init(params),
        )

    def update_fn(
        updates: optax.Updates,
        state: AccumulateState,
        params: optax.Params | None = None,
        *surplus: Any,
        value: jax.typing.ArrayLike | None = MISSING,
        is_last: jax.typing.ArrayLike = False,
        **extra_args: Any,
    ) -> tuple[optax.Updates, AccumulateState]:
        check_state_type("accumulate", state, AccumulateState)
        updates = as_arrays(updates)
        check_updates("accumulate", updates, state.mean_grads)
        if "verdict" in extra_args:
            raise ValueError(
                "accumulate belongs outside of error_regulate and lalerg, which judge "
                "whole steps: accumulate(error_regulate(optimizer), every_k)."
            )

        # Average.
        value = given(value, surplus, extra_args)
        is_told = value is not MISSING
        loss = as_loss(value) if is_told else None
        grad_norm = global_norm(updates)
        if axis_name is not None:
            loss, grad_norm = lax.pmean((loss, grad_norm), axis_name)
        is_usable = jnp.isfinite(grad_norm)
        if loss is not None:
            is_usable &= jnp.isfinite(loss)
        before = state.num_averaged

        def add(mean: jax.Array, new: jax.Array) -> jax.Array:
            return _added(mean, new, before, is_usable)

        mean_grads = jax.tree.map(add, state.mean_grads, updates)
        mean_value = state.mean_value if loss is None else add(state.mean_value, loss)
        num_averaged = count_if(is_usable, before)
        micro_step = count_if(jnp.ones((), jnp.bool_), state.micro_step)

        # Step, if the group is complete and there is anything to see.
        k = every_k(state.num_groups) if callable(every_k) else every_k
        is_complete = (micro_step >= k) | jnp.asarray(is_last, jnp.bool_)
        is_seen = num_averaged > 0
        is_run = is_complete if has_regulator(state) else is_complete & is_seen

        def step() -> tuple[optax.Updates, optax.OptState]:
            told = dict(extra_args)

            def mean_of(mean: jax.Array, g: jax.Array) -> jax.Array:
                if loss is None:  # then only the gradient tells that all were dropped
                    mean = jnp.where(is_seen, mean, jnp.nan)
                return mean.astype(g.dtype)

            grads = jax.tree.map(mean_of, mean_grads, updates)
            if is_told:
                told["value"] = loss
            if loss is not None:
                told["value"] = jnp.where(is_seen, mean_value, jnp.nan)
            if "grad" in told:  # that of a line search
                told["grad"] = grads
            steps, inner_state = chained.update(
                grads, state.inner_state, params, **told
            )
            # The accumulator is free now: the update needs no memory of its own.
            return (
                jax.tree.map(lambda m, u: u.astype(m.dtype), mean_grads, steps),
                jax.tree.map(_like, inner_state, state.inner_state),
            )

        def wait() -> tuple[optax.Updates, optax.OptState]:
            return mean_grads, state.inner_state

        mean_grads, inner_state = _choose(is_run, step, wait)
        steps = jax.tree.map(
            lambda m, p: jnp.where(is_run, m, 0).astype(p.dtype),
            mean_grads,
            updates if params is None else params,
        )
        return steps, AccumulateState(
            micro_step=jnp.where(is_complete, 0, micro_step),
            num_averaged=jnp.where(is_complete, 0, num_averaged),
            num_groups=count_if(is_complete, state.num_groups),
            num_dropped=count_if(~is_usable, state.num_dropped),
            mean_value=mean_value,
            mean_grads=mean_grads,
            inner_state=inner_state,
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _like(new: Any, old: Any) -> Any:
    """Returns a part of a state with the dtype that it had before."""
    dtype = jnp.result_type(old)
    return new if jnp.result_type(new) == dtype else jnp.asarray(new, dtype)
