"""What ``mixtures.py`` measured, and what follows from it: the tables."""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from peers import ADAMW, BLIND, LALERG, LONG_MEMORY, NO_SEARCH, REGULATED, SKIPPING
from store import Store, table
from streams import CHOOSE, FAMILIES, REPORT, STREAMS, Stream
from sweeps import best_index

OPTIMIZERS = (
    LALERG,
    NO_SEARCH._replace(name="lalerg, no search"),
    REGULATED,
    ADAMW,
    SKIPPING,
    LONG_MEMORY,
    BLIND,
)
TUNING = "adamw, half decades"
FACTOR, SLACK = 1.10, 0.05  # of a loss on the rare part, against bare AdamW's
RUN_FACTOR = 1.05  # of a mean loss over the run
MOST_REJECTED = 5  # batches of any kind


class Runs(Store):
    """What has been measured, and what follows from it."""

    identity = ("stream", "optimizer")

    def get(self, stream: str, name: str, field: str) -> np.ndarray:
        """Returns a field of all seeds, NaN where it was not finite."""
        return np.asarray(self.runs[stream, name][field], float)

    def has(self, stream: str, *names: str) -> bool:
        """Returns whether these optimizers were run on a stream."""
        return all((stream, name) in self.runs for name in names)

    def rate(self, stream: str) -> float:
        """Returns AdamW's best rate."""
        tuned = self.runs[stream, TUNING]
        return tuned["rates"][best_index(tuned["losses"])]

    def measured(self, stream: str, name: str) -> np.ndarray:
        """Returns the losses that count."""
        is_continual = FAMILIES[STREAMS[stream].family].is_continual
        return self.get(stream, name, "mean_loss" if is_continual else "rare_loss")

    def is_learnt(
        self, stream: str, name: str, reference: Callable[..., Any] = np.mean
    ) -> np.ndarray:
        """Returns whether the loss is near enough to that of bare AdamW, by seed."""
        base = reference(self.measured(stream, ADAMW.name))
        is_continual = FAMILIES[STREAMS[stream].family].is_continual
        limit = RUN_FACTOR * base if is_continual else FACTOR * base + SLACK
        return self.measured(stream, name) <= limit  # a NaN is not

    def is_spared(self, stream: str, name: str) -> np.ndarray:
        """Returns whether no kind of batch was rejected often, by seed."""
        rejected = self.get(stream, name, "rejected")
        return rejected.max(axis=1) <= MOST_REJECTED

    def passes(
        self, stream: str, name: str, reference: Callable[..., Any] = np.mean
    ) -> np.ndarray:
        """Returns whether both is so, by seed."""
        is_learnt = self.is_learnt(stream, name, reference)
        return is_learnt & self.is_spared(stream, name)


# Tables


def streams_of(results: Runs, *names: str, half: str = "") -> list[Stream]:
    """Returns the streams, of a half, on which AdamW and these were measured."""
    return [
        stream
        for stream in STREAMS.values()
        if half in ("", stream.half) and results.has(stream.name, ADAMW.name, *names)
    ]


def names_of(results: Runs) -> list[str]:
    """Returns the optimizers that were measured."""
    known = {name for _, name in results.runs}
    return [o.name for o in OPTIMIZERS if o.name in known]


def mark(passes: np.ndarray) -> str:
    """Returns whether all seeds pass."""
    return "yes" if passes.all() else f"no, {passes.sum()} of {passes.size}"


def spread(losses: np.ndarray) -> str:
    """Returns from where to where losses go."""
    return f"{losses.min():.3g} to {losses.max():.3g}"


def stream_table(results: Runs) -> list[str]:
    """Returns what the streams are."""
    lines = []
    for stream in streams_of(results):
        family = FAMILIES[stream.family]
        make = getattr(family.make, "func", family.make)
        steps = results.get(stream.name, ADAMW.name, "steps")
        lines.append(
            [
                stream.name,
                stream.half,
                (make.__doc__ or "").splitlines()[0].rstrip("."),
                stream.note,
                f"{steps.sum() / len(steps):.0f}",
                f"{steps[:, -1].mean():.0f}",
                f"{results.rate(stream.name):.1e}"
                + (", linear decay" if family.is_decayed else ", constant"),
            ]
        )
    header = ["stream", "half", "problem", "rare", "steps", "rare ones", "rate"]
    return table(header, lines)


def run_table(results: Runs, half: str) -> list[str]:
    """Returns how every optimizer ends on every stream."""
    lines = []
    for name in names_of(results):
        for stream in streams_of(results, name, half=half):
            key = stream.name, name
            losses = results.measured(*key)
            rejected, bound = (results.get(*key, f) for f in ("rejected", "bound"))
            lines.append(
                [
                    *key,
                    f"{losses.mean():.3g}",
                    spread(losses),
                    f"{results.get(*key, 'common_loss').mean():.3g}",
                    f"{rejected[:, -1].max():.0f}",
                    f"{rejected[:, :-1].max():.0f}",
                    f"{bound[:, -1].max():.0f}",
                    f"{bound[:, :-1].max():.0f}",
                    mark(results.passes(*key)),
                    mark(results.passes(*key, np.max)),
                ]
            )
    order = list(STREAMS)
    lines.sort(key=lambda line: order.index(line[0]))
    return table(
        [
            "stream",
            "optimizer",
            "loss that counts",
            "seeds",
            "loss, common",
            "rejected, rare",
            "another kind",
            "bounded, rare",
            "another kind",
            "passes",
            "against the worst seed",
        ],
        lines,
    )


def percent_of(flags: Iterable[np.ndarray]) -> str:
    """Returns how many % of all runs have a flag."""
    every = np.concatenate([np.zeros(0), *flags])
    return f"{100.0 * every.mean():.0f}" if every.size else ""


def share_table(results: Runs) -> list[str]:
    """Returns the shares of runs that pass, as a table and in a line."""
    lines, told = [], []
    for name in names_of(results):
        every = [stream.name for stream in streams_of(results, name)]
        line = [name]
        for half in (CHOOSE, REPORT, ""):
            chosen = streams_of(results, name, half=half)
            line.append(percent_of(results.passes(s.name, name) for s in chosen))
        told.append(f"{name} {line[-1]} %")
        line += [
            percent_of(results.passes(s, name, np.max) for s in every),
            percent_of(results.is_learnt(s, name) for s in every),
            percent_of(results.is_spared(s, name) for s in every),
            f"{sum(results.passes(s, name).all() for s in every)} of {len(every)}",
        ]
        lines.append(line)
    header = [
        "optimizer",
        f"runs that pass, % of {CHOOSE}",
        f"of {REPORT}",
        "of all",
        "against the worst seed",
        "by the loss alone",
        "by the rejections alone",
        "streams on which all seeds pass",
    ]
    return [*table(header, lines), f"Runs that pass: {', '.join(told)}."]


def report(results: Runs) -> str:
    """Returns everything as Markdown."""
    seeds = {entry["num_seeds"] for entry in results.runs.values()}
    lines = [
        "# Nothing is censored",
        "",
        results.made(),
        "",
        "Honest streams of data, with something rare in them; "
        f"{' or '.join(map(str, sorted(seeds)))} seeds. A run passes if its final loss "
        f"on the rare part of the training set is at most {FACTOR} times bare AdamW's "
        f"plus {SLACK}, and no kind of batch was rejected more than {MOST_REJECTED} "
        "times (a revert takes two steps). In continual learning ("
        + ", ".join(s.name for s in STREAMS.values() if FAMILIES[s.family].is_continual)
        + f") the mean loss of the run takes its place, at most {RUN_FACTOR} times "
        "AdamW's. Bare AdamW's is the mean over its seeds, or its worst one. What was "
        "rejected or bounded is the most of any seed (and of any other kind). The "
        "rate is the best of seven half decades for AdamW. Constants of the library "
        f"were chosen on {CHOOSE}, if on any.",
    ]
    for half in (CHOOSE, REPORT):
        lines += ["", f"## {half}", "", *run_table(results, half)]
    lines += ["## Streams", "", *stream_table(results)]
    known = names_of(results)
    lines += ["## How each is run", ""]
    lines += [f"- {o.name}: {o.note}." for o in OPTIMIZERS if o.name in known]
    return "\n".join([*lines, "", "## Runs that pass", "", *share_table(results)])
