"""What ``noise.py`` measured, and what follows from it: tables and figure."""

import itertools
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from noise_tasks import (
    BATCH_SIZES,
    CASES,
    CHOOSE,
    FULL,
    NOISE,
    PLATEAU,
    PLATEAUS,
    REPORT,
)
from peers import ADAMW, LALERG
from store import RESULTS, Store, table
from sweeps import (
    DECADES,
    NUM_SEEDS,
    Rates,
    Row,
    best_index,
    percent,
    ratio_shares,
    shares,
)

FACTORS = (1e-3, 1.0, 1e3)  # of tuned AdamW's rate, on plateaus
FULL_RATES = (1e-6, 1e-3, 1e-1)


class Results(Store):
    """What has been measured, and what follows from it."""

    identity = ("task", "batch_size", "optimizer")
    current: tuple[str, ...] = ()

    def measure(self, key: tuple[str, ...], *args: Any, **kwargs: Any) -> None:
        """Measures and stores a run, unless one with the same cells is stored."""
        self.current = key
        super().measure(key, *args, **kwargs)

    def save(self) -> None:
        """Writes what was measured last, and leaves what another run wrote."""
        measured, about = self.runs[self.current], self.about
        self.load()
        self.runs[self.current], self.about = measured, about
        path, self.path = self.path, self.path.with_suffix(f".{os.getpid()}")
        super().save()
        self.path.replace(path)
        self.path = path

    def get(self, task: str, size: int, name: str, field: str) -> np.ndarray:
        """Returns a field of a row, NaN where it was not finite."""
        return np.asarray(self.runs[task, str(size), name][field], float)

    def has(self, task: str, size: int, name: str) -> bool:
        """Returns whether a row was measured."""
        return (task, str(size), name) in self.runs

    def reference(self, task: str, size: int, field: str = "train_loss") -> float:
        """Returns a field of tuned AdamW, mean over the seeds; "rates": its rate."""
        best = best_index(self.get(task, size, ADAMW.name, "train_loss"))
        return float(self.get(task, size, ADAMW.name, field)[best].mean())

    def drop(self, task: str, size: int) -> float:
        """Returns by how much tuned AdamW lowered the loss."""
        start = self.get(task, size, ADAMW.name, "start_loss").mean()
        return float(start - self.reference(task, size))

    def percents(self, task: str, size: int, losses: np.ndarray) -> np.ndarray:
        """Returns losses above tuned AdamW's, in % of its drop."""
        excess = losses - self.reference(task, size)
        excess = 100.0 * np.asarray(excess, float) / self.drop(task, size)
        return np.where(np.isnan(excess), np.inf, excess)

    def excess(
        self, task: str, size: int, name: str, rates: Rates = DECADES
    ) -> np.ndarray:
        """Returns the excesses in % at those of the rates that were run, by seed."""
        known = self.runs[task, str(size), name]["rates"]
        chosen = [known.index(rate) for rate in rates if rate in known]
        losses = self.get(task, size, name, "train_loss")
        return self.percents(task, size, losses[chosen])

    def ratios(self, task: str, size: int, name: str) -> np.ndarray:
        """Returns final losses in units of tuned AdamW's, [rate, seed]."""
        excess, reference = self.excess(task, size, name), self.reference(task, size)
        return 1.0 + excess / 100.0 * self.drop(task, size) / reference

    def is_positive(self, task: str) -> bool:
        """Returns whether losses of a task have a ratio, at all batch sizes."""
        sizes = [s for s in BATCH_SIZES if self.has(task, s, ADAMW.name)]
        return all(self.reference(task, size) > 0.0 for size in sizes)

    def at_tuned(self, task: str, size: int, name: str) -> np.ndarray:
        """Returns the excesses in % at tuned AdamW's own rate, by seed."""
        return self.excess(task, size, name, (self.reference(task, size, "rates"),))[0]

    def cells(
        self,
        name: str,
        cases: Iterable[str],
        sizes: Iterable[int],
        found: Callable[..., np.ndarray] | None = None,
    ) -> np.ndarray:
        """Returns the excesses of all cells of a row that were measured.

        Args:
          name: of the row.
          cases: names of the tasks.
          sizes: batch sizes.
          found: (task, batch size, name) to the excesses; by default `excess`.
        """
        known = [p for p in itertools.product(cases, sizes) if self.has(*p, name)]
        excesses = [(found or self.excess)(*place, name).ravel() for place in known]
        return np.concatenate(excesses or [np.zeros(0)])

    def tasks_of(self, cases: Iterable[str], name: str) -> list[str]:
        """Returns those of the tasks that a row was measured on, at any batch size."""
        return [
            case
            for case in cases
            if any(self.has(case, size, name) for size in CASES[case].batch_sizes)
        ]


def stored() -> Results:
    """Returns what is stored with the repository."""
    results = Results(RESULTS / "noise.json")
    results.load()
    return results


# Tables


def in_short(cells: np.ndarray) -> str:
    """Returns how many % of cells are within 5 %, within 1 %, and the worst cell."""
    if not cells.size:
        return ""
    five, one, _ = shares(cells)
    return f"{five} / {one} / {percent(cells.max())}"


def summary_table(
    results: Results, rows: Iterable[Row], cases: Iterable[str]
) -> list[str]:
    """Returns how every optimizer does at every batch size.

    The first line is what tuned AdamW's own seeds are: no more can be expected.
    """
    told = [("adamw, tuned", ADAMW.name, results.at_tuned)]
    told += [(r.name, r.name, results.excess) for r in rows if r.group != "tuned"]
    lines = []
    for title, name, found in told:
        known = results.tasks_of(cases, name)
        if known:
            cells = [results.cells(name, known, [s], found) for s in BATCH_SIZES]
            line = [in_short(c) for c in (*cells, np.concatenate(cells))]
            lines.append([title, *line, str(len(known))])
    header = ["optimizer", *(f"batch size {s}" for s in BATCH_SIZES), "all", "tasks"]
    return table(header, lines)


def ratio_table(
    results: Results, rows: Iterable[Row], cases: Iterable[str]
) -> list[str]:
    """Returns how high losses end at every batch size, in units of tuned AdamW's."""
    lines = []
    for name in (row.name for row in rows if row.group != "tuned"):
        known = results.tasks_of(cases, name)
        if known:
            cells = [
                results.cells(name, known, [s], results.ratios) for s in BATCH_SIZES
            ]
            every = (ratio_shares(c) for c in (*cells, np.concatenate(cells)))
            lines.append([name, *(" / ".join(c) for c in every), str(len(known))])
    header = ["optimizer", *(f"batch size {s}" for s in BATCH_SIZES), "all", "tasks"]
    return table(header, lines)


def task_table(results: Results) -> list[str]:
    """Returns how lalerg does on every task at every batch size."""
    lines = []
    for name in results.tasks_of(NOISE, LALERG.name):
        line = [in_short(results.cells(LALERG.name, [name], [s])) for s in BATCH_SIZES]
        lines.append([name, CASES[name].part, *line])
    header = ["task", "part", *(f"batch size {s}" for s in BATCH_SIZES)]
    return table(header, lines)


def tuned_table(results: Results, rows: Iterable[Row]) -> list[str]:
    """Returns excesses at tuned AdamW's own rate, mean and worst."""
    names = [ADAMW.name, LALERG.name, *(r.name for r in rows if r.group == "tuned")]
    lines = []
    for name in results.tasks_of(NOISE, ADAMW.name):
        for own in names:
            line = []
            for size in BATCH_SIZES:
                if results.has(name, size, own):
                    excess = results.at_tuned(name, size, own)
                    line.append(f"{percent(excess.mean())} ({percent(excess.max())})")
                else:
                    line.append("")
            if any(line):
                lines.append([name, own, *line])
    header = ["task", "optimizer", *(f"batch size {s}" for s in BATCH_SIZES)]
    return table(header, lines)


def reference_table(results: Results) -> list[str]:
    """Returns the rate of tuned AdamW, and the losses between which it went."""
    lines = []
    for name in results.tasks_of(NOISE, ADAMW.name):
        line = []
        for size in BATCH_SIZES:
            if results.has(name, size, ADAMW.name):
                rate = results.reference(name, size, "rates")
                end = results.reference(name, size)
                start = end + results.drop(name, size)
                line.append(f"{rate:.0e}: {start:.3g} to {end:.3g}")
            else:
                line.append("")
        lines.append([name, CASES[name].part, *line])
    header = ["task", "part", *(f"batch size {s}" for s in BATCH_SIZES)]
    return table(header, lines)


def plateau_table(results: Results) -> list[str]:
    """Returns how many runs ended above half of the loss of a constant guess."""
    lines = []
    for name, case in PLATEAUS.items():
        for size in case.batch_sizes:
            if not results.has(name, size, ADAMW.name):
                continue
            tuned = results.get(name, size, ADAMW.name, "train_loss")
            losses = [tuned[best_index(tuned)]]
            if results.has(name, size, LALERG.name):
                losses += [*results.get(name, size, LALERG.name, "train_loss")]
            stuck = [str(np.sum(~(x <= 0.5 * case.chance))) for x in losses]
            stuck += [""] * (1 + len(FACTORS) - len(stuck))
            rate = f"{results.reference(name, size, 'rates'):.0e}"
            lines.append([name, str(size), rate, *stuck])
    header = ["task", "batch size", "tuned rate", "tuned AdamW"]
    return table([*header, *(f"lalerg, rate x {f:g}" for f in FACTORS)], lines)


def full_table(results: Results) -> list[str]:
    """Returns dead runs and excess of lalerg on full batches."""
    lines = []
    for name in results.tasks_of(FULL, LALERG.name):
        losses = results.get(name, 1, LALERG.name, "train_loss")
        tuned = results.get(name, 1, ADAMW.name, "train_loss")
        limit = 0.5 * CASES[name].chance
        excess = results.percents(name, 1, losses)
        network, count, num_steps = name.split("_")
        lines.append(
            [
                network,
                count,
                num_steps,
                str(np.sum(~(tuned[best_index(tuned)] <= limit))),
                *(str(np.sum(~(x <= limit))) for x in losses),
                *shares(excess)[:2],
                percent(excess.max()),
            ]
        )
    header = ["network", "digits", "steps", "dead: tuned AdamW"]
    header += [f"lalerg, {rate:.0e}" for rate in FULL_RATES]
    return table([*header, "within 5 %", "within 1 %", "worst cell, %"], lines)


def report(results: Results, rows: Sequence[Row]) -> str:
    """Returns everything as Markdown."""
    lines = [
        "# Any learning rate, any batch size",
        "",
        results.made(),
        "",
        f"Learning rates 1e-7 ... 1e1, {NUM_SEEDS} seeds each. Excess is the final "
        "loss on the whole training set above that of AdamW tuned at the same batch "
        "size, in % of the drop that tuned AdamW made. Tuned AdamW is the best of 17 "
        "half decades with linear decay to zero. A cell of a table gives % of runs "
        "within 5 %, % of runs within 1 %, and the worst excess in %.",
        "",
    ]
    for title, cases in (("chosen on", CHOOSE), ("not chosen on", REPORT)):
        lines += [
            f"## Tasks {title}",
            "",
            f"{', '.join(cases)}.",
            "",
            *summary_table(results, rows, cases),
        ]
    lines += [
        "A share of the drop flatters losses that fall by orders of magnitude. A cell "
        "of the next two tables gives the final loss in units of tuned AdamW's: % of "
        "runs in which it is at most 1.1 times as high, % of runs in which it is at "
        "most twice as high, and the median. Losses that can be negative have no such "
        "ratio, and their tasks are left out.",
        "",
    ]
    for title, cases in (("chosen on", CHOOSE), ("not chosen on", REPORT)):
        positive = [name for name in cases if results.is_positive(name)]
        lines += [
            f"## Ratio of losses, tasks {title}",
            "",
            f"{', '.join(positive)}.",
            "",
            *ratio_table(results, rows, positive),
        ]
    lines += ["## lalerg, task by task", "", *task_table(results)]
    lines += [
        "## At tuned AdamW's own rate",
        "",
        "Excess in %, mean of the seeds and the worst of them. AdamW's own is how far "
        "its seeds are apart; its rate is the best on these seeds.",
        "",
        *tuned_table(results, rows),
    ]
    lines += [
        "## Tuned AdamW",
        "",
        "Its rate, and the loss on the whole training set before and after.",
        "",
        *reference_table(results),
    ]
    if results.tasks_of(PLATEAUS, ADAMW.name):
        lines += [
            "## Plateaus",
            "",
            f"Runs of {PLATEAU.num_seeds} that end above half of the loss of a "
            "constant guess. Tuned AdamW is the best of nine half decades.",
            "",
            *plateau_table(results),
        ]
    if results.tasks_of(FULL, LALERG.name):
        lines += [
            "## Full batches",
            "",
            "All digits at every step. Dead are runs of 12 that end above half of ln "
            "10 (tuned AdamW: of three).",
            "",
            *full_table(results),
        ]
    lines += ["## How each is run", ""]
    lines += [f"- {r.name}: {r.note}." for r in rows if r.note]
    return "\n".join(lines)


# Figure


def draw(results: Results, path: Path) -> None:
    """Writes the figure: excess by learning rate and batch size, a panel a task."""
    import matplotlib.pyplot as plt

    names = {ADAMW.name: "AdamW", LALERG.name: "lalerg"}
    parts = [results.tasks_of(part, ADAMW.name) for part in (CHOOSE, REPORT)]
    num_columns = max(1, *map(len, parts))
    figure, axes = plt.subplots(
        4,
        num_columns,
        figsize=(1.9 * num_columns + 1.2, 7.6),
        squeeze=False,
        layout="constrained",
    )
    image = None
    for axis in axes.flat:
        axis.axis("off")
    rows = [(part, name) for part in parts for name in names]
    for line, (part, name) in zip(axes, rows, strict=True):
        for axis, task in zip(line, part, strict=False):
            shape = (len(BATCH_SIZES), len(DECADES))
            excess = np.full(shape, np.nan)
            for i, size in enumerate(BATCH_SIZES):
                if results.has(task, size, name):
                    found = results.excess(task, size, name).mean(axis=1)
                    if len(found) == len(DECADES):
                        excess[i] = np.clip(found, 0.0, 20.0)
            axis.axis("on")
            image = axis.imshow(
                excess, cmap="viridis_r", vmin=0.0, vmax=20.0, aspect="auto"
            )
            axis.set_title(f"{task}: {names[name]}", fontsize=8)
            axis.set_xticks(range(0, len(DECADES), 2))
            axis.set_xticklabels([f"{rate:.0e}" for rate in DECADES[::2]], fontsize=6)
            axis.set_yticks(range(len(BATCH_SIZES)))
            axis.set_yticklabels(BATCH_SIZES, fontsize=7)
    for axis in axes[:, 0]:
        axis.set_ylabel("batch size", fontsize=8)
    for axis in axes[-1]:
        axis.set_xlabel("learning_rate", fontsize=8)
    if image is not None:
        label = "excess over tuned AdamW, % of its drop"
        figure.colorbar(image, ax=axes, shrink=0.6, extend="max", label=label)
    figure.savefig(path, dpi=130)
    plt.close(figure)
