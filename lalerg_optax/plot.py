"""Figures of a run, from what a `Recorder` recorded. Needs Matplotlib.

All functions return a ``matplotlib.figure.Figure`` and leave pyplot alone: nothing is
shown and no global state changes. A notebook with ``%matplotlib inline`` shows a figure
at the end of a cell; elsewhere, ``figure.savefig(path)``.
"""

from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize, SymLogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ._verdict import Verdict
from ._watch import is_step

History = Mapping[str, np.ndarray]

# Okabe and Ito's palette, which the colour-blind can tell apart
_BLACK, _ORANGE, _BLUE, _GREEN, _RED = (
    "#000000",
    "#E69F00",
    "#0072B2",
    "#009E73",
    "#D55E00",
)
_MARKS = {
    Verdict.BOUND: ("bounded: a hard batch", _BLUE, "."),
    Verdict.SKIP: ("skipped: batch dropped", _ORANGE, "v"),
    Verdict.REVERT: ("reverted: back to anchor", _RED, "X"),
}
_ERRORS = {
    "scaled_error": ("loss", _BLACK, "-"),
    "scaled_norm_error": ("gradient norm", _BLUE, "--"),
}
_TOP, _BOTTOM = 10.0, -1.0  # of the panel of errors

_LAYERS = {
    "update_ratio": "update / weight, |u| / |p|\n(around 1e-3 is usual)",
    "effective_rate": "effective rate, |u| / |g|\n(the rate SGD would need)",
    "grad_norm": "gradient norm, |g|",
    "predicted_decrease": "predicted decrease of the loss, -<g, u>",
    "jump": "distance from where the update\nbefore sent it, in units of |p| + |u|",
}


def run(history: History, *, group: str = "", loss: str = "loss") -> Figure:
    """Draws what happened in a run, and why.

    Three panels over the steps: the loss with a mark at each step that was bounded,
    skipped or reverted (once, where micro-batches accumulate); the factors of the
    learning rate (``macro_rate``, ``damping_factor`` and their product); and the errors
    in units of the tolerated rise, with the threshold at 1. Errors beyond 10 are drawn
    as triangles at the top.

    Args:
      history: what ``Recorder.history`` returns, or any dict with arrays of `metrics`.
      group: the label of one regulator where there are several: ``"encoder"`` for
        ``"encoder/verdict"``.
      loss: the name under which the loss was recorded; if it was not, ``avg_value`` is
        drawn.

    Returns:
      The figure.

    Raises:
      ValueError: if the history has no verdicts (of this group).

    Example:
      >>> import numpy as np
      >>> from lalerg_optax import plot
      >>> history = {
      ...     "loss": np.array([1.0, 0.9, 7.0, 0.8]),
      ...     "verdict": np.array([0, 0, 1, 0]),
      ...     "scaled_error": np.array([0.0, -0.1, 4.0, -0.2]),
      ...     "macro_rate": np.ones(4),
      ...     "damping_factor": np.ones(4),
      ... }
      >>> figure = plot.run(history)
      >>> [axes.get_ylabel() for axes in figure.axes][0]
      'loss of the batch'
    """
    prefix = f"{group}/" if group else ""
    if f"{prefix}verdict" not in history:
        raise ValueError(
            f"history has no {prefix}verdict: call recorder.record(opt_state, "
            "loss=loss) at each step first, and for an optimizer with several "
            "regulators give the group."
        )
    series = {name: np.asarray(x) for name, x in history.items()}
    if series[f"{prefix}verdict"].ndim != 1:
        raise ValueError(
            "history is that of a population: draw one member, "
            "plot.run({name: x[:, 0] if x.ndim > 1 else x for name, x in "
            "history.items()})."
        )
    series |= {name.removeprefix(prefix): x for name, x in series.items()}
    figure = Figure(figsize=(8, 6.4), layout="constrained")
    panels = figure.subplots(3, sharex=True, height_ratios=(3, 2, 2))
    steps = series.get("step", np.arange(len(series["verdict"])))
    is_decided = is_step(history, prefix)
    _draw_loss(panels[0], steps, series, loss, is_decided)
    _draw_rates(panels[1], steps, series)
    _draw_errors(panels[2], steps, series)
    panels[-1].set_xlabel("step")
    panels[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in panels:
        axes.legend(
            loc="lower left",
            bbox_to_anchor=(0.0, 1.0),
            ncols=4,
            frameon=False,
            fontsize=8.5,
            borderaxespad=0.2,
            columnspacing=1.2,
            handletextpad=0.4,
        )
        axes.grid(axis="y", lw=0.4, alpha=0.5)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def _draw_loss(
    axes: Axes,
    steps: np.ndarray,
    series: History,
    name: str,
    is_decided: np.ndarray,
) -> None:
    """Draws the loss; marks of losses that are not finite are at the top."""
    is_recorded = name in series
    values = series[name] if is_recorded else series["avg_value"]
    values = np.where(np.abs(values) < 1e37, values, np.nan).astype(float)
    axes.plot(steps, values, color=_BLACK, lw=0.8)
    finite = values[np.isfinite(values)]
    is_wide = finite.size and finite.min() > 0.0 and finite.max() > 8 * finite.min()
    axes.set_yscale("log" if is_wide else "linear")
    axes.set_ylabel("loss of the batch" if is_recorded else "average loss")
    low, high = axes.get_ylim()
    top = high**0.97 * low**0.03 if is_wide else 0.97 * high + 0.03 * low
    for verdict, (label, color, marker) in _MARKS.items():
        chosen = is_decided & (series["verdict"] == verdict)
        heights = np.where(np.isfinite(values), values, top)[chosen]
        note = f"{label} ({chosen.sum()})"
        axes.plot(
            steps[chosen],
            heights,
            marker,
            color=color,
            ms=6,
            mec="white",
            mew=0.4,
            ls="",
            label=note,
            clip_on=False,
            in_layout=False,  # the extent of no marks at all would upset it
        )
    num_lost = int((~np.isfinite(values)).sum())
    if num_lost:
        axes.plot([], [], " ", label=f"at the top: not finite ({num_lost})")


def _draw_rates(axes: Axes, steps: np.ndarray, series: History) -> None:
    """Draws the factors by which the learning rate is multiplied."""
    macro = series.get("macro_rate", np.ones(len(steps)))
    damping = series.get("damping_factor", series.get("damping", np.ones(len(steps))))
    axes.plot(
        steps, macro * damping, color=_BLACK, lw=2.4, alpha=0.35, label="both together"
    )
    axes.plot(steps, macro, color=_BLUE, lw=1.2, label="macro rate (search)")
    axes.plot(steps, damping, "--", color=_RED, lw=1.2, label="damping (after reverts)")
    axes.axhline(1.0, color="grey", lw=0.8, ls=":")
    axes.set_yscale("log", base=10)
    axes.set_ylabel("times your\nlearning rate")
    low, high = axes.get_ylim()
    axes.set_ylim(min(low, 0.3), max(high, 3.0))
    rate = np.asarray(series.get("learning_rate", np.zeros(len(steps))), float)
    if not (rate > 0.0).any():
        return  # it is not known, or was not recorded
    other = axes.twinx()
    shown = np.where(rate > 0.0, rate, np.nan)
    other.plot(steps, shown, color=_GREEN, lw=1.2)
    axes.plot([], [], color=_GREEN, lw=1.2, label="learning rate (right)")
    other.set_yscale("log", base=10)
    other.set_ylabel("learning rate", fontsize=9)
    other.spines[["top"]].set_visible(False)


def _draw_errors(axes: Axes, steps: np.ndarray, series: History) -> None:
    """Draws the errors; those out of the panel are triangles at its top."""
    for name, (label, color, style) in _ERRORS.items():
        if name not in series:
            continue
        error = np.asarray(series[name], float)
        shown = np.clip(error, _BOTTOM, _TOP)
        axes.plot(steps, shown, style, color=color, lw=0.9, label=label)
        beyond = error > _TOP
        axes.plot(
            steps[beyond],
            shown[beyond],
            "^",
            color=color,
            ms=5,
            clip_on=False,
            in_layout=False,
        )
    axes.axhline(1.0, color=_RED, lw=1.2, label="above: bounded or skipped")
    axes.set_yscale("symlog", linthresh=1.0, linscale=1.0)
    axes.set_ylim(_BOTTOM, _TOP)
    axes.set_yticks([-1, 0, 1, 3, 10], ["< -1", "0", "1", "3", "> 10"])
    axes.set_ylabel("error: rise in units\nof what is tolerated")


def layers(history: History, name: str = "update_ratio", *, group: str = "") -> Figure:
    """Draws one number of the local view as a heat map, leaves by steps.

    Bright is large. Grey is 0: the step was rejected, or the leaf did not move. For
    ``predicted_decrease``, which has a sign, purple leaves raise the loss.

    Args:
      history: that of a run with ``local=True``.
      name: ``"update_ratio"``, ``"effective_rate"``, ``"grad_norm"``,
        ``"predicted_decrease"`` or ``"jump"``, see `metrics`.
      group: as in `run`.

    Returns:
      The figure.

    Raises:
      ValueError: if the history has nothing of that name.

    Example:
      >>> import numpy as np
      >>> from lalerg_optax import plot
      >>> history = {
      ...     "update_ratio/hidden/kernel": np.array([1e-3, 2e-3, 0.0, 1e-3]),
      ...     "update_ratio/out/kernel": np.array([1e-2, 1e-2, 0.0, 5e-3]),
      ... }
      >>> figure = plot.layers(history, "update_ratio")
      >>> [label.get_text() for label in figure.axes[0].get_yticklabels()]
      ['hidden/kernel', 'out/kernel']
    """
    of_group = f"{group}/" if group else ""
    prefix = f"{of_group}{name}/"
    rows = {
        key.removeprefix(prefix): np.asarray(x, float)
        for key, x in history.items()
        if key.startswith(prefix)
    }
    alone = f"{of_group}{name}"
    if alone in history and f"{of_group}update_ratio" in history:
        rows = {name: np.asarray(history[alone], float)}  # params are one array
    if not rows:
        raise ValueError(
            f"history has nothing that begins with {prefix!r}: make the optimizer with "
            "local=True, and record lo.metrics(opt_state)."
        )
    names = [key.split("/") for key in rows]
    while all(len(path) > 1 and path[0] == names[0][0] for path in names):
        names = [path[1:] for path in names]  # what all have in common
    labels = ["/".join(path) for path in names]
    table = np.stack(list(rows.values()))
    table = np.where((table == 0.0) | (np.abs(table) >= 1e37), np.nan, table)
    steps = np.asarray(history.get("step", np.arange(table.shape[1])))
    height = 1.6 + 0.24 * min(len(rows), 60)
    figure = Figure(figsize=(8, max(2.6, height)), layout="constrained")
    axes = figure.subplots()
    norm, colors = _scale(table, is_signed=name == "predicted_decrease")
    axes.set_facecolor("#BBBBBB")
    image = axes.imshow(
        table,
        norm=norm,
        cmap=colors,
        aspect="auto",
        interpolation="nearest",
        extent=(steps[0] - 0.5, steps[-1] + 0.5, len(rows) - 0.5, -0.5),
    )
    every = -(-len(rows) // 60)
    axes.set_yticks(range(0, len(rows), every), labels[::every], fontsize=8)
    axes.set_xlabel("step (grey: rejected, or nothing moved)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    label = _LAYERS.get(name, name)
    figure.colorbar(image, ax=axes, pad=0.01).set_label(label, fontsize=9)
    return figure


def _scale(table: np.ndarray, *, is_signed: bool) -> tuple[Normalize, str]:
    """Returns norm and colour map, robust to a few extremes."""
    sizes = np.abs(table[np.isfinite(table)])
    if not sizes.size:
        return Normalize(0.0, 1.0), "cividis"
    low, high = np.percentile(sizes, [2.0, 99.5])
    if is_signed and np.nanmin(table) < 0.0:
        return SymLogNorm(max(low, high / 1e4), vmin=-high, vmax=high), "PuOr_r"
    return LogNorm(max(low, high / 1e6), high * (1 + 1e-6)), "cividis"
