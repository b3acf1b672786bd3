"""Programs of the kinds that researchers write: is anything worse, and what is better?

Each of `program_zoo.MAKERS` is trained by the optimizer that is usual for it, at its
usual rate, at a thousandth and at a thousand times of it; by `lalerg` at the same
three; and by `error_regulate` around the usual one. Five seeds, the same for all.
Nothing goes wrong in any of them. Two bars: the training loss ends above that of the
usual optimizer by at most 2 % of its drop or one standard deviation of its seeds, and
nothing is skipped or reverted.

    python benchmarks/programs.py            # about 40 minutes
    python benchmarks/programs.py --quick    # two minutes
    python benchmarks/programs.py --only lalerg --tasks flow PINN
    python benchmarks/programs.py --report-only

What is stored is not run again, so that a run may be stopped and goes on later;
``--force`` runs it anew.
"""

import contextlib
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from program_zoo import MAKERS, Program, made
from programs_tables import FORMS, LALERG, USUAL, Results, report
from rich.progress import Progress
from store import opened, options_of, publish, rounded
from train import Hooks, Taken, grid, is_finite, train

import lalerg_optax as lo

PyTree = Any
NUM_SEEDS = 5
QUICK_SEEDS, QUICK_SHARE, QUICK = 2, 20, ("ELBO", "graph", "least squares")
COUNTS = ("num_skipped", "num_reverts", "num_harmful", "macro_rate")


def nothing(taken: Taken) -> None:
    """Keeps nothing of a step."""
    del taken


def optimizer(program: Program, form: str, rate: Any, num_steps: int) -> Any:
    """Returns the optimizer of a form at a rate."""
    schedule = program.schedule(rate, num_steps)
    if form == LALERG:
        return lo.lalerg(schedule, weight_decay=program.weight_decay)
    usual = program.usual(schedule)
    return usual if form == USUAL else lo.error_regulate(usual)


def precision(program: Program) -> contextlib.AbstractContextManager[Any]:
    """Returns the context in which a program is run."""
    return jax.enable_x64(program.is_double)


def run(
    program: Program,
    form: str,
    num_steps: int,
    rate: jax.Array,
    seed: jax.Array,
    keep: Callable[[Taken], Any] = nothing,
) -> dict[str, Any]:
    """Trains; returns loss and metric before and after, and what was decided.

    Args:
      program: the program.
      form: a key of `FORMS`.
      num_steps: steps of the run.
      rate: the learning rate.
      seed: of params and batches.
      keep: what is kept of a step that was taken.
    """
    key = jax.random.key(seed)

    def gradient(params: PyTree, rest: PyTree, i: jax.Array, now: None) -> PyTree:
        del now
        return program.gradient(params, rest, jax.random.fold_in(key, i))

    def told(loss: jax.Array, grads: PyTree, now: None) -> tuple[Any, PyTree]:
        del now
        return loss if program.is_told else None, grads

    def applied(params: PyTree, updates: PyTree, state: PyTree) -> PyTree:
        if form == USUAL:
            return optax.apply_updates(params, updates)
        return lo.apply_updates(params, updates, state)

    tx = optimizer(program, form, rate, num_steps)
    start = program.init(key)
    hooks = Hooks(told=told, apply=applied, keep=keep)
    end = train(tx, gradient, start, num_steps, hooks=hooks)
    start_loss, start_metric = program.judge(*start)
    loss, metric = program.judge(end.params, end.rest)
    report = {} if form == USUAL else lo.metrics(end.state)
    return {
        "start_loss": start_loss,
        "start_metric": start_metric,
        "loss": loss,
        "metric": metric,
        "is_alive": is_finite(end.params),
        "kept": end.kept,
        **{name: report[name] for name in COUNTS if report},
    }


def runs(
    program: Program,
    form: str,
    num_steps: int,
    num_seeds: int,
    factors: tuple[float, ...] = (),
    keep: Callable[[Taken], Any] = nothing,
    side_by_side: bool = True,
) -> dict[str, Any]:
    """Returns what is left of all runs of a form, [factor of the rate, seed].

    Args:
      program: the program.
      form: a key of `FORMS`.
      num_steps: steps of a run.
      num_seeds: runs at each rate.
      factors: of the usual rate; by default those of the form.
      keep: what is kept of a step that was taken.
      side_by_side: see `train.grid`; not, where compiling takes longest.
    """
    with precision(program):
        rates = program.rate * jnp.asarray(factors or FORMS[form])
        one = partial(run, program, form, num_steps, keep=keep)
        every = jax.jit(partial(grid, one, side_by_side=side_by_side))
        found = every(rates, jnp.arange(num_seeds))
        return jax.tree.map(np.asarray, found)


def measure(
    program: Program, form: str, num_steps: int, num_seeds: int
) -> dict[str, Any]:
    """Returns what is stored of all runs of a form."""
    found = runs(program, form, num_steps, num_seeds)
    del found["kept"]
    for name in ("start_loss", "start_metric"):  # the same at every rate
        found[name] = found[name][0]
    return {name: rounded(x) for name, x in found.items()}


def main() -> None:
    """Measures, stores, and writes the tables."""
    options = options_of(__doc__, tuple(FORMS), tuple(MAKERS), tuple(MAKERS))
    results = opened(Results, "programs", options)
    names = [n for n in options.tasks if not options.quick or n in QUICK]
    todo = [(name, form) for name in names for form in options.only]
    if not options.report_only:
        with Progress() as progress:
            for name, form in progress.track(todo, description="runs"):
                program = made(name)
                share = QUICK_SHARE if options.quick else 1
                num_steps = program.num_steps // share
                num_seeds = QUICK_SEEDS if options.quick else NUM_SEEDS
                cells = {
                    "rate": program.rate,
                    "factors": list(FORMS[form]),
                    "num_steps": num_steps,
                    "num_seeds": num_seeds,
                }
                measured = partial(measure, program, form, num_steps, num_seeds)
                results.measure((name, form), cells, measured, options.force)
    publish(results, report(results))


if __name__ == "__main__":
    main()
