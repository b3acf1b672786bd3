"""Any learning rate, any batch size: what is left of a run whose gradients are noise.

Every optimizer trains every task at batch sizes 1 ... 64 and at ``learning_rate`` 1e-7
... 1e1, three seeds each. It is compared with AdamW *tuned at the same batch size*: the
best of 17 half decades, with linear decay to zero. A cell is *within x %* when its
final loss on the whole training set exceeds that of tuned AdamW by at most x % of the
drop that tuned AdamW made. The noise is of several kinds: few examples, hard examples,
sparse gradients, one sample of a posterior, a score-function estimate, few tokens.

Two parts ask for more than noise. *Plateaus*: how many runs get stuck where the loss is
flat at first. *Full*: small networks on a few digits, all of them at every step.

    python benchmarks/noise.py --out benchmarks/results/noise   # all, for hours
    python benchmarks/noise.py --quick                          # about a minute
    python benchmarks/noise.py --only adamw                     # tuned AdamW, first
    python benchmarks/noise.py --only lalerg --tasks mlp bandit # some of it
    python benchmarks/noise.py --tasks CHOOSE                   # and not REPORT
    python benchmarks/noise.py --only plateaus full             # the other parts
    python benchmarks/noise.py --report-only                    # tables and figure

A row that is stored is not run again, so that a run may be stopped and goes on later;
``--force`` runs it anew. Two runs may fill one file at the same time. To try a variant
without storing anything, call `cells` from a script beside this one.
"""

from collections.abc import Callable, Iterable
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import peers
import rate_free
from jax import lax
from noise_tables import FACTORS, FULL_RATES, Results, draw, report, stored
from noise_tasks import CASES, CHOOSE, FULL, NOISE, PLATEAUS, REPORT
from rich.progress import Progress
from store import opened, options_of, publish, rounded
from sweeps import DECADES, HALF_DECADES, NUM_SEEDS, Rates, Row, seen
from tasks import Task
from train import Hooks, full_loss, grid, keys_at, on_batch, train

PyTree = Any

GROUPS = ("adamw", "lalerg", "tuned", "peers", "plateaus", "full")
SETS = {"CHOOSE": CHOOSE, "REPORT": REPORT, "PLATEAUS": PLATEAUS}
QUICK_CASES = ("logistic", "poisson", "xor", "tanh1_16_500")
QUICK_STEPS = 100


# Rows


def both(tuned: float) -> Rates:
    """Returns the decades, and tuned AdamW's own rate."""
    return (*DECADES, tuned)


def only_tuned(tuned: float) -> Rates:
    """Returns tuned AdamW's own rate."""
    return (tuned,)


ADAMW = Row(peers.ADAMW, "adamw", lambda tuned: HALF_DECADES)
LALERG = Row(peers.LALERG, "lalerg", both, final=seen)
ROWS = (
    ADAMW,
    LALERG,
    Row(peers.NO_SEARCH, "tuned", only_tuned),
    Row(peers.REGULATED, "tuned", only_tuned),
    *(
        Row(peer, "peers")
        for peer in (
            rate_free.PRODIGY,
            rate_free.PRODIGY_FIRST,
            rate_free.SCHEDULE_FREE,
        )
    ),
)
ON_PLATEAUS = LALERG._replace(
    group="plateaus", rates=lambda tuned: tuple(tuned * f for f in FACTORS)
)
ON_FULL = LALERG._replace(group="full", rates=lambda tuned: FULL_RATES)


# Runs


@cache
def task_of(name: str) -> Task:
    """Returns a task, made once."""
    return CASES[name].make()


@cache
def starts(name: str, num_seeds: int) -> tuple[PyTree, jax.Array]:
    """Returns where the runs of a task begin, and their losses there, by seed."""
    task = task_of(name)

    def start(seed: jax.Array) -> tuple[PyTree, jax.Array]:
        params, rest = task.init(jax.random.key(seed))
        return (params, rest), full_loss(task, task.train, params, rest)

    return jax.jit(jax.vmap(start))(jnp.arange(num_seeds))


def cell(
    task: Task,
    row: Row,
    batch_sizes: tuple[int, ...],
    num_steps: int,
    which: jax.Array,
    rate: jax.Array,
    begin: tuple[jax.Array, PyTree],
) -> tuple[jax.Array, PyTree]:
    """Returns the loss on the whole training set after a run, and what else is kept.

    With one of several batch sizes: the optimizer takes most of the time to compile,
    and is the same for all of them.
    """
    seed, start = begin
    key = jax.random.key(seed)
    branches = [partial(on_batch, task, size) for size in batch_sizes]

    def gradient(params: PyTree, rest: PyTree, i: jax.Array, now: None) -> PyTree:
        del now
        return lax.switch(which, branches, params, rest, keys_at(key, i))

    tx, hooks = row.peer.at(rate, num_steps), Hooks(keep=lambda taken: None)
    end = train(tx, gradient, start, num_steps, hooks=hooks)
    params = row.peer.eval_params(end.state, end.params)
    return full_loss(task, task.train, params, end.rest), row.final(end.state)


def program(
    name: str,
    row: Row,
    batch_sizes: tuple[int, ...],
    num_steps: int,
    num_seeds: int,
) -> Callable[[int, Rates], dict[str, np.ndarray]]:
    """Returns what runs all cells of a row at one of the batch sizes.

    It is compiled once for all of them. The cells run one after the other: side by side
    they would leave the cache, take both sides of every condition, and take twice as
    long to compile.
    """
    one = partial(cell, task_of(name), row, batch_sizes, num_steps)

    @jax.jit
    def every(which: jax.Array, rates: jax.Array, begin: PyTree) -> PyTree:
        seeds = jnp.arange(num_seeds), begin
        return grid(partial(one, which), rates, seeds, side_by_side=False)

    def measured(batch_size: int, rates: Rates) -> dict[str, np.ndarray]:
        which = batch_sizes.index(batch_size)
        begin, _ = starts(name, num_seeds)
        losses, final = every(which, jnp.asarray(rates, jnp.float32), begin)
        return jax.tree.map(np.asarray, {"train_loss": losses} | final)

    return measured


def measure(
    results: Results, name: str, row: Row, is_quick: bool, is_forced: bool
) -> None:
    """Runs a row on a task at all batch sizes that are not stored yet."""
    case = CASES[name]
    num_seeds = case.num_tuning_seeds if row.name == ADAMW.name else case.num_seeds
    num_seeds = 1 if is_quick else num_seeds
    num_steps = QUICK_STEPS if is_quick else case.num_steps
    sizes = case.batch_sizes[::4] if is_quick else case.batch_sizes
    run = program(name, row, sizes, num_steps, num_seeds)

    def measured(size: int, rates: Rates) -> dict[str, Any]:
        entry = run(size, rates)
        if row.name == ADAMW.name:
            entry["start_loss"] = np.asarray(starts(name, num_seeds)[1])
        return {field: rounded(x) for field, x in entry.items()}

    for size in sizes:
        if row.name == ADAMW.name:
            rates = case.tuning
        else:
            rates = row.rates(results.reference(name, size, "rates"))
        rates = rates[::3] if is_quick and len(rates) > 3 else rates
        cells = {"rates": list(rates), "num_seeds": num_seeds, "num_steps": num_steps}
        key = (name, str(size), row.name)
        results.measure(key, cells, partial(measured, size, rates), force=is_forced)


def jobs_of(only: Iterable[str], names: Iterable[str]) -> list[tuple[str, Row]]:
    """Returns what is to be run, tuned AdamW first."""
    jobs = [
        *((name, row) for row in ROWS[1:] for name in NOISE),
        *((name, ON_PLATEAUS) for name in PLATEAUS),
        *((name, ON_FULL) for name in FULL),
    ]
    asked = [
        (name, row)
        for name, row in jobs
        if row.group in only and (name in names or name in FULL)
    ]
    needed = {name for name, _ in asked}
    if "adamw" in only:
        needed |= set(FULL).union(names)
    return [*((name, ADAMW) for name in CASES if name in needed), *asked]


def cells(
    task_name: str,
    batch_size: int,
    make: peers.Make,
    rates: Rates = DECADES,
    num_seeds: int = NUM_SEEDS,
) -> np.ndarray:
    """Tries a variant without storing it.

    Args:
      task_name: a key of ``CASES``.
      batch_size: one of its batch sizes (1 for a full batch).
      make: (learning rate, number of steps) to the transformation.
      rates: learning rates to try.
      num_seeds: runs at each rate.

    Returns:
      Excess over the stored tuned AdamW in % of its drop, [rate, seed].
    """
    return cells_of_sizes(task_name, (batch_size,), make, rates, num_seeds)[0]


def cells_of_sizes(
    task_name: str,
    batch_sizes: tuple[int, ...],
    make: peers.Make,
    rates: Rates = DECADES,
    num_seeds: int = NUM_SEEDS,
) -> np.ndarray:
    """Tries a variant as `cells` does, compiled once for several batch sizes.

    Returns:
      Excess over the stored tuned AdamW in % of its drop, [batch size, rate, seed].
    """
    row = Row(peers.Peer("", make, schedule=peers.as_it_is), "")
    num_steps = CASES[task_name].num_steps
    run = program(task_name, row, batch_sizes, num_steps, num_seeds)
    results = stored()
    return np.stack(
        [
            results.percents(task_name, size, run(size, rates)["train_loss"])
            for size in batch_sizes
        ]
    )


def main() -> None:
    """Measures, stores, and writes tables and figure."""
    names = (*SETS, *NOISE, *PLATEAUS)
    options = options_of(__doc__, GROUPS, tuple(SETS), names)
    results = opened(Results, "noise", options)
    if not options.report_only:
        asked = {n for word in options.tasks for n in SETS.get(word, (word,))}
        jobs = jobs_of(options.only, asked)
        if options.quick:
            jobs = [j for j in jobs if j[0] in QUICK_CASES and j[1].group != "peers"]
        with Progress() as progress:
            bar = progress.add_task("", total=len(jobs))
            for name, row in jobs:
                progress.update(bar, description=f"{name}: {row.name}"[:44].ljust(44))
                is_forced = options.force and row.group in options.only
                measure(results, name, row, options.quick, is_forced)
                progress.advance(bar)
    publish(results, report(results, ROWS), draw)


if __name__ == "__main__":
    main()
