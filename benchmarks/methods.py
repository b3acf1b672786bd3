"""Every adaptive method that people know: bare, protected, and in trouble.

Each of `recipes.METHODS` trains three real tasks, three seeds, at one rate (that of
`recipes`, not tuned), bare and in each protected form: once without fault, once with a
gradient that is NaN, once with a burst: five steps whose gradients point uphill and are
10,000 times too large, and later five batches whose targets are those of other
examples. Differences are in % of the drop of the loss (on the whole training set)
that the bare method makes without fault.

    python benchmarks/methods.py             # about 10 minutes
    python benchmarks/methods.py --quick     # about a minute
    python benchmarks/methods.py --tasks words --only Adam SM3
    python benchmarks/methods.py --report-only

What is stored is not run again, so that a run may be stopped and goes on later;
``--force`` runs it anew.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from recipes import (
    BARE,
    METHODS,
    REGULATED,
    SECOND,
    Method,
    applied,
    evaluated,
    forms_of,
    optimizer,
)
from rich.progress import Progress
from store import Store, opened, options_of, publish, rounded, table
from tasks import TASKS, Task
from train import Hooks, full_loss, is_finite, train

import lalerg_optax as lo

PyTree = Any
METHOD_TASKS = ("mlp", "words", "autoencoder")
NUM_SEEDS = 3
NUM_STEPS, QUICK_STEPS = 400, 150
LENGTH = 5  # of a burst
QUICK = ("Adam", "Ranger")


class Plan(NamedTuple):
    """What goes wrong; each is an array over the steps.

    Attributes:
      factor: of the gradient.
      is_poisoned: whether targets are those of other examples.
    """

    factor: np.ndarray
    is_poisoned: np.ndarray


NO_FAULT, NAN, BURST = "no fault", "NaN", "burst"


def plans(num_steps: int) -> dict[str, Plan]:
    """Returns what goes wrong, by name of the fault."""
    found = {
        name: Plan(np.ones(num_steps, np.float32), np.zeros(num_steps, bool))
        for name in (NO_FAULT, NAN, BURST)
    }
    found[NAN].factor[int(0.5 * num_steps)] = np.nan
    first, second = int(0.4 * num_steps), int(0.6 * num_steps)
    found[BURST].factor[first : first + LENGTH] = -1e4
    found[BURST].is_poisoned[second : second + LENGTH] = True
    return found


class Prepared(NamedTuple):
    """A task with all that its runs have in common, which is compiled once.

    Attributes:
      task: the task.
      starts: params and whatever else the model keeps, for each seed.
      full_loss: both to the mean loss of the whole training set.
    """

    task: Task
    starts: list[tuple[PyTree, PyTree]]
    full_loss: Callable[[PyTree, PyTree], jax.Array]


# The programs are many and small: most of the time would go into compiling them.
quick_jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def prepare(name: str) -> Prepared:
    """Returns a task that is ready to run."""
    task = TASKS[name]()
    init = quick_jit(task.init)
    return Prepared(
        task,
        [init(jax.random.key(seed)) for seed in range(NUM_SEEDS)],
        quick_jit(lambda params, rest: full_loss(task, task.train, params, rest)),
    )


def trainer(task: Task, method: Method, form: str, num_steps: int) -> Callable:
    """Returns a run, compiled once: start, examples, plan to what is left of it."""

    def gradient(params: PyTree, rest: PyTree, i: jax.Array, now: PyTree) -> PyTree:
        chosen, plan = now
        *inputs, target = (a[chosen] for a in task.train)
        other = jnp.roll(target, 1, axis=0)
        batch = (*inputs, jnp.where(plan.is_poisoned, other, target))

        def loss_fn(params: PyTree) -> tuple[jax.Array, PyTree]:
            return task.loss(method.seen(params), rest, batch, jax.random.key(i), True)

        return jax.value_and_grad(loss_fn, has_aux=True)(params)

    def told(loss: jax.Array, grads: PyTree, now: PyTree) -> tuple[jax.Array, PyTree]:
        grads = jax.tree.map(lambda g: now[1].factor * g, grads)
        return loss, method.given(grads) if form == BARE else grads

    tx = optimizer(method, form, num_steps)
    hooks = Hooks(told=told, apply=partial(applied, form), keep=lambda taken: None)

    @quick_jit
    def run(params: PyTree, rest: PyTree, chosen: Any, plan: Plan) -> PyTree:
        start = method.begin(params), rest
        end = train(tx, gradient, start, num_steps, (chosen, plan), hooks)
        told = {"is_alive": is_finite(end.params)}
        if form != BARE:
            report = lo.metrics(end.state)
            told |= {"skipped": report["num_skipped"]}
            told |= {"reverted": report["num_revert_steps"]}
        return evaluated(method, form, end.state, end.params), end.rest, told

    return run


def measure(
    prepared: Prepared, method: Method, form: str, num_steps: int
) -> dict[str, Any]:
    """Returns how all runs ended, by fault; a list has an entry for each seed."""
    task = prepared.task
    run = trainer(task, method, form, num_steps)
    faults: dict[str, Any] = {}
    for fault, plan in plans(num_steps).items():
        ends: dict[str, list[Any]] = {"loss": [], "is_alive": []}
        for seed, start in enumerate(prepared.starts):
            rng = np.random.default_rng(seed)
            shape = (num_steps, task.batch_size)
            chosen = rng.integers(0, len(task.train[0]), shape)
            *last, told = run(*start, chosen, plan)
            ends["loss"].append(rounded(prepared.full_loss(*last)))
            for name, x in told.items():
                ends.setdefault(name, []).append(np.asarray(x).tolist())
        faults[fault] = ends
    start_loss = [rounded(prepared.full_loss(*start)) for start in prepared.starts]
    return {"start_loss": start_loss, "faults": faults}


class Results(Store):
    """What has been measured."""

    identity = ("task", "method", "form")

    def losses(self, key: tuple[str, ...], fault: str) -> np.ndarray:
        """Returns the final losses of all seeds; infinite where not finite."""
        found = self.runs[key]["faults"][fault]
        alive = zip(found["loss"], found["is_alive"], strict=True)
        return np.array([np.inf if x is None or not ok else x for x, ok in alive])

    def drop(self, task: str, method: str) -> np.ndarray:
        """Returns the drop of the bare method without fault, for each seed."""
        start = np.array(self.runs[task, method, BARE]["start_loss"])
        return start - self.losses((task, method, BARE), NO_FAULT)

    def excess(self, task: str, method: str, form: str, fault: str) -> np.ndarray:
        """Returns how much higher the loss ends, in % of the drop.

        Without fault than that of the bare method, with a fault than that of the same
        form without.
        """
        other = BARE if fault == NO_FAULT else form
        rise = self.losses((task, method, form), fault)
        rise = rise - self.losses((task, method, other), NO_FAULT)
        return 100.0 * rise / self.drop(task, method)


def shown(values: list[np.ndarray]) -> str:
    """Returns the worst task's mean over seeds, and how many runs did not survive."""
    found = np.stack(values)
    dead = int(np.sum(~np.isfinite(found)))
    if dead == found.size:
        return "dead"
    means = [v[np.isfinite(v)].mean() for v in found if np.isfinite(v).any()]
    worst = f"{max(means):+.1f}" if max(means) < 1000 else "> 1,000"
    return worst + f", {dead} dead" * (dead > 0)


HEADINGS = {
    (REGULATED, NO_FAULT): "`error_regulate`: no fault",
    (REGULATED, NAN): "NaN",
    (REGULATED, BURST): "burst",
    (SECOND, NO_FAULT): "second level: no fault",
    (SECOND, NAN): "NaN",
    (SECOND, BURST): "burst",
    (BARE, NAN): "bare: NaN",
    (BARE, BURST): "burst",
}


def summary(results: Results) -> list[str]:
    """Returns a row for each method: the worst task, mean of the seeds."""
    rows = []
    for name in METHODS:
        tasks = [t for t, m, f in results.runs if m == name and f == BARE]
        if not tasks:
            continue
        row = [name]
        for form, fault in HEADINGS:
            is_there = all((t, name, form) in results.runs for t in tasks)
            row.append(
                shown([results.excess(t, name, form, fault) for t in tasks])
                if is_there
                else ""
            )
        rows.append(row)
    return table(["method", *HEADINGS.values()], rows)


def details(results: Results, task: str) -> list[str]:
    """Returns losses and interventions on a task."""
    rows = []
    for at, name, form in results.runs:
        if at != task:
            continue
        key = (at, name, form)
        found = results.runs[key]["faults"]
        row = [name, form]
        for fault in (NO_FAULT, NAN, BURST):
            alive = [x for x in results.losses(key, fault) if np.isfinite(x)]
            loss = f"{np.mean(alive):.4g}" if alive else "dead"
            acts = [sum(found[fault].get(k, [])) for k in ("skipped", "reverted")]
            row += [loss, "" if form == BARE else f"{acts[0]}, {acts[1]}"]
        rows.append(row)
    header = ["method", "form"]
    for fault in (NO_FAULT, NAN, BURST):
        header += [f"loss, {fault}", "skips, reverts"]
    return table(header, rows)


def report(results: Results) -> str:
    """Returns everything as Markdown."""
    tasks = list(dict.fromkeys(task for task, *_ in results.runs))
    steps = max(run["num_steps"] for run in results.runs.values())
    lines = [
        "# Methods",
        "",
        results.made(),
        "",
        f"Tasks: {', '.join(tasks)}; {steps} steps, {NUM_SEEDS} seeds, one rate for "
        "each method (`recipes.py`), which is not tuned. % of the drop that the bare "
        "method makes, mean of the seeds on the worst task: *no fault*, how much "
        "higher the loss ends than that of the bare method; *NaN* and *burst*, how "
        "much higher than that of the same form without fault. *Dead*: parameters "
        "or loss are not finite at the end.",
        "",
        *summary(results),
    ]
    for task in tasks:
        lines += [
            f"## {task}",
            "",
            "Mean final loss of the seeds that are alive; steps skipped and steps "
            "spent on reverts, sums over the seeds.",
            "",
            *details(results, task),
        ]
    return "\n".join(lines)


def main() -> None:
    """Measures, stores, and writes the tables."""
    options = options_of(__doc__, tuple(METHODS), METHOD_TASKS, tuple(TASKS))
    results = opened(Results, "methods", options)
    names = [n for n in options.only if not options.quick or n in QUICK]
    tasks = options.tasks[:1] if options.quick else options.tasks
    num_steps = QUICK_STEPS if options.quick else NUM_STEPS
    todo = [(t, n, f) for t in tasks for n in names for f in forms_of(METHODS[n])]
    todo.sort(key=lambda key: key[2] == SECOND)  # which tells least, last
    if not options.report_only:
        made = {t: prepare(t) for t in tasks}
        with Progress() as progress:
            for key in progress.track(todo, description="runs"):
                task, name, form = key
                measured = partial(measure, made[task], METHODS[name], form, num_steps)
                cells = {
                    "rate": METHODS[name].rate,
                    "num_steps": num_steps,
                    "num_seeds": NUM_SEEDS,
                }
                results.measure(key, cells, measured, options.force)
    publish(results, report(results))


if __name__ == "__main__":
    main()
