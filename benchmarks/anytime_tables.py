"""What ``anytime.py`` measured, and what follows from it: tables and figure."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from store import Store, table
from sweeps import RATIO_COLUMNS, best_index, percent, ratio_shares, times
from tasks import DEVELOPMENT, REPORT, TASKS

TUNED = "adamw, linear decay"
LAST, READ = "last", "average"
MIDDLE = 3e-3  # where the first range of rates lies
HALVES = {"chosen on": DEVELOPMENT, "not chosen on": REPORT}
COLORS = {
    ("adamw, constant", LAST): ("tab:gray", ":"),
    ("adamw, constant", READ): ("tab:gray", "-"),
    ("schedule_free_adamw", READ): ("tab:brown", "-"),
    ("lalerg(average=True)", LAST): ("tab:red", ":"),
    ("lalerg(average=True)", READ): ("tab:red", "-"),
    ("lalerg, linear decay", LAST): ("tab:blue", "-"),
}


class Results(Store):
    """What has been measured, and what follows from it."""

    identity = ("task", "optimizer", "steps")

    @property
    def starts(self) -> dict[str, list[float]]:
        """The losses before anything is learnt, by task."""
        return self.notes.setdefault("start_loss", {})

    def cells(
        self, task: str, name: str, stop: int, read: str = LAST
    ) -> np.ndarray | None:
        """Returns the losses at a stopping point, [rate, seed]; None if not there."""
        for (own, optimizer, _), entry in self.runs.items():
            is_there = (own, optimizer) == (task, name) and stop in entry["stops"]
            if is_there and read in entry["read"]:
                i, j = entry["stops"].index(stop), entry["read"].index(read)
                losses = np.asarray(entry["train_loss"], float)[:, :, i, j]
                return np.where(np.isnan(losses), np.inf, losses)
        return None

    def best(self, task: str, name: str, stop: int, read: str = LAST) -> Any:
        """Returns the losses at the best rate for a stopping point, by seed."""
        cells = self.cells(task, name, stop, read)
        return None if cells is None else cells[best_index(cells)]

    def rate_before(self, task: str, name: str, steps: int) -> float:
        """Returns the best rate for the last stopping point before that, or `MIDDLE`.

        Of a row that is not there yet, it is that of tuned AdamW.
        """
        for optimizer in (name, TUNED):
            for (own, other, n), entry in reversed(self.runs.items()):
                if (own, other) == (task, optimizer) and n < steps:
                    stop, read = entry["stops"][-1], entry["read"][-1]
                    cells = self.cells(task, optimizer, stop, read)
                    return float(entry["rates"][best_index(cells)])
        return MIDDLE

    def is_own(self, name: str) -> bool:
        """Whether an optimizer is not tuned, but begins anywhere."""
        return name.startswith("lalerg")

    def losses(self, task: str, name: str, stop: int, read: str) -> Any:
        """Returns what counts of a row: all cells of ours, the best rate of others."""
        if self.is_own(name):
            return self.cells(task, name, stop, read)
        return self.best(task, name, stop, read)

    def compared(
        self, task: str, name: str, stop: int, read: str
    ) -> tuple[np.ndarray, float] | None:
        """Returns what counts of a row, and the loss of AdamW tuned for this stop."""
        losses = self.losses(task, name, stop, read)
        tuned = self.best(task, TUNED, stop)
        if losses is None or tuned is None:
            return None
        return losses.ravel(), float(tuned.mean())

    def excess(self, task: str, name: str, stop: int, read: str) -> np.ndarray | None:
        """Returns losses above that of the tuned one, in % of its drop."""
        found = self.compared(task, name, stop, read)
        if found is None:
            return None
        losses, tuned = found
        return 100.0 * (losses - tuned) / (float(np.mean(self.starts[task])) - tuned)

    def ratio(self, task: str, name: str, stop: int, read: str) -> np.ndarray | None:
        """Returns losses in units of that of the tuned one."""
        found = self.compared(task, name, stop, read)
        return None if found is None else found[0] / found[1]

    def rows(self) -> list[tuple[str, str]]:
        """Returns the rows, as optimizer and how it is read."""
        pairs = [
            (name, read)
            for (_, name, _), entry in self.runs.items()
            for read in entry["read"]
        ]
        return [pair for pair in dict.fromkeys(pairs) if pair[0] != TUNED]

    def stops(self) -> list[int]:
        """Returns all stopping points."""
        return sorted({n for entry in self.runs.values() for n in entry["stops"]})

    def by_task(
        self, name: str, read: str, stop: int, chosen: Iterable[str]
    ) -> list[np.ndarray]:
        """Returns the excesses of each task that was measured."""
        found = (self.excess(task, name, stop, read) for task in chosen)
        return [cells for cells in found if cells is not None]


def means_table(results: Results, chosen: Iterable[str]) -> list[str]:
    """Returns the mean excess over tasks at each stop, spread of tasks, worst run."""
    chosen, stops = list(chosen), results.stops()
    lines = []
    for name, read in results.rows():
        line = [f"{name}, {read}"]
        for stop in stops:
            tasks = results.by_task(name, read, stop, chosen)
            if not tasks:
                line.append("")
                continue
            means = np.array([cells.mean() for cells in tasks])
            worst = max(cells.max() for cells in tasks)
            within = f"{np.sum(means <= 1.0)}/{len(means)}"
            mean = f"{percent(means.mean())} +- {means.std():.2f}"
            line.append(f"{mean}, {within}, {percent(worst)}")
        lines.append(line)
    return table(["optimizer, read", *(f"{n:,} steps" for n in stops)], lines)


def ratios_table(results: Results, chosen: Iterable[str]) -> list[str]:
    """Returns how high losses are in units of that of the tuned one, all stops."""
    chosen, lines = list(chosen), []
    for name, read in results.rows():
        found = [
            results.ratio(task, name, stop, read)
            for task in chosen
            for stop in results.stops()
            if stop >= 400
        ]
        cells = [cells for cells in found if cells is not None]
        shares = ratio_shares(np.concatenate(cells or [np.zeros(0)]))
        lines.append([f"{name}, {read}", *shares])
    return table(["optimizer, read", *RATIO_COLUMNS], lines)


def tasks_table(results: Results, name: str, read: str) -> list[str]:
    """Returns the mean excess, the worst and the mean ratio of each task."""
    stops, lines = results.stops(), []
    for task in TASKS:
        line = [task]
        for stop in stops:
            cells = results.excess(task, name, stop, read)
            if cells is None:
                line.append("")
                continue
            ratio = times(float(results.ratio(task, name, stop, read).mean()))
            line.append(f"{percent(cells.mean())}, {percent(cells.max())}, {ratio}")
        if any(line[1:]):
            lines.append(line)
    return table(["task", *(f"{n:,} steps" for n in stops)], lines)


def report(results: Results) -> str:
    """Returns everything as Markdown."""
    lines = [
        "# Stopped anywhere",
        "",
        results.made(),
        "",
        "Excess is the loss on the whole training set above that of AdamW with linear "
        "decay to zero, tuned for each stopping point (half decades, mean of the "
        "seeds), in % of the drop that it made. Stopping points have different numbers "
        "of tasks. Schedule-free warms up for 100 steps. *linear decay* is told the "
        "number of steps, and makes a run for each; of all others a single run is read "
        "at all stopping points. lalerg begins at 1e-6, 1e-3 and 1, all of which "
        "count; of all others the best rate for each stopping point counts.",
        "",
        "Mean over tasks +- standard deviation of the tasks, tasks whose mean is at "
        "most 1 %, worst run:",
        "",
    ]
    for half, chosen in HALVES.items():
        lines += [f"## Tasks {half}", "", *means_table(results, chosen)]
    lines += [
        "## By the ratio of losses",
        "",
        "Loss in units of that of the tuned one, from 400 steps on, all tasks: % of "
        "runs in which it is at most 1.1 and 2 times as high, and the median.",
        "",
        *ratios_table(results, TASKS),
    ]
    for name, read in results.rows():
        if results.is_own(name):
            lines += [f"## {name}, {read}", "", "Mean, worst run, ratio of losses.", ""]
            lines += tasks_table(results, name, read)
    return "\n".join(lines)


def draw(results: Results, path: Path) -> None:
    """Writes the figure: mean excess over tasks against the stopping point."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        1, len(HALVES), figsize=(8.2, 3.4), layout="constrained", sharey=True
    )
    for axis, (half, chosen) in zip(axes, HALVES.items(), strict=True):
        for name, read in results.rows():
            color, style = COLORS.get((name, read), (None, None))
            points = []
            for stop in results.stops():
                tasks = results.by_task(name, read, stop, chosen)
                if color and tasks:
                    points.append((stop, np.mean([cells.mean() for cells in tasks])))
            if points:
                axis.plot(
                    *zip(*points, strict=True),
                    color=color,
                    linestyle=style,
                    marker=".",
                    label=f"{name}, {read}",
                )
        axis.axhline(0.0, color="black", linewidth=0.8)
        axis.set_xscale("log")
        axis.set_yscale("symlog", linthresh=1.0)
        axis.set_title(f"tasks {half}", fontsize=9)
        axis.set_xlabel("stopped at step", fontsize=8)
    axes[0].set_ylabel("excess over AdamW tuned for this length, %", fontsize=8)
    axes[0].legend(fontsize=6)
    figure.savefig(path, dpi=130)
    plt.close(figure)
