"""Records of the regulator: its memory, and how it assesses a step.

`assess` makes an `Assessment`, `look_and_move` a `Look`, `decide` a `Decision`, and
`learn` the next `RegulatorScalars` of them.
"""

import enum
from typing import Any, NamedTuple

import jax

from ._judge_rule import JudgeRule
from ._numbers import LARGEST, UNKNOWN


class Conduct(enum.IntEnum):
    """State of the regulator between two steps.

    Attributes:
      HEALTHY: nothing to object to.
      SUSPECT: losses are high, and may be those of hard batches.
      RESTORING: params go back to the anchor, to test whether they are damaged; the
        second of the two steps is still to come.
      TRIAL: params are those of the anchor, and healthy: the next loss decides.
      EPISODE: the loss was high there, too: the data are hard, the anchor is held.
      REWINDING: params go back for another reason; the second step is still to come.
    """

    HEALTHY = 0
    SUSPECT = 1
    RESTORING = 2
    TRIAL = 3
    EPISODE = 4
    REWINDING = 5


class RegulatorScalars(NamedTuple):
    """The regulator's report of the last step, its memory, and its counters.

    Attributes:
      grad_norm: global norm of the gradient before clipping, float32.
      scaled_error: rise of the loss above its median; 1 is tolerated, float32.
      scaled_norm_error: rise of the log gradient norm, likewise, float32.
      avg_value: exponential average of the accepted losses, float32.
      num_averaged: number of losses in that, up to 20, float32.
      damping_factor: factor of the updates, in [2^-10, 1], float32.
      base_rate: learning rate of this step without macro rate and damping; `UNKNOWN`
        where it is not known, float32.
      num_well: steps accepted since an update did harm, up to 2^20, float32.
      skips_left: steps whose norm alone is odd that may still be skipped, float32.
      ceiling: logarithm of the largest norm that did no harm, at most that of 5/4 of
        the bound, float32.
      ceiling_in_doubt: the same for the steps since losses became high, float32.
      doubt: evidence against the params, float32.
      peak_doubt: the largest doubt since it was 0 that usable losses made, float32.
      harmless_doubt: the largest doubt that subsided by itself, or that was the same at
        the anchor, float32.
      alignment: that of the last audit, in [-1, 1], float32.
      alignment_error: its standard error, float32.
      alignment_scale: the largest recent one, less its standard error, float32.
      look_sum: sum of the alignments of the looks at this anchor, each times its
        weight, float32.
      look_square: sum of the squares of these products, float32.
      look_cross: sum of the alignments, each times the square of its weight, float32.
      look_weight: sum of the weights, float32.
      look_weight_square: sum of their squares, float32.
      look_rise: sum of the products of gradient and way, float32.
      look_rise_square: sum of their squares, float32.
      look_variance: average variance of a single look, float32.
      num_looks: number of those looks, float32.
      verdict: the last `Verdict`, int32.
      conduct: the last `Conduct`, int32.
      num_hard: steps of the current `Conduct.EPISODE`, int32.
      num_accepted: number of steps accepted, including bounded ones, int32.
      num_bounded: number of steps accepted with a bounded gradient, int32.
      num_skipped: number of steps skipped, int32.
      num_rejected_in_a_row: steps skipped or reverted since the last accepted one,
        int32.
      num_skips_in_a_row: the last steps, as far as all were skipped because they were
        not finite, int32.
      num_lost: steps of such rows that ended without a revert, int32.
      num_revert_steps: number of steps spent on reverts (two each), int32.
      num_trials: reverts that test whether params are damaged, int32.
      num_harmful: trials that showed damage, int32.
      num_audits_passed: number of audits with a positive alignment, int32.
      anchor_age: accepted updates by which params are away from the anchor, int32.
    """

    grad_norm: Any = 0.0
    scaled_error: Any = 0.0
    scaled_norm_error: Any = 0.0
    avg_value: Any = 0.0
    num_averaged: Any = 0.0
    damping_factor: Any = 1.0
    base_rate: Any = UNKNOWN
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
    look_rise: Any = 0.0
    look_rise_square: Any = 0.0
    look_variance: Any = 0.0
    num_looks: Any = 0.0
    verdict: Any = 0
    conduct: Any = 0
    num_hard: Any = 0
    num_accepted: Any = 0
    num_bounded: Any = 0
    num_skipped: Any = 0
    num_rejected_in_a_row: Any = 0
    num_skips_in_a_row: Any = 0
    num_lost: Any = 0
    num_revert_steps: Any = 0
    num_trials: Any = 0
    num_harmful: Any = 0
    num_audits_passed: Any = 0
    anchor_age: Any = 0

    @property
    def is_pending(self) -> jax.Array:
        """Whether the second of the two steps of a revert is still to come."""
        rewinding = self.conduct == Conduct.REWINDING
        return (self.conduct == Conduct.RESTORING) | rewinding


class Look(NamedTuple):
    """Result of the conditional: what was seen of the anchor, and whether it moved.

    Attributes:
      is_seen: whether there was a look at this step, bool.
      is_taken: whether all looks at this anchor were summed up, bool.
      is_failed: whether they show that the first steps failed, bool.
      is_moved: whether the anchor is now at the params, bool.
      reach: how far a start that failed went, float32.
      alignment: weighted mean of the looks, float32.
      alignment_error: its standard error, float32.
      rise: mean product of gradient and way, float32.
      rise_error: its standard error, float32.
      look_sum, ..., num_looks: see `RegulatorScalars`.
    """

    is_seen: Any = False
    is_taken: Any = False
    is_failed: Any = False
    is_moved: Any = False
    reach: Any = 0.0
    alignment: Any = 0.0
    alignment_error: Any = 0.0
    rise: Any = 0.0
    rise_error: Any = 0.0
    look_sum: Any = 0.0
    look_square: Any = 0.0
    look_cross: Any = 0.0
    look_weight: Any = 0.0
    look_weight_square: Any = 0.0
    look_rise: Any = 0.0
    look_rise_square: Any = 0.0
    look_variance: Any = 0.0
    num_looks: Any = 0.0


LOOKS = (  # sums over looks, until an audit reports them
    "look_sum",
    "look_square",
    "look_cross",
    "look_weight",
    "look_weight_square",
    "look_rise",
    "look_rise_square",
    "num_looks",
)


class Assessment(NamedTuple):
    """What a step looks like, before anything is decided or remembered.

    Attributes:
      is_usable: whether loss and gradient are finite, bool.
      is_high: whether the loss is above what is tolerated; without a loss, the norm
        where no skips are left, bool.
      is_odd: whether the norm is above what is tolerated and the loss is not, bool.
      is_healthy: whether all errors are far below what is tolerated, bool.
      is_undone: whether much of the progress is lost; without a loss, `is_high`, bool.
      error: rise of the loss in units of what is tolerated, float32.
      norm_error: rise of the log norm likewise, float32.
      log_norm: logarithm of the norm, minus infinity for a norm of 0, float32.
      log_limit: logarithm of the norm that a bounded gradient may have, float32.
      bound: factor that scales the gradient down to that, float32.
      weight: norm in units of its median, at most that of a bounded gradient, and in
        [e^-20, e^20], float32.
      recorded: loss and log norm as the history records them, float32, (2,).
      signals: loss and log norm themselves, float32, (2,).
      is_recorded: which of the two is recorded, bool, (2,).
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
    bound: jax.Array
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
      is_new_level: whether high losses are taken for a new level, bool.
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
