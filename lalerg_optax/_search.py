"""Search: the rate for all parameters, as a table of phases. Scalars only."""

import functools

import jax
import jax.numpy as jnp

from ._numbers import LARGEST
from ._rise import averaged, room_left
from ._scalars import count_if
from ._search_rule import MacroScalars, Phase, SearchRule
from ._verdict import Audit
from ._windows import (
    Loss,
    choose,
    compare,
    is_first_window,
    share,
    start_loss,
    start_window,
    variance_of_mean,
    weight,
)


def _estimate(state: MacroScalars, audit: Audit, rule: SearchRule) -> MacroScalars:
    r"""Returns the alignment after one more audit (Kalman filter).

    With :math:`c` and :math:`\sigma` the average and its standard error, :math:`c^*`
    the best so far, :math:`c_k` and :math:`\sigma_k` those of the audit, :math:`P` the
    variance of the average, and :math:`q = (\max(c^*, |c|) / 4)^2`,

    .. math::

        \begin{aligned}
        G &= \frac{P + q}{P + 2 q + \sigma_k^2}, & c &\leftarrow c + G (c_k - c), \\
        P &\leftarrow (1 - G) (P + q), &
            \sigma^2 &\leftarrow (1 - G)^2 \sigma^2 + G^2 \sigma_k^2
        \end{aligned}

    Between audits it may drift by a share of its best. The result of an audit is
    uncertain by as much, and by the noise of its looks. So without noise the average is
    over two audits, and with noise over as many as the noise requires.
    """
    noise = audit.alignment_error**2
    scale = jnp.maximum(state.best_alignment, jnp.abs(state.avg_alignment))
    is_first = state.num_audits == 0
    scale = jnp.where(is_first, jnp.abs(audit.alignment), scale)
    drift = (rule.drift * scale) ** 2
    before = state.alignment_spread + drift
    gain = jnp.where(is_first, 1.0, before / jnp.maximum(before + noise + drift, 1e-30))
    # an alignment that is clearly another one counts at least half
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
        # 1 is that of a run that was adopted
        best_alignment=jnp.maximum(state.best_alignment, jnp.minimum(clear, 0.999)),
        num_audits=count_if(jnp.ones((), jnp.bool_), state.num_audits),
    )
    return choose(audit.alignment != 0.0, new, state)


def _log2(factor: jax.typing.ArrayLike) -> jax.Array:
    return jnp.log2(jnp.asarray(factor, jnp.float32))


def _scaled(state: MacroScalars, octaves: jax.Array, rule: SearchRule) -> MacroScalars:
    """Multiplies the rate by 2 to that power, which is exact for whole numbers."""
    rate = jnp.clip(
        state.macro_rate * jnp.power(2.0, octaves), 1.0 / rule.max_rate, rule.max_rate
    )
    return state._replace(macro_rate=rate)


def _leap(
    state: MacroScalars,
    rho: jax.Array,
    room: jax.Array | None,
    is_good: jax.Array,
    is_bad: jax.Array,
    is_found: jax.Array,
    loss: Loss,
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
    octaves = jnp.where(is_found, 0.0, octaves)
    is_ended = (is_bad & is_begun) | is_found
    if room is not None:
        # an alignment lost in noise, or zero, does not end it while nothing rises
        is_over = loss.is_undone | loss.is_flat
        is_early = is_ended & ~is_over & (room >= 1.0)
        octaves = jnp.where(is_begun, jnp.minimum(octaves, room), octaves)
        octaves = jnp.where(is_early, 0.5 * room, octaves)
        is_ended &= ~is_early
    phase = jnp.where(is_bad | is_begun, state.phase, Phase.SEARCH)
    # a good alignment is learnt from that lower rate on
    return octaves, state._replace(
        phase=jnp.where(is_ended, Phase.STEER, phase).astype(jnp.int32),
        num_audits=jnp.where(is_first, 0, state.num_audits),
        best_alignment=jnp.where(is_first, 0.0, state.best_alignment),
    )


def _steer(
    state: MacroScalars, loss: Loss, room: jax.Array | None, rule: SearchRule
) -> jax.Array:
    r"""STEER: small steps in octaves, by what is known of the rate.

    With :math:`n` the steps since the last audit, :math:`t` all accepted steps and
    :math:`room` that of `room_left` (without a loss, the alignment takes its place),

    .. math::

        w = \min(1,\; 4 n / t), \qquad
        e = \frac{room}{\log_2 slow\_growth}, \qquad -4 \le e \le 1/2
    """
    by_loss = jnp.where(
        loss.is_best & loss.is_gaining,
        1.0,
        jnp.where(loss.is_worse, -1.0, 0.0),
    )
    if room is None:
        error = rule.standard_errors * jnp.sqrt(state.alignment_noise)
        scale = jnp.maximum(state.best_alignment, jnp.abs(state.avg_alignment) + error)
        rho = state.avg_alignment / jnp.maximum(scale, 1e-30)
        target = jnp.where(rule.anneal, rule.annealed_target, rule.target)
        power = jnp.clip(rule.slope * (rho - target), -1.0, 1.0)
    else:
        power = room / _log2(rule.slow_growth_factor)
        power = jnp.clip(power, -rule.steer_down, rule.steer_up)
        # with no progress left to make, the loss does not rise either
        most = jnp.where(rule.anneal, rule.annealed_floor, 0.0)
        power = jnp.where(loss.is_flat, jnp.minimum(power, most), power)
    # the start of a run that was adopted is unknown
    is_blind = (state.num_audits == 0) | (state.best_alignment >= 1.0)
    power = jnp.where(is_blind, by_loss, power)
    return jnp.where(
        loss.is_undone,
        _log2(rule.backoff_factor),
        weight(state, rule) * power * _log2(rule.slow_growth_factor),
    )


@functools.partial(jax.jit, inline=True)
def harm(state: MacroScalars, audit: Audit | None, rule: SearchRule) -> MacroScalars:
    """Cuts the rate after harm, and more deeply before any audit was good."""
    is_begun = state.phase >= Phase.SEARCH
    octaves = jnp.where(is_begun, 1.0, rule.deep) * _log2(rule.backoff_factor)
    if audit is not None:  # the further a start went, the deeper the cut
        nearer = _log2(rule.first_reach / jnp.maximum(audit.reach, rule.first_reach))
        octaves = jnp.where(is_begun, octaves, jnp.minimum(octaves, nearer))
    cut = _scaled(start_window(state), octaves, rule)
    phase = jnp.where(is_begun, state.phase, Phase.RESTARTED)
    return cut._replace(phase=phase.astype(jnp.int32))


def _blind_audit(
    state: MacroScalars, loss: Loss, rule: SearchRule
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns rho, and whether a window was good, and bad, by the loss alone."""
    is_known = state.num_windows > 0
    variance = variance_of_mean(state) + state.last_window_variance
    margin = rule.standard_errors * jnp.sqrt(variance)
    rise = state.window_mean - state.last_window_mean
    rho = jnp.where(is_known, rule.blind, 0.0)
    return rho, is_known & (rise < -margin), is_known & (rise > margin)


def _remembered(seen: MacroScalars, moved: MacroScalars, loss: Loss) -> MacroScalars:
    """Returns what is remembered of the losses of a finished window."""
    is_first = is_first_window(seen)
    # the start is the mean loss until it has clearly come down
    is_start = (seen.phase <= Phase.SEARCH) & ~loss.is_down
    first = moved.first_window_mean
    first += jnp.where(is_start, share(seen), 0.0) * (seen.window_mean - first)
    is_best = loss.is_best | is_first
    variance = variance_of_mean(seen)
    spread = variance * seen.window_count
    average = seen.loss_variance + 0.25 * (spread - seen.loss_variance)
    return moved._replace(
        first_window_mean=jnp.where(is_first, seen.window_mean, first),
        loss_variance=jnp.where(is_first, spread, average),
        last_window_mean=seen.window_mean,
        last_window_variance=variance,
        best_window_mean=jnp.where(is_best, seen.window_mean, moved.best_window_mean),
        num_windows=count_if(jnp.ones((), jnp.bool_), seen.num_windows),
    )


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
    loss = compare(seen, rule, has_value)
    room = None
    is_found = jnp.zeros((), jnp.bool_)
    if audit is None:  # only the loss is known
        audited = seen
        is_audited = (seen.window_count >= rule.audit_every) & has_value
        rho, is_good, is_bad = _blind_audit(seen, loss, rule)
        is_found = is_good  # there is no way back from more than that
        is_reopened = is_found & False
    else:
        is_audited = audit.is_taken
        audited = _estimate(seen, audit, rule)
        if has_value:
            audited = averaged(audited, audit, rule)
            room = room_left(audited, rule)
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
        # Where the slope continues at another loss, the data have changed: the lowest
        # loss is learnt again.
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
            avg_loss=jnp.where(is_new, seen.window_mean, audited.avg_loss),
            start_loss=jnp.where(is_new, -LARGEST, audited.start_loss),
        )
    leap, leapt = _leap(audited, rho, room, is_good, is_bad, is_found, loss, rule)
    is_steered = (seen.phase == Phase.STEER) & ~is_reopened
    octaves = jnp.where(is_steered, _steer(audited, loss, room, rule), leap)
    moved = _scaled(choose(is_steered, audited, leapt), octaves, rule)
    moved = start_window(moved)
    if not has_value:
        return choose(is_audited, moved, seen)
    known = choose(is_audited, _remembered(seen, moved, loss), seen)
    return known._replace(start_loss=start_loss(seen, known, rule))
