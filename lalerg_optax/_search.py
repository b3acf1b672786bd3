"""Search: the rate for all parameters, as a table of phases. Scalars only."""

import enum
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ._judge import LARGEST
from ._scalars import count_if
from ._verdict import Audit

LARGEST_LOSS = 1e16  # its square, times the length of most windows, is a float32


class Steering(NamedTuple):
    """Which alignment, in units of its best, a rate is steered to once it is found.

    Attributes:
      target: where the loss is too noisy to go by.
      slope: of that steering.
      bold_target: where it is not.
    """

    target: Any
    slope: Any
    bold_target: Any


class SearchRule(NamedTuple):
    """Numbers of the search; those that users see may be traced.

    Attributes:
      anneal: whether the rate falls when the loss stalls.
      growth_factor: see `scale_by_macro_rate`, as the next four.
      slow_growth_factor: likewise.
      backoff_factor: likewise.
      good_alignment: likewise.
      audit_every: likewise.
      max_rate: bound of the rate, and of its inverse.
      standard_errors: how many of them make a thing clear.
      drift: by how much, in units of the best, the alignment may change from one audit
        to the next: what makes old audits count less.
      share: of the run so far: an audit of fewer steps moves the rate by less.
      first: power of ``backoff_factor`` after the first good audit of a run.
      first_reach: how far the first steps should lead, in units of the params.
      deep: the same of a run that had to go back to its start, and of each time.
      gain: exponent of a growth that the loss alone speaks for.
      boldest: exponent of the largest growth: hardly more than a cut takes.
      blind: share of a leap to dare where the alignment is not known.
      scheduled: how to steer where a schedule is still to fall: to below 0. Chosen, as
        `best_errors`, on development tasks of ``benchmarks/noise.py`` and
        ``benchmarks/decades.py``.
      annealed: how to steer where there is none.
      best_errors: standard errors by which an alignment has to be above the best.
      noise: deviation of a loss, in units of the progress so far, at which half of the
        steering is that.
      least_gain: what a window has to gain, in units of the progress that was made at
        the same pace so far, for a higher rate to be worth anything.
    """

    anneal: bool = False
    growth_factor: Any = 4.0
    slow_growth_factor: Any = 1.5
    backoff_factor: Any = 0.5
    good_alignment: Any = 0.25
    audit_every: Any = 16
    max_rate: float = 2.0**40
    standard_errors: float = 2.0
    drift: float = 0.25
    share: float = 1.0 / 8.0
    first: float = 2.0
    first_reach: float = 1e-3
    deep: float = 4.0
    gain: float = 0.5
    boldest: float = 2.0
    blind: float = 0.5
    scheduled: Steering = Steering(target=-0.2, slope=2.0, bold_target=-0.05)
    annealed: Steering = Steering(target=0.15, slope=1.0, bold_target=0.0)
    best_errors: float = 1.0
    noise: float = 0.5
    least_gain: float = 0.01


class Phase(enum.IntEnum):
    """How far the search is.

    Attributes:
      START: no audit was good yet.
      RESTARTED: nor was any, and the run had to go back to its start.
      SEARCH: the rate grows by leaps.
      STEER: it was found, and moves in small steps.
    """

    START = 0
    RESTARTED = 1
    SEARCH = 2
    STEER = 3


class MacroScalars(NamedTuple):
    """What the macro level knows.

    Attributes:
      macro_rate: factor of the updates, in [2^-40, 2^40], float32.
      avg_alignment: what the alignment is, from all audits, float32.
      alignment_spread: variance of that, if it may drift between audits, float32.
      alignment_noise: variance that the noise of looks alone gives it, float32.
      best_alignment: the largest that it clearly was, float32.
      window_mean: mean of the losses accepted since the last audit, float32.
      window_sum_of_squares: of their deviations from that mean, float32.
      loss_variance: average variance of a loss within a window, float32.
      first_window_mean: the mean of the first whole window, float32.
      last_window_mean: the mean of the window before, float32.
      last_window_variance: the variance of that mean, float32.
      best_window_mean: the lowest mean of a whole window, float32.
      phase: the `Phase`, int32.
      num_audits: number of audits that moved, since what a good one is has to be
        learnt, int32.
      window_count: number of losses in the window, int32.
      num_macro_steps: number of losses ever taken in, int32.
      num_windows: number of windows that are complete, int32.
      num_macro_held: number of steps that left the rate as it was because the
        verdict or a number that is not finite said so, int32.
    """

    macro_rate: Any = 1.0
    avg_alignment: Any = 0.0
    alignment_spread: Any = 0.0
    alignment_noise: Any = 0.0
    best_alignment: Any = 0.0
    window_mean: Any = 0.0
    window_sum_of_squares: Any = 0.0
    loss_variance: Any = 0.0
    first_window_mean: Any = 0.0
    last_window_mean: Any = 0.0
    last_window_variance: Any = 0.0
    best_window_mean: Any = 0.0
    phase: Any = 0
    num_audits: Any = 0
    window_count: Any = 0
    num_macro_steps: Any = 0
    num_windows: Any = 0
    num_macro_held: Any = 0


def observe(state: MacroScalars, loss: jax.Array) -> MacroScalars:
    """Adds a loss to the window (Welford's sums)."""
    loss = jnp.clip(loss, -LARGEST_LOSS, LARGEST_LOSS)
    count = count_if(jnp.ones((), jnp.bool_), state.window_count)
    mean = state.window_mean + (loss - state.window_mean) / count
    square = (loss - state.window_mean) * (loss - mean)
    return state._replace(
        window_count=count,
        num_macro_steps=count_if(jnp.ones((), jnp.bool_), state.num_macro_steps),
        window_mean=mean,
        window_sum_of_squares=jnp.minimum(
            state.window_sum_of_squares + square, LARGEST
        ),
    )


def _start_window(state: MacroScalars) -> MacroScalars:
    """Forgets the losses since the last audit."""
    return state._replace(
        window_count=jnp.zeros((), jnp.int32),
        window_mean=jnp.zeros((), jnp.float32),
        window_sum_of_squares=jnp.zeros((), jnp.float32),
    )


def _variance_of_mean(state: MacroScalars) -> jax.Array:
    n = jnp.maximum(state.window_count, 2).astype(jnp.float32)
    return state.window_sum_of_squares / ((n - 1.0) * n)


class _Loss(NamedTuple):
    """How the window compares with those before; bools."""

    is_best: jax.Array
    is_worse: jax.Array
    is_undone: jax.Array
    is_gaining: jax.Array
    is_flat: jax.Array


def _is_first(state: MacroScalars) -> jax.Array:
    """Returns whether what a window is compared with begins with this one."""
    return (state.num_windows == 0) | (state.phase < Phase.SEARCH)


def _compare(state: MacroScalars, rule: SearchRule, has_value: bool) -> _Loss:
    rise = state.window_mean - state.best_window_mean
    # by the noise of the windows before: a blow-up does not excuse itself
    count = jnp.maximum(state.window_count, 1)
    margin = rule.standard_errors * jnp.sqrt(2.0 * state.loss_variance / count)
    is_first = _is_first(state)
    is_worse = ~is_first & (rise > margin) & has_value
    pace = state.window_count / jnp.maximum(state.num_macro_steps, 1)
    best_progress = state.first_window_mean - state.best_window_mean
    least = rule.least_gain * pace * (state.first_window_mean - state.window_mean)
    is_clear = ~is_first & (best_progress > 2.0 * margin) & has_value
    # at the floor the losses differ by less than they did on the way
    close = rule.standard_errors * jnp.sqrt(2.0 * _variance_of_mean(state))
    return _Loss(
        is_best=(is_first | (rise < 0.0)) & has_value,
        is_worse=is_worse,
        is_undone=is_worse
        & is_clear
        & (2.0 * (rise - margin) > best_progress)
        & (state.window_mean > state.last_window_mean),
        is_gaining=is_first | (-rise > least),
        is_flat=is_clear & (jnp.minimum(margin, close) - rise < least),
    )


def _estimate(state: MacroScalars, audit: Audit, rule: SearchRule) -> MacroScalars:
    """Returns what the alignment is after one more audit (Kalman's filter).

    Between audits it may drift by a share of its best; what an audit tells is uncertain
    by as much, and by the noise of its looks. So without noise it is an average over
    two audits, and over as many as the noise asks for with it.
    """
    noise = audit.alignment_error**2
    scale = jnp.maximum(state.best_alignment, jnp.abs(state.avg_alignment))
    is_first = state.num_audits == 0
    scale = jnp.where(is_first, jnp.abs(audit.alignment), scale)
    drift = (rule.drift * scale) ** 2
    before = state.alignment_spread + drift
    gain = jnp.where(is_first, 1.0, before / jnp.maximum(before + noise + drift, 1e-30))
    # what is clearly another one is not averaged with what it was
    surprise = (audit.alignment - state.avg_alignment) ** 2
    margin = rule.standard_errors**2 * (noise + state.alignment_noise)
    gain = jnp.where(surprise > margin, jnp.maximum(gain, 0.5), gain)
    mean = state.avg_alignment + gain * (audit.alignment - state.avg_alignment)
    left = (1.0 - gain) ** 2 * state.alignment_noise + gain**2 * noise
    clear = mean - rule.best_errors * jnp.sqrt(left)
    new = state._replace(
        avg_alignment=mean,
        alignment_spread=jnp.where(is_first, noise + drift, (1.0 - gain) * before),
        alignment_noise=left,
        # 1 is that of a run that was taken up
        best_alignment=jnp.maximum(state.best_alignment, jnp.minimum(clear, 0.999)),
        num_audits=count_if(jnp.ones((), jnp.bool_), state.num_audits),
    )
    return choose(audit.alignment != 0.0, new, state)


def choose(pred: jax.Array, new: MacroScalars, old: MacroScalars) -> MacroScalars:
    """Returns one of two records."""
    return jax.tree.map(lambda n, o: jnp.where(pred, n, o), new, old)


def _log2(factor: jax.typing.ArrayLike) -> jax.Array:
    return jnp.log2(jnp.asarray(factor, jnp.float32))


def _scaled(state: MacroScalars, octaves: jax.Array, rule: SearchRule) -> MacroScalars:
    """Multiplies the rate by 2 to that power: an exact one of whole numbers."""
    rate = jnp.clip(
        state.macro_rate * jnp.power(2.0, octaves), 1.0 / rule.max_rate, rule.max_rate
    )
    return state._replace(macro_rate=rate)


def _leap(
    state: MacroScalars,
    rho: jax.Array,
    is_good: jax.Array,
    is_bad: jax.Array,
    is_found: jax.Array,
    rule: SearchRule,
) -> tuple[jax.Array, MacroScalars]:
    """START, RESTARTED, SEARCH: leaps, in octaves, until one was too far."""
    is_begun = state.phase >= Phase.SEARCH
    is_first = is_good & ~is_begun & ~is_found
    depth = jnp.where(is_first & (state.phase == Phase.START), rule.first, rule.deep)
    is_known = state.best_alignment > 0.0
    depth = jnp.where(is_bad & is_begun, jnp.where(is_known, 1.0, rule.first), depth)
    octaves = jnp.where(
        is_bad | is_first,
        depth * _log2(rule.backoff_factor),
        rho * _log2(rule.growth_factor),
    )
    is_ended = (is_bad & is_begun & (state.best_alignment > 0.0)) | is_found
    is_ended |= is_bad & (state.phase == Phase.SEARCH)
    phase = jnp.where(is_bad | is_begun, state.phase, Phase.SEARCH)
    # what a good alignment is, is learnt from down there
    return jnp.where(is_found, 0.0, octaves), state._replace(
        phase=jnp.where(is_ended, Phase.STEER, phase).astype(jnp.int32),
        num_audits=jnp.where(is_first, 0, state.num_audits),
        best_alignment=jnp.where(is_first, 0.0, state.best_alignment),
    )


def _steer(state: MacroScalars, loss: _Loss, rule: SearchRule) -> jax.Array:
    """STEER: small steps in octaves, by the loss and by where the slope leads."""
    error = rule.standard_errors * jnp.sqrt(state.alignment_noise)
    scale = jnp.maximum(state.best_alignment, jnp.abs(state.avg_alignment) + error)
    rho = jnp.where(scale > 0.0, state.avg_alignment / jnp.maximum(scale, 1e-30), 0.0)
    is_blind = state.num_audits == 0  # the loss is all that is known
    down = jnp.where(loss.is_worse, -jnp.asarray(rule.good_alignment), 0.0)
    rho = jnp.where(is_blind, down, rho)
    steering = jax.tree.map(
        functools.partial(jnp.where, rule.anneal), rule.annealed, rule.scheduled
    )
    tilt = rho - jnp.where(is_blind, 0.0, steering.bold_target)
    tilt = tilt / rule.good_alignment
    bold = jnp.where(
        loss.is_best & loss.is_gaining, rule.gain + tilt, jnp.minimum(tilt, 0.0)
    )
    is_beyond = state.avg_alignment + error < -state.best_alignment
    may_fall = jnp.asarray(rule.anneal) | loss.is_worse | is_beyond
    bold = jnp.maximum(bold, jnp.where(may_fall, -1.0, 0.0))
    # Where the noise of a loss is as large as all progress, a window of them tells
    # little. What is left is where the slope leads. Of a run that was taken up at a
    # good rate the best was never seen: it is not pushed beyond the bottom.
    is_seen = state.best_alignment < 1.0
    target = jnp.where(is_seen, steering.target, jnp.maximum(steering.target, 0.0))
    careful = jnp.clip(steering.slope * (rho - target), -1.0, 1.0)
    progress = state.first_window_mean - state.best_window_mean
    trust = (rule.noise * jnp.maximum(progress, 0.0)) ** 2
    trust = trust / jnp.maximum(trust + state.loss_variance, 1e-30)
    trust = jnp.where(is_blind, 1.0, trust)
    power = trust * jnp.minimum(bold, rule.boldest) + (1.0 - trust) * careful
    share = state.window_count / jnp.maximum(state.num_macro_steps, 1)
    weight = jnp.minimum(share / rule.share, 1.0)
    return jnp.where(
        loss.is_undone,
        _log2(rule.backoff_factor),
        weight * power * _log2(rule.slow_growth_factor),
    )


@functools.partial(jax.jit, inline=True)
def harm(state: MacroScalars, audit: Audit | None, rule: SearchRule) -> MacroScalars:
    """An update did harm: the rate is cut, and deep before any audit was good."""
    is_begun = state.phase >= Phase.SEARCH
    octaves = jnp.where(is_begun, 1.0, rule.deep) * _log2(rule.backoff_factor)
    if audit is not None:  # a start that went too far is told by how much
        nearer = _log2(rule.first_reach / jnp.maximum(audit.reach, rule.first_reach))
        octaves = jnp.where(is_begun, octaves, jnp.minimum(octaves, nearer))
    cut = _scaled(_start_window(state), octaves, rule)
    phase = jnp.where(is_begun, state.phase, Phase.RESTARTED)
    return cut._replace(phase=phase.astype(jnp.int32))


def _blind_audit(
    state: MacroScalars, loss: _Loss, rule: SearchRule
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns rho, and whether a window was good, and bad, by the loss alone."""
    is_known = state.num_windows > 0
    variance = _variance_of_mean(state) + state.last_window_variance
    margin = rule.standard_errors * jnp.sqrt(variance)
    rise = state.window_mean - state.last_window_mean
    rho = jnp.where(is_known, rule.blind, 0.0)
    return rho, is_known & (rise < -margin), is_known & (rise > margin)


# jit: outside of a jitted step, every operation would be dispatched by itself
@functools.partial(jax.jit, static_argnames="has_value", inline=True)
def step(
    seen: MacroScalars,
    audit: Audit | None,
    rule: SearchRule,
    *,
    has_value: bool,
) -> MacroScalars:
    """Returns what is known after an accepted step, whose loss was observed."""
    loss = _compare(seen, rule, has_value)
    is_found = jnp.zeros((), jnp.bool_)
    if audit is None:  # the loss is all that is known
        audited = seen
        is_audited = (seen.window_count >= rule.audit_every) & has_value
        rho, is_good, is_bad = _blind_audit(seen, loss, rule)
        is_found = is_good  # there is no way back from more than that
        is_reopened = is_found & False
    else:
        is_audited = audit.is_taken
        audited = _estimate(seen, audit, rule)
        mean, best = audited.avg_alignment, audited.best_alignment
        error = rule.standard_errors * jnp.sqrt(audited.alignment_noise)
        has_moved = audit.alignment != 0.0
        scale = jnp.maximum(best, jnp.abs(mean))
        is_known = best > 0.0
        # a start is good where it leads downhill
        threshold = rule.good_alignment * jnp.where(
            seen.phase < Phase.SEARCH, 0.0, best
        )
        is_good = has_moved & (mean - error > threshold)
        is_bad = has_moved & (mean + error <= threshold)
        # Where the slope goes on and the loss is another one, so are the data: what is
        # the lowest is learnt anew.
        now = audit.alignment - rule.standard_errors * audit.alignment_error
        is_new = loss.is_undone & is_good & (now > threshold)
        is_new &= seen.phase >= Phase.SEARCH
        loss = loss._replace(
            is_undone=loss.is_undone & ~is_new,
            is_worse=loss.is_worse & ~is_new,
            is_flat=loss.is_flat & ~is_new,
        )
        is_bad |= loss.is_undone & (seen.phase == Phase.SEARCH)
        is_good &= ~is_bad
        # a leap in the dark where nothing is known yet
        rho = jnp.where(is_known, jnp.maximum(mean / scale, 0.0), rule.blind)
        rho = jnp.where(has_moved, rho, 1.0)
        is_unclear = has_moved & is_known & ~is_good & ~is_bad
        rho = jnp.where(is_unclear, 0.5 * rho, rho)
        is_unclear &= mean <= threshold
        is_found = (is_unclear | loss.is_flat) & (seen.phase == Phase.SEARCH) & ~is_bad
        is_steering = seen.phase == Phase.STEER
        is_reopened = is_steering & is_known & (mean - error > 0.5 * best)
        is_reopened &= loss.is_gaining
        audited = audited._replace(
            first_window_mean=jnp.where(
                is_new, seen.window_mean, audited.first_window_mean
            ),
            best_window_mean=jnp.where(
                is_new, seen.window_mean, audited.best_window_mean
            ),
        )
    leap, leapt = _leap(audited, rho, is_good, is_bad, is_found, rule)
    is_steered = (seen.phase == Phase.STEER) & ~is_reopened
    octaves = jnp.where(is_steered, _steer(audited, loss, rule), leap)
    moved = _scaled(choose(is_steered, audited, leapt), octaves, rule)
    is_first = _is_first(seen)
    is_best = loss.is_best | is_first
    variance = _variance_of_mean(seen)
    spread = variance * seen.window_count
    moved = _start_window(moved)._replace(
        first_window_mean=jnp.where(
            is_first, seen.window_mean, moved.first_window_mean
        ),
        loss_variance=jnp.where(
            is_first,
            spread,
            seen.loss_variance + 0.25 * (spread - seen.loss_variance),
        ),
        last_window_mean=seen.window_mean,
        last_window_variance=variance,
        best_window_mean=jnp.where(is_best, seen.window_mean, moved.best_window_mean),
        num_windows=count_if(is_audited, seen.num_windows),
    )
    return choose(is_audited, moved, seen)
