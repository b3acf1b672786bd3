"""On held-out data, by the metric that a user looks at: does the rate matter?

Tuned AdamW trains the tasks of ``decades.py``, and so do AdamW and ``lalerg`` at a
thousandth and a thousand times of its rate: error, signal-to-noise ratio or ELBO on
the fifth of the data that is held out, in standard deviations of tuned AdamW's seeds.
Tuned is by the training loss, with ``decades.py`` and on other seeds than these.

    python benchmarks/heldout.py --out benchmarks/results/heldout   # all, half an hour
    python benchmarks/heldout.py --quick                            # a minute
    python benchmarks/heldout.py --report-only                      # tables

A row that is stored is not run again; ``--force`` runs it anew.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from decades_tables import Results as Decades
from heldout_tables import FACTORS, METRICS, OPTIMIZERS, Results, report
from peers import Peer
from rich.progress import Progress
from store import RESULTS, opened, options_of, publish, rounded
from sweeps import NUM_SEEDS as NUM_TUNING_SEEDS
from tasks import TASKS, Task
from train import full_loss, grid, train_on

PyTree = Any
NUM_SEEDS = 5
QUICK_TASKS = ("logistic", "vae")
QUICK_STEPS, QUICK_SEEDS = 100, 2


def tuned_rates() -> dict[str, float]:
    """Returns the rates of tuned AdamW that ``decades.py`` found, by task."""
    stored = Decades(RESULTS / "decades.json")
    stored.load()
    return {task: stored.reference(task, "rates") for task in TASKS}


def run(
    name: str, task: Task, peer: Peer, num_steps: int, rate: jax.Array, seed: jax.Array
) -> dict[str, jax.Array]:
    """Trains; returns the losses before and after, and the metric on held-out data."""
    start, end = train_on(task, peer.at(rate, num_steps), seed, num_steps)
    params = peer.eval_params(end.state, end.params)
    out = task.predict(params, end.rest, task.test)
    return {
        "start_loss": full_loss(task, task.train, *start),
        "train_loss": full_loss(task, task.train, params, end.rest),
        "metric": METRICS[name].of(out, task.test[-1]),
    }


def measure(
    name: str, task: Task, peer: Peer, rate: float, num_steps: int, num_seeds: int
) -> dict[str, Any]:
    """Returns what is stored of all runs of an optimizer on a task."""
    rates = rate * jnp.asarray(FACTORS)
    seeds = NUM_TUNING_SEEDS + jnp.arange(num_seeds)
    every = jax.jit(partial(grid, partial(run, name, task, peer, num_steps)))
    found = jax.tree.map(np.asarray, every(rates, seeds))
    found["start_loss"] = found["start_loss"][0]  # the same at every rate
    entry = {field: rounded(x) for field, x in found.items()}
    return {"num_held_out": task.test[-1].size} | entry


def main() -> None:
    """Measures, stores, and writes the tables."""
    names = tuple(peer.name for peer in OPTIMIZERS)
    options = options_of(__doc__, names, tuple(TASKS), tuple(TASKS))
    results = opened(Results, "heldout", options)
    asked = [n for n in options.tasks if not options.quick or n in QUICK_TASKS]
    todo = [
        (name, peer)
        for name in asked
        for peer in OPTIMIZERS
        if peer.name in options.only
    ]
    if not options.report_only:
        rates = tuned_rates()
        with Progress() as progress:
            for name, peer in progress.track(todo, description="runs"):
                task = TASKS[name]()
                cells = {
                    "rate": rates[name],
                    "factors": list(FACTORS),
                    "num_steps": QUICK_STEPS if options.quick else task.num_steps,
                    "num_seeds": QUICK_SEEDS if options.quick else NUM_SEEDS,
                }
                measured = partial(
                    measure,
                    name,
                    task,
                    peer,
                    cells["rate"],
                    cells["num_steps"],
                    cells["num_seeds"],
                )
                results.measure((name, peer.name), cells, measured, options.force)
    publish(results, report(results))


if __name__ == "__main__":
    main()
