"""Search: the rate for all parameters, as a table of phases. Scalars only."""

import functools

import jax
import jax.numpy as jnp

from ._scalars import count_if
from ._search_rule import MacroScalars, Phase, SearchRule
from ._verdict import Audit
from ._windows import Loss, compare, is_first_window, start_window, variance_of_mean


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


def _steer(state: MacroScalars, loss: Loss, rule: SearchRule) -> jax.Array:
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
    is_first = is_first_window(seen)
    is_best = loss.is_best | is_first
    variance = variance_of_mean(seen)
    spread = variance * seen.window_count
    moved = start_window(moved)._replace(
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
