"""Judge: what is seen of a step, what becomes of it, and what is remembered.

Arithmetic on scalars alone. `assess` reads, `decide` decides, `learn` writes.
"""

import enum
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ._history import NUM_START_VALUES, Z95, LossHistory
from ._scalars import Scalars, count_if, lanes, pack
from ._verdict import Verdict

LARGEST = 1e37  # larger magnitudes are treated as this one: sums must not overflow
_SMALLEST = 1e-30
_MANY = 2.0**20  # more steps make no difference
_HEAVY = 20.0  # logarithm of a weight whose fourth power is a float32


class JudgeRule(NamedTuple):
    """Numbers of the rule; those that users see may be traced.

    Attributes:
      threshold: see `error_regulate`, as the next five.
      progress_fraction: likewise.
      patience: likewise.
      anchor_every: likewise.
      backoff_factor: likewise.
      recovery_steps: likewise.
      resolution: of a loss, in units of its level: about 100 last places of float32.
      norm_floor: logarithm of the growth of the norm that is tolerated always; judged
        on the runs of ``benchmarks/alarms.py``.
      bound_floor: logarithm of the norm that a bounded gradient may have, in units of
        the median. At the median itself rare data are not learnt, at 16 times they are
        (``benchmarks/mixtures.py``).
      slack: what of an error is no evidence: five standard deviations of the sum lie
        between normal noise and `least_doubt`.
      least_doubt: evidence at which params are gone back for: that of two high losses.
      suspect: evidence at which the anchor is held.
      widening: of the tolerance, by each 5 % of a window that are alarms; chosen on the
        regression of ``benchmarks/faults.py``.
      longer: doubt that is taken for harmless from then on, in units of that of a trial
        after a first harm; chosen, as the next two and `fall`, on development streams
        of ``benchmarks/mixtures.py`` and two tasks of ``benchmarks/faults.py``.
      apart: accepted steps between the two, for that to be another time.
      undone: share of the progress that is too much to be what rare data do.
      growth: of the logarithm of the bound, where a bounded gradient did no harm.
      num_skips: steps whose norm alone is odd that may be skipped, at first.
      skip_memory: accepted steps after which there may be another one.
      avg_decay: decay of the average loss.
      healthy: errors below this are fit to be gone back to.
      fall: to which share of what it was an error falls when hard data end.
      min_damping: lower bound of the damping.
      noise_steps: looks of an audit, and at most so much longer a way that they look
        back on, for each variance of a look in units of the squared alignment.
      least_steps: by how much that is longer at least, in units of the largest squared
        alignment of late; chosen on development tasks of ``benchmarks/noise.py`` and
        ``benchmarks/decades.py``.
      scale_decay: of the largest alignment of late, at an audit.
      min_anchor_every: accepted steps between anchors at first; odd, so that a swing
        to and fro is not back at its start.
    """

    threshold: Any = 6.0
    progress_fraction: Any = 0.1
    patience: Any = 32
    anchor_every: Any = 32
    backoff_factor: Any = 0.5
    recovery_steps: Any = 64
    resolution: float = 1e-5
    norm_floor: float = math.log(4.0)
    bound_floor: float = math.log(16.0)
    slack: float = 0.25
    least_doubt: float = 1.25
    suspect: float = 0.5
    widening: float = 1.5
    longer: float = 16.0
    apart: float = 16.0
    undone: float = 0.5
    growth: float = math.log(1.25)
    num_skips: float = 5.0
    skip_memory: float = 2.0**14
    avg_decay: float = 0.95
    healthy: float = 0.5
    fall: float = 1.0 / 16.0
    min_damping: float = 2.0**-10
    noise_steps: float = 16.0
    least_steps: float = 3.0
    scale_decay: float = 0.75
    min_anchor_every: int = 5


class Conduct(enum.IntEnum):
    """Where the regulator stands between two steps.

    Attributes:
      HEALTHY: nothing to object to.
      SUSPECT: losses are high, and may be those of hard batches.
      RESTORING: params go back to the anchor, to see whether they are damaged; the
        second of the two steps is still to come.
      TRIAL: params are those of the anchor, and healthy: the next loss tells.
      EPISODE: it was high there, too: the data are hard, the anchor is held.
      REWINDING: params go back for another reason; the second step is still to come.
    """

    HEALTHY = 0
    SUSPECT = 1
    RESTORING = 2
    TRIAL = 3
    EPISODE = 4
    REWINDING = 5


class RegulatorScalars(NamedTuple):
    """What the regulator told at the last step, what it remembers and counts.

    Attributes:
      grad_norm: global norm of the gradient before clipping, float32.
      scaled_error: rise of the loss above its median; 1 is tolerated, float32.
      scaled_norm_error: rise of the log gradient norm, likewise, float32.
      avg_value: exponential average of the accepted losses, float32.
      num_averaged: number of losses in that, up to 20, float32.
      damping: factor of the updates, in [2^-10, 1], float32.
      num_well: steps accepted since an update did harm, up to 2^20, float32.
      skips_left: steps whose norm alone is odd that may still be skipped, float32.
      ceiling: logarithm of the largest norm that did no harm, at most that of 5/4 of
        the bound, float32.
      ceiling_in_doubt: the same of the steps since the losses are high, float32.
      doubt: evidence against the params, float32.
      peak_doubt: the most of it since it was 0 that usable losses made, float32.
      harmless_doubt: the most of it that subsided by itself, or that was the same at
        the anchor, float32.
      alignment: what the last audit told, in [-1, 1], float32.
      alignment_error: its standard error, float32.
      alignment_scale: the largest of late, less its standard error, in [0, 1], float32.
      look_sum: sum of the alignments that were looked at since the anchor, each
        times its weight, float32.
      look_square: sum of the squares of these products, float32.
      look_cross: sum of the alignments, each times the square of its weight, float32.
      look_weight: sum of the weights, float32.
      look_weight_square: sum of their squares, float32.
      look_variance: average variance of a single look, float32.
      num_looks: number of those looks, float32.
      verdict: the last `Verdict`, int32.
      conduct: the last `Conduct`, int32.
      num_hard: steps of the present `Conduct.EPISODE`, int32.
      num_accepted: number of steps accepted, bounded ones among them, int32.
      num_bounded: number of steps accepted with a bounded gradient, int32.
      num_skipped: number of steps skipped, int32.
      num_reverted: number of steps spent on reverts (two each), int32.
      num_trials: times that params went back to see whether they are damaged, int32.
      num_harmful: times that they were, int32.
      num_audits_passed: number of audits with a positive alignment, int32.
      anchor_age: accepted updates by which params are away from the anchor, int32.
    """

    grad_norm: Any = 0.0
    scaled_error: Any = 0.0
    scaled_norm_error: Any = 0.0
    avg_value: Any = 0.0
    num_averaged: Any = 0.0
    damping: Any = 1.0
    num_well: Any = 0.0
    skips_left: Any = JudgeRule().num_skips
    ceiling: Any = -LARGEST
    ceiling_in_doubt: Any = -LARGEST
    doubt: Any = 0.0
    peak_doubt: Any = 0.0
    harmless_doubt: Any = 0.0
    alignment: Any = 0.0
    alignment_error: Any = 0.0
    alignment_scale: Any = 0.0
    look_sum: Any = 0.0
    look_square: Any = 0.0
    look_cross: Any = 0.0
    look_weight: Any = 0.0
    look_weight_square: Any = 0.0
    look_variance: Any = 0.0
    num_looks: Any = 0.0
    verdict: Any = 0
    conduct: Any = 0
    num_hard: Any = 0
    num_accepted: Any = 0
    num_bounded: Any = 0
    num_skipped: Any = 0
    num_reverted: Any = 0
    num_trials: Any = 0
    num_harmful: Any = 0
    num_audits_passed: Any = 0
    anchor_age: Any = 0


class Look(NamedTuple):
    """What came of the conditional: what was seen of the anchor, and done about it.

    Attributes:
      is_seen: whether there was a look at this step, bool.
      is_taken: whether all looks at this anchor were summed up, bool.
      is_failed: whether they say that the first steps led nowhere, bool.
      is_moved: whether the anchor is now at the params, bool.
      reach: how far a start went that was too far, float32.
      alignment: their weighed mean, float32.
      alignment_error: its standard error, float32.
      look_sum: see `RegulatorScalars`, as the next six.
      look_square: likewise.
      look_cross: likewise.
      look_weight: likewise.
      look_weight_square: likewise.
      look_variance: likewise.
      num_looks: likewise.
    """

    is_seen: Any = False
    is_taken: Any = False
    is_failed: Any = False
    is_moved: Any = False
    reach: Any = 0.0
    alignment: Any = 0.0
    alignment_error: Any = 0.0
    look_sum: Any = 0.0
    look_square: Any = 0.0
    look_cross: Any = 0.0
    look_weight: Any = 0.0
    look_weight_square: Any = 0.0
    look_variance: Any = 0.0
    num_looks: Any = 0.0


LOOKS = (  # what is summed up from look to look, until it is told
    "look_sum",
    "look_square",
    "look_cross",
    "look_weight",
    "look_weight_square",
    "num_looks",
)


class Assessment(NamedTuple):
    """What a step looks like, before anything is decided or remembered.

    Attributes:
      is_usable: whether loss and gradient are finite, bool.
      is_high: whether the loss is above what is tolerated; without a loss, the norm
        where no more may be skipped for it, bool.
      is_odd: whether the norm is and the loss is not, bool.
      is_healthy: whether all errors are far below what is tolerated, bool.
      is_undone: whether much of the progress is; without a loss, `is_high`, bool.
      error: rise of the loss in units of what is tolerated, float32.
      norm_error: rise of the log norm likewise, float32.
      log_norm: logarithm of the norm, NaN for a norm of 0 or NaN, float32.
      log_limit: logarithm of the norm that a bounded gradient may have, float32.
      weight: norm in units of its median, at most that of a bounded gradient, and in
        [e^-20, e^20], float32.
      recorded: what the history is to remember of loss and log norm, float32, (2,).
      signals: what they are, float32, (2,).
      is_recorded: which of the two is remembered, bool, (2,).
    """

    is_usable: jax.Array
    is_high: jax.Array
    is_odd: jax.Array
    is_healthy: jax.Array
    is_undone: jax.Array
    error: jax.Array
    norm_error: jax.Array
    log_norm: jax.Array
    log_limit: jax.Array
    weight: jax.Array
    recorded: jax.Array
    signals: jax.Array
    is_recorded: jax.Array


class Decision(NamedTuple):
    """What becomes of a step.

    Attributes:
      verdict: `Verdict`, int32.
      conduct: `Conduct` from now on, int32.
      is_new_revert: whether this is the first of the two steps of a revert, bool.
      is_trial: whether that revert is to show if params are damaged, bool.
      is_harmful: whether going back showed that they were, bool.
      is_new_level: whether high losses are there to stay, bool.
      is_over: whether nothing is in doubt any more, bool.
      doubt: evidence against the params, float32.
    """

    verdict: jax.Array
    conduct: jax.Array
    is_new_revert: jax.Array
    is_trial: jax.Array
    is_harmful: jax.Array
    is_new_level: jax.Array
    is_over: jax.Array
    doubt: jax.Array


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
    """Compares loss and gradient norm with those before; writes nothing.

    The equations stand in `error_regulate`.

    Args:
      last: what is known.
      history: of losses and logarithms of the norm, leading axis 2.
      value: the loss at the current params, float32 scalar, or None.
      grad_norm: the global norm of the gradient before clipping, float32 scalar.
      rule: the numbers of the rule.
      norm_is_judged: whether a large norm is an error; one that is not finite
        always is.
    """
    if value is None:
        loss = jnp.zeros((), jnp.float32)
    else:
        loss = jnp.where(jnp.isfinite(value), jnp.clip(value, -LARGEST, LARGEST), value)
    # A zero gradient tells nothing: it is neither judged nor recorded.
    log_norm = jnp.where(grad_norm > 0.0, jnp.log(grad_norm), jnp.nan)
    is_usable = jnp.isfinite(loss) & jnp.isfinite(grad_norm)

    # Both signals are judged by one rule. The norm has a scale of its own, and can be
    # judged from the second step on.
    signals = lanes([loss, log_norm])
    medians, spreads = history.centre_and_spread()
    progress = jnp.maximum(history.start_value[0] - medians[0], 0.0)
    is_early = history.num_values[1] < NUM_START_VALUES
    norm_floor = jnp.where(is_early, 2.0, 1.0) * rule.norm_floor
    scales = jnp.maximum(
        rule.threshold * spreads,
        lanes(
            [
                rule.progress_fraction * progress,
                jnp.maximum(norm_floor, last.ceiling - medians[1]),
            ]
        ),
    )
    tolerances = jnp.maximum(scales, rule.resolution * jnp.abs(medians) + _SMALLEST)
    # a signal that was never anything but constant tells nothing of its scale
    min_values = lanes([NUM_START_VALUES, 1.0])
    known = (history.num_values >= min_values) & (scales > 0.0)
    rises = jnp.clip((signals - medians) / tolerances, -LARGEST, LARGEST)
    errors = jnp.where(jnp.isfinite(signals), jnp.where(known, rises, 0.0), LARGEST)
    error, norm_error = errors[0], jnp.where(grad_norm == 0.0, 0.0, errors[1])
    if not norm_is_judged:
        norm_error = jnp.where(jnp.isfinite(grad_norm), 0.0, norm_error)

    is_high = is_usable & (error > 1.0)
    is_odd = is_usable & (norm_error > 1.0) & ~is_high
    if value is None:  # the norm is all there is
        may_skip = last.skips_left >= 1.0
        is_high, is_odd = is_odd & ~may_skip, is_odd & may_skip

    # An alarm is recorded as the value that, as 95th percentile, would make the
    # tolerance so many times as wide: the window always advances and follows a new
    # level, but outliers do not blind it.
    share = jnp.minimum(rule.widening * Z95 / rule.threshold, 1.0)
    alarms = jnp.minimum(medians + share * tolerances, LARGEST)
    recorded = jnp.where(known & (rises > 1.0), alarms, jnp.minimum(signals, LARGEST))
    # Nor does a signal that cannot be judged yet, while the other one objects. From the
    # way back until it is known what was wrong, the windows wait.
    is_recorded = jnp.isfinite(signals) & (known | ~(is_high | is_odd))
    is_recorded &= last.conduct <= Conduct.SUSPECT
    if value is None:
        is_recorded &= lanes([0.0, 1.0]) > 0.0
    if value is None:
        is_undone = is_high
    else:  # of NaN, too
        is_undone = ~(loss - medians[0] <= rule.undone * progress)
    norm_is_known = (history.num_values[1] > 0) & norm_is_judged
    # What holds at the anchor, too, is hard: there the bound gives way step by step.
    # That of an odd gradient never does: with an ordinary loss there is nothing new.
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
        weight=jnp.exp(
            jnp.clip(log_norm - medians[1], -_HEAVY, jnp.minimum(high_limit, _HEAVY))
        ),
        recorded=recorded,
        signals=signals,
        is_recorded=is_recorded,
    )


@functools.partial(jax.jit, static_argnames="has_value", inline=True)
def decide(
    last: RegulatorScalars, seen: Assessment, rule: JudgeRule, *, has_value: bool
) -> Decision:
    """Says what becomes of a step; the table stands in `error_regulate`.

    Args:
      last: what is known.
      seen: what the step looks like.
      rule: the numbers of the rule.
      has_value: whether there is a loss.
    """
    conduct = last.conduct
    is_skipped = ~seen.is_usable | (seen.is_odd & (last.skips_left >= 1.0))
    error = seen.error if has_value else seen.norm_error

    # Evidence is summed up: two high losses in a row weigh as much as many that are a
    # little too high. Losses as they should be take it away again.
    rise = jnp.where(seen.is_usable, jnp.clip(error, 0.0, 1.0), 1.0) - rule.slack
    doubt = jnp.maximum(last.doubt + rise, 0.0)
    # What was harmless before is all that tells how long hard data can last.
    usual = 2.0 * last.harmless_doubt + (1.0 - rule.slack)
    most = 2.0 * rule.patience * (1.0 - rule.slack)
    needed = jnp.maximum(jnp.minimum(usual, most), rule.least_doubt)
    needed = jnp.where(seen.is_usable, needed, rule.least_doubt)

    is_before = conduct <= Conduct.SUSPECT
    is_due = is_before & (doubt >= needed)
    # Where as much was harmless before, and half of the progress is still there, it is
    # the new level.
    is_settled = is_due & (doubt >= most) & ~seen.is_undone & seen.is_usable
    is_trial = is_due & ~is_settled
    is_fine = seen.is_usable & (error < rule.healthy)
    # At the anchor there are two looks, one after each step of the way back. If what
    # they show would go on to be evidence, it is the data.
    before = last.scaled_error if has_value else last.scaled_norm_error
    looks = 0.5 * (jnp.clip(before, -1.0, 1.0) + jnp.clip(error, -1.0, 1.0))
    is_fine &= (conduct != Conduct.TRIAL) | (looks < rule.slack)
    # A burst of hard data that ends at once is undone at its first time, for it may
    # have been poison. The next one as long will not even be gone back for. Where the
    # loss comes down by and by, hard data have been learnt.
    is_episode = conduct == Conduct.EPISODE
    has_taken = last.peak_doubt > 0.0
    least = jnp.maximum(rule.fall * before, rule.healthy)
    has_ended = seen.is_usable & (before > 1.0) & (error < least)
    is_rewind = is_episode & has_ended & has_taken & (doubt >= usual)
    # One that lasts is gone back for once more, in case it is what it did to the params
    # that lasts.
    is_long = last.num_hard >= rule.patience
    is_last = is_long & (last.num_hard < rule.patience + 1) & seen.is_undone
    is_trial |= is_episode & is_last & ~is_fine & has_taken
    is_tested = (conduct == Conduct.TRIAL) | (is_episode & ~is_last)
    is_new_level = is_tested & is_long & ~is_fine & seen.is_usable | is_settled
    is_new_revert = is_trial | is_rewind
    is_pending = (conduct == Conduct.RESTORING) | (conduct == Conduct.REWINDING)
    is_reverted = is_new_revert | is_pending
    verdict = jnp.where(
        is_reverted,
        Verdict.REVERT,
        jnp.where(
            is_new_level,
            Verdict.ACCEPT,
            jnp.where(
                is_skipped,
                Verdict.SKIP,
                jnp.where(seen.is_high | seen.is_odd, Verdict.BOUND, Verdict.ACCEPT),
            ),
        ),
    )
    is_suspect = (doubt > rule.suspect) | ((conduct == Conduct.SUSPECT) & (doubt > 0.0))
    is_suspect &= ~is_settled
    now = jnp.where(is_suspect, Conduct.SUSPECT, Conduct.HEALTHY)
    is_hard = ~is_fine & ~is_new_level
    now = jnp.where(
        is_before, now, jnp.where(is_hard, Conduct.EPISODE, Conduct.HEALTHY)
    )
    now = jnp.where(is_trial, Conduct.RESTORING, now)
    now = jnp.where(is_rewind, Conduct.REWINDING, now)
    now = jnp.where(conduct == Conduct.RESTORING, Conduct.TRIAL, now)
    now = jnp.where(conduct == Conduct.REWINDING, Conduct.HEALTHY, now)
    is_harmful = (conduct == Conduct.TRIAL) & is_fine & ~is_long
    is_over = is_rewind | is_new_level | (is_before & ~is_trial & (doubt == 0.0))
    is_over |= (conduct >= Conduct.TRIAL) & is_fine
    return Decision(
        verdict=verdict.astype(jnp.int32),
        conduct=now.astype(jnp.int32),
        is_new_revert=is_new_revert,
        is_trial=is_trial,
        is_harmful=is_harmful,
        is_new_level=is_new_level,
        is_over=is_over,
        doubt=jnp.where(is_pending, last.doubt, doubt),
    )


def overruled(decision: Decision, is_failed: jax.Array) -> Decision:
    """Returns the decision, or that to go back to the start of the run."""
    return decision._replace(
        verdict=jnp.where(is_failed, Verdict.REVERT, decision.verdict),
        conduct=jnp.where(is_failed, Conduct.REWINDING, decision.conduct),
        is_new_revert=decision.is_new_revert | is_failed,
        is_over=decision.is_over | is_failed,
        is_harmful=decision.is_harmful | is_failed,
    )


@functools.partial(jax.jit, inline=True)
def learn(
    last: RegulatorScalars,
    history: LossHistory,
    grad_norm: jax.Array,
    seen: Assessment,
    look: Look,
    decision: Decision,
    is_started: jax.Array,
    rule: JudgeRule,
) -> tuple[Scalars, LossHistory]:
    """Writes what is remembered of a step, once all is decided.

    Args:
      last: what is known.
      history: of losses and logarithms of the norm.
      grad_norm: the global norm of the gradient.
      seen: what the step looks like.
      look: what was seen of the anchor.
      decision: what becomes of the step.
      is_started: whether the run has begun well.
      rule: the numbers of the rule.
    """
    verdict = decision.verdict
    is_reverted = verdict == Verdict.REVERT
    is_skipped = verdict == Verdict.SKIP
    is_bounded = verdict == Verdict.BOUND
    is_applied = ~(is_reverted | is_skipped)

    # an average weighs its first values alike, and starts anew with the windows
    loss = seen.signals[0]
    num_averaged = jnp.where(decision.is_new_level, 0.0, last.num_averaged)
    weight = jnp.maximum(1.0 - rule.avg_decay, 1.0 / (num_averaged + 1.0))
    moved = jnp.where(
        num_averaged == 0.0, loss, last.avg_value + weight * (loss - last.avg_value)
    )
    is_averaged = verdict == Verdict.ACCEPT
    num_averaged = jnp.minimum(num_averaged + is_averaged, 1.0 / (1.0 - rule.avg_decay))

    # n steps after the last harm, (n / recovery_steps)^2 cuts are made good
    num_well = jnp.where(is_applied, last.num_well + 1.0, last.num_well)
    exponent = -(2.0 * num_well - 1.0) / rule.recovery_steps**2
    recovery = jnp.asarray(rule.backoff_factor, jnp.float32) ** exponent
    recovered = jnp.where(
        is_applied, jnp.minimum(last.damping * recovery, 1.0), last.damping
    )
    cut = jnp.maximum(last.damping * rule.backoff_factor, rule.min_damping)

    skips_left = jnp.where(
        is_skipped & seen.is_odd,
        last.skips_left - 1.0,
        jnp.where(
            is_applied,
            jnp.minimum(last.skips_left + 1.0 / rule.skip_memory, rule.num_skips),
            last.skips_left,
        ),
    )

    # What a step did is known when nothing is in doubt any more.
    is_over = decision.is_over | look.is_failed
    is_harmless = is_over & ~(decision.is_harmful | look.is_failed)
    doubt = jnp.where(is_over, 0.0, decision.doubt)
    peak_doubt = jnp.where(
        is_over,
        0.0,
        jnp.where(
            is_applied & (decision.doubt > last.doubt),
            jnp.maximum(last.peak_doubt, decision.doubt),
            last.peak_doubt,
        ),
    )
    harmless = jnp.maximum(last.peak_doubt, decision.is_new_level * LARGEST)
    # What is in doubt again, though most of the progress is there, may be what rare
    # data do, and may pass: the next time it is awaited. The anchor is held meanwhile.
    is_again = (last.num_harmful > 0) & (last.num_well >= rule.apart)
    is_again &= decision.is_trial & (last.conduct <= Conduct.SUSPECT) & ~seen.is_undone
    longer = jnp.where(is_again, rule.longer * last.peak_doubt, 0.0)
    # what is the same at the anchor was no harm so far
    is_hard = (last.conduct == Conduct.TRIAL) & (decision.conduct == Conduct.EPISODE)
    harmless_doubt = jnp.maximum(
        last.harmless_doubt,
        jnp.where(is_harmless | is_hard, harmless, longer),
    )
    is_tried = is_bounded & jnp.isfinite(seen.log_norm)
    most = seen.log_limit + jnp.where(seen.is_high, rule.growth, 0.0)
    tried = jnp.where(is_tried, jnp.minimum(seen.log_norm, most), -LARGEST)
    is_borne = is_harmless & ~decision.is_new_revert
    ceiling = jnp.where(
        is_borne, jnp.maximum(last.ceiling, last.ceiling_in_doubt), last.ceiling
    )
    ceiling_in_doubt = jnp.maximum(
        jnp.where(is_over | is_reverted, -LARGEST, last.ceiling_in_doubt), tried
    )

    is_told = look.is_taken | look.is_failed
    is_cleared = is_told | is_reverted | decision.is_new_level
    looks = {name: jnp.where(is_cleared, 0.0, getattr(look, name)) for name in LOOKS}
    is_passed = look.is_taken & (look.alignment > 0.0)
    scalars = pack(
        RegulatorScalars(
            grad_norm=jnp.nan_to_num(grad_norm, nan=LARGEST, posinf=LARGEST),
            scaled_error=seen.error,
            scaled_norm_error=seen.norm_error,
            avg_value=jnp.where(is_averaged, moved, last.avg_value),
            num_averaged=jnp.where(look.is_failed, 0.0, num_averaged),
            damping=jnp.where(decision.is_harmful & is_started, cut, recovered),
            num_well=jnp.where(decision.is_harmful, 0.0, jnp.minimum(num_well, _MANY)),
            skips_left=skips_left,
            ceiling=ceiling,
            ceiling_in_doubt=ceiling_in_doubt,
            doubt=doubt,
            peak_doubt=peak_doubt,
            harmless_doubt=harmless_doubt,
            alignment=jnp.where(is_told, look.alignment, last.alignment),
            alignment_error=jnp.where(
                is_told, look.alignment_error, last.alignment_error
            ),
            alignment_scale=jnp.where(
                is_told,
                jnp.maximum(
                    jnp.abs(look.alignment) - look.alignment_error,
                    rule.scale_decay * last.alignment_scale,
                ),
                last.alignment_scale,
            ),
            look_variance=jnp.where(is_told, look.look_variance, last.look_variance),
            **looks,
            verdict=verdict,
            conduct=decision.conduct,
            num_hard=jnp.where(
                is_over,
                0,
                count_if(decision.conduct == Conduct.EPISODE, last.num_hard),
            ),
            num_accepted=count_if(is_applied, last.num_accepted),
            num_bounded=count_if(is_bounded, last.num_bounded),
            num_skipped=count_if(is_skipped, last.num_skipped),
            num_reverted=count_if(is_reverted, last.num_reverted),
            num_trials=count_if(decision.is_trial, last.num_trials),
            num_harmful=count_if(
                decision.is_harmful & ~look.is_failed, last.num_harmful
            ),
            num_audits_passed=count_if(is_passed, last.num_audits_passed),
            # the anchor is what params were before the update of this step
            anchor_age=jnp.where(
                look.is_moved,
                1,
                jnp.where(is_reverted, 0, count_if(is_applied, last.anchor_age)),
            ),
        )
    )

    starts_anew = decision.is_new_level | look.is_failed
    history = history._replace(num_values=jnp.where(starts_anew, 0, history.num_values))
    recorded = jnp.where(decision.is_new_level, seen.signals, seen.recorded)
    is_recorded = seen.is_recorded | (
        decision.is_new_level & jnp.isfinite(seen.signals)
    )
    is_recorded &= ~look.is_failed
    return scalars, history.record(jnp.where(is_recorded, recorded, jnp.nan))
