"""A zoo of faults: what is left of a run that meets one.

Every optimizer trains every task at the rate of tuned AdamW (``decades.json``) with
linear decay, five seeds, once without and once with each of the faults below. A run is
*within 5 %* when its final loss on the whole training set exceeds that of the same
optimizer and seed without fault by at most 5 % of the drop that was made without it.

    python benchmarks/faults.py --out benchmarks/results/faults     # all, for hours
    python benchmarks/faults.py --quick                             # under 2 minutes
    python benchmarks/faults.py --tasks mlp photo --only lalerg     # some of it
    python benchmarks/faults.py --tasks SMALL                       # batch sizes 1, 8
    python benchmarks/faults.py --report-only                       # table and figure

With small batches, "mlp, batch 1", tasks and tuned rates are those of ``noise.json``.

A fault is data: for every step, what happens to batch, gradient, loss, update, rate,
parameters and moments. So one program for each task and optimizer runs them all. What
is stored is not run again, fault by fault, so that a run may be stopped; ``--force``
runs it anew.
"""

import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from decades_tables import Results
from fault_zoo import FAULTS, HOOKS, NONE, Fault, Plan, poisoned
from faults_tables import OPTIMIZERS, SMALL_BATCHES, Runs, draw, report
from jax import lax
from noise_tables import stored as noise_stored
from noise_tasks import CASES as NOISE_CASES
from peers import Peer, linear
from rich.progress import Progress
from store import RESULTS, opened, options_of, publish, rounded
from tasks import TASKS, Batch, Task
from train import Taken, full_loss, is_finite, train_on

import lalerg_optax as lo

PyTree = Any

NUM_SEEDS = 5
AT_A_TIME = 8  # faults run side by side; more do not fit into a cache
FAULT_TASKS = (
    "mlp",
    "autoencoder",
    "regression",
    "factorization",
    "photo",
    "words",
)
SMALL_OPTIMIZERS = (
    "lalerg",
    "lalerg, no search",
    "error_regulate(adamw)",
    "adamw",
    "clip + adamw",
)
QUICK_TASKS = ("regression", "photo")
QUICK_OPTIMIZERS = ("lalerg", "lalerg, no search", "adamw", "clip + adamw")
QUICK_STEPS = 300


def run(
    task: Task,
    peer: Peer,
    rate: float,
    seed: jax.Array,
    plan: Plan,
    see: Callable[[PyTree], Any] = lambda state: None,
) -> dict[str, Any]:
    """One run; a pure function of seed and plan."""
    num_steps = len(plan.poison)
    schedule = linear(rate, num_steps)
    tx = peer.make(lambda count: schedule(count) * plan.rate_factor[count], num_steps)

    def keep(taken: Taken) -> PyTree:
        return is_finite(taken.params), taken.loss, see(taken.state)

    def change(batch: Batch, now: Plan) -> Batch:
        return poisoned(batch, task.train, now.poison)

    hooks = HOOKS._replace(apply=peer.apply, keep=keep)
    start, end = train_on(task, tx, seed, num_steps, plan, hooks, change)
    are_finite, losses, seen = end.kept
    result = {
        "train_loss": full_loss(task, task.train, end.params, end.rest),
        "start_loss": full_loss(task, task.train, *start),
        "num_not_finite": (~are_finite).sum(),
    }
    if peer.is_own:
        report = lo.metrics(end.state)
        result |= {k: report[k] for k in ("num_skipped", "num_revert_steps")}
    if seen is not None:
        result |= {"losses": losses, "seen": seen}
    return result


def measure(
    task: Task,
    peer: Peer,
    rate: float,
    faults: Iterable[Fault],
    num_seeds: int,
    num_steps: int,
    see: Callable[[PyTree], Any] = lambda state: None,
) -> dict[str, np.ndarray]:
    """Runs all faults and seeds in one program; arrays are [fault, seed]."""
    plans = jax.tree.map(
        lambda *rows: jnp.asarray(np.stack(rows)),
        *(
            jax.tree.map(
                lambda *rows: np.stack(rows),
                *(fault.plan(seed, num_steps) for seed in range(num_seeds)),
            )
            for fault in faults
        ),
    )
    one = partial(run, task, peer, rate, see=see)

    @jax.jit
    def cells(seeds: jax.Array, plans: Plan) -> PyTree:
        return lax.map(
            lambda plan: jax.vmap(one)(seeds, plan), plans, batch_size=AT_A_TIME
        )

    return jax.tree.map(np.asarray, cells(jnp.arange(num_seeds), plans))


def task_of(name: str) -> Task:
    """Returns a task, that of small batches among them."""
    if name not in SMALL_BATCHES:
        return TASKS[name]()
    of, size = SMALL_BATCHES[name]
    case = NOISE_CASES[of]
    return case.make()._replace(batch_size=size, num_steps=case.num_steps)


def rates_of(names: Iterable[str]) -> dict[str, float]:
    """Returns the rates of tuned AdamW."""
    tuned = Results(RESULTS / "decades.json")
    tuned.load()
    noisy = noise_stored()
    return {
        name: noisy.reference(*SMALL_BATCHES[name], "rates")
        if name in SMALL_BATCHES
        else tuned.reference(name, "rates")
        for name in names
    }


def entry_of(
    task: Task,
    peer: Peer,
    faults: tuple[Fault, ...],
    stored: dict[str, Any],
    **settings: Any,
) -> dict[str, Any]:
    """Runs what is not stored of the faults of an optimizer and a task.

    Returns:
      What is stored of all of them, in their order.
    """
    is_same = all(stored.get(name) == x for name, x in settings.items())
    known = stored["faults"] if is_same else []
    missing = [fault for fault in faults if fault.name not in known]
    started = time.perf_counter()
    new = measure(task, peer, faults=missing, **settings) if missing else {}
    lists = [n for n, x in stored.items() if isinstance(x, list) and n != "faults"]
    found = {
        name: dict(zip(known, stored.get(name, []), strict=False))
        | {f.name: rounded(row) for f, row in zip(missing, rows, strict=True)}
        for name, rows in (new or dict.fromkeys(lists, ())).items()
    }
    seconds = time.perf_counter() - started + (stored["seconds"] if known else 0.0)
    return {
        "seconds": round(seconds, 1),
        **{name: [rows[f.name] for f in faults] for name, rows in found.items()},
    }


def measure_all(
    results: Runs,
    rates: dict[str, float],
    jobs: list[tuple[str, Peer]],
    faults: tuple[Fault, ...],
    quick: bool,
    force: bool,
) -> None:
    """Runs every optimizer and task that is not stored yet; stores it."""
    made: dict[str, Task] = {}
    with Progress() as progress:
        bar = progress.add_task("", total=len(jobs))
        for name, peer in jobs:
            label = f"{name}: {peer.name}"
            progress.update(bar, description=label[:36].ljust(36))
            if name not in made:
                made[name] = task_of(name)
            task = made[name]
            settings = {
                "rate": rates[name],
                "num_seeds": 1 if quick else NUM_SEEDS,
                "num_steps": QUICK_STEPS if quick else task.num_steps,
            }
            cells = settings | {"faults": [fault.name for fault in faults]}
            results.measure(
                (name, peer.name),
                cells,
                partial(
                    entry_of,
                    task,
                    peer,
                    faults,
                    {} if force else results.runs.get((name, peer.name), {}),
                    **settings,
                ),
                force,
            )
            progress.advance(bar)


def main() -> None:
    """Measures, stores, and writes tables and figure."""
    names = [peer.name for peer in OPTIMIZERS]
    words = ("SMALL", *TASKS, *SMALL_BATCHES)
    options = options_of(__doc__, names, (*FAULT_TASKS, "SMALL"), words)
    results = opened(Runs, "faults", options)
    if not options.report_only:
        tasks, faults = [t for t in options.tasks if t != "SMALL"], (NONE, *FAULTS)
        tasks += [t for t in SMALL_BATCHES if "SMALL" in options.tasks]
        chosen = [p for p in OPTIMIZERS if p.name in options.only]
        if options.quick:
            tasks = [t for t in tasks if t in QUICK_TASKS]
            chosen = [p for p in chosen if p.name in QUICK_OPTIMIZERS]
            faults = (NONE, *FAULTS[::3])
        jobs = [
            (task, peer)
            for task in tasks
            for peer in chosen
            if task not in SMALL_BATCHES or peer.name in SMALL_OPTIMIZERS
        ]
        measure_all(
            results, rates_of(tasks), jobs, faults, options.quick, options.force
        )
    publish(results, report(results), draw)


if __name__ == "__main__":
    main()
