"""What is stored of ``scale.py``, its tables and its figure."""

import math
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from store import Store, table

Entry = dict[str, Any]
START = math.log(256)  # loss of a model that knows nothing, in nats a byte
TUNED = "adamw"  # with warm-up and cosine: what all others are compared with
STEP, TRAIN, HELD_OUT, MACRO_RATE = range(4)  # of an entry of "seen"


class Runs(Store):
    """Runs that have ended."""

    identity = ("size", "optimizer", "rate", "seed", "has_faults", "num_steps")

    def groups(self) -> dict[tuple[str, int], list[Entry]]:
        """Returns the runs by what makes them comparable: size and number of steps."""
        found: dict[tuple[str, int], list[Entry]] = {}
        for entry in self.runs.values():
            if not entry["stopped"]:
                found.setdefault((entry["size"], entry["steps"]), []).append(entry)
        return dict(sorted(found.items(), key=lambda item: size_of(item[1])))


def size_of(entries: list[Entry]) -> tuple[int, int]:
    """Returns by what groups are sorted."""
    return entries[0]["num_params"], entries[0]["steps"]


def loss_of(entry: Entry) -> float:
    """Returns the held-out loss in the end; infinite if there is none."""
    loss = entry["held_out_loss"]
    return math.inf if loss is None else loss


def by_rate(entries: Iterable[Entry], optimizer: str, faults: bool) -> Any:
    """Returns the runs of an optimizer: lists of seeds, by rate."""
    found: dict[float, list[Entry]] = {}
    for entry in entries:
        if (entry["optimizer"], entry["has_faults"]) == (optimizer, faults):
            found.setdefault(entry["rate"], []).append(entry)
    return dict(sorted(found.items()))


def mean_loss(entries: list[Entry]) -> float:
    """Returns the mean of the seeds."""
    return statistics.fmean(map(loss_of, entries))


def tuned_of(entries: list[Entry]) -> tuple[float, float]:
    """Returns the best rate of AdamW, and the mean loss that it ends with."""
    means = {r: mean_loss(runs) for r, runs in by_rate(entries, TUNED, False).items()}
    rate = min(means, key=lambda rate: means[rate])
    return rate, means[rate]


def rate_found(entry: Entry) -> float:
    """Returns macro rate times rate: the median over the middle half of the run."""
    seen = entry["seen"]
    middle = seen[len(seen) // 4 : -(len(seen) // 4) or None]
    return entry["rate"] * statistics.median(now[MACRO_RATE] for now in middle)


def is_own(entry: Entry) -> bool:
    """Returns whether a run tells what the regulator did."""
    return "num_reverts" in entry


# Tables

COLUMNS = {
    "size": "size",
    "optimizer": "optimizer",
    "rate": "rate",
    "seed": "seed",
    "num_params": "parameters",
    "steps": "steps",
    "bytes_read": "bytes read",
    "train_loss": "training loss",
    "held_out_loss": "held-out loss",
    "step_milliseconds": "ms a step",
    "num_reverts": "reverts",
    "num_skipped": "skips",
}


def as_text(name: str, value: Any) -> str:
    """Returns a cell of the table."""
    if value is None:
        return ""
    if name.endswith("loss"):
        return f"{value:.3f}"
    if isinstance(value, int) and name != "seed":
        return f"{value:,}"
    return f"{value:g}" if isinstance(value, float) else str(value)


def runs_table(entries: list[Entry]) -> list[str]:
    """Returns a row for each run."""
    rows = [[as_text(name, entry.get(name)) for name in COLUMNS] for entry in entries]
    return table(list(COLUMNS.values()), rows)


def spread_of(numbers: list[float]) -> str:
    """Returns the mean, and the standard deviation if there are several."""
    if not all(map(math.isfinite, numbers)):
        return "dead"
    mean = f"{statistics.fmean(numbers):+.2f}"
    return mean if len(numbers) < 2 else f"{mean} +- {statistics.stdev(numbers):.2f}"


def size_table(entries: list[Entry]) -> list[str]:
    """Returns a row for each optimizer and rate, against tuned AdamW."""
    _, best = tuned_of(entries)
    names = dict.fromkeys(entry["optimizer"] for entry in entries)
    lines = [
        size_line(name + ", faults" * faults, rate, runs, best)
        for faults in (False, True)
        for name in names
        for rate, runs in by_rate(entries, name, faults).items()
    ]
    header = ["optimizer", "rate", "seeds", "held-out loss", "excess, %", "rate found"]
    return table([*header, "skips", "bounded", "reverts"], lines)


def size_line(name: str, rate: float, runs: list[Entry], best: float) -> list[str]:
    """Returns a row: seeds of one rate."""
    excess = [100 * (loss_of(run) - best) / (START - best) for run in runs]
    line = [name, f"{rate:g}", str(len(runs))]
    line += [f"{mean_loss(runs):.3f}", spread_of(excess)]
    own = all(map(is_own, runs))
    found = [rate_found(run) for run in runs]
    searched = own and any(now != rate for now in found)
    line.append(f"{statistics.geometric_mean(found):.1e}" if searched else "")
    counts = ("num_skipped", "num_bounded", "num_reverts")
    return line + [told(runs, count) if own else "" for count in counts]


def told(runs: list[Entry], name: str) -> str:
    """Returns a count of each seed."""
    return ", ".join(str(run[name]) for run in runs)


def transfer_table(results: Runs) -> list[str]:
    """Returns how the tuned rate and the rate found go with the size."""
    lines = []
    for (size, steps), entries in results.groups().items():
        if not by_rate(entries, TUNED, False):
            continue
        rate, loss = tuned_of(entries)
        line = [size, f"{size_of(entries)[0]:,}", f"{steps:,}", f"{rate:g}"]
        line.append(f"{loss:.3f}")
        for name in ("lalerg", "lalerg_warmed_up"):
            runs = [run for r in by_rate(entries, name, False).values() for run in r]
            excess = [100 * (loss_of(run) - loss) / (START - loss) for run in runs]
            found = [rate_found(run) for run in runs]
            line.append(f"{min(found):.1e} to {max(found):.1e}" if runs else "")
            line.append(f"{max(excess):+.2f}" if runs else "")
        lines.append(line)
    header = ["size", "parameters", "steps", "AdamW's best rate", "its held-out loss"]
    own = ["lalerg: rates found", "worst excess, %"]
    warm = ["with warm-up and cosine: rates found", "worst excess of these, %"]
    return table([*header, *own, *warm], lines)


def report(results: Runs) -> str:
    """Returns everything as Markdown."""
    lines = [
        "# Larger models",
        "",
        f"{results.made()} A decoder-only transformer on source code by bytes; losses "
        "in nats a byte, the held-out one on other files.",
        "",
        "AdamW (and all but `lalerg` and `lalerg_average`) with warm-up and cosine "
        "decay. *Excess* is the held-out loss above that of AdamW at its best rate, "
        f"in % of the drop that this made from {START:.3f}. *Rate found* is the rate "
        "times the macro rate, the median over the middle half of the run; the "
        "schedule multiplies it.",
        "",
        "## Sizes",
        "",
        *transfer_table(results),
    ]
    for (size, steps), entries in results.groups().items():
        heading = f"## {size}, {steps:,} steps"
        if by_rate(entries, TUNED, False):
            lines += [heading, "", *size_table(entries)]
    lines += [
        "## Every run",
        "",
        "Times are not taken in turn: other load of the machine shows in them.",
        "",
        *runs_table(list(results.runs.values())),
    ]
    return "\n".join(lines)


# Figure

STYLES = {
    "adamw": ("AdamW, warm-up and cosine", "tab:gray", "-"),
    "regulated": ("error_regulate(AdamW)", "tab:green", "-"),
    "muon": ("Muon", "tab:purple", "-"),
    "lalerg_muon": ("lalerg, Muon inside", "tab:purple", "--"),
    "lalerg_warmed_up": ("lalerg, the same schedule", "tab:orange", "--"),
    "lalerg": ("lalerg, linear decay", "tab:red", "-"),
}


def draw(results: Runs, path: Path) -> None:
    """Writes the figure: the loss against the rate, and the rate in the run."""
    import matplotlib.pyplot as plt

    groups = [
        (size, steps, entries)
        for (size, steps), entries in results.groups().items()
        if by_rate(entries, TUNED, False)
    ]
    figure, axes = plt.subplots(
        2,
        max(1, len(groups)),
        figsize=(1.0 + 3.2 * max(1, len(groups)), 5.4),
        layout="constrained",
        squeeze=False,
    )
    for column, (size, steps, entries) in enumerate(groups):
        best_rate, best = tuned_of(entries)
        above, below = axes[:, column]
        for name, (label, color, style) in STYLES.items():
            runs = by_rate(entries, name, False)
            points = [(rate, mean_loss(seeds)) for rate, seeds in runs.items()]
            if points:
                above.plot(
                    *zip(*points, strict=True),
                    color=color,
                    linestyle=style,
                    marker=".",
                    label=label,
                )
            if not name.startswith("lalerg"):
                continue
            for rate, seeds in runs.items():
                for run in seeds:
                    at = [now[STEP] for now in run["seen"]]
                    rates = [rate * now[MACRO_RATE] for now in run["seen"]]
                    below.plot(at, rates, color=color, linestyle=style, linewidth=0.9)
        above.set_xscale("log")
        drop = START - best
        above.set_ylim(best - 0.06 * drop, best + 0.36 * drop)  # what is worse is lost
        above.set_title(f"{size}, {steps:,} steps", fontsize=9)
        above.set_xlabel("learning rate", fontsize=8)
        below.axhline(best_rate, color="tab:gray", label="AdamW's best rate")
        below.set_yscale("log")
        below.set_xlabel("step", fontsize=8)
    axes[0, 0].set_ylabel("held-out loss, nats a byte", fontsize=8)
    axes[1, 0].set_ylabel("rate found (times the schedule)", fontsize=8)
    names = axes[0, 0].get_legend_handles_labels()
    figure.legend(*names, loc="outside lower center", ncols=6, fontsize=7)
    axes[1, 0].legend(fontsize=6)
    figure.savefig(path, dpi=130)
    plt.close(figure)
