"""Learning rates over many decades: what ``decades.py`` and ``noise.py`` share.

Their results are told against AdamW tuned over half decades.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from peers import Peer
from tasks import TASKS

import lalerg_optax as lo

PyTree = Any
Rates = tuple[float, ...]

HALF_DECADES: Rates = tuple(float(f"{10 ** (k / 2):.5g}") for k in range(-14, 3))
DECADES = HALF_DECADES[::2]
NUM_SEEDS = 3
RATIOS = (1.1, 2.0)  # of final training losses, at most
RATIO_COLUMNS = ("at most 1.1 times", "at most 2 times", "median")


class Row(NamedTuple):
    """An optimizer, and at which rates, how often and on what it is run.

    Attributes:
      peer: the optimizer.
      group: what ``--only`` chooses.
      rates: tuned AdamW's rate to the rates that are run.
      num_seeds: runs at each rate.
      tasks: names of the tasks that it is run on.
      final: state to what else is stored of the end of a run, by name.
      has_curve: whether the curve at the best rate is stored.
      changed: a constant of the library that is another one here: where it is at
        home, its name, its value.
    """

    peer: Peer
    group: str
    rates: Callable[[float], Rates] = lambda tuned: DECADES
    num_seeds: int = NUM_SEEDS
    tasks: tuple[str, ...] = tuple(TASKS)
    final: Callable[[PyTree], dict[str, jax.Array]] = lambda state: {}
    has_curve: bool = False
    changed: tuple[Any, str, Any] | None = None

    @property
    def name(self) -> str:
        """How the tables call it."""
        return self.peer.name

    @property
    def note(self) -> str:
        """How it is run."""
        return self.peer.sweep_note or self.peer.note


def seen(state: PyTree) -> dict[str, jax.Array]:
    """Returns what is stored of a run of lalerg."""
    report = lo.metrics(state)
    names = ("num_revert_steps", "num_skipped", "macro_rate")
    return {name: report[name] for name in names}


def best_index(train_loss: Any) -> int:
    """Returns which rate has the lowest mean over the seeds."""
    means = np.asarray(train_loss, float).mean(axis=1)
    return int(np.argmin(np.where(np.isfinite(means), means, np.inf)))


def percent(x: float) -> str:
    """Returns an excess as a table shows it."""
    if not np.isfinite(x):
        return "diverged"
    return f"{x:+.2f}" if abs(x) < 100 else f"{x:+.3g}"


def ratio_shares(ratios: np.ndarray) -> list[str]:
    """Returns how many % of ratios of losses are at most 1.1 and 2, and the median."""
    if not ratios.size:
        return ["", "", ""]
    within = [f"{100 * np.mean(ratios <= most):.0f}" for most in RATIOS]
    return [*within, times(float(np.median(ratios)))]


def times(ratio: float) -> str:
    """Returns a ratio of losses as a table shows it."""
    return f"{ratio:.3g}" if np.isfinite(ratio) else "diverged"


def shares(cells: np.ndarray) -> list[str]:
    """Returns how many % of cells are within 5 %, within 1 %, better."""
    if not cells.size:
        return ["", "", ""]
    return [f"{100 * np.mean(s):.0f}" for s in (cells <= 5, cells <= 1, cells < 0)]
