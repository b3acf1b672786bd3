"""Rule of the regulator: its numbers, and where they come from."""

import math
from typing import Any, NamedTuple


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
      norm_floor: logarithm of the growth of the norm that is always tolerated; judged
        on the runs of ``benchmarks/alarms.py``.
      bound_floor: logarithm of the norm that a bounded gradient may have, in units of
        the median. At the median itself rare data are not learnt, at 16 times they are
        (``benchmarks/mixtures.py``).
      slack: part of an error that is not evidence: five standard deviations of the sum
        lie between normal noise and `least_doubt`.
      least_doubt: evidence that starts a trial: that of two high losses.
      least_row: steps in a row that are not finite and start one, at least.
      log_chance: logarithm of the probability at which a row of skips is no chance.
      num_prior: steps that are added to those of a run, to tell the share of skips.
      suspect: evidence at which the anchor is held.
      widening: of the tolerance, by each 5 % of a window that are alarms; chosen on the
        regression of ``benchmarks/faults.py``.
      longer: doubt that is taken for harmless from then on, in units of that of a trial
        after a first harm; chosen, as the next two and `fall`, on development streams
        of ``benchmarks/mixtures.py`` and two tasks of ``benchmarks/faults.py``.
      apart: accepted steps between the harm and the trial, at least.
      undone: share of the progress that is too much for rare data to undo.
      growth: of the logarithm of the bound, where a bounded gradient did no harm.
      num_skips: steps whose norm alone is odd that may be skipped, at first.
      skip_memory: accepted steps that restore one of these skips.
      avg_decay: decay of the average loss.
      healthy: params with errors below this may become the anchor.
      fall: share of its last value to which an error falls when hard data end.
      min_damping: lower bound of the damping.
      noise_steps: looks of an audit for each variance of a look in units of the squared
        alignment; the longest way that they look back on grows with their number.
      least_steps: the same for the shortest way, in units of the largest recent squared
        alignment; chosen on development tasks of ``benchmarks/noise.py`` and
        ``benchmarks/decades.py``.
      scale_decay: decay of the largest recent alignment, at an audit.
      min_anchor_every: accepted steps between anchors at first; odd, so that an
        oscillation is not back at its start.
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
    least_row: float = 2.0
    log_chance: float = math.log(1e-4)
    num_prior: int = 8
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
