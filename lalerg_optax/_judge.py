"""Judge: turns a loss and a gradient norm into a verdict, by arithmetic on scalars."""

import enum
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ._history import NUM_START_VALUES, Z95, LossHistory
from ._scalars import Scalars, lanes, pack, read, unpack

LARGEST = 1e37  # larger magnitudes are treated as this one: sums must not overflow
_SMALLEST = 1e-30
_RESOLUTION = 1e-5  # of the median: about 100 units of float32's last place
_LOG_NORM_FLOOR = math.log(4.0)  # a four-fold gradient norm is tolerated
_WIDENING = 1.5  # of the tolerance, by each 5 % of a window that are alarms

_AVG_DECAY = 0.95  # the average looks at about 20 steps, a batch of noise at none
_DEVIATION_DECAY = 0.99  # slower, so that a rise does not excuse itself
_DRIFT_DEVIATIONS = 4.0  # the range of such an average over 10^6 steps of noise is 2
_DRIFT_PROGRESS = 0.5  # "undoes the progress": half of it
_DRIFT_MIN_VALUES = 128  # the deviation is an average over about that many
_BEST_MEMORY = 1024.0  # steps over which the best average fades
_MANY = 4.0  # more rejected steps in a row make no difference


class Verdict(enum.IntEnum):
    """What becomes of a step.

    Attributes:
      ACCEPT: 0, the update is applied.
      SKIP: 1, the batch is dropped: params and rates stay as they are.
      REVERT: 2, params go back to the anchor.

    Example:
      >>> import jax.numpy as jnp, lalerg_optax as lo
      >>> verdict = jnp.array(2, jnp.int32)  # as `metrics` has it
      >>> lo.Verdict(int(verdict)).name
      'REVERT'
      >>> bool(verdict == lo.Verdict.ACCEPT)
      False
    """

    ACCEPT = 0
    SKIP = 1
    REVERT = 2


class Judgement(NamedTuple):
    """A verdict with its reasons, and what the next one needs to know.

    Errors are in units of what is tolerated: 1 is the threshold. Every field is
    finite, whatever the judge is fed.

    Attributes:
      is_skipped: whether the verdict is SKIP, bool.
      is_reverted: whether it is REVERT, bool; ACCEPT is neither.
      is_new_revert: whether this step begins a revert (it lasts two), bool.
      restore_pending: whether the next step repeats the revert, bool.
      starts_anew: whether the windows do: with this step or, if that is a revert,
        without it, bool.
      scaled_error: rise of the loss above its median, float32.
      scaled_norm_error: rise of the log gradient norm, float32.
      scaled_drift: slow rise of the average loss, float32.
      avg_value: exponential average of the accepted losses, float32.
      avg_deviation: average distance of a loss from ``avg_value``, float32.
      best_value: the lowest ``avg_value``, fading over 1024 steps, float32.
      num_averaged: number of losses in the average, up to 128, float32.
      num_rejected_in_row: steps since the last ACCEPT, up to 4, float32.
      num_finite_rejected_in_row: those of them with finite input, float32.
    """

    is_skipped: Any = False
    is_reverted: Any = False
    is_new_revert: Any = False
    restore_pending: Any = False
    starts_anew: Any = False
    scaled_error: Any = 0.0
    scaled_norm_error: Any = 0.0
    scaled_drift: Any = 0.0
    avg_value: Any = 0.0
    avg_deviation: Any = 0.0
    best_value: Any = 0.0
    num_averaged: Any = 0.0
    num_rejected_in_row: Any = 0.0
    num_finite_rejected_in_row: Any = 0.0


class JudgeState(NamedTuple):
    """What the judge remembers; every number is finite whatever it is fed.

    The scalars can be read by name: ``judge_state.avg_value``, ...

    Attributes:
      history: the recent losses and the recent logarithms of the gradient norm, an
        alarm clipped to what was tolerated; leading axis 2.
      scalars: the last `Judgement`.
    """

    history: LossHistory
    scalars: Scalars

    def __getattr__(self, name: str) -> jax.Array:
        return read(Judgement, self.scalars, name)


def init_judge() -> JudgeState:
    """Returns a judge that has seen nothing."""
    return JudgeState(LossHistory.empty(shape=(2,)), pack(Judgement()))


def _resolution(level: jax.Array) -> jax.Array:
    """Returns the smallest tolerance that makes sense at a level."""
    return _RESOLUTION * jnp.abs(level) + _SMALLEST


def _scaled_rises(
    history: LossHistory,
    signals: jax.Array,
    threshold: jax.typing.ArrayLike,
    floors: jax.Array,
    progress_fractions: jax.Array,
    min_values: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns ``(signal - median) / tolerance``, what to record, and if that is known.

    All are vectors with an entry for the loss and one for the norm.
    """
    medians, spreads = history.centre_and_spread()
    progress = jnp.maximum(history.start_value - medians, 0.0)
    scales = jnp.maximum(
        jnp.maximum(threshold * spreads, progress_fractions * progress), floors
    )
    tolerances = jnp.maximum(scales, _resolution(medians))
    rises = jnp.clip((signals - medians) / tolerances, -LARGEST, LARGEST)
    # a signal that was never anything but constant tells nothing of its scale
    known = (history.num_values >= min_values) & (scales > 0.0)
    # As the 95th percentile, it would make the tolerance so many times as wide.
    share = jnp.minimum(_WIDENING * Z95 / threshold, 1.0)
    alarms = jnp.minimum(medians + share * tolerances, LARGEST)
    return (
        jnp.where(jnp.isfinite(signals), jnp.where(known, rises, 0.0), LARGEST),
        jnp.where(known & (rises > 1.0), alarms, jnp.minimum(signals, LARGEST)),
        known,
    )


def _averages(
    num_averaged: jax.Array, last: Judgement, loss: jax.Array
) -> tuple[jax.Array, ...]:
    """Returns the average loss, its deviation and its best after ``loss``."""
    mean_weight = 1.0 / (num_averaged + 1.0)
    is_first = num_averaged == 0
    avg = last.avg_value + jnp.maximum(1.0 - _AVG_DECAY, mean_weight) * (
        loss - last.avg_value
    )
    avg = jnp.where(is_first, loss, avg)  # a difference from a huge one would be lost
    deviation = last.avg_deviation + jnp.maximum(
        1.0 - _DEVIATION_DECAY, mean_weight
    ) * (jnp.abs(loss - avg) - last.avg_deviation)
    best = jnp.where(is_first, avg, jnp.minimum(last.best_value, avg))
    return avg, deviation, best


def _scaled_drift(
    num_averaged: jax.Array,
    start_value: jax.Array,
    avg: jax.Array,
    deviation: jax.Array,
    best: jax.Array,
) -> jax.Array:
    """Returns the rise of the average loss in units of what is tolerated."""
    tolerance = jnp.maximum(
        jnp.maximum(
            _DRIFT_DEVIATIONS * deviation, _DRIFT_PROGRESS * (start_value - best)
        ),
        _resolution(best),
    )
    return jnp.where(
        num_averaged >= _DRIFT_MIN_VALUES,
        jnp.clip((avg - best) / tolerance, 0.0, LARGEST),
        0.0,
    )


# jit: outside of a jitted step, every operation would be dispatched by itself
@functools.partial(jax.jit, static_argnames="norm_is_judged", inline=True)
def judge(
    state: JudgeState,
    value: jax.Array | None,
    grad_norm: jax.Array,
    *,
    norm_is_judged: bool,
    threshold: jax.typing.ArrayLike,
    progress_fraction: jax.typing.ArrayLike,
    patience: jax.typing.ArrayLike,
) -> JudgeState:
    """Judges one step. A judgement may still be overruled: see `overrule`.

    The equations stand in `error_regulate`, whose arguments these are.

    Args:
      state: what was seen so far.
      value: the loss at the current params, float32 scalar, or None.
      grad_norm: the global norm of the gradient before clipping, float32 scalar.
      norm_is_judged: whether a large norm is an error; one that is not finite
        always is.
      threshold: tolerance in units of the upper spread.
      progress_fraction: tolerance in units of the progress since the start.
      patience: finite steps that may be rejected in a row.

    Returns:
      The new state, with the judgement in it.
    """
    last = unpack(Judgement, state.scalars)
    if value is None:
        loss = jnp.zeros((), jnp.float32)
    else:
        loss = jnp.where(jnp.isfinite(value), jnp.clip(value, -LARGEST, LARGEST), value)
    # A zero gradient tells nothing: it is neither judged nor recorded.
    log_norm = jnp.where(grad_norm > 0.0, jnp.log(grad_norm), jnp.nan)
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)

    # Both signals are judged by one rule. The norm has a scale of its own, and can be
    # judged from the second step on.
    signals = lanes([loss, log_norm])
    is_early = state.history.num_values[1] < NUM_START_VALUES
    errors, recorded, known = _scaled_rises(
        state.history,
        signals,
        threshold,
        floors=lanes([0.0, jnp.where(is_early, 2.0, 1.0) * _LOG_NORM_FLOOR]),
        progress_fractions=lanes([progress_fraction, 0.0]),
        min_values=lanes([NUM_START_VALUES, 1.0]),
    )
    error, norm_error = errors[0], errors[1]
    norm_error = jnp.where(grad_norm == 0.0, 0.0, norm_error)
    if not norm_is_judged:
        norm_error = jnp.where(jnp.isfinite(grad_norm), 0.0, norm_error)

    # One outlier may be a bad batch, a second in a row means that params are bad.
    is_outlier = jnp.maximum(error, norm_error) > 1.0
    is_new_level = finite & (last.num_finite_rejected_in_row >= patience)

    # A slow rise has no outlier: the average shows it. A new level starts it anew.
    num_averaged = jnp.where(is_new_level, 0.0, last.num_averaged)
    tolerated = jnp.where(is_outlier & ~is_new_level, last.avg_value, loss)
    avg, deviation, best = _averages(num_averaged, last, tolerated)
    drift = _scaled_drift(
        num_averaged, state.history.start_value[0], avg, last.avg_deviation, best
    )
    is_drift = ~is_outlier & (drift > 1.0)

    # A revert is issued twice: only after the second time do params equal the
    # anchor exactly, however far away they were.
    is_new_revert = ((is_outlier & (last.num_rejected_in_row == 1)) | is_drift) & ~(
        is_new_level | last.restore_pending
    )
    is_reverted = is_new_revert | last.restore_pending
    is_skipped = ~is_reverted & is_outlier & ~is_new_level
    is_rejected = is_reverted | is_skipped

    # After a drift the average starts anew, or a level that is there to stay would
    # revert for ever.
    forgets_average = is_new_revert & is_drift
    more = jnp.minimum(num_averaged + 1.0, _DRIFT_MIN_VALUES)
    judgement = Judgement(
        is_skipped=is_skipped,
        is_reverted=is_reverted,
        is_new_revert=is_new_revert,
        restore_pending=is_reverted & ~last.restore_pending,
        starts_anew=is_new_level,
        scaled_error=error,
        scaled_norm_error=norm_error,
        scaled_drift=drift,
        avg_value=jnp.where(is_rejected, last.avg_value, avg),
        avg_deviation=jnp.where(is_rejected, last.avg_deviation, deviation),
        best_value=jnp.where(
            is_rejected, last.best_value, best + (avg - best) / _BEST_MEMORY
        ),
        num_averaged=jnp.where(
            forgets_average, 0.0, jnp.where(is_rejected, num_averaged, more)
        ),
        num_rejected_in_row=jnp.where(
            is_rejected, jnp.minimum(last.num_rejected_in_row + 1.0, _MANY), 0.0
        ),
        num_finite_rejected_in_row=jnp.where(
            is_rejected, last.num_finite_rejected_in_row + finite, 0.0
        ),
    )
    scalars = pack(judgement)

    # Read back: what comes later takes it from memory and does not judge again.
    judgement = unpack(Judgement, scalars)

    # An alarm is recorded as a value that widens the tolerance, if at all, by little:
    # the window always advances and follows a new level, but outliers do not blind it.
    # Nor do those of a signal that cannot be judged yet, while the other one objects.
    history = state.history._replace(
        num_values=jnp.where(judgement.starts_anew, 0, state.history.num_values)
    )
    recorded = jnp.where(judgement.starts_anew, signals, recorded)
    is_recorded = jnp.isfinite(signals)
    is_recorded &= known | judgement.starts_anew | ~is_outlier
    if value is None:
        is_recorded &= lanes([0.0, 1.0]) > 0.0
    history = history.record(jnp.where(is_recorded, recorded, jnp.nan))
    return JudgeState(history, scalars)


def overrule(is_overruled: jax.Array, judged: Scalars, last: Scalars) -> Scalars:
    """Turns an ACCEPT into a REVERT after which everything is learnt anew.

    Args:
      is_overruled: whether to do so, bool scalar.
      judged: the judgement of this step.
      last: that of the step before.
    """
    before, judgement = unpack(Judgement, last), unpack(Judgement, judged)
    revert = before._replace(
        is_skipped=False,
        is_reverted=True,
        is_new_revert=True,
        restore_pending=True,
        starts_anew=True,
        scaled_error=judgement.scaled_error,
        scaled_norm_error=judgement.scaled_norm_error,
        scaled_drift=judgement.scaled_drift,
        num_averaged=0.0,
        num_rejected_in_row=jnp.minimum(before.num_rejected_in_row + 1.0, _MANY),
        num_finite_rejected_in_row=before.num_finite_rejected_in_row + 1.0,
    )
    return pack(
        jax.tree.map(lambda r, j: jnp.where(is_overruled, r, j), revert, judgement)
    )
