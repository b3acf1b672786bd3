"""What ``decades.py`` measured, and what follows from it: tables and figure."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from peers import ADAMW, DEFAULT, LALERG
from store import Store, table
from sweeps import (
    DECADES,
    RATIO_COLUMNS,
    Row,
    best_index,
    percent,
    ratio_shares,
    shares,
    times,
)
from tasks import DEVELOPMENT, REPORT, TASKS

NUM_PIECES = 40  # a curve is the mean loss of the batches of so many pieces of a run
SMOOTHED_PIECES = 5
BUDGET_SHARE = 2 / 3  # where the speed of ``lalerg()`` is compared
TUNED = "lalerg, tuned rate"


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

    def ratios(self, task: str, name: str) -> np.ndarray:
        """Returns final training losses in units of tuned AdamW's, [rate, seed]."""
        reference = self.reference(task)
        return 1.0 + self.excess(task, name) / 100.0 * self.drop(task) / reference

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


# Tables

SETS: dict[str, Iterable[str]] = {
    "chosen on": DEVELOPMENT,
    "not chosen on": REPORT,
    "all": TASKS,
}


def ranked(results: Results, rows: Iterable[Row]) -> list[Row]:
    """Returns the rows that were measured, those first that are often within 5 %."""
    known = [row for row in rows if results.common(row.name)]
    return sorted(known, key=lambda row: -np.mean(results.cells(row.name) <= 5))


def summary_table(results: Results, rows: Iterable[Row]) -> list[str]:
    """Returns the shares of every row, on the two halves of the tasks and on all."""
    header = ["optimizer"]
    for name in SETS:
        header += [f"{name}: within 5 %", "within 1 %", "better"]
    lines = []
    for row in ranked(results, rows):
        tasks = results.common(row.name)
        line = [row.name]
        for chosen in SETS.values():
            line += shares(results.cells(row.name, chosen))
        num_rates = len(results.excess(tasks[0], row.name))
        lines.append([*line, str(len(tasks)), str(num_rates)])
    return table([*header, "tasks", "rates"], lines)


def ratio_table(results: Results, rows: Iterable[Row]) -> list[str]:
    """Returns how high training losses end, in units of tuned AdamW's."""
    header, lines = ["optimizer"], []
    for name in SETS:
        header += [f"{name}: {RATIO_COLUMNS[0]}", *RATIO_COLUMNS[1:]]
    for row in ranked(results, rows):
        line = [row.name]
        for chosen in SETS.values():
            known = [t for t in chosen if results.has(t, row.name)]
            ratios = [results.ratios(t, row.name).ravel() for t in known]
            line += ratio_shares(np.concatenate([np.zeros(0), *ratios]))
        lines.append(line)
    return table(header, lines)


def best_table(results: Results, rows: Iterable[Row]) -> list[str]:
    """Returns how every row does at its best rate of each task: when it is tuned."""
    lines = []
    for row in rows:
        best = {}
        for task in results.common(row.name):
            excess = results.excess(task, row.name)
            best[task] = excess[best_index(excess)].mean()
        if best:
            values = np.array(list(best.values()))
            most = max(best, key=best.__getitem__)
            lines.append(
                (
                    float(np.median(values)),
                    [
                        row.name,
                        *shares(values),
                        percent(np.median(values)),
                        f"{percent(best[most])} ({most})",
                        str(len(best)),
                    ],
                )
            )
    header = ["optimizer", "within 5 %", "within 1 %", "better", "median", "worst task"]
    return table([*header, "tasks"], [line for _, line in sorted(lines)])


def worst(results: Results, task: str, name: str) -> str:
    """Returns the worst cell and its rate."""
    excess = results.excess(task, name)
    where = int(np.argmax(excess.max(axis=1)))
    rate = results.runs[task, name]["rates"][where]
    return f"{percent(excess.max())} (at {rate:.0e})"


def at_tuned_rate(results: Results, task: str) -> str:
    """Returns the excess at tuned AdamW's own rate."""
    if not results.has(task, TUNED):
        return ""
    excess = results.excess(task, TUNED)
    return f"{percent(excess.mean())} (worst {percent(excess.max())})"


def task_table(results: Results) -> list[str]:
    """Returns how lalerg does on every task."""
    lines, held_out = [], []
    for task in results.common(LALERG.name):
        reverted = results.get(task, LALERG.name, "num_revert_steps")
        share = 100 * reverted / results.runs[task, LALERG.name]["num_steps"]
        ratios = results.ratios(task, LALERG.name)
        held_out.append(np.median(results.excess(task, LALERG.name, "test_loss")))
        lines.append(
            [
                task,
                f"{results.reference(task, 'rates'):.1e}",
                *shares(results.cells(LALERG.name, [task])),
                worst(results, task, LALERG.name),
                times(float(np.median(ratios))),
                times(float(ratios.max())),
                at_tuned_rate(results, task),
                f"{np.median(reverted) / 2:g}",
                f"{reverted.max() / 2:g}",
                f"{share.max():.1f}",
                percent(held_out[-1]),
            ]
        )
    lines.append(["**median**", *[""] * 11, percent(np.median(held_out))])
    return table(
        [
            "task",
            "tuned AdamW's rate",
            "within 5 %",
            "within 1 %",
            "better",
            "worst cell, %",
            "ratio of losses, median",
            "ratio of losses, worst",
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


def slower(factor: float) -> str:
    """Returns a factor as a table shows it."""
    return f"{factor:.2f}" if np.isfinite(factor) else "not reached"


def default_table(results: Results) -> list[str]:
    """Returns how ``lalerg()`` does on every task."""
    lines, factors = [], []
    for task in results.common(DEFAULT.name):
        excess = results.excess(task, DEFAULT.name)
        factors.append(slowdown(results, task))
        factor = slower(factors[-1])
        lines.append([task, percent(excess.mean()), percent(excess.max()), factor])
    lines.append(["**median**", "", "", slower(float(np.median(factors)))])
    header = ["task", "mean excess, %", "worst seed, %", "times tuned AdamW's steps"]
    return table(header, lines)


def constants_table(results: Results, rows: Iterable[Row]) -> list[str]:
    """Returns what a change of a constant changes."""
    lines = []
    for row in rows:
        tasks = results.common(row.name, LALERG.name)
        if tasks:
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


def report(results: Results, rows: Iterable[Row]) -> str:
    """Returns everything as Markdown."""
    known = {name for _, name in results.runs}
    groups: dict[str, list[Row]] = {}
    for row in rows:
        if row.name in known:
            groups.setdefault(row.group, []).append(row)
    compared = [r for g in ("peers", "lalerg", "ablation") for r in groups.get(g, [])]
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
        f'"not chosen on" the others ({", ".join(REPORT)}).',
        "",
        "## All optimizers",
        "",
        *summary_table(results, compared),
        "## By the ratio of losses",
        "",
        "A share of the drop flatters losses that fall by orders of magnitude. Here is "
        "the final loss on the whole training set in units of tuned AdamW's: % of "
        "cells in which it is at most 1.1 and 2 times as high, and the median.",
        "",
        *ratio_table(results, compared),
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
    lines += [
        "## Each at its best rate",
        "",
        "When it is tuned, too: for each task the one of its rates with the lowest "
        "mean loss. % of tasks; then the mean excess of the seeds in %, median and "
        "worst task. Below 0 it is better than tuned AdamW. These are nine decades, "
        "and not 17 half decades: the row of adamw says what that costs.",
        "",
        *best_table(results, compared),
    ]
    if "constants" in groups:
        lines += [
            "## One constant changed",
            "",
            "Points gained or lost against lalerg with the same seed and tasks.",
            "",
            *constants_table(results, groups["constants"]),
        ]
    lines += ["## How each is run", ""]
    told = [row for group in groups.values() for row in group if row.note]
    lines += [f"- {row.name}: {row.note}." for row in told]
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
