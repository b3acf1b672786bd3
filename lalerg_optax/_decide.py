"""Decide: what becomes of a step. Scalars only."""

import functools

import jax
import jax.numpy as jnp

from ._judge_rule import JudgeRule
from ._numbers import SMALLEST
from ._records import Assessment, Conduct, Decision, RegulatorScalars
from ._verdict import Verdict


# jit: outside of a jitted step, every operation would be dispatched by itself
@functools.partial(jax.jit, static_argnames="has_value", inline=True)
def decide(
    last: RegulatorScalars, seen: Assessment, rule: JudgeRule, *, has_value: bool
) -> Decision:
    r"""Decides what becomes of a step; the tables are in ``docs/algorithm.md``.

    The doubt about the params is

    .. math::

        D \leftarrow \max(0,\; D + \min(\max(e_{loss}, 0), 1) - 1/4)

    and with :math:`H` the largest that was harmless, a trial of the params starts when

    .. math::

        D \ge \max(5/4,\; \min(2 H + 3/4,\; 3/2 \cdot patience))

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
    # little too high. Ordinary losses reduce it again.
    log_share = _log_share_lost(last, rule)
    # what is not finite is evidence, too, where two in a row would be no chance
    is_telling = rule.least_row * log_share <= rule.log_chance
    rise = jnp.where(seen.is_usable, jnp.clip(error, 0.0, 1.0), 1.0) - rule.slack
    rise = jnp.where(seen.is_usable | is_telling, rise, 0.0)
    doubt = jnp.maximum(last.doubt + rise, 0.0)
    # Only what was harmless before shows how long hard data can last.
    usual = 2.0 * last.harmless_doubt + (1.0 - rule.slack)
    most = 2.0 * rule.patience * (1.0 - rule.slack)
    needed = jnp.maximum(jnp.minimum(usual, most), rule.least_doubt)
    is_doubted = jnp.where(
        seen.is_usable,
        doubt >= needed,
        is_telling & (doubt >= rule.least_doubt) | _is_lost(last, log_share, rule),
    )

    is_before = conduct <= Conduct.SUSPECT
    is_due = is_before & is_doubted
    # Where as much was harmless before, and half of the progress is still there, it is
    # the new level.
    is_settled = is_due & (doubt >= most) & ~seen.is_undone & seen.is_usable
    is_trial = is_due & ~is_settled
    is_fine = seen.is_usable & (error < rule.healthy)
    # At the anchor there are two losses, one after each step of the way back. If their
    # mean error would still be evidence, the data are hard.
    before = last.scaled_error if has_value else last.scaled_norm_error
    looks = 0.5 * (jnp.clip(before, -1.0, 1.0) + jnp.clip(error, -1.0, 1.0))
    is_fine &= (conduct != Conduct.TRIAL) | (looks < rule.slack)
    # The first burst of hard data that ends abruptly is undone, because it may have
    # been poison. The next one of that length will not even cause a trial. Where the
    # loss comes down gradually, hard data have been learnt.
    is_episode = conduct == Conduct.EPISODE
    has_taken = last.peak_doubt > 0.0
    least = jnp.maximum(rule.fall * before, rule.healthy)
    has_ended = seen.is_usable & (before > 1.0) & (error < least)
    is_rewind = is_episode & has_ended & has_taken & (doubt >= usual)
    # A burst that lasts causes one more trial, in case it is its damage to the params
    # that lasts.
    is_long = last.num_hard >= rule.patience
    is_last = is_long & (last.num_hard < rule.patience + 1) & seen.is_undone
    is_trial |= is_episode & is_last & ~is_fine & has_taken
    is_tested = (conduct == Conduct.TRIAL) | (is_episode & ~is_last)
    is_new_level = is_tested & is_long & ~is_fine & seen.is_usable | is_settled
    is_new_revert = is_trial | is_rewind
    is_reverted = is_new_revert | last.is_pending
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
    is_harmful &= last.num_accepted > 0  # where no update was made, none did harm
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
        doubt=jnp.where(last.is_pending, last.doubt, doubt),
    )


def _log_share_lost(last: RegulatorScalars, rule: JudgeRule) -> jax.Array:
    """Returns the logarithm of the share of steps that were not finite by chance."""
    # the sum of two counts may be too large for int32
    num_lost = last.num_lost.astype(jnp.float32)
    share = num_lost / (last.num_accepted + num_lost + rule.num_prior)
    return jnp.log(jnp.maximum(share, SMALLEST))


def _is_lost(
    last: RegulatorScalars, log_share: jax.Array, rule: JudgeRule
) -> jax.Array:
    r"""Returns whether so many steps in a row that are not finite cannot be a chance.

    With :math:`q` the share of such steps so far in rows that ended by themselves,
    where eight steps are added that were finite, and with this step being the
    :math:`k`-th of its row

    .. math::

        k \ge \max(2,\; \min(\log(10^{-4}) / \log(q),\; patience))

    Where one batch in eight holds a NaN, two in a row say nothing about the params.
    Waiting costs only these steps, because a skipped one changes nothing.
    """
    length = last.num_skips_in_a_row + 1
    is_rare = length * log_share <= rule.log_chance
    return (length >= rule.least_row) & (is_rare | (length >= rule.patience))


def overruled(decision: Decision, is_failed: jax.Array) -> Decision:
    """Returns the decision, or the one to go back to the start of the run."""
    return decision._replace(
        verdict=jnp.where(is_failed, Verdict.REVERT, decision.verdict),
        conduct=jnp.where(is_failed, Conduct.REWINDING, decision.conduct),
        is_new_revert=decision.is_new_revert | is_failed,
        is_over=decision.is_over | is_failed,
        is_harmful=decision.is_harmful | is_failed,
    )
