"""Nine decades of learning rates: what is left of a run whose rate is wrong.

Every optimizer trains every task of ``tasks.py`` at ``learning_rate`` 1e-7 ... 1e1,
three seeds each, all in one jitted, vmapped program for each optimizer and task. It is
compared with tuned AdamW: the best of 17 half decades, with linear decay to zero. A
cell is *within x %* when its final loss on the whole training set exceeds that of
tuned AdamW by at most x % of the drop that tuned AdamW made.

    python benchmarks/decades.py --out benchmarks/results/decades   # all, for hours
    python benchmarks/decades.py --quick                            # under 3 minutes
    python benchmarks/decades.py --only peers --tasks mlp cnn       # some of it
    python benchmarks/decades.py --report-only                      # tables and figure

A row that is stored is not run again, so that a run may be stopped and goes on later;
``--force`` runs it anew.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import peers
import rate_free
from decades_tables import NUM_PIECES, TUNED, Results, draw, report
from rich.progress import Progress
from store import opened, options_of, publish, rounded
from sweeps import HALF_DECADES, NUM_SEEDS, Rates, Row, best_index, seen
from tasks import TASKS, Task
from train import full_loss, grid, train_on

import lalerg_optax as lo
from lalerg_optax._judge_rule import JudgeRule
from lalerg_optax._search_rule import SearchRule

PyTree = Any


# Rows

ADAMW = Row(peers.ADAMW, "peers", lambda tuned: HALF_DECADES, has_curve=True)
LALERG = Row(peers.LALERG, "lalerg", final=seen)

# Constants of the rule, each halved and doubled: a factor in its logarithm, because
# half of a doubling is no growth at all, and a decay in the length of its memory.
CONSTANTS: dict[str, tuple[Any, str, tuple[Any, Any]]] = {
    "growth_factor": (lo.scale_by_macro_rate, "growth_factor", (2.0, 16.0)),
    "slow_growth_factor": (lo.scale_by_macro_rate, "slow_growth_factor", (1.225, 2.25)),
    "backoff_factor": (lo.scale_by_macro_rate, "backoff_factor", (0.707, 0.25)),
    "good_alignment": (lo.scale_by_macro_rate, "good_alignment", (0.125, 0.5)),
    **{
        f"{rule.__name__}.{name}": (rule, name, values)
        for rule, name, values in (
            (SearchRule, "waste", (0.35, 1.4)),
            (SearchRule, "share", (1 / 8, 1 / 2)),
            (SearchRule, "rise_errors", (0.25, 1.0)),
            (SearchRule, "steer_up", (0.25, 1.0)),
            (SearchRule, "downhill_room", (0.5, 2.0)),
            (SearchRule, "drift", (0.125, 0.5)),
            (SearchRule, "standard_errors", (1.0, 4.0)),
            (SearchRule, "first", (1.0, 4.0)),
            (SearchRule, "deep", (2.0, 8.0)),
            (JudgeRule, "min_anchor_every", (3, 9)),
            (JudgeRule, "noise_steps", (8.0, 32.0)),
        )
    },
    "threshold": (lo.lalerg, "threshold", (3.0, 12.0)),
    "anchor_every": (lo.lalerg, "anchor_every", (16, 64)),
    "b1": (lo.lalerg, "b1", (0.8, 0.95)),
    "b2": (lo.lalerg, "b2", (0.99, 0.999)),  # neither grows
    "gradient_share": (lo.lalerg, "gradient_share", (0.2, 0.8)),
}
# cheap ones; constants were chosen on them
CONSTANTS_TASKS = ("logistic", "regression", "factorization")


def alone(peer: peers.Peer, rate: float) -> Row:
    """Returns a row of what is run at one rate only, because it is said to fit all."""
    return Row(peer, "peers", rates=lambda tuned: (rate,))


def variants() -> list[Row]:
    """Returns the rows in which one constant is changed."""
    return [
        LALERG._replace(
            peer=peers.LALERG._replace(
                name=f"{name} = {value:.4g}", note="", sweep_note=""
            ),
            group="constants",
            num_seeds=1,
            tasks=CONSTANTS_TASKS,
            changed=(home, key, value),
        )
        for name, (home, key, values) in CONSTANTS.items()
        for value in values
    ]


@contextmanager
def in_force(changed: tuple[Any, str, Any] | None) -> Iterator[None]:
    """Changes one constant of the library: a default of a record or of a function."""
    if changed is None:
        yield
        return
    home, key, value = changed
    if isinstance(home, type):
        defaults = tuple((home._field_defaults | {key: value}).values())
        with mock.patch.object(home.__new__, "__defaults__", defaults):
            yield
    else:
        with mock.patch.dict(home.__kwdefaults__, {key: value}):
            yield


ROWS = (
    ADAMW,
    *(
        Row(peer, "peers")
        for peer in (
            peers.CONSTANT,
            peers.NADAMW,
            peers.CLIPPED,
            peers.FINITE,
            peers.SKIPPING,
            peers.PLATEAU,
            rate_free.MECHANIZED,
            rate_free.PRODIGY,
            rate_free.PRODIGY_FIRST,
            rate_free.DADAPT,
            rate_free.DADAPT_FIRST,
            rate_free.DOG,
            rate_free.DOG_FIRST,
            rate_free.MOMO,
            rate_free.SCHEDULE_FREE,
            rate_free.SCHEDULE_FREE_PLUS,
            peers.ADEMAMIX,
            peers.MUON,
            peers.AURA,
        )
    ),
    alone(peers.ALGOPERF, peers.ALGOPERF_RATE),
    alone(rate_free.SCHEDULE_FREE_DEFAULTS, 0.0025),
    alone(rate_free.SCHEDULE_FREE_PLUS_ALONE, 1.0),
    LALERG,
    Row(peers.ADAMS_RULE, "ablation", final=seen),
    Row(peers.NO_SEARCH, "ablation", final=seen),
    Row(
        peers.LALERG._replace(name=TUNED),
        "tuned",
        rates=lambda tuned: (tuned,),
        final=seen,
    ),
    Row(
        peers.DEFAULT,
        "default",
        rates=lambda tuned: (1e-3,),  # a name only: it is the default
        final=seen,
        has_curve=True,
    ),
    *variants(),
)
GROUPS = tuple(dict.fromkeys(row.group for row in ROWS))
QUICK_TASKS = ("logistic", "regression", "autoencoder")
QUICK_ROWS = (
    "adamw",
    "mechanize(adamw)",
    "prodigy, first estimate",
    "lalerg",
    "lalerg()",
)
QUICK_STEPS = 200


# Runs


def measure(
    task: Task, row: Row, rates: Rates, num_seeds: int, num_steps: int
) -> dict[str, Any]:
    """Runs all cells of a row in one program."""

    def cell(rate: jax.Array, seed: jax.Array) -> PyTree:
        _, end = train_on(task, row.peer.at(rate, num_steps), seed, num_steps)
        params = row.peer.eval_params(end.state, end.params)
        losses = [full_loss(task, a, params, end.rest) for a in (task.train, task.test)]
        pieces = jnp.array_split(end.kept, NUM_PIECES)
        curve = jnp.stack([piece.mean() for piece in pieces])
        return *losses, curve, row.final(end.state)

    cells = jax.jit(partial(grid, cell))
    with in_force(row.changed):
        out = cells(jnp.asarray(rates, jnp.float32), jnp.arange(num_seeds))
    train_loss, test_loss, curves, final = jax.tree.map(np.asarray, out)
    entry = {"train_loss": train_loss, "test_loss": test_loss} | final
    if row.has_curve:
        entry["curve"] = curves[best_index(train_loss)].mean(axis=0)
    return {name: rounded(x) for name, x in entry.items()}


def start_losses(task: Task) -> list[float]:
    """Returns the loss on the training set before anything is learnt, by seed."""

    def start_loss(seed: jax.Array) -> jax.Array:
        _, end = train_on(task, optax.set_to_zero(), seed, num_steps=1)
        return full_loss(task, task.train, end.params, end.rest)

    return rounded(np.asarray(jax.jit(jax.vmap(start_loss))(jnp.arange(NUM_SEEDS))))


def measure_all(
    results: Any,
    jobs: list[tuple[str, Row]],
    quick: bool,
    forced: tuple[str, ...],
    tuned: Callable[[str, Row], float] = lambda task, row: 0.0,
) -> None:
    """Runs every row that is not stored yet, or whose group is forced; stores it.

    Args:
      results: the store; its ``starts`` are the losses before anything is learnt.
      jobs: tasks and rows.
      quick: whether to run small and rough.
      forced: groups whose rows are run although they are stored.
      tuned: of a task and a row, the rate that the rates of the row depend on.
    """
    made: dict[str, Task] = {}
    with Progress() as progress:
        bar = progress.add_task("", total=len(jobs))
        for name, row in jobs:
            progress.update(bar, description=f"{name}: {row.name}"[:44].ljust(44))
            task = made.setdefault(name, TASKS[name]())
            rates = row.rates(tuned(name, row))
            cells = {
                "rates": list(rates[1::3] or rates if quick else rates),
                "num_seeds": 1 if quick else row.num_seeds,
                "num_steps": QUICK_STEPS if quick else task.num_steps,
            }
            if name not in results.starts:
                results.starts[name] = start_losses(task)
            results.measure(
                (name, row.name),
                cells,
                partial(measure, task, row, **cells),
                force=row.group in forced,
            )
            progress.advance(bar)


def main() -> None:
    """Measures, stores, and writes tables and figure."""
    options = options_of(__doc__, GROUPS, tuple(TASKS), tuple(TASKS))
    results = opened(Results, "decades", options)
    if not options.report_only:
        jobs = [
            (task, row)
            for task in options.tasks
            for row in ROWS
            if row is ADAMW or (row.group in options.only and task in row.tasks)
            if row.peer.is_there
        ]
        if options.quick:
            jobs = [j for j in jobs if j[0] in QUICK_TASKS and j[1].name in QUICK_ROWS]
        forced = tuple(options.only) if options.force else ()
        measure_all(
            results,
            jobs,
            options.quick,
            forced,
            lambda task, row: 0.0 if row is ADAMW else results.reference(task, "rates"),
        )
    publish(results, report(results, ROWS), draw)


if __name__ == "__main__":
    main()
