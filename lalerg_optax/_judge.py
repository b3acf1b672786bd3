"""Judge: turns a loss and a gradient norm into a verdict, by arithmetic on scalars."""

import enum
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from ._history import NUM_START_VALUES, LossHistory

LARGEST = 1e37  # larger magnitudes are treated as this one: sums must not overflow
_SMALLEST = 1e-30
_RESOLUTION = 1e-5  # of the median: about 100 units of float32's last place
_LOG_NORM_FLOOR = math.log(4.0)  # a four-fold gradient norm is tolerated

_AVG_DECAY = 0.95  # the average looks at about 20 steps, a batch of noise at none
_DEVIATION_DECAY = 0.99  # slower, so that a rise does not excuse itself
_DRIFT_DEVIATIONS = 4.0  # the range of such an average over 10^6 steps of noise is 2
_DRIFT_PROGRESS = 0.5  # "undoes the progress": half of it
_DRIFT_MIN_VALUES = 128  # the deviation is an average over about that many
_BEST_MEMORY = 1024.0  # steps over which the best average fades


class Verdict(enum.IntEnum):
    """What becomes of a step.

    Attributes:
      ACCEPT: 0, the update is applied.
      SKIP: 1, the batch is dropped: params and rates stay as they are.
      REVERT: 2, params go back to the anchor.
    """

    ACCEPT = 0
    SKIP = 1
    REVERT = 2


class JudgeState(NamedTuple):
    """What the judge remembers; every field is finite whatever it is fed.

    Attributes:
      loss_history: the recent losses, an alarm clipped to what was tolerated.
      norm_history: the recent logarithms of the gradient norm, likewise.
      avg_value: exponential average of the accepted losses, float32.
      avg_deviation: average distance of a loss from ``avg_value``, float32.
      best_value: the lowest ``avg_value``, fading over 1024 steps, float32.
      num_averaged: number of losses in the average, up to 128, int32.
      num_rejected_in_row: steps since the last ACCEPT, int32.
      num_finite_rejected_in_row: those of them with finite input, int32.
      restore_pending: whether the next step repeats the revert, bool.
    """

    loss_history: LossHistory
    norm_history: LossHistory
    avg_value: jax.Array
    avg_deviation: jax.Array
    best_value: jax.Array
    num_averaged: jax.Array
    num_rejected_in_row: jax.Array
    num_finite_rejected_in_row: jax.Array
    restore_pending: jax.Array


class Judgement(NamedTuple):
    """A verdict with its reasons: errors in units of what is tolerated.

    Attributes:
      verdict: a `Verdict`, int32.
      scaled_error: rise of the loss above its median; 1 is the threshold.
      scaled_norm_error: rise of the log gradient norm; 1 is the threshold.
      scaled_drift: slow rise of the average loss; 1 is the threshold.
      is_new_revert: whether this step begins a revert (it lasts two), bool.
    """

    verdict: jax.Array
    scaled_error: jax.Array
    scaled_norm_error: jax.Array
    scaled_drift: jax.Array
    is_new_revert: jax.Array


def init_judge() -> JudgeState:
    """Returns a judge that has seen nothing."""
    return JudgeState(
        loss_history=LossHistory.empty(),
        norm_history=LossHistory.empty(),
        avg_value=jnp.zeros((), jnp.float32),
        avg_deviation=jnp.zeros((), jnp.float32),
        best_value=jnp.zeros((), jnp.float32),
        num_averaged=jnp.zeros((), jnp.int32),
        num_rejected_in_row=jnp.zeros((), jnp.int32),
        num_finite_rejected_in_row=jnp.zeros((), jnp.int32),
        restore_pending=jnp.zeros((), jnp.bool_),
    )


def _resolution(level: jax.Array) -> jax.Array:
    """Returns the smallest tolerance that makes sense at a level."""
    return _RESOLUTION * jnp.abs(level) + _SMALLEST


def _scaled_rise(
    history: LossHistory,
    value: jax.Array,
    threshold: jax.typing.ArrayLike,
    floor: jax.typing.ArrayLike,
    progress_fraction: jax.typing.ArrayLike,
    min_values: int,
) -> tuple[jax.Array, jax.Array]:
    """Returns ``(value - median) / tolerance``, and the largest tolerated value."""
    median, spread = history.centre_and_spread()
    progress = jnp.maximum(history.start_value - median, 0.0)
    scale = jnp.maximum(
        jnp.maximum(threshold * spread, progress_fraction * progress), floor
    )
    tolerance = jnp.maximum(scale, _resolution(median))
    rise = jnp.clip((value - median) / tolerance, -LARGEST, LARGEST)
    # a signal that was never anything but constant tells nothing of its scale
    known = (history.num_values >= min_values) & (scale > 0.0)
    return (
        jnp.where(jnp.isfinite(value), jnp.where(known, rise, 0.0), LARGEST),
        jnp.where(known, jnp.minimum(median + tolerance, LARGEST), LARGEST),
    )


def _averages(state: JudgeState, loss: jax.Array) -> tuple[jax.Array, ...]:
    """Returns the average loss, its deviation and its best after ``loss``."""
    mean_weight = 1.0 / (state.num_averaged.astype(jnp.float32) + 1.0)
    is_first = state.num_averaged == 0
    avg = state.avg_value + jnp.maximum(1.0 - _AVG_DECAY, mean_weight) * (
        loss - state.avg_value
    )
    avg = jnp.where(is_first, loss, avg)  # a difference from a huge one would be lost
    deviation = state.avg_deviation + jnp.maximum(
        1.0 - _DEVIATION_DECAY, mean_weight
    ) * (jnp.abs(loss - avg) - state.avg_deviation)
    best = jnp.where(is_first, avg, jnp.minimum(state.best_value, avg))
    return avg, deviation, best


def _scaled_drift(
    state: JudgeState, avg: jax.Array, deviation: jax.Array, best: jax.Array
) -> jax.Array:
    """Returns the rise of the average loss in units of what is tolerated."""
    progress = state.loss_history.start_value - best
    tolerance = jnp.maximum(
        jnp.maximum(_DRIFT_DEVIATIONS * deviation, _DRIFT_PROGRESS * progress),
        _resolution(best),
    )
    return jnp.where(
        state.num_averaged >= _DRIFT_MIN_VALUES,
        jnp.clip((avg - best) / tolerance, 0.0, LARGEST),
        0.0,
    )


# jit: outside of a jitted step, a conditional would be compiled anew at every call
@functools.partial(jax.jit, static_argnames="norm_is_judged", inline=True)
def judge(
    state: JudgeState,
    value: jax.Array | None,
    grad_norm: jax.Array,
    *,
    norm_is_judged: bool,
    failed_audit: jax.Array,
    threshold: jax.typing.ArrayLike,
    progress_fraction: jax.typing.ArrayLike,
    patience: jax.typing.ArrayLike,
) -> tuple[Judgement, JudgeState]:
    """Judges one step.

    The equations stand in `error_regulate`, whose arguments these are.

    Args:
      state: what was seen so far.
      value: the loss at the current params, float32 scalar, or None.
      grad_norm: the global norm of the gradient before clipping, float32 scalar.
      norm_is_judged: whether a large norm is an error; one that is not finite
        always is.
      failed_audit: whether the very first steps led nowhere, bool scalar.
      threshold: tolerance in units of the upper spread.
      progress_fraction: tolerance in units of the progress since the start.
      patience: finite steps that may be rejected in a row.

    Returns:
      The judgement and the new state.
    """
    if value is None:
        loss = jnp.zeros((), jnp.float32)
    else:
        loss = jnp.where(jnp.isfinite(value), jnp.clip(value, -LARGEST, LARGEST), value)
    # A zero gradient tells nothing: it is neither judged nor recorded.
    log_norm = jnp.where(grad_norm > 0.0, jnp.log(grad_norm), jnp.nan)
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)

    # One outlier may be a bad batch, a second in a row means that params are bad.
    error, limit = _scaled_rise(
        state.loss_history, loss, threshold, 0.0, progress_fraction, NUM_START_VALUES
    )
    # The norm has a scale of its own, and can be judged from the second step on.
    is_early = state.norm_history.num_values < NUM_START_VALUES
    norm_floor = jnp.where(is_early, 2.0 * _LOG_NORM_FLOOR, _LOG_NORM_FLOOR)
    norm_error, norm_limit = _scaled_rise(
        state.norm_history, log_norm, threshold, norm_floor, 0.0, 1
    )
    norm_error = jnp.where(grad_norm == 0.0, 0.0, norm_error)
    if not norm_is_judged:
        norm_error = jnp.where(jnp.isfinite(grad_norm), 0.0, norm_error)
    is_outlier = jnp.maximum(error, norm_error) > 1.0
    failed_audit &= ~is_outlier  # a bad batch is no witness
    is_new_level = finite & (state.num_finite_rejected_in_row >= patience)

    # A slow rise has no outlier: the average shows it. A new level starts it anew.
    state = state._replace(num_averaged=jnp.where(is_new_level, 0, state.num_averaged))
    tolerated = jnp.where(is_outlier & ~is_new_level, state.avg_value, loss)
    avg, deviation, best = _averages(state, tolerated)
    drift = _scaled_drift(state, avg, state.avg_deviation, best)
    is_drift = ~is_outlier & (drift > 1.0)

    # A revert is issued twice: only after the second time do params equal the
    # anchor exactly, however far away they were.
    is_new_revert = (
        (is_outlier & (state.num_rejected_in_row == 1)) | is_drift | failed_audit
    ) & ~(is_new_level | state.restore_pending)
    verdict = jnp.where(
        is_new_revert | state.restore_pending,
        Verdict.REVERT,
        jnp.where(is_outlier & ~is_new_level, Verdict.SKIP, Verdict.ACCEPT),
    ).astype(jnp.int32)

    def accept() -> JudgeState:
        return state._replace(
            avg_value=avg,
            avg_deviation=deviation,
            best_value=best + (avg - best) / _BEST_MEMORY,
            num_averaged=jnp.minimum(state.num_averaged + 1, _DRIFT_MIN_VALUES),
            num_rejected_in_row=jnp.zeros((), jnp.int32),
            num_finite_rejected_in_row=jnp.zeros((), jnp.int32),
        )

    def reject() -> JudgeState:
        return state._replace(
            # more than a few in a row make no difference: no overflow
            num_rejected_in_row=jnp.minimum(state.num_rejected_in_row + 1, 4),
            num_finite_rejected_in_row=state.num_finite_rejected_in_row + finite,
        )

    def revert() -> JudgeState:
        # After a drift the average starts anew, or a level that is there to stay
        # would revert for ever.
        new_average = is_new_revert & (is_drift | failed_audit)
        return reject()._replace(
            num_averaged=jnp.where(new_average, 0, state.num_averaged),
            restore_pending=~state.restore_pending,
        )

    new_state = lax.switch(verdict, (accept, reject, revert))

    # An alarm is recorded as the largest value that was tolerated: the window
    # always advances and follows a new level, but no outlier can blow it up.
    def recorded(
        history: LossHistory, signal: jax.Array, limit: jax.Array
    ) -> LossHistory:
        blank = LossHistory.empty(history.values.shape[0])
        history = jax.tree.map(
            lambda new, old: jnp.where(is_new_level | failed_audit, new, old),
            blank,
            history,
        )
        clipped = jnp.where(is_new_level, signal, jnp.minimum(signal, limit))
        is_recorded = jnp.isfinite(signal) & ~failed_audit
        return history.record(jnp.where(is_recorded, clipped, jnp.nan))

    if value is not None:
        new_state = new_state._replace(
            loss_history=recorded(state.loss_history, loss, limit)
        )
    new_state = new_state._replace(
        norm_history=recorded(state.norm_history, log_norm, norm_limit)
    )
    return Judgement(verdict, error, norm_error, drift, is_new_revert), new_state
