"""Assess: how loss and gradient norm compare with those before. Scalars only."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from ._history import NUM_START_VALUES, Z95, LossHistory
from ._judge_rule import JudgeRule
from ._numbers import LARGEST, SMALLEST, log
from ._records import Assessment, Conduct, RegulatorScalars
from ._scalars import as_vector

_LOG_OF_LARGE_WEIGHT = 20.0  # the fourth power of this weight fits into float32


# jit: outside of a jitted step, every operation would be dispatched by itself
@functools.partial(jax.jit, static_argnames="norm_is_judged", inline=True)
def assess(
    last: RegulatorScalars,
    history: LossHistory,
    value: jax.Array | None,
    grad_norm: jax.Array,
    rule: JudgeRule,
    *,
    norm_is_judged: bool,
) -> Assessment:
    r"""Compares loss and gradient norm with those before; writes nothing.

    The error of the loss is that of `error_regulate`. With :math:`m^g` and :math:`s^g`
    the median and the upper spread of the logarithms of the norm, and :math:`h` the
    largest of a bounded step that did no harm, that of the norm is as below; until 16
    norms are known, with twice the logarithm of 4.

    .. math::

        e_{norm} = \frac{\log |g_t| - m^g}{\max(threshold \cdot s^g,\;
            \log 4,\; h - m^g)}

    Args:
      last: what is known.
      history: of losses and logarithms of the norm, leading axis 2.
      value: the loss at the current params, float32 scalar, or None.
      grad_norm: the global norm of the gradient before clipping, float32 scalar.
      rule: the numbers of the rule.
      norm_is_judged: whether a large norm is an error; one that is not finite
        always is.
    """
    # decisions are no functions to differentiate: what is left is inner, and the step
    value, grad_norm = lax.stop_gradient((value, grad_norm))
    if value is None:
        loss = jnp.zeros((), jnp.float32)
    else:
        loss = jnp.where(jnp.isfinite(value), jnp.clip(value, -LARGEST, LARGEST), value)
    # A zero gradient is no evidence: it is neither judged nor recorded.
    log_norm = log(grad_norm)
    is_usable = jnp.isfinite(loss) & jnp.isfinite(grad_norm)

    # Both signals are judged by one rule. The norm has a scale of its own, and can be
    # judged from the second step on.
    signals = as_vector([loss, log_norm])
    medians, spreads = history.centre_and_spread()
    progress = jnp.maximum(history.start_value[0] - medians[0], 0.0)
    is_early = history.num_values[1] < NUM_START_VALUES
    norm_floor = jnp.where(is_early, 2.0, 1.0) * rule.norm_floor
    scales = jnp.maximum(
        rule.threshold * spreads,
        as_vector(
            [
                rule.progress_fraction * progress,
                jnp.maximum(norm_floor, last.ceiling - medians[1]),
            ]
        ),
    )
    tolerances = jnp.maximum(scales, rule.resolution * jnp.abs(medians) + SMALLEST)
    # the scale of a signal that was always constant is unknown
    min_values = as_vector([NUM_START_VALUES, 1.0])
    known = (history.num_values >= min_values) & (scales > 0.0)
    rises = jnp.clip((signals - medians) / tolerances, -LARGEST, LARGEST)
    errors = jnp.where(jnp.isfinite(signals), jnp.where(known, rises, 0.0), LARGEST)
    error, norm_error = errors[0], jnp.where(grad_norm == 0.0, 0.0, errors[1])
    if not norm_is_judged:
        norm_error = jnp.where(jnp.isfinite(grad_norm), 0.0, norm_error)

    is_high = is_usable & (error > 1.0)
    is_odd = is_usable & (norm_error > 1.0) & ~is_high
    if value is None:  # only the norm is available
        may_skip = last.skips_left >= 1.0
        is_high, is_odd = is_odd & ~may_skip, is_odd & may_skip

    # An alarm is recorded as the value that, as 95th percentile, would make the
    # tolerance so many times as wide: the window always advances and follows a new
    # level, but outliers do not blind it.
    share = jnp.minimum(rule.widening * Z95 / rule.threshold, 1.0)
    alarms = jnp.minimum(medians + share * tolerances, LARGEST)
    recorded = jnp.where(known & (rises > 1.0), alarms, jnp.minimum(signals, LARGEST))
    # A signal that cannot be judged yet is not recorded while the other one objects.
    # From the way back until it is known what was wrong, the windows wait.
    is_recorded = jnp.isfinite(signals) & (known | ~(is_high | is_odd))
    is_recorded &= last.conduct <= Conduct.SUSPECT
    if value is None:
        is_recorded &= as_vector([0.0, 1.0]) > 0.0
    if value is None:
        is_undone = is_high
    else:  # also for NaN
        is_undone = ~(loss - medians[0] <= rule.undone * progress)
    norm_is_known = (history.num_values[1] > 0) & norm_is_judged
    # Losses that are high at the anchor, too, are hard data: there the bound loosens
    # step by step. That of an odd gradient never does: its loss shows nothing new.
    is_episode = last.conduct == Conduct.EPISODE
    tried = jnp.where(is_episode, last.ceiling_in_doubt - medians[1], 0.0)
    high_limit = jnp.maximum(jnp.maximum(tolerances[1], rule.bound_floor), tried)
    limit = medians[1] + jnp.where(is_high, high_limit, rule.norm_floor)
    return Assessment(
        is_usable=is_usable,
        is_high=is_high,
        is_odd=is_odd,
        is_healthy=jnp.maximum(error, norm_error) < rule.healthy,
        is_undone=is_undone,
        error=error,
        norm_error=norm_error,
        log_norm=log_norm,
        log_limit=jnp.where(norm_is_known, limit, LARGEST),
        bound=jnp.exp(jnp.minimum(medians[1] + high_limit - log_norm, 0.0)),
        weight=jnp.exp(
            jnp.clip(
                log_norm - medians[1],
                -_LOG_OF_LARGE_WEIGHT,
                jnp.minimum(high_limit, _LOG_OF_LARGE_WEIGHT),
            )
        ),
        recorded=recorded,
        signals=signals,
        is_recorded=is_recorded,
    )
