"""What ``heldout.py`` measured, and what follows from it: tables."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from peers import ADAMW, LALERG
from store import Store, table
from sweeps import RATIOS, percent, times
from tasks import DEVELOPMENT, REPORT, TASKS, negative_elbo

FACTORS = (1e-3, 1.0, 1e3)  # of tuned AdamW's rate
NAMES = {1e-3: ", thousandth", 1.0: "", 1e3: ", thousandfold"}
SETS = {"chosen on": DEVELOPMENT, "not chosen on": REPORT}
MOST_WORSE = 1.0  # standard deviation of AdamW's seeds


class Metric(NamedTuple):
    """What a user looks at.

    Attributes:
      name: with its unit.
      of: (what the model makes of examples, what it should be) to the metric.
      sign: 1 if more is better, -1 if less.
    """

    name: str
    of: Callable[[Any, jax.Array], jax.Array]
    sign: int


def wrong(out: jax.Array, labels: jax.Array) -> jax.Array:
    """Returns how many % of labels are not the most probable ones."""
    return 100.0 * jnp.mean(jnp.argmax(out, axis=-1) != labels)


def wrong_side(out: jax.Array, labels: jax.Array) -> jax.Array:
    """Returns how many % of two labels, 0 and 1, are not told by the sign."""
    return 100.0 * jnp.mean((out[:, 0] > 0.0) != (labels > 0.5))


def rms_error(out: jax.Array, target: jax.Array) -> jax.Array:
    """Returns the root of the mean squared error."""
    return jnp.sqrt(jnp.mean((out.reshape(target.shape) - target) ** 2))


def decibels(out: jax.Array, target: jax.Array) -> jax.Array:
    """Returns the peak signal-to-noise ratio of values between 0 and 1."""
    return -20.0 * jnp.log10(rms_error(out, target))


def elbo(out: tuple[jax.Array, ...], x: jax.Array) -> jax.Array:
    """Returns the evidence lower bound of one sample an image, in nats."""
    return -negative_elbo(out, x)


ERROR = Metric("error in %", wrong, -1)
RMS = Metric("root mean squared error, in sd of the data", rms_error, -1)
METRICS = {name: ERROR for name in TASKS} | {
    "logistic": Metric("error in %", wrong_side, -1),
    "autoencoder": RMS._replace(name="root mean squared error of a pixel"),
    "regression": RMS,
    "factorization": RMS,
    "photo": Metric("peak signal-to-noise ratio in dB", decibels, 1),
    "vae": Metric("ELBO in nats", elbo, 1),
}
OPTIMIZERS = (LALERG, ADAMW)
CELLS = [
    (peer.name, factor)
    for peer in OPTIMIZERS
    for factor in FACTORS
    if (peer.name, factor) != (ADAMW.name, 1.0)
]


class Results(Store):
    """What has been measured, and what follows from it; arrays are over seeds."""

    def get(self, task: str, name: str, factor: float, field: str) -> np.ndarray:
        """Returns a field of the runs at a factor; NaN where it is not finite."""
        return np.asarray(self.runs[task, name][field][FACTORS.index(factor)], float)

    def tasks(self) -> list[str]:
        """Returns the tasks on which both optimizers were measured."""
        return [
            t for t in TASKS if all((t, peer.name) in self.runs for peer in OPTIMIZERS)
        ]

    def ratio(self, task: str, name: str, factor: float) -> float:
        """Returns the mean training loss in units of tuned AdamW's."""
        own, tuned = (
            self.get(task, *cell, "train_loss").mean()
            for cell in ((name, factor), (ADAMW.name, 1.0))
        )
        return float(np.where(np.isnan(own), np.inf, own) / tuned)

    def excess(self, task: str, name: str, factor: float) -> float:
        """Returns the mean training loss above tuned AdamW's, in % of its drop."""
        tuned = self.get(task, ADAMW.name, 1.0, "train_loss").mean()
        drop = np.mean(self.runs[task, ADAMW.name]["start_loss"]) - tuned
        return float(100.0 * (self.ratio(task, name, factor) - 1.0) * tuned / drop)

    def least(self, task: str) -> float:
        """Returns the least deviation that counts: of one example, for a share."""
        is_share = METRICS[task].name == ERROR.name
        num_held_out = self.runs[task, ADAMW.name]["num_held_out"]
        return 100.0 / num_held_out if is_share else 1e-12

    def gains(self, task: str, name: str, factor: float) -> np.ndarray:
        """Returns by how many standard deviations of seeds the metric is better."""
        tuned = self.get(task, ADAMW.name, 1.0, "metric")
        gains = METRICS[task].sign * (
            self.get(task, name, factor, "metric") - tuned.mean()
        )
        gains = gains / max(tuned.std(ddof=1), self.least(task))
        is_alive = np.isfinite(self.get(task, name, factor, "train_loss"))
        return np.where(is_alive & np.isfinite(gains), gains, -np.inf)


def label(name: str, factor: float) -> str:
    """Returns how the tables call an optimizer at a factor of the rate."""
    return f"{name}{NAMES[factor]}"


def deviations(x: float) -> str:
    """Returns a gain as a table shows it."""
    if not np.isfinite(x):
        return "dead"
    return f"{x:+.1f}" if abs(x) < 99.5 else f"{x:+.2g}"


def share_table(results: Results) -> list[str]:
    """Returns on how many tasks each is within the bars, by three measures."""
    header, lines = ["tasks within the bar"], []
    parts = {
        title: [t for t in results.tasks() if t in tasks]
        for title, tasks in SETS.items()
    }
    for title in parts:
        header += [f"{title}: within 5 % of the drop"]
        header += [f"loss at most {RATIOS[0]} times", "metric at most 1 sd worse"]
    for cell in CELLS:
        line = [label(*cell)]
        for tasks in parts.values():
            counts = (
                sum(results.excess(t, *cell) <= 5.0 for t in tasks),
                sum(results.ratio(t, *cell) <= RATIOS[0] for t in tasks),
                sum(results.gains(t, *cell).mean() >= -MOST_WORSE for t in tasks),
            )
            line += [f"{count} of {len(tasks)}" for count in counts]
        lines.append(line)
    return table(header, lines)


def metric_table(results: Results) -> list[str]:
    """Returns for each task by how much its metric is better."""
    lines = []
    for task in results.tasks():
        tuned = results.get(task, ADAMW.name, 1.0, "metric")
        part = next(title for title, tasks in SETS.items() if task in tasks)
        line = [task, part, METRICS[task].name]
        line += [f"{tuned.mean():.4g} ± {tuned.std(ddof=1):.2g}"]
        for cell in CELLS:
            gains = results.gains(task, *cell)
            line.append(f"{deviations(gains.mean())} ({deviations(gains.min())})")
        lines.append(line)
    header = ["task", "constants", "metric", "tuned AdamW's"]
    return table([*header, *(label(*cell) for cell in CELLS)], lines)


def loss_table(results: Results) -> list[str]:
    """Returns for each task how high its training loss ends."""
    lines = []
    for task in results.tasks():
        rate = results.runs[task, ADAMW.name]["rate"]
        tuned = results.get(task, ADAMW.name, 1.0, "train_loss")
        line = [task, f"{rate:.1e}", f"{tuned.mean():.3g} ± {tuned.std(ddof=1):.2g}"]
        for cell in CELLS:
            excess, ratio = results.excess(task, *cell), results.ratio(task, *cell)
            line.append(f"{percent(excess)} / {times(ratio)}")
        lines.append(line)
    header = ["task", "tuned rate", "tuned AdamW's loss"]
    return table([*header, *(label(*cell) for cell in CELLS)], lines)


def report(results: Results) -> str:
    """Returns everything as Markdown."""
    if not results.tasks():
        return "# On held-out data\n\nNo task is measured with both optimizers yet."
    seeds = max(run["num_seeds"] for run in results.runs.values())
    return "\n".join(
        [
            "# On held-out data",
            "",
            results.made(),
            "",
            f"{seeds} seeds that no rate was chosen on, linear decay. *Thousandth*, "
            "*thousandfold*: at a thousandth and a thousand times the rate of tuned "
            "AdamW (the best of 17 half decades by training loss, from `decades.py`). "
            "A fifth of the data of each task is held out; inputs have the scale of "
            "all rows. AdamW's rate is the best by training loss, not by the metric.",
            "",
            "## Three measures",
            "",
            "On how many tasks the mean over the seeds is within each bar, against "
            "tuned AdamW: final training loss, in % of the drop and as a ratio, and "
            "the metric on held-out data, in standard deviations of tuned AdamW's "
            "seeds, or in single examples where these are more.",
            "",
            *share_table(results),
            "## Metric",
            "",
            "On held-out data: by how many standard deviations of tuned AdamW's seeds "
            "it is better (+) or worse (-), mean of the seeds and the worst of them.",
            "",
            *metric_table(results),
            "## Training loss",
            "",
            "On the whole training set: above tuned AdamW's in % of its drop / ratio "
            "of the two.",
            "",
            *loss_table(results),
        ]
    )
