"""What ``families.py`` measured, and what follows from it: tables and figure."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from store import Store, table
from sweeps import (
    DECADES,
    RATIO_COLUMNS,
    best_index,
    percent,
    ratio_shares,
    shares,
)
from tasks import DEVELOPMENT, REPORT, TASKS

SCHEDULES = (  # of AdamW
    *("linear decay", "warm-up and cosine"),
    *("warm-up, stable, decay", "warm restarts"),
)
HALVES = {"chosen on": DEVELOPMENT, "not chosen on": REPORT}


def bare(family: str) -> str:
    """Returns how the optimizer of a family is called where it is tuned."""
    return f"bare: {family}"


class Results(Store):
    """What has been measured, and what follows from it."""

    @property
    def starts(self) -> dict[str, list[float]]:
        """The losses before anything is learnt, by task."""
        return self.notes.setdefault("start_loss", {})

    def losses(self, task: str, name: str) -> np.ndarray:
        """Returns the final losses of a row, [rate, seed]; infinity if not finite."""
        losses = np.asarray(self.runs[task, name]["train_loss"], float)
        return np.where(np.isnan(losses), np.inf, losses)

    def tasks(self, family: str, chosen: Iterable[str]) -> list[str]:
        """Returns those of the tasks on which a family was measured."""
        names = family, bare(family)
        return [t for t in chosen if all((t, name) in self.runs for name in names)]

    def tuned(self, task: str, family: str) -> float:
        """Returns the loss of the tuned optimizer of a family, mean over the seeds."""
        base = self.losses(task, bare(family))
        return float(base[best_index(base)].mean())

    def measured(self, task: str, family: str, name: str) -> np.ndarray:
        """Returns the losses of all cells of a row, [rate, seed]."""
        losses = self.losses(task, name)
        if name == bare(family):  # the half decades only tune it
            rates = self.runs[task, name]["rates"]
            losses = losses[np.isin(rates, DECADES)] if len(rates) > 6 else losses
        return losses

    def excess(self, task: str, family: str, name: str) -> np.ndarray:
        """Returns losses above those of the tuned one, in % of its drop."""
        tuned = self.tuned(task, family)
        drop = float(np.mean(self.starts[task])) - tuned
        return 100.0 * (self.measured(task, family, name) - tuned) / drop

    def ratios(self, task: str, family: str, name: str) -> np.ndarray:
        """Returns losses in units of that of the tuned one."""
        return self.measured(task, family, name) / self.tuned(task, family)

    def cells(
        self,
        family: str,
        name: str,
        chosen: Iterable[str],
        found: Callable[..., np.ndarray] | None = None,
    ) -> np.ndarray:
        """Returns the excesses, or what else is found, of all cells of a row."""
        tasks = self.tasks(family, chosen)
        cells = [(found or self.excess)(t, family, name).ravel() for t in tasks]
        return np.concatenate(cells or [np.zeros(0)])


def shares_table(results: Results, families: Iterable[Any]) -> list[str]:
    """Returns the shares of cells of each family, ours beside bare."""
    header = ["family", "bare: within 5 %"]
    for half in HALVES:
        header += [f"{half}: within 5 %", "within 1 %", "better"]
    lines = []
    for family in families:
        tasks = results.tasks(family.name, TASKS)
        line = [family.name]
        line += shares(results.cells(family.name, bare(family.name), tasks))[:1]
        for half in HALVES.values():
            chosen = [t for t in tasks if t in half]
            line += shares(results.cells(family.name, family.name, chosen))
        worst = results.cells(family.name, family.name, tasks).max()
        line += [percent(worst), str(len(tasks))]
        for half in HALVES.values():
            chosen = [t for t in tasks if t in half]
            line += shares(results.cells(family.name, bare(family.name), chosen))[:1]
        lines.append(line)
    header += [
        "worst cell, %",
        "tasks",
        *(f"{half}: bare, within 5 %" for half in HALVES),
    ]
    return table(header, lines)


def ratio_table(results: Results, families: Iterable[Any]) -> list[str]:
    """Returns how high losses end, in units of that of the tuned one."""
    header, lines = ["family"], []
    for half in HALVES:
        header += [f"{half}: bare, {RATIO_COLUMNS[0]}", *RATIO_COLUMNS]
    for family in families:
        line = [family.name]
        for half in HALVES.values():
            base, own = (
                ratio_shares(results.cells(family.name, name, half, results.ratios))
                for name in (bare(family.name), family.name)
            )
            line += [base[0], *own]
        lines.append(line)
    return table(header, lines)


def tasks_table(results: Results, families: list[Any]) -> list[str]:
    """Returns the worst cell of each family on each task, and where it begins."""
    tasks = [
        t
        for t in (*DEVELOPMENT, *REPORT)
        if any((t, f.name) in results.runs for f in families)
    ]
    lines = []
    for family in families:
        line = [family.name]
        for task in tasks:
            if not results.tasks(family.name, [task]):
                line.append("")
                continue
            cells = results.excess(task, family.name, family.name)
            line.append(f"{100 * np.mean(cells <= 5):.0f} / {percent(cells.max())}")
        lines.append(line)
    return table(["family", *tasks], lines)


def report(results: Results, families: Iterable[Any]) -> str:
    """Returns everything as Markdown."""
    families = [f for f in families if results.tasks(f.name, TASKS)]
    lines = [
        "# Any method, any schedule",
        "",
        results.made(),
        "",
        "Learning rates 1e-7 ... 1e1, three seeds each. Excess is the final loss on "
        "the whole training set above that of the tuned optimizer of the family (the "
        "best of 17 half decades, mean of the seeds), in % of the drop that it made. "
        'Tables give % of cells. "Chosen on" are the tasks on which constants of '
        'lalerg were chosen, "not chosen on" the others.',
        "",
    ]
    for group, title in (("methods", "Methods"), ("schedules", "Schedules")):
        chosen = [f for f in families if f.group == group]
        if chosen:
            lines += [f"## {title}", "", *shares_table(results, chosen)]
            lines += [f"## {title}, by the ratio of losses", ""]
            lines += [
                "A share of the drop flatters losses that fall by orders of magnitude. "
                "Here is the final loss in units of that of the tuned optimizer: % of "
                "cells in which it is at most 1.1 and 2 times as high, and the median.",
                "",
            ]
            lines += ratio_table(results, chosen)
            lines += [f"## {title}, task by task", ""]
            lines += ["Within 5 %, % of cells / worst cell, %.", ""]
            lines += tasks_table(results, chosen)
    return "\n".join(lines)


def draw(results: Results, path: Path) -> None:
    """Writes the figure: share of cells within 5 % for each family, ours and bare."""
    import matplotlib.pyplot as plt

    names = [n for _, n in results.runs if not n.startswith(bare(""))]
    names = list(dict.fromkeys(names))[::-1]
    every = [*DEVELOPMENT, *REPORT]
    figure, axis = plt.subplots(
        figsize=(6.4, 0.32 * len(names) + 1.2), layout="constrained"
    )
    for offset, prefix, color, label in (
        (0.2, "", "tab:red", "lalerg"),
        (-0.2, bare(""), "tab:gray", "the optimizer itself"),
    ):
        widths = [
            100 * np.mean(results.cells(name, prefix + name, every) <= 5)
            for name in names
        ]
        places = np.arange(len(names)) + offset
        axis.barh(places, widths, height=0.38, color=color, label=label)
    labels = [f"AdamW, {name}" if name in SCHEDULES else name for name in names]
    axis.set_yticks(np.arange(len(names)), labels, fontsize=8)
    axis.set_ylim(-0.6, len(names) - 0.4)
    axis.set_xlim(0, 100)
    axis.set_xlabel(
        "% of runs over nine decades of rates within 5 % of the tuned one", fontsize=8
    )
    figure.legend(loc="outside upper right", ncols=2, fontsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)
