"""Learn: records a step, once all is decided. Scalars only."""

import functools

import jax
import jax.numpy as jnp

from ._history import LossHistory
from ._judge_rule import JudgeRule
from ._numbers import LARGEST
from ._records import LOOKS, Assessment, Conduct, Decision, Look, RegulatorScalars
from ._scalars import Scalars, count_if, pack
from ._verdict import Verdict, is_applied

_MAX_COUNTED_STEPS = 2.0**20  # more steps make no difference


def _average(
    last: RegulatorScalars, seen: Assessment, decision: Decision, rule: JudgeRule
) -> tuple[jax.Array, jax.Array]:
    """Returns the average of the accepted losses, and the number of losses in it."""
    loss = seen.signals[0]
    # its first values have equal weights, and it is reset with the windows
    number = jnp.where(decision.is_new_level, 0.0, last.num_averaged)
    weight = jnp.maximum(1.0 - rule.avg_decay, 1.0 / (number + 1.0))
    moved = jnp.where(
        number == 0.0, loss, last.avg_value + weight * (loss - last.avg_value)
    )
    is_averaged = decision.verdict == Verdict.ACCEPT
    number = jnp.minimum(number + is_averaged, 1.0 / (1.0 - rule.avg_decay))
    return jnp.where(is_averaged, moved, last.avg_value), number


def _damping(
    last: RegulatorScalars, decision: Decision, is_started: jax.Array, rule: JudgeRule
) -> tuple[jax.Array, jax.Array]:
    """Returns the damping, and the steps since an update did harm.

    After n accepted steps without harm, (n / recovery_steps)^2 cuts are made good.
    """
    is_accepted = is_applied(decision.verdict)
    num_well = jnp.where(is_accepted, last.num_well + 1.0, last.num_well)
    exponent = -(2.0 * num_well - 1.0) / rule.recovery_steps**2
    recovery = jnp.asarray(rule.backoff_factor, jnp.float32) ** exponent
    recovered = jnp.where(
        is_accepted,
        jnp.minimum(last.damping_factor * recovery, 1.0),
        last.damping_factor,
    )
    cut = jnp.maximum(last.damping_factor * rule.backoff_factor, rule.min_damping)
    return (
        jnp.where(decision.is_harmful & is_started, cut, recovered),
        jnp.where(decision.is_harmful, 0.0, jnp.minimum(num_well, _MAX_COUNTED_STEPS)),
    )


def _skips_left(
    last: RegulatorScalars, seen: Assessment, verdict: jax.Array, rule: JudgeRule
) -> jax.Array:
    """Returns how many steps may still be skipped because their norm alone is odd."""
    return jnp.where(
        (verdict == Verdict.SKIP) & seen.is_odd,
        last.skips_left - 1.0,
        jnp.where(
            is_applied(verdict),
            jnp.minimum(last.skips_left + 1.0 / rule.skip_memory, rule.num_skips),
            last.skips_left,
        ),
    )


def _evidence(
    last: RegulatorScalars,
    seen: Assessment,
    look: Look,
    decision: Decision,
    rule: JudgeRule,
) -> dict[str, jax.Array]:
    """Returns the doubt, and the doubt and the norms that proved to be harmless.

    The effect of a step is known when nothing is in doubt any more.
    """
    is_reverted = decision.verdict == Verdict.REVERT
    is_over = decision.is_over | look.is_failed
    is_harmless = is_over & ~(decision.is_harmful | look.is_failed)
    is_more = is_applied(decision.verdict) & (decision.doubt > last.doubt)
    peak_doubt = jnp.where(
        is_more, jnp.maximum(last.peak_doubt, decision.doubt), last.peak_doubt
    )
    harmless = jnp.maximum(last.peak_doubt, decision.is_new_level * LARGEST)
    # New doubt, though most of the progress is there, may come from rare data, and may
    # pass: the next time, the regulator waits. The anchor is held meanwhile.
    is_again = (last.num_harmful > 0) & (last.num_well >= rule.apart)
    is_again &= decision.is_trial & (last.conduct <= Conduct.SUSPECT) & ~seen.is_undone
    longer = jnp.where(is_again, rule.longer * last.peak_doubt, 0.0)
    # losses that are high at the anchor, too, were no harm so far
    is_hard = (last.conduct == Conduct.TRIAL) & (decision.conduct == Conduct.EPISODE)
    known = jnp.where(is_harmless | is_hard, harmless, longer)

    is_tried = (decision.verdict == Verdict.BOUND) & jnp.isfinite(seen.log_norm)
    most = seen.log_limit + jnp.where(seen.is_high, rule.growth, 0.0)
    tried = jnp.where(is_tried, jnp.minimum(seen.log_norm, most), -LARGEST)
    is_borne = is_harmless & ~decision.is_new_revert
    in_doubt = jnp.where(is_over | is_reverted, -LARGEST, last.ceiling_in_doubt)
    return {
        "doubt": jnp.where(is_over, 0.0, decision.doubt),
        "peak_doubt": jnp.where(is_over, 0.0, peak_doubt),
        "harmless_doubt": jnp.maximum(last.harmless_doubt, known),
        "ceiling": jnp.where(
            is_borne, jnp.maximum(last.ceiling, last.ceiling_in_doubt), last.ceiling
        ),
        "ceiling_in_doubt": jnp.maximum(in_doubt, tried),
    }


def _audited(
    last: RegulatorScalars, look: Look, decision: Decision, rule: JudgeRule
) -> dict[str, jax.Array]:
    """Returns the last audit, and the sums of the looks since then."""
    is_reported = look.is_taken | look.is_failed
    is_cleared = is_reported | decision.is_new_level
    is_cleared |= decision.verdict == Verdict.REVERT
    looks = {name: jnp.where(is_cleared, 0.0, getattr(look, name)) for name in LOOKS}
    scale = jnp.maximum(
        jnp.abs(look.alignment) - look.alignment_error,
        rule.scale_decay * last.alignment_scale,
    )
    report = {
        "alignment": look.alignment,
        "alignment_error": look.alignment_error,
        "alignment_scale": scale,
        "look_variance": look.look_variance,
    }
    return looks | {
        name: jnp.where(is_reported, new, getattr(last, name))
        for name, new in report.items()
    }


def _counters(
    last: RegulatorScalars, seen: Assessment, look: Look, decision: Decision
) -> dict[str, jax.Array]:
    """Returns how often each decision was made."""
    verdict = decision.verdict
    is_reverted, is_accepted = verdict == Verdict.REVERT, is_applied(verdict)
    is_over = decision.is_over | look.is_failed
    is_passed = look.is_taken & (look.alignment > 0.0)
    is_harmful = decision.is_harmful & ~look.is_failed
    num_hard = count_if(decision.conduct == Conduct.EPISODE, last.num_hard)
    age = jnp.where(is_reverted, 0, count_if(is_accepted, last.anchor_age))
    return {
        "num_hard": jnp.where(is_over, 0, num_hard),
        "num_accepted": count_if(is_accepted, last.num_accepted),
        "num_bounded": count_if(verdict == Verdict.BOUND, last.num_bounded),
        "num_skipped": count_if(verdict == Verdict.SKIP, last.num_skipped),
        "num_lost": jnp.where(
            is_accepted & (last.conduct <= Conduct.SUSPECT),
            # saturates, as all counters
            last.num_lost
            + jnp.minimum(
                last.num_skips_in_a_row, jnp.iinfo(jnp.int32).max - last.num_lost
            ),
            last.num_lost,
        ),
        "num_skips_in_a_row": jnp.where(
            (verdict == Verdict.SKIP) & ~seen.is_usable,
            count_if(jnp.ones((), jnp.bool_), last.num_skips_in_a_row),
            0,
        ),
        "num_rejected_in_a_row": jnp.where(
            is_accepted, 0, count_if(~is_accepted, last.num_rejected_in_a_row)
        ),
        "num_revert_steps": count_if(is_reverted, last.num_revert_steps),
        "num_trials": count_if(decision.is_trial, last.num_trials),
        "num_harmful": count_if(is_harmful, last.num_harmful),
        "num_audits_passed": count_if(is_passed, last.num_audits_passed),
        # the anchor is what params were before the update of this step
        "anchor_age": jnp.where(look.is_moved, 1, age),
    }


# jit: outside of a jitted step, every operation would be dispatched by itself
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
    """Records a step, once all is decided.

    Args:
      last: what is known, and the learning rate of this step.
      history: of losses and logarithms of the norm.
      grad_norm: the global norm of the gradient.
      seen: what the step looks like.
      look: what was seen of the anchor.
      decision: what becomes of the step.
      is_started: whether the run has begun well.
      rule: the numbers of the rule.
    """
    avg_value, num_averaged = _average(last, seen, decision, rule)
    damping, num_well = _damping(last, decision, is_started, rule)
    scalars = pack(
        RegulatorScalars(
            grad_norm=jnp.nan_to_num(grad_norm, nan=LARGEST, posinf=LARGEST),
            scaled_error=seen.error,
            scaled_norm_error=seen.norm_error,
            avg_value=avg_value,
            num_averaged=jnp.where(look.is_failed, 0.0, num_averaged),
            damping_factor=damping,
            base_rate=last.base_rate,
            num_well=num_well,
            skips_left=_skips_left(last, seen, decision.verdict, rule),
            verdict=decision.verdict,
            conduct=decision.conduct,
            **_evidence(last, seen, look, decision, rule),
            **_audited(last, look, decision, rule),
            **_counters(last, seen, look, decision),
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
