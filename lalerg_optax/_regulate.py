"""Error regulation: judge every step; accept, bound, skip or revert it."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from ._act import act, admitted, scale_of
from ._anchor import check_anchor_dtype, check_anchor_memory, copy_params
from ._assess import assess
from ._audit import due, look_and_move
from ._average import Average, init_average, is_point
from ._checks import (
    MISSING,
    as_arrays,
    as_loss,
    as_params,
    check_params,
    check_range,
    check_state,
    check_state_type,
    check_updates,
    given,
    present_name,
)
from ._decide import decide, overruled
from ._history import LossHistory
from ._inner import as_inner, loss_seen, report_of
from ._judge_rule import JudgeRule
from ._learn import learn
from ._local import LocalView, init_local, leaf_squares
from ._mapped import check_mapped, mapped_axes, spread
from ._numbers import UNKNOWN
from ._rate import learning_rate
from ._records import RegulatorScalars
from ._scalars import Scalars, pack, read, unpack
from ._sums import global_norm


class ErrorRegulateState(NamedTuple):
    """State of `error_regulate`. Every number in it is finite at all times.

    The scalars can be read by name: ``state.verdict``, ``state.damping_factor``, ...

    Attributes:
      scalars: the report of the last step, memory, and counters; see
        `RegulatorScalars`.
      history: the recent losses and the recent logarithms of the gradient norm, with
        alarms clipped; leading axis 2.
      anchor: the params that a revert goes back to, a tree like the params.
      inner_state: the state of the wrapped transformation.
      local: the effect of the last step on each leaf; None without ``local=True``.
      average: that of the params of late; None without ``average=True``.

    Example:
      >>> import jax.numpy as jnp, optax, lalerg_optax as lo
      >>> tx = lo.error_regulate(optax.adam(1e-3))
      >>> params = jnp.array([1.0, 2.0])
      >>> state = tx.init(params)
      >>> _, state = tx.update(jnp.ones(2), state, params, value=0.5)
      >>> int(state.num_accepted), float(state.avg_value)
      (1, 0.5)
      >>> [float(a) for a in state.anchor]
      [1.0, 2.0]
      >>> int(state.inner_state[0].count)  # Adam's
      1
    """

    scalars: Scalars
    history: LossHistory
    anchor: optax.Params
    inner_state: optax.OptState
    local: LocalView | None = None
    average: Average | None = None

    def __getattr__(self, name: str) -> jax.Array:
        return read(RegulatorScalars, self.scalars, present_name(name))


def _checked(
    updates: optax.Updates,
    state: Any,
    params: optax.Params | None,
    init: Callable[..., Any],
) -> tuple[optax.Updates, optax.Params]:
    """Returns gradients and params as arrays, after all checks of a call."""
    link = "error_regulate"
    check_params(link, params)
    check_state_type(link, state, ErrorRegulateState)
    updates, params = as_arrays(updates), as_params(link, params)
    check_updates(link, updates, params)
    check_state(link, state, functools.partial(init, is_checked=True), params)
    return updates, params


def error_regulate(
    inner: optax.GradientTransformation | None = None,
    *,
    threshold: jax.typing.ArrayLike = 6.0,
    progress_fraction: jax.typing.ArrayLike = 0.1,
    patience: jax.typing.ArrayLike = 32,
    anchor_every: jax.typing.ArrayLike = 32,
    backoff_factor: jax.typing.ArrayLike = 0.5,
    recovery_steps: jax.typing.ArrayLike = 64,
    clip_norm: jax.typing.ArrayLike | None = None,
    audit: bool = False,
    average: bool = False,
    local: bool = False,
    anchor_dtype: jax.typing.DTypeLike | None = None,
    anchor_memory: str = "device",
    axis_name: str | tuple[str, ...] | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Judges every update by its effect on the loss, and undoes one that did harm.

    Args:
      inner: the transformation to protect; None for the flat form.
      threshold: tolerated rise in units of the upper spread, above 0.
      progress_fraction: the same in units of the progress so far, at least 0.
      patience: steps after which hard data are the new level, at least 4.
      anchor_every: accepted steps between two anchors, at least 1.
      backoff_factor: cut of the damping when updates did harm, in (0, 1].
      recovery_steps: accepted steps in which one cut is made good, above 0.
      clip_norm: if given, gradients are scaled down to this global norm, above 0.
      audit: whether to look back at the anchor, for a macro level in ``inner``.
      average: whether to keep an average of the params, for `eval_params`.
      local: whether `metrics` also reports the effect of a step on each leaf.
      anchor_dtype: dtype of the anchor of real params, with the range of float32.
      anchor_memory: of the anchor: ``"device"`` or ``"pinned_host"``.
      axis_name: of mapped axes (``shard_map``) over which value and norm are averaged.
        Average the gradients yourself before. Not needed under plain ``jit``.

    Returns:
      An ``optax.GradientTransformationExtraArgs`` whose ``update`` takes the keyword
      ``value`` (or ``loss``): the mean loss at the current params, or None to judge by
      gradient norm alone. Updates have the dtypes of the params.

    Raises:
      ValueError: for a hyperparameter outside its range; in ``init`` when devices lack
        that memory; in ``update`` for missing params, a ``value`` that is not a scalar,
        gradients that do not match the params, or another state.
      TypeError: if ``inner`` is not a transformation or refuses extra arguments,
        ``value`` is not a number, or the state is that of another transformation.

    Example:
      >>> import jax, jax.numpy as jnp, optax, lalerg_optax as lo
      >>> tx = lo.error_regulate(optax.sgd(0.1))
      >>> params = jnp.array([1.0, -2.0])
      >>> state = tx.init(params)
      >>> loss, grads = jax.value_and_grad(lambda p: jnp.sum(p**2))(params)
      >>> updates, state = tx.update(grads, state, params, value=loss)
      >>> [round(float(u), 3) for u in updates], int(state.verdict)
      ([-0.2, 0.4], 0)
      >>> updates, state = tx.update(grads, state, params, value=jnp.nan)
      >>> bool(jnp.all(updates == 0.0)), int(state.verdict)
      (True, 1)

    The loss :math:`L_t` is compared with the median :math:`m` and the upper spread
    :math:`s` of the last 128 losses, and with that at the start, :math:`L_1`; the
    logarithm of the gradient norm likewise. An error above 1 exceeds the tolerance:

    .. math::

        e_{loss} = \frac{L_t - m}{\max(threshold \cdot s,\;
            progress\_fraction \cdot (L_1 - m),\; 10^{-5} |m|)}

    It leads to a `Verdict`: a high loss is accepted with a bounded gradient, a step
    that is not finite is skipped. If losses stay high, params go back to the anchor, a
    copy of healthy params. The losses there show whether params or data were at fault.
    All equations: ``docs/algorithm.md``; nested or flat: ``docs/forms.md``.
    """
    check_range("threshold", threshold, 0.0, float("inf"), low_open=True)
    check_range("progress_fraction", progress_fraction, 0.0, float("inf"))
    check_range("patience", patience, 4, float("inf"))
    check_range("anchor_every", anchor_every, 1, float("inf"))
    check_range("backoff_factor", backoff_factor, 0.0, 1.0, low_open=True)
    check_range("recovery_steps", recovery_steps, 0.0, float("inf"), low_open=True)
    if clip_norm is not None:
        check_range("clip_norm", clip_norm, 0.0, float("inf"), low_open=True)
    check_anchor_dtype(anchor_dtype)
    check_anchor_memory(anchor_memory)
    is_flat = inner is None
    if is_flat and (audit or local):
        name = "audit" if audit else "local"
        raise ValueError(f"{name} needs the gradient: the flat form does not see it.")
    chained = as_inner(optax.identity() if is_flat else inner)
    rule = JudgeRule(
        threshold=threshold,
        progress_fraction=progress_fraction,
        patience=patience,
        anchor_every=anchor_every,
        backoff_factor=backoff_factor,
        recovery_steps=recovery_steps,
    )

    def init_fn(
        params: optax.Params, *, is_checked: bool = False
    ) -> ErrorRegulateState:
        params = as_params("error_regulate", params)
        inner_state = chained.init(params)
        base_rate = UNKNOWN if is_checked else learning_rate(chained, inner_state)
        axes = mapped_axes(params)
        return ErrorRegulateState(
            scalars=spread(pack(RegulatorScalars(base_rate=base_rate)), axes),
            history=spread(LossHistory.empty(shape=(2,)), axes),
            anchor=copy_params(params, anchor_dtype, anchor_memory),
            inner_state=inner_state,
            local=init_local(params) if local else None,
            average=init_average(params) if average else None,
        )

    def update_fn(
        updates: optax.Updates,
        state: ErrorRegulateState,
        params: optax.Params | None = None,
        *surplus: Any,
        value: jax.typing.ArrayLike | None = MISSING,
        **extra_args: Any,
    ) -> tuple[optax.Updates, ErrorRegulateState]:
        updates, params = _checked(updates, state, params, init_fn)

        # Measure.
        base_rate = learning_rate(chained, state.inner_state)
        last = unpack(RegulatorScalars, state.scalars)._replace(base_rate=base_rate)
        grad_norm = global_norm(updates)
        value = as_loss(given(value, surplus, extra_args))
        squares = leaf_squares(updates, params) if local else None
        if axis_name is not None:
            value, grad_norm = lax.pmean((value, grad_norm), axis_name)
        check_mapped("error_regulate", params, value, grad_norm)

        # Assess, look, decide, learn: scalars, except for the anchor.
        is_judged = not is_flat or value is None
        seen = assess(
            last, state.history, value, grad_norm, rule, norm_is_judged=is_judged
        )
        decision = decide(last, seen, rule, has_value=value is not None)
        is_started = last.num_audits_passed > 0 if audit else jnp.ones((), jnp.bool_)
        when = due(last, seen, decision, rule, audit=audit)
        # a longer way shows more
        weights = seen.weight * last.anchor_age, seen.bound
        way_back = state.anchor, params, updates, grad_norm
        points = state.average, is_point(last, decision)
        how = {"audit": audit, "axis_name": axis_name}
        anchor, look, averaged = look_and_move(
            *when, is_started, *weights, last, *way_back, *points, **how
        )
        decision = overruled(decision, look.is_failed)
        scalars, history = learn(
            last, state.history, grad_norm, seen, look, decision, is_started, rule
        )
        # read back: later code takes it from memory instead of deciding again
        verdict, damping, avg_value = (
            read(RegulatorScalars, scalars, name)
            for name in ("verdict", "damping_factor", "avg_value")
        )

        # Inner: sees nothing of a rejected batch.
        scale = scale_of(seen, verdict, grad_norm, clip_norm)
        # these replace those of an outer regulator
        extra_args |= report_of(last, decision, look, verdict, is_started, audit=audit)
        inner_updates, inner_state = chained.update(
            admitted(updates, verdict, scale),
            state.inner_state,
            params,
            value=None if value is None else loss_seen(seen, verdict, avg_value),
            **extra_args,
        )

        # Act.
        trees = params, inner_updates, anchor, updates
        views = squares, last, state.local
        steps, view = act(verdict, damping, *trees, *views, axis_name)
        return steps, ErrorRegulateState(
            scalars=scalars,
            history=history,
            anchor=anchor,
            inner_state=inner_state,
            local=view,
            average=averaged,
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
