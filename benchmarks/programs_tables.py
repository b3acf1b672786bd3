"""What ``programs.py`` measured, and what follows from it: tables."""

from typing import Any, NamedTuple

import numpy as np
from program_zoo import MAKERS, constant, cosine, made, warmup_linear
from store import Store, table
from sweeps import percent

USUAL, LALERG, REGULATED = "usual", "lalerg", "error_regulate"
FACTORS = (1e-3, 1.0, 1e3)
FORMS = {USUAL: FACTORS, LALERG: FACTORS, REGULATED: (1.0,)}
MOST = 2.0  # % of the drop
SCHEDULES: dict[Any, str] = {
    constant: "",
    cosine: ", cosine decay",
    warmup_linear: ", warm-up and linear decay",
}


class Cell(NamedTuple):
    """A form at a factor of the usual rate."""

    form: str
    factor: float = 1.0


SAME = Cell(USUAL)
CELLS = {
    "lalerg, thousandth": Cell(LALERG, 1e-3),
    "lalerg": Cell(LALERG),
    "lalerg, thousandfold": Cell(LALERG, 1e3),
    "error_regulate": Cell(REGULATED),
    "usual, thousandth": Cell(USUAL, 1e-3),
    "usual, thousandfold": Cell(USUAL, 1e3),
}
OURS = {label: cell for label, cell in CELLS.items() if cell.form != USUAL}


class Results(Store):
    """What has been measured, and what follows from it; arrays are over seeds."""

    identity = ("program", "form")

    def get(self, name: str, cell: Cell, field: str) -> np.ndarray:
        """Returns a field of the runs of a cell; infinite where it is not finite."""
        at = FORMS[cell.form].index(cell.factor)
        found = np.asarray(self.runs[name, cell.form][field][at], float)
        return np.where(np.isfinite(found), found, np.inf)

    def losses(self, name: str, cell: Cell) -> np.ndarray:
        """Returns the final losses; infinite where params are not finite."""
        is_alive = self.get(name, cell, "is_alive") > 0.0
        return np.where(is_alive, self.get(name, cell, "loss"), np.inf)

    def drop(self, name: str) -> float:
        """Returns by how much the usual optimizer lowers the loss."""
        start = np.mean(self.runs[name, USUAL]["start_loss"])
        return float(start - self.losses(name, SAME).mean())

    def spread(self, name: str) -> float:
        """Returns the standard deviation of the usual's losses, in % of its drop."""
        return float(100.0 * self.losses(name, SAME).std(ddof=1) / self.drop(name))

    def excess(self, name: str, cell: Cell) -> float:
        """Returns how much higher the loss ends, in % of the usual's drop."""
        rise = self.losses(name, cell).mean() - self.losses(name, SAME).mean()
        return float(100.0 * rise / self.drop(name))

    def is_within(self, name: str, cell: Cell) -> bool:
        """Returns whether the loss is within the bar."""
        return self.excess(name, cell) <= max(MOST, self.spread(name))

    def ratio(self, name: str, cell: Cell) -> str:
        """Returns the ratio of the mean losses, if these are positive."""
        usual, found = self.losses(name, SAME), self.losses(name, cell)
        if min(usual.min(), found.min()) <= 0.0:
            return "none"
        ratio = found.mean() / usual.mean()
        return f"{ratio:.3g}" if np.isfinite(ratio) else "dead"

    def gain(self, name: str, cell: Cell) -> float:
        """Returns how much better the metric is, in standard deviations of seeds."""
        usual = self.get(name, SAME, "metric")
        better = made(name).sign * (self.get(name, cell, "metric") - usual)
        is_alive = np.isfinite(self.losses(name, cell)) & np.isfinite(better)
        better = np.where(is_alive, better, -np.inf)
        return float(better.mean() / max(usual.std(ddof=1), 1e-12))

    def objections(self, name: str, cell: Cell) -> tuple[float, float]:
        """Returns skips and reverts of a run, on average."""
        skipped, reverts = (
            self.get(name, cell, field).mean()
            for field in ("num_skipped", "num_reverts")
        )
        return float(skipped), float(reverts)


def _deviations(x: float) -> str:
    if not np.isfinite(x):
        return "dead"
    return f"{x:+.1f}" if abs(x) < 99.5 else f"{x:+.2g}"


def _mean_and_deviation(x: np.ndarray) -> str:
    return f"{x.mean():.4g} ± {x.std(ddof=1):.2g}"


def bar_table(results: Results, names: list[str]) -> list[str]:
    """Returns a row for each form: how many programs are within the bars."""
    lines = []
    for label, cell in CELLS.items():
        excess = np.array([results.excess(n, cell) for n in names])
        gains = np.array([results.gain(n, cell) for n in names])
        is_quiet = [
            cell.form == USUAL or sum(results.objections(n, cell)) == 0.0 for n in names
        ]
        line = [label, f"{sum(results.is_within(n, cell) for n in names)}"]
        line += [f"{np.sum(excess < 0.0)}", percent(float(np.median(excess)))]
        line += [percent(float(excess.max())), f"{np.sum(gains >= -1.0)}"]
        lines.append([*line, "" if cell.form == USUAL else f"{sum(is_quiet)}"])
    header = [f"of {len(names)} programs", "within the bar", "loss below the usual's"]
    header += ["median excess in %", "worst", "metric at most 1 sd worse"]
    return table([*header, "nothing skipped or reverted"], lines)


def loss_table(results: Results, names: list[str]) -> list[str]:
    """Returns a row for each program: how much higher the loss ends."""
    lines = []
    for name in names:
        losses = results.losses(name, SAME)
        line = [name, _mean_and_deviation(losses), f"{results.spread(name):.2f}"]
        for cell in CELLS.values():
            shown = percent(results.excess(name, cell))
            mark = "" if results.is_within(name, cell) or cell.form == USUAL else " !"
            line.append(f"{shown} / {results.ratio(name, cell)}{mark}")
        lines.append(line)
    return table(["program", "usual's loss", "sd in % of the drop", *CELLS], lines)


def metric_table(results: Results, names: list[str]) -> list[str]:
    """Returns a row for each program: how much better its metric is."""
    lines = []
    for name in names:
        found = _mean_and_deviation(results.get(name, SAME, "metric"))
        gains = [_deviations(results.gain(name, cell)) for cell in CELLS.values()]
        lines.append([name, made(name).metric, found, *gains])
    return table(["program", "metric", "usual's", *CELLS], lines)


def objection_table(results: Results, names: list[str]) -> list[str]:
    """Returns a row for each program: skips and reverts of a run."""
    lines = []
    for name in names:
        counts = [results.objections(name, cell) for cell in OURS.values()]
        steps = str(results.runs[name, USUAL]["num_steps"])
        lines.append([name, steps, *(f"{a:.3g} / {b:.3g}" for a, b in counts)])
    return table(["program", "steps", *OURS], lines)


def what_they_are(names: list[str]) -> list[str]:
    """Returns a row for each program: what it is, and where its rate is from."""
    programs = [(name, made(name)) for name in names]
    lines = [
        [n, p.about, f"{p.rate:g}{SCHEDULES[p.schedule]}", p.source]
        for n, p in programs
    ]
    return table(["program", "what it is", "usual rate", "from"], lines)


def report(results: Results) -> str:
    """Returns everything as Markdown."""
    names = [n for n in MAKERS if all((n, form) in results.runs for form in FORMS)]
    if not names:
        return "# Programs\n\nNo program is measured with all forms yet."
    seeds = max(run["num_seeds"] for run in results.runs.values())
    lines = [
        "# Programs",
        "",
        results.made(),
        "",
        f"{seeds} seeds. Nothing goes wrong in any run. *Usual*: the optimizer that is "
        "usual for such a program, at its usual rate (last table); *thousandth*, "
        "*thousandfold*: at a thousandth and a thousand times of it. `lalerg` has the "
        "schedule and the weight decay of the usual optimizer; `error_regulate` is "
        "around it, at its usual rate.",
        "",
        "## Bars",
        "",
        "*Within the bar*: the training loss ends above that of the usual optimizer by "
        f"at most {MOST:g} % of its drop or one standard deviation of its seeds.",
        "",
        *bar_table(results, names),
        "## Loss",
        "",
        "Training loss above that of the usual optimizer, in % of the drop that this "
        "makes / ratio of the two losses (none where they are negative). With an "
        "exclamation mark: not within the bar.",
        "",
        *loss_table(results, names),
        "## Metric",
        "",
        "The metric that a user looks at: by how many standard deviations of the "
        "usual optimizer's seeds it is better (+) or worse (-) than with that.",
        "",
        *metric_table(results, names),
        "## Objections",
        "",
        "Steps skipped / reverts in a run, mean of the seeds.",
        "",
        *objection_table(results, names),
        "## What they are",
        "",
        *what_they_are(names),
    ]
    return "\n".join(lines)
