"""Records of the search: its rule, its phases, and what it knows."""

import enum
from typing import Any, NamedTuple


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
