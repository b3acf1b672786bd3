"""Records of the search: its rule, its phases, and what it knows."""

import enum
from typing import Any, NamedTuple

from ._numbers import LARGEST


class SearchRule(NamedTuple):
    """Numbers of the search; those that users see may be traced.

    Attributes:
      anneal: whether the rate keeps falling: where no schedule does.
      growth_factor: see `scale_by_macro_rate`, as the next four.
      slow_growth_factor: likewise.
      backoff_factor: likewise.
      good_alignment: likewise.
      audit_every: likewise.
      max_rate: bound of the rate, and of its inverse.
      standard_errors: how many of them make a difference clear.
      drift: by how much, in units of the best, the alignment may change from one audit
        to the next: this makes old audits count less.
      share: share of the run so far over which rise and loss are averaged; audits of
        fewer steps steer the rate by less.
      waste: rise on the way from the anchor to the params at a good rate, in
        units of the square root of share of the run, progress, and noise of a loss.
        Chosen, as the next seven, on development tasks of ``benchmarks/noise.py`` and
        ``benchmarks/decades.py``.
      annealed_waste: the same without a schedule, in units of the share itself: there
        the rate has to keep falling.
      least_noise: deviation of a loss, in units of the progress, at least.
      most_noise: the same, at most.
      rise_errors: standard errors that are added to a rise.
      clear_errors: standard errors below zero at which the way still leads downhill.
      downhill_room: octaves by which the rate is then too low, at least.
      steer_up: exponent of the largest growth of a rate that was found.
      steer_down: the same of its largest fall.
      num_start: losses that give the loss at the start, if no audit precedes.
      first: power of ``backoff_factor`` after the first good audit of a run.
      first_reach: how far the first steps should lead, in units of the params.
      deep: the same for a run that had to go back to its start, and each time it does.
      blind: share of a leap where the alignment is not known.
      target: alignment, in units of its best, that a rate is steered to without a loss.
      slope: of that steering.
      annealed_target: the target without a schedule.
      annealed_floor: exponent of the largest growth without a schedule where the loss
        is at its floor: there nothing else lowers the rate, which the next change of
        data will meet. Chosen on *classes* of ``benchmarks/mixtures.py``, but *growing*
        and *permuted* had been looked at.
      best_errors: standard errors by which an alignment has to be above the best.
      least_gain: least gain of a window for which a higher rate is worth it, in units
        of the progress at the pace so far.
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
    share: float = 1.0 / 4.0
    waste: float = 0.7
    annealed_waste: float = 2.0
    least_noise: float = 0.01
    most_noise: float = 3.0
    rise_errors: float = 0.5
    clear_errors: float = 3.0
    downhill_room: float = 1.0
    steer_up: float = 0.5
    steer_down: float = 4.0
    num_start: int = 8
    first: float = 2.0
    first_reach: float = 1e-3
    deep: float = 4.0
    blind: float = 0.5
    target: float = -0.2
    slope: float = 2.0
    annealed_target: float = 0.15
    annealed_floor: float = -0.5
    best_errors: float = 1.0
    least_gain: float = 0.01


class Phase(enum.IntEnum):
    """How far the search is.

    Attributes:
      START: no audit was good yet.
      RESTARTED: the same, and the run had to go back to its start.
      SEARCH: the rate grows by leaps.
      STEER: the rate was found, and moves in small steps.
    """

    START = 0
    RESTARTED = 1
    SEARCH = 2
    STEER = 3


class MacroScalars(NamedTuple):
    """What the macro level knows.

    Attributes:
      macro_rate: factor of the updates, in [2^-40, 2^40], float32.
      top_rate: the highest rate of the schedule since the rate was found, float32.
      avg_alignment: estimate of the alignment, from all audits, float32.
      alignment_spread: its variance, if it may drift between audits, float32.
      alignment_noise: its variance from the noise of looks alone, float32.
      best_alignment: the largest alignment that was clear, float32.
      avg_rise: average rise of the loss from anchor to params, in units of the squared
        rate, float32.
      avg_rise_error: its standard error, float32.
      avg_loss: average loss over the same share of the run, float32.
      start_loss: mean of the first losses, less its standard error, float32.
      window_mean: mean of the losses accepted since the last audit, float32.
      window_sum_of_squares: of their deviations from that mean; -1 where no step of the
        window had a loss, float32.
      loss_variance: average variance of a loss within a window, float32.
      first_window_mean: mean loss until it had clearly come down, float32.
      last_window_mean: the mean of the window before, float32.
      last_window_variance: the variance of that mean, float32.
      best_window_mean: the lowest mean of a whole window, float32.
      phase: the `Phase`, int32.
      num_audits: number of audits at which params had moved, since a good alignment
        has to be learnt, int32.
      window_count: number of accepted steps in the window, int32.
      num_macro_steps: number of all accepted steps, int32.
      num_windows: number of windows that are complete, int32.
      num_macro_held: number of steps that left the rate unchanged, because of the
        verdict or of a number that is not finite, int32.
    """

    macro_rate: Any = 1.0
    top_rate: Any = 0.0
    avg_alignment: Any = 0.0
    alignment_spread: Any = 0.0
    alignment_noise: Any = 0.0
    best_alignment: Any = 0.0
    avg_rise: Any = 0.0
    avg_rise_error: Any = 0.0
    avg_loss: Any = 0.0
    start_loss: Any = -LARGEST
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
