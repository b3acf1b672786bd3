"""What ``faults.py`` measured, and what follows from it: tables and figure."""

from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from fault_zoo import EARLIEST, FAMILIES, FAULTS, LATEST, NONE
from peers import (
    ADAMW,
    CLIPPED,
    FINITE,
    LALERG,
    NO_SEARCH,
    REGULATED,
    SKIPPING,
    ZCLIPPED,
)
from store import Store, table
from sweeps import RATIOS
from tasks import DEVELOPMENT, REPORT, TASKS

OPTIMIZERS = (  # columns
    LALERG,
    NO_SEARCH._replace(name="lalerg, no search"),
    REGULATED,
    ADAMW,
    CLIPPED,
    FINITE,
    SKIPPING,
    ZCLIPPED,
)
WITHIN = 5.0  # %
SMALL_BATCHES = {  # tasks of noise.py, constants were not chosen on the second half
    f"{name}, batch {size}": (name, size)
    for name in ("mlp", "logistic", "affairs", "photo", "words", "rows")
    for size in (1, 8)
}


class Runs(Store):
    """What has been measured, and what follows from it."""

    def get(self, task: str, name: str, field: str) -> np.ndarray:
        """Returns a field of all runs, NaN where it was not finite."""
        return np.asarray(self.runs[task, name][field], float)

    def has(self, task: str, name: str) -> bool:
        """Returns whether an optimizer was run on a task."""
        return (task, name) in self.runs

    def faults(self, task: str, name: str) -> list[str]:
        """Returns the names of the faults that were run."""
        return self.runs[task, name]["faults"]

    def fault_free(self, task: str, name: str, field: str = "train_loss") -> np.ndarray:
        """Returns how the runs without fault ended, by seed."""
        where = self.faults(task, name).index(NONE.name)
        return self.get(task, name, field)[where]

    def excess_of(self, task: str, name: str, against: str = "") -> np.ndarray:
        """Returns losses in % of the drop above those without fault, [fault, seed].

        They are those of the same optimizer and seed, or the mean of another optimizer.
        """
        reference = self.fault_free(task, against or name)
        drop = self.fault_free(task, against or name, "start_loss") - reference
        if against:
            reference = reference.mean()
        excess = self.get(task, name, "train_loss") - reference
        excess = 100.0 * excess / drop.mean()
        return np.where(np.isnan(excess), np.inf, excess)

    def ratios(self, task: str, name: str) -> np.ndarray:
        """Returns losses in units of those of the same run without fault."""
        ratios = self.get(task, name, "train_loss") / self.fault_free(task, name)
        return np.where(np.isnan(ratios), np.inf, ratios)

    def select(
        self,
        name: str,
        family: str = "",
        field: str = "",
        tasks: Iterable[str] = TASKS,
        found: Callable[[str, str], np.ndarray] | None = None,
    ) -> np.ndarray:
        """Returns excesses, or a field, or what is found, of all runs with a fault."""
        selected = [np.zeros(0)]
        for task in tasks:
            if self.has(task, name):
                names = [
                    fault.name for fault in FAULTS if family in ("", fault.family)
                ] or [family]
                known = self.faults(task, name)
                where = [known.index(n) for n in names if n in known]
                values = (
                    self.get(task, name, field)
                    if field
                    else (found or self.excess_of)(task, name)
                )
                selected.append(values[where].ravel())
        return np.concatenate(selected)


# Tables


def share(found: np.ndarray, most: float = WITHIN) -> str:
    """Returns how many % of runs are within 5 %, or another limit."""
    if not found.size:
        return ""
    within = 100.0 * np.mean(found <= most)
    return f"{within:.0f}" if within in (0.0, 100.0) else f"{within:.1f}"


def as_percent(x: float) -> str:
    """Returns an excess as a table shows it."""
    return f"{x:+.3g}" if np.isfinite(x) else "not finite"


def names_of(results: Runs) -> list[str]:
    """Returns the optimizers that were measured."""
    known = {name for _, name in results.runs}
    return [o.name for o in OPTIMIZERS if o.name in known]


def tasks_of(results: Runs, *names: str) -> list[str]:
    """Returns the tasks on which all these were measured."""
    return [t for t in TASKS if all(results.has(t, name) for name in names)]


def family_table(results: Runs) -> list[str]:
    """Returns the share of runs within 5 %, by family of faults."""
    names = names_of(results)
    lines = [[f, *(share(results.select(n, f)) for n in names)] for f in FAMILIES]
    lines.append(["**all**", *(f"**{share(results.select(n))}**" for n in names)])
    sets = {"chosen on": DEVELOPMENT, "not chosen on": REPORT}
    for title, tasks in sets.items():
        cells = (share(results.select(n, tasks=tasks)) for n in names)
        lines.append([f"all, on tasks {title}", *cells])
    for title, tasks in {"": TASKS, " on tasks not chosen on,": REPORT}.items():
        ratios = (results.select(n, tasks=tasks, found=results.ratios) for n in names)
        cells = (share(r, RATIOS[0]) for r in ratios)
        lines.append([f"all,{title} loss at most {RATIOS[0]} times", *cells])
    not_finite = []
    for name in names:
        hit = results.select(name, "parameter hit", "num_not_finite")
        every = results.select(name, field="num_not_finite")
        not_finite.append(f"{(every > 0).sum()} ({(hit > 0).sum()})")
    lines.append(["runs with a parameter not finite (of those hit)", *not_finite])
    number = [str(results.select(n).size) for n in names]
    tasks = [str(len(tasks_of(results, n))) for n in names]
    return table(["fault", *names], [*lines, ["runs", *number], ["tasks", *tasks]])


def small_table(results: Runs) -> list[str]:
    """Returns the share of runs within 5 % at small batch sizes."""
    names = [
        name
        for name in names_of(results)
        if any(results.has(task, name) for task in SMALL_BATCHES)
    ]
    if not names:
        return ["Not measured yet.", ""]
    lines = []
    # those that all have: a row compares what was run on the same tasks
    common = [t for t in SMALL_BATCHES if all(results.has(t, n) for n in names)]
    for title, part in (("chosen on", slice(0, 6)), ("not chosen on", slice(6, None))):
        for size in (1, 8):
            tasks = [
                task
                for task in tuple(SMALL_BATCHES)[part]
                if SMALL_BATCHES[task][1] == size and task in common
            ]
            cells = [share(results.select(n, tasks=tasks)) for n in names]
            told = ", ".join(SMALL_BATCHES[task][0] for task in tasks)
            if tasks:
                lines.append([f"batch size {size}, tasks {title}: {told}", *cells])
    for family in FAMILIES:
        cells = [share(results.select(n, family, tasks=common)) for n in names]
        lines.append([family, *cells])
    cells = [share(results.select(n, tasks=common)) for n in names]
    lines.append(["**all**", *(f"**{cell}**" for cell in cells)])
    return table(["fault", *names], lines)


def fault_table(results: Runs) -> list[str]:
    """Returns the share of runs within 5 %, fault by fault."""
    names = names_of(results)
    by_name = {
        name: np.concatenate(
            [_by_fault(results, task, name) for task in tasks_of(results, name)], axis=1
        )
        for name in names
    }
    lines = [
        [
            fault.name,
            *(share(by_name[name][i][by_name[name][i] > -np.inf]) for name in names),
        ]
        for i, fault in enumerate(FAULTS)
    ]
    return table(["fault", *names], [line for line in lines if any(line[1:])])


def _by_fault(results: Runs, task: str, name: str) -> np.ndarray:
    """Returns excesses, [fault, seed]; minus infinity where it was not run."""
    known, excess = results.faults(task, name), results.excess_of(task, name)
    none = np.full(excess.shape[1], -np.inf)
    return np.stack(
        [excess[known.index(f.name)] if f.name in known else none for f in FAULTS]
    )


def task_table(results: Runs) -> list[str]:
    """Returns shares task by task, and what each costs where there is no fault."""
    names = names_of(results)
    lines = []
    for task in tasks_of(results, *names):
        cells = [share(results.select(name, tasks=[task])) for name in names]
        lines.append([task, *cells])
    header = ["task", *names]
    lines_free = []
    for task in tasks_of(results, ADAMW.name, *names):
        cells = []
        for name in names:
            where = results.faults(task, name).index(NONE.name)
            cells.append(
                as_percent(results.excess_of(task, name, ADAMW.name)[where].mean())
            )
        lines_free.append([task, *cells])
    return [
        "Runs within 5 %, task by task:",
        "",
        *table(header, lines),
        "Without fault, % of the drop of tuned AdamW above it, mean over seeds:",
        "",
        *table(header, lines_free),
    ]


def miss_table(results: Runs) -> list[str]:
    """Returns the runs of this library that are not within 5 %."""
    lines = []
    for optimizer in OPTIMIZERS:
        known = [t for t in (*TASKS, *SMALL_BATCHES) if results.has(t, optimizer.name)]
        for task in known if optimizer.is_own else ():
            excess = results.excess_of(task, optimizer.name)
            skipped, reverted = (
                results.get(task, optimizer.name, field)
                for field in ("num_skipped", "num_revert_steps")
            )
            for i, seed in np.argwhere(excess > WITHIN):
                lines.append(
                    [
                        optimizer.name,
                        task,
                        results.faults(task, optimizer.name)[i],
                        str(seed),
                        as_percent(excess[i, seed]),
                        f"{skipped[i, seed]:.0f}",
                        f"{reverted[i, seed]:.0f}",
                    ]
                )
    header = ["optimizer", "task", "fault", "seed", "excess, %", "skipped", "reverted"]
    return table(header, lines)


def report(results: Runs) -> str:
    """Returns everything as Markdown."""
    names = names_of(results)
    seeds = {entry["num_seeds"] for entry in results.runs.values()}
    lines = [
        "# Faults",
        "",
        results.made(),
        "",
        f"{len(FAULTS)} faults, {' or '.join(map(str, sorted(seeds)))} seeds, at the "
        "rate of tuned AdamW with linear decay. Tables give % of the runs whose final "
        "loss on the whole training set exceeds that of the same optimizer and seed "
        "without fault by at most 5 % of the drop that it made. A fault begins between "
        f'{EARLIEST:.0%} and {LATEST:.0%} of the run. Rows with "1.1 times" have '
        "the ratio of the two losses in place of the share of the drop. Constants were "
        f"not chosen on {len(REPORT)} tasks ({', '.join(REPORT)}).",
        "",
        *family_table(results),
        "## Small batches",
        "",
        "Tasks of `noise.py` at small batch sizes that all optimizers were run on, at "
        "the rate of AdamW tuned at that batch size.",
        "",
        *small_table(results),
        "## Fault by fault",
        "",
        *fault_table(results),
        "## Task by task",
        "",
        *task_table(results),
        "## Runs of this library that are not within 5 %",
        "",
        *miss_table(results),
        "## How each is run",
        "",
        *(f"- {o.name}: {o.note}." for o in OPTIMIZERS if o.name in names),
    ]
    return "\n".join(lines)


def draw(results: Runs, path: Path) -> None:
    """Writes the figure: share of runs within 5 %, a row for each fault."""
    import matplotlib.pyplot as plt

    names = names_of(results)
    shares = np.full((len(FAULTS), len(names)), np.nan)
    for column, name in enumerate(names):
        parts = [_by_fault(results, t, name) for t in tasks_of(results, name)]
        excess = np.concatenate(parts, axis=1)
        is_run = excess > -np.inf
        within = 100.0 * (is_run & (excess <= WITHIN)).sum(axis=1)
        shares[:, column] = within / np.where(
            is_run.any(axis=1), is_run.sum(axis=1), np.nan
        )
    kept = np.isfinite(shares).any(axis=1)
    figure, axis = plt.subplots(
        figsize=(2.8 + 0.55 * len(names), 1.5 + 0.17 * kept.sum()), layout="constrained"
    )
    image = axis.imshow(shares[kept], aspect="auto", cmap="RdYlGn", vmin=0, vmax=100)
    labels = [fault.name for fault, k in zip(FAULTS, kept, strict=True) if k]
    axis.set_yticks(range(len(labels)), labels, fontsize=7)
    axis.set_xticks(range(len(names)), names, fontsize=8, rotation=40, ha="left")
    axis.xaxis.tick_top()
    families = [fault.family for fault, k in zip(FAULTS, kept, strict=True) if k]
    for i in range(1, len(families)):
        if families[i] != families[i - 1]:
            axis.axhline(i - 0.5, color="black", linewidth=0.8)
    figure.colorbar(image, ax=axis, label="% of runs within 5 % of the fault-free drop")
    figure.savefig(path, dpi=130)
    plt.close(figure)
