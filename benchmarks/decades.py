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

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
from cost import skip_step
from rich.progress import Progress
from store import Store, opened, options_of, publish, rounded, table
from tasks import DEVELOPMENT, REPORT, TASKS, Task, run

import lalerg_optax as lo
from lalerg_optax._records import JudgeRule
from lalerg_optax._search_rule import SearchRule

PyTree = Any
Rates = tuple[float, ...]

HALF_DECADES: Rates = tuple(float(f"{10 ** (k / 2):.5g}") for k in range(-14, 3))
DECADES = HALF_DECADES[::2]
NUM_SEEDS = 3
NUM_PIECES = 40  # a curve is the mean loss of the batches of so many pieces of a run
SMOOTHED_PIECES = 5
BUDGET_SHARE = 2 / 3  # where the speed of ``lalerg()`` is compared
WEIGHT_DECAY = 1e-4


# Optimizers


class Optimizer(NamedTuple):
    """A row of the benchmark.

    Attributes:
      name: how the tables call it.
      group: what ``--only`` chooses.
      make: (learning rate, number of steps) to the transformation.
      note: why this is its most favourable documented form.
      rates: tuned AdamW's rate to the rates that are run.
      num_seeds: runs at each rate.
      tasks: names of the tasks that it is run on.
      eval_params: (state, params) to the params to evaluate.
      final: state to what else is stored of the end of a run, by name.
      has_curve: whether the curve at the best rate is stored.
      changed: a constant of the library that is another one here: where it is at
        home, its name, its value.
    """

    name: str
    group: str
    make: Callable[[Any, int], Any]
    note: str = ""
    rates: Callable[[float], Rates] = lambda tuned: DECADES
    num_seeds: int = NUM_SEEDS
    tasks: tuple[str, ...] = tuple(TASKS)
    eval_params: Callable[[PyTree, PyTree], PyTree] = lambda state, params: params
    final: Callable[[PyTree], dict[str, jax.Array]] = lambda state: {}
    has_curve: bool = False
    changed: tuple[Any, str, Any] | None = None


def linear(rate: Any, num_steps: int) -> optax.Schedule:
    """Returns the decay to zero that everyone gets who wants one."""
    return optax.linear_schedule(rate, 0.0, num_steps)


def warmup_cosine(rate: Any, num_steps: int) -> optax.Schedule:
    """Returns a cosine decay after a warm-up of a tenth of the run."""
    shape = optax.warmup_cosine_decay_schedule(0.0, 1.0, num_steps // 10, num_steps)
    return lambda count: rate * shape(count)


class AveragedState(NamedTuple):
    """State of `averaged`: the average, its length, and the state of the inner."""

    average: PyTree
    count: jax.Array
    inner_state: PyTree


def averaged(inner: optax.GradientTransformation, gamma: float = 8.0) -> Any:
    """Keeps the average of the params with polynomial decay that DoG's authors use."""

    def init_fn(params: PyTree) -> AveragedState:
        return AveragedState(params, jnp.zeros((), jnp.int32), inner.init(params))

    def update_fn(updates: PyTree, state: AveragedState, params: Any = None) -> PyTree:
        updates, inner_state = inner.update(updates, state.inner_state, params)
        count = state.count + 1
        weight = (1.0 + gamma) / (count + gamma)
        average = jax.tree.map(
            lambda a, p, u: a + weight * (p + u - a), state.average, params, updates
        )
        return updates, AveragedState(average, count, inner_state)

    return optax.GradientTransformation(init_fn, update_fn)


def plateau(rate: Any, num_steps: int) -> Any:
    """AdamW, halved when the loss was no better for five fortieths of the run."""
    return optax.chain(
        optax.adamw(rate, weight_decay=WEIGHT_DECAY),
        optax.contrib.reduce_on_plateau(
            factor=0.5, patience=5, accumulation_size=max(1, num_steps // 40)
        ),
    )


def seen(state: PyTree) -> dict[str, jax.Array]:
    """Returns what is stored of a run of lalerg."""
    report = lo.metrics(state)
    return {
        name: report[name] for name in ("num_reverted", "num_skipped", "macro_rate")
    }


adamw = partial(optax.adamw, weight_decay=WEIGHT_DECAY)
ADAMW = Optimizer(
    "adamw",
    "peers",
    lambda rate, n: adamw(linear(rate, n)),
    "linear decay to zero; also the reference, which is the best of 17 half decades",
    rates=lambda tuned: HALF_DECADES,
    has_curve=True,
)
LALERG = Optimizer(
    "lalerg",
    "lalerg",
    lambda rate, n: lo.lalerg(linear(rate, n), weight_decay=WEIGHT_DECAY),
    "linear decay to zero",
    final=seen,
)
ABLATIONS = (
    LALERG._replace(
        name="lalerg with Adam's rule",
        group="ablation",
        make=lambda rate, n: lo.lalerg(
            linear(rate, n), b2=0.999, gradient_share=0.0, weight_decay=WEIGHT_DECAY
        ),
        note="b2=0.999, gradient_share=0, linear decay to zero",
    ),
    LALERG._replace(
        name="lalerg without search",
        group="ablation",
        make=lambda rate, n: lo.lalerg(
            linear(rate, n), search=False, weight_decay=WEIGHT_DECAY
        ),
        note="search=False, linear decay to zero",
    ),
)
TUNED = LALERG._replace(
    name="lalerg, tuned rate", group="tuned", rates=lambda tuned: (tuned,)
)
DEFAULT = LALERG._replace(
    name="lalerg()",
    group="default",
    make=lambda rate, n: lo.lalerg(),
    note="no argument, no schedule, number of steps not known",
    rates=lambda tuned: (1e-3,),  # a name only: it is the default
    has_curve=True,
)


def estimating(name: str, factory: Callable[..., Any]) -> tuple[Optimizer, Optimizer]:
    """Returns the two ways to give a rate to an optimizer that estimates its own."""
    return (
        Optimizer(
            name,
            "peers",
            lambda rate, n: factory(linear(rate, n), weight_decay=WEIGHT_DECAY),
            "multiplier with linear decay, as its docstring recommends",
        ),
        Optimizer(
            f"{name}, first estimate",
            "peers",
            lambda rate, n: factory(
                linear(1.0, n), estim_lr0=rate, weight_decay=WEIGHT_DECAY
            ),
            "the rate as its first estimate, multiplier 1 with linear decay",
        ),
    )


PEERS = (
    ADAMW,
    Optimizer("adamw, constant", "peers", lambda rate, n: adamw(rate), "no schedule"),
    Optimizer(
        "nadamw",
        "peers",
        lambda rate, n: optax.nadamw(linear(rate, n), weight_decay=WEIGHT_DECAY),
        "linear decay",
    ),
    Optimizer(
        "clip + adamw",
        "peers",
        lambda rate, n: optax.chain(
            optax.clip_by_global_norm(1.0), adamw(linear(rate, n))
        ),
        "global norm 1, linear decay",
    ),
    Optimizer(
        "apply_if_finite(adamw)",
        "peers",
        lambda rate, n: optax.apply_if_finite(adamw(linear(rate, n)), 10**6),
        "linear decay; any number of errors in a row is tolerated",
    ),
    Optimizer(
        "skip_step(adamw)",
        "peers",
        lambda rate, n: skip_step(adamw(linear(rate, n))),
        "linear decay; loss or norm above mean + 6 sd of 128 steps is dropped",
    ),
    Optimizer(
        "reduce_on_plateau(adamw)",
        "peers",
        plateau,
        "factor and patience of Optax's example, with means of a fortieth of the run",
    ),
    Optimizer(
        "mechanize(adamw)",
        "peers",
        lambda rate, n: optax.contrib.mechanize(adamw(linear(rate, n))),
        "linear decay inside; its own decay left at the default that it recommends",
    ),
    *estimating("prodigy", optax.contrib.prodigy),
    *estimating("dadapt_adamw", optax.contrib.dadapt_adamw),
    Optimizer(
        "dog",
        "peers",
        lambda rate, n: averaged(optax.contrib.dog(rate, weight_decay=WEIGHT_DECAY)),
        "constant multiplier and the averaging that its authors recommend",
        eval_params=lambda state, params: state.average,
    ),
    Optimizer(
        "dog, first estimate",
        "peers",
        lambda rate, n: averaged(
            optax.contrib.dog(
                init_step=("learning_rate", rate), weight_decay=WEIGHT_DECAY
            )
        ),
        "the rate as its first step, multiplier 1, the same averaging",
        eval_params=lambda state, params: state.average,
    ),
    Optimizer(
        "momo_adam",
        "peers",
        lambda rate, n: optax.contrib.momo_adam(
            linear(rate, n), weight_decay=WEIGHT_DECAY
        ),
        "linear decay; its lower bound 0 is one for every task",
    ),
    Optimizer(
        "schedule_free_adamw",
        "peers",
        lambda rate, n: optax.contrib.schedule_free_adamw(
            rate, warmup_steps=n // 10, weight_decay=WEIGHT_DECAY
        ),
        "constant after a warm-up of a tenth, evaluated at its average",
        eval_params=optax.contrib.schedule_free_eval_params,
    ),
)
SOME_TASKS = ("mlp", "autoencoder", "regression", "residual", "vae", "photo")
MICROS: dict[str, Callable[[], Any]] = {
    "rms": optax.scale_by_rms,
    "rss": optax.scale_by_rss,
    "lion": optax.scale_by_lion,
    "momentum": lambda: optax.trace(0.9),
}
SCHEDULES = (
    LALERG._replace(
        name="lalerg, warm-up and cosine",
        group="schedule",
        make=lambda rate, n: lo.lalerg(
            warmup_cosine(rate, n), weight_decay=WEIGHT_DECAY
        ),
        note="a tenth of warm-up, cosine decay",
        tasks=SOME_TASKS,
    ),
    Optimizer(
        "adamw, warm-up and cosine",
        "schedule",
        lambda rate, n: adamw(warmup_cosine(rate, n)),
        "the same",
        tasks=SOME_TASKS,
    ),
)

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
            (SearchRule, "gain", (0.25, 1.0)),
            (SearchRule, "boldest", (1.0, 4.0)),
            (SearchRule, "share", (1 / 16, 1 / 4)),
            (SearchRule, "drift", (0.125, 0.5)),
            (SearchRule, "standard_errors", (1.0, 4.0)),
            (SearchRule, "first", (1.0, 4.0)),
            (SearchRule, "deep", (2.0, 8.0)),
            (SearchRule, "target", (0.0, 0.3)),
            (SearchRule, "noise", (0.25, 1.0)),
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


def variants() -> list[Optimizer]:
    """Returns the rows in which one constant is changed."""
    return [
        LALERG._replace(
            name=f"{name} = {value:.4g}",
            group="constants",
            note="",
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
    *PEERS,
    LALERG,
    *ABLATIONS,
    TUNED,
    DEFAULT,
    *(
        LALERG._replace(
            name=f"lalerg, micro = {name}",
            group="micro",
            make=lambda rate, n, micro=micro: lo.lalerg(
                linear(rate, n), weight_decay=WEIGHT_DECAY, micro=micro()
            ),
            note="in place of Adam's, with linear decay",
            tasks=SOME_TASKS,
        )
        for name, micro in MICROS.items()
    ),
    *SCHEDULES,
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


def best_index(train_loss: Any) -> int:
    """Returns which rate has the lowest mean over the seeds."""
    means = np.asarray(train_loss, float).mean(axis=1)
    return int(np.argmin(np.where(np.isfinite(means), means, np.inf)))


def measure(
    task: Task, row: Optimizer, rates: Rates, num_seeds: int, num_steps: int
) -> dict[str, Any]:
    """Runs all cells of a row in one program."""

    def cell(rate: jax.Array, seed: jax.Array) -> PyTree:
        result = run(
            task,
            row.make(rate, num_steps),
            seed,
            num_steps=num_steps,
            eval_params=row.eval_params,
            final=row.final,
        )
        pieces = jnp.array_split(result.losses, NUM_PIECES)
        curve = jnp.stack([piece.mean() for piece in pieces])
        return result.train_loss, result.test_loss, curve, result.aux[1]

    # seeds inside: the batches are drawn once for all rates
    cells = jax.jit(jax.vmap(jax.vmap(cell, (None, 0)), (0, None)))
    with in_force(row.changed):
        out = cells(jnp.asarray(rates, jnp.float32), jnp.arange(num_seeds))
    train_loss, test_loss, curves, final = jax.tree.map(np.asarray, out)
    entry = {"train_loss": train_loss, "test_loss": test_loss} | final
    if row.has_curve:
        entry["curve"] = curves[best_index(train_loss)].mean(axis=0)
    return {name: rounded(x) for name, x in entry.items()}


def start_losses(task: Task) -> list[float]:
    """Returns the loss on the training set before anything is learnt, by seed."""
    stay = optax.set_to_zero()
    losses = jax.vmap(lambda seed: run(task, stay, seed, num_steps=1).train_loss)
    return rounded(np.asarray(jax.jit(losses)(jnp.arange(NUM_SEEDS))))


class Results(Store):
    """What has been measured, and what follows from it."""

    @property
    def starts(self) -> dict[str, list[float]]:
        """The losses before anything is learnt, by task."""
        return self.notes.setdefault("start_loss", {})

    def get(self, task: str, name: str, field: str) -> np.ndarray:
        """Returns a field of a row, NaN where it was not finite."""
        return np.asarray(self.runs[task, name][field], float)

    def has(self, task: str, name: str) -> bool:
        """Returns whether a row was measured on a task."""
        return (task, name) in self.runs

    def reference(self, task: str, field: str = "train_loss") -> float:
        """Returns a field of tuned AdamW, mean over the seeds; "rates": its rate."""
        best = best_index(self.get(task, ADAMW.name, "train_loss"))
        return float(self.get(task, ADAMW.name, field)[best].mean())

    def drop(self, task: str) -> float:
        """Returns by how much tuned AdamW lowered the loss."""
        return float(np.mean(self.starts[task])) - self.reference(task)

    def excess(
        self, task: str, name: str, field: str = "train_loss", num_seeds: int = 0
    ) -> np.ndarray:
        """Returns losses above tuned AdamW's, in % of its drop, [rate, seed]."""
        losses = self.get(task, name, field)[:, : num_seeds or None]
        if name == ADAMW.name:  # the half decades only tune it
            losses = losses[np.isin(self.get(task, name, "rates"), DECADES)]
        excess = 100.0 * (losses - self.reference(task, field)) / self.drop(task)
        return np.where(np.isnan(excess), np.inf, excess)

    def cells(
        self, name: str, tasks: Iterable[str] = TASKS, num_seeds: int = 0
    ) -> np.ndarray:
        """Returns the excesses of all cells of a row on those tasks that it has."""
        known = [t for t in tasks if self.has(t, name)]
        all_cells = [self.excess(t, name, num_seeds=num_seeds).ravel() for t in known]
        return np.concatenate(all_cells or [np.zeros(0)])

    def common(self, *names: str) -> list[str]:
        """Returns the tasks on which all these rows were measured."""
        return [t for t in TASKS if all(self.has(t, name) for name in names)]


def measure_all(
    results: Results,
    jobs: list[tuple[str, Optimizer]],
    quick: bool,
    forced: tuple[str, ...],
) -> None:
    """Runs every row that is not stored yet, or whose group is forced; stores it."""
    made: dict[str, Task] = {}
    with Progress() as progress:
        bar = progress.add_task("", total=len(jobs))
        for name, row in jobs:
            progress.update(bar, description=f"{name}: {row.name}"[:44].ljust(44))
            task = made.setdefault(name, TASKS[name]())
            tuned = 0.0 if row is ADAMW else results.reference(name, "rates")
            rates = row.rates(tuned)
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


# Tables


def percent(x: float) -> str:
    """Returns an excess as a table shows it."""
    if not np.isfinite(x):
        return "diverged"
    return f"{x:+.2f}" if abs(x) < 100 else f"{x:+.3g}"


def shares(cells: np.ndarray) -> list[str]:
    """Returns how many % of cells are within 5 %, within 1 %, better."""
    if not cells.size:
        return ["", "", ""]
    return [f"{100 * np.mean(s):.0f}" for s in (cells <= 5, cells <= 1, cells < 0)]


def summary_table(results: Results, groups: tuple[str, ...]) -> list[str]:
    """Returns the shares of every row, on the two halves of the tasks and on all."""
    sets = {"chosen on": DEVELOPMENT, "held back": REPORT, "all": TASKS}
    header = ["optimizer"]
    for name in sets:
        header += [f"{name}: within 5 %", "within 1 %", "better"]
    rows = [row for row in ROWS if row.group in groups and results.common(row.name)]
    rows.sort(key=lambda row: -np.mean(results.cells(row.name) <= 5))
    lines = []
    for row in rows:
        tasks = results.common(row.name)
        line = [row.name]
        for chosen in sets.values():
            line += shares(results.cells(row.name, chosen))
        lines.append([*line, str(len(tasks))])
    return table([*header, "tasks"], lines)


def worst(results: Results, task: str, name: str) -> str:
    """Returns the worst cell and its rate."""
    excess = results.excess(task, name)
    where = int(np.argmax(excess.max(axis=1)))
    rate = results.runs[task, name]["rates"][where]
    return f"{percent(excess.max())} (at {rate:.0e})"


def at_tuned_rate(results: Results, task: str) -> str:
    """Returns the excess at tuned AdamW's own rate."""
    if not results.has(task, TUNED.name):
        return ""
    excess = results.excess(task, TUNED.name)
    return f"{percent(excess.mean())} (worst {percent(excess.max())})"


def task_table(results: Results) -> list[str]:
    """Returns how lalerg does on every task."""
    lines, held_out = [], []
    for task in results.common(LALERG.name):
        reverted = results.get(task, LALERG.name, "num_reverted")
        share = 100 * reverted / results.runs[task, LALERG.name]["num_steps"]
        held_out.append(np.median(results.excess(task, LALERG.name, "test_loss")))
        lines.append(
            [
                task,
                f"{results.reference(task, 'rates'):.1e}",
                *shares(results.cells(LALERG.name, [task])),
                worst(results, task, LALERG.name),
                at_tuned_rate(results, task),
                f"{np.median(reverted) / 2:g}",
                f"{reverted.max() / 2:g}",
                f"{share.max():.1f}",
                percent(held_out[-1]),
            ]
        )
    lines.append(["**median**", *[""] * 9, percent(np.median(held_out))])
    return table(
        [
            "task",
            "tuned AdamW's rate",
            "within 5 %",
            "within 1 %",
            "better",
            "worst cell, %",
            "at tuned AdamW's rate, %",
            "reverts, median",
            "reverts, most",
            "steps on reverts, most, %",
            "held-out loss, median, %",
        ],
        lines,
    )


def slowdown(results: Results, task: str) -> float:
    """Returns how many times tuned AdamW's steps ``lalerg()`` takes to its loss.

    The loss is that at two thirds of the budget; both curves are smoothed alike.
    """
    window = np.ones(SMOOTHED_PIECES) / SMOOTHED_PIECES
    ends = np.arange(SMOOTHED_PIECES, NUM_PIECES + 1) / NUM_PIECES
    reference, own = (
        np.convolve(results.get(task, name, "curve"), window, "valid")
        for name in (ADAMW.name, DEFAULT.name)
    )
    is_there = own <= np.interp(BUDGET_SHARE, ends, reference)
    return float(ends[np.argmax(is_there)] / BUDGET_SHARE if any(is_there) else np.inf)


def times(factor: float) -> str:
    """Returns a factor as a table shows it."""
    return f"{factor:.2f}" if np.isfinite(factor) else "not reached"


def default_table(results: Results) -> list[str]:
    """Returns how ``lalerg()`` does on every task."""
    lines, factors = [], []
    for task in results.common(DEFAULT.name):
        excess = results.excess(task, DEFAULT.name)
        factors.append(slowdown(results, task))
        factor = times(factors[-1])
        lines.append([task, percent(excess.mean()), percent(excess.max()), factor])
    lines.append(["**median**", "", "", times(float(np.median(factors)))])
    header = ["task", "mean excess, %", "worst seed, %", "times tuned AdamW's steps"]
    return table(header, lines)


def constants_table(results: Results) -> list[str]:
    """Returns what a change of a constant changes."""
    lines = []
    for row in ROWS:
        tasks = results.common(row.name, LALERG.name)
        if row.group == "constants" and tasks:
            line = [row.name]
            for limit in (5, 1):
                base, own = (
                    100 * np.mean(results.cells(name, tasks, row.num_seeds) <= limit)
                    for name in (LALERG.name, row.name)
                )
                line += [f"{own:.0f}", f"{own - base:+.1f}"]
            lines.append([*line, ", ".join(tasks)])
    header = ["changed constant", "within 5 %", "points", "within 1 %", "points"]
    return table([*header, "tasks"], lines)


def report(results: Results) -> str:
    """Returns everything as Markdown."""
    known = {name for _, name in results.runs}
    groups = {row.group for row in ROWS if row.name in known}
    lines = [
        "# Nine decades of learning rates",
        "",
        results.made(),
        "",
        "Learning rates 1e-7 ... 1e1, three seeds each. Excess is the final loss on "
        "the whole training set above that of tuned AdamW, in % of the drop that tuned "
        "AdamW made. Tuned AdamW is the best of 17 half decades with linear decay to "
        'zero. Tables give % of cells. "Chosen on" are the tasks on which constants of '
        f"lalerg were chosen ({', '.join(DEVELOPMENT)}), "
        f'"held back" the others ({", ".join(REPORT)}).',
        "",
        "## All optimizers",
        "",
        *summary_table(results, ("peers", "lalerg", "ablation")),
    ]
    if "lalerg" in groups:
        lines += [
            "## lalerg, task by task",
            "",
            "Held-out loss is the difference to tuned AdamW's, in % of the same drop. "
            "A revert takes two steps.",
            "",
            *task_table(results),
        ]
    if "default" in groups:
        lines += [
            "## lalerg() without any argument",
            "",
            "The last column compares the steps to tuned AdamW's loss at two thirds of "
            f"the budget (means of {SMOOTHED_PIECES} fortieths of the run).",
            "",
            *default_table(results),
        ]
    if "micro" in groups:
        lines += ["## Other second levels", ""]
        lines += [f"On {', '.join(SOME_TASKS)}.", ""]
        lines += summary_table(results, ("micro",))
    if "schedule" in groups:
        lines += ["## Warm-up and cosine decay", ""]
        lines += [f"On {', '.join(SOME_TASKS)}.", ""]
        lines += summary_table(results, ("schedule",))
    if "constants" in groups:
        lines += [
            "## One constant changed",
            "",
            "Points gained or lost against lalerg with the same seed and tasks.",
            "",
            *constants_table(results),
        ]
    lines += ["## How each is run", ""]
    lines += [f"- {r.name}: {r.note}." for r in ROWS if r.note and r.name in known]
    return "\n".join(lines)


# Figure

STYLES: dict[str, dict[str, Any]] = {
    "adamw": {"color": "black", "linestyle": ":"},
    "mechanize(adamw)": {"color": "tab:blue"},
    "prodigy, first estimate": {"color": "tab:green"},
    "momo_adam": {"color": "tab:purple"},
    "schedule_free_adamw": {"color": "tab:brown"},
    "lalerg": {"color": "tab:red", "linewidth": 3.0},
}


def draw(results: Results, path: Path) -> None:
    """Writes the figure: final loss against learning rate, a panel a task."""
    import matplotlib.pyplot as plt

    tasks = results.common(ADAMW.name)
    num_columns = min(4, len(tasks))
    num_rows = -(-len(tasks) // num_columns)
    figure, axes = plt.subplots(
        num_rows,
        num_columns,
        figsize=(3.2 * num_columns, 2.5 * num_rows + 0.8),
        squeeze=False,
        layout="constrained",
    )
    for axis in axes.flat[len(tasks) :]:
        axis.axis("off")
    lines = {}
    for axis, task in zip(axes.flat, tasks, strict=False):
        ceiling = 2.0 * float(np.mean(results.starts[task]))
        for name, style in STYLES.items():
            if not results.has(task, name):
                continue
            rates = results.get(task, name, "rates")
            losses = results.get(task, name, "train_loss")
            losses = np.minimum(np.where(np.isnan(losses), ceiling, losses), ceiling)
            middle = np.median(losses, axis=1)
            (lines[name],) = axis.plot(rates, middle, **({"linewidth": 1.4} | style))
            if name == LALERG.name:
                low, high = losses.min(axis=1), losses.max(axis=1)
                axis.fill_between(rates, low, high, color=style["color"], alpha=0.2)
        lines["tuned AdamW"] = axis.axhline(
            results.reference(task), color="black", linestyle="--", linewidth=0.8
        )
        title, *place = (TASKS[task].__doc__ or task).splitlines()[0].split(", ", 1)
        axis.set_title("\n".join([title, *place]).rstrip("."), fontsize=8)
        axis.set(xscale="log", yscale="log")
        axis.tick_params(labelsize=7, which="both")
    for axis in axes[:, 0]:
        axis.set_ylabel("final training loss", fontsize=8)
    for axis in axes.flat[max(0, len(tasks) - num_columns) : len(tasks)]:
        axis.set_xlabel("learning_rate", fontsize=8)
    names = {"adamw": "AdamW, linear decay", "lalerg": "lalerg (band: all seeds)"}
    figure.legend(
        lines.values(),
        [names.get(name, name) for name in lines],
        loc="outside lower center",
        ncols=4,
        frameon=False,
    )
    figure.savefig(path, dpi=130)
    plt.close(figure)


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
        ]
        if options.quick:
            jobs = [j for j in jobs if j[0] in QUICK_TASKS and j[1].name in QUICK_ROWS]
        forced = tuple(options.only) if options.force else ()
        measure_all(results, jobs, options.quick, forced)
    publish(results, report(results), draw)


if __name__ == "__main__":
    main()
