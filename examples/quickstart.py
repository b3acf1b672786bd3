"""Trains one small network with AdamW and with lalerg, well and badly treated.

The network is convolutional, the data are scikit-learn's 1797 images of handwritten
digits. Both optimizers start from the same weights and see the same batches, with
the same weight decay and the same constant learning rate, under four conditions: a
rate that suits AdamW, one a thousand times too small, one a thousand times too
large, and the good rate with broken batches in mid-run. The rate is constant so that
any change of it in the figure is the optimizer's own doing.

Run with: python examples/quickstart.py
"""

import argparse
import functools
from collections.abc import Iterator
from typing import NamedTuple

import jax
import numpy as np
import optax
from flax import nnx
from matplotlib.axes import Axes
from matplotlib.figure import Figure  # not pyplot: nothing needs a display
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import lalerg_optax as lo

GOOD_RATE = 1e-3
BATCH_SIZE = 64
MAKERS = {"AdamW": optax.adamw, "lalerg": lo.lalerg}
COLORS = {"AdamW": "#E69F00", "lalerg": "#0072B2"}
MARKS = {
    lo.Verdict.BOUND: "#009E73",
    lo.Verdict.SKIP: "#777777",
    lo.Verdict.REVERT: "#CC0033",
}
POISON_COLOR = "#FFCCCC"


class Condition(NamedTuple):
    """One way to treat an optimizer."""

    name: str
    rate: float
    is_poisoned: bool = False


CONDITIONS = (
    Condition("Good rate", GOOD_RATE),
    Condition("Rate 1000x too small", GOOD_RATE / 1000),
    Condition("Rate 1000x too large", GOOD_RATE * 1000),
    Condition("Good rate, bad batches", GOOD_RATE, is_poisoned=True),
)
Records = list[dict[str, np.ndarray]]  # of every step of a run
Runs = dict[tuple[Condition, str], Records]


class Network(nnx.Module):
    """Three convolutions and a linear layer: 8x8 pixels in, ten scores out."""

    def __init__(self, rngs: nnx.Rngs):
        self.conv1 = nnx.Conv(1, 16, (3, 3), rngs=rngs)
        self.conv2 = nnx.Conv(16, 32, (3, 3), strides=2, rngs=rngs)
        self.conv3 = nnx.Conv(32, 32, (3, 3), rngs=rngs)
        self.linear = nnx.Linear(4 * 4 * 32, 10, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Returns the scores of the ten digits for every image."""
        x = images
        for conv in (self.conv1, self.conv2, self.conv3):
            x = nnx.relu(conv(x))
        return self.linear(x.reshape(len(x), -1))


@functools.cache  # one object for one rate, so that nothing is compiled twice
def make_optimizer(name: str, rate: float) -> optax.GradientTransformation:
    """Returns AdamW or lalerg; all else is left at its default."""
    return MAKERS[name](rate, weight_decay=1e-4)


@functools.partial(nnx.jit, static_argnames="is_monitored")
def train_step(
    model: Network,
    optimizer: nnx.Optimizer,
    images: jax.Array,
    labels: jax.Array,
    is_monitored: bool,
) -> dict[str, jax.Array]:
    """Takes one step; returns the loss and, of lalerg, what was decided."""

    def loss_fn(model: Network) -> jax.Array:
        scores = model(images)
        return optax.softmax_cross_entropy_with_integer_labels(scores, labels).mean()

    loss, grads = nnx.value_and_grad(loss_fn)(model)
    optimizer.update(model, grads, value=loss)  # AdamW ignores the value
    if not is_monitored:
        return {"loss": loss}
    return {"loss": loss, **lo.metrics(optimizer.opt_state)}


@nnx.jit
def accuracy(model: Network, images: jax.Array, labels: jax.Array) -> jax.Array:
    """Returns the share of images that are recognised."""
    return (model(images).argmax(-1) == labels).mean()


def load_data() -> list[np.ndarray]:
    """Returns images and labels for training, then for testing."""
    images, labels = load_digits(return_X_y=True)
    images = (images / 16.0).reshape(-1, 8, 8, 1).astype(np.float32)
    x_train, x_test, y_train, y_test = train_test_split(
        images, labels, test_size=400, random_state=0, stratify=labels
    )
    return [x_train, y_train, x_test, y_test]


def poisoned_stretches(num_steps: int) -> tuple[range, range]:
    """Returns which steps get wrong labels with huge inputs, and which get NaN."""
    length = min(20, max(1, num_steps // 10))
    return tuple(range(at, at + length) for at in (num_steps // 3, num_steps * 2 // 3))


def make_batches(
    images: np.ndarray, labels: np.ndarray, num_steps: int, seed: int, poisoned: bool
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields minibatches, the same ones for the same arguments."""
    rng = np.random.default_rng(seed)
    scaled, nan = poisoned_stretches(num_steps) if poisoned else ((), ())
    per_epoch = len(images) // BATCH_SIZE
    for step in range(num_steps):
        if step % per_epoch == 0:
            epoch = rng.permutation(len(images))
        chosen = epoch[step % per_epoch * BATCH_SIZE :][:BATCH_SIZE]
        x, y = images[chosen], labels[chosen]
        if step in scaled:
            x, y = 100.0 * x, np.random.default_rng(step).permutation(y)
        yield (np.full_like(x, np.nan) if step in nan else x), y


def train(
    name: str, condition: Condition, data: list[np.ndarray], num_steps: int, seed: int
) -> Iterator[dict[str, np.ndarray]]:
    """Yields a record of every step; the last has the test accuracy in it, too."""
    x_train, y_train, x_test, y_test = data
    model = Network(nnx.Rngs(seed))
    tx = make_optimizer(name, condition.rate)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    batches = make_batches(x_train, y_train, num_steps, seed, condition.is_poisoned)
    for step, (images, labels) in enumerate(batches, start=1):
        record = train_step(model, optimizer, images, labels, name == "lalerg")
        if step == num_steps:
            record["accuracy"] = accuracy(model, x_test, y_test)
        yield jax.device_get(record)


def print_table(runs: Runs) -> None:
    """Prints how every run ended."""
    table = Table(
        title="After training",
        caption="accuracy: on test images; loss: of the last training batch; "
        "skipped: steps dropped; reverts: how often params went back (two steps each)",
    )
    for column in ("condition", "optimizer", "accuracy", "loss", "skipped", "reverts"):
        table.add_column(column, justify="left" if column == "condition" else "right")
    for (condition, name), records in runs.items():
        last = records[-1]
        numbers = (f"{last['accuracy']:.1%}", f"{last['loss']:.1e}")
        counts = (str(last.get(f"num_{kind}", "-")) for kind in ("skipped", "reverts"))
        is_last = name == list(MAKERS)[-1]
        table.add_row(condition.name, name, *numbers, *counts, end_section=is_last)
    Console().print(table)


def running_median(values: np.ndarray, reach: int = 8) -> np.ndarray:
    """Returns the median of each value and its neighbours, ignoring NaN and Inf."""
    finite = np.where(np.isfinite(values), values, np.nan)
    windows = (finite[max(0, i - reach) : i + reach + 1] for i in range(len(finite)))
    medians = [np.nanmedian(w) if np.isfinite(w).any() else np.nan for w in windows]
    return np.where(np.isfinite(values), medians, np.nan)


def draw_loss(axes: Axes, name: str, records: Records) -> None:
    """Draws the loss of a run, its verdicts, and where it was lost for good."""
    loss = np.array([r["loss"] for r in records], np.float64)
    color, place = COLORS[name], axes.get_xaxis_transform()  # y: share of the height
    axes.plot(loss, color=color, lw=0.5, alpha=0.4)
    axes.plot(running_median(loss), color=color, lw=1.4)
    verdicts = np.array([r.get("verdict", lo.Verdict.ACCEPT) for r in records])
    for height, (verdict, mark) in zip((0.04, 0.07, 0.1), MARKS.items(), strict=True):
        for step in np.flatnonzero(verdicts == verdict):
            axes.plot(step, height, "|", color=mark, ms=7, transform=place)
    if not np.isfinite(loss[-1]):
        end = np.flatnonzero(np.isfinite(loss))[-1]
        axes.plot(end, loss[end], "X", color=color, ms=7, mec="black", mew=0.6)
        text = f"{name}: NaN\nfor good"
        axes.text(
            0.98, 0.96, text, transform=axes.transAxes, ha="right", va="top", size=9
        )


def draw(runs: Runs, path: str) -> None:
    """Saves the figure: a column for each condition, losses above rates."""
    figure = Figure(figsize=(10, 5.2), layout="constrained")
    panels = figure.subplots(2, len(CONDITIONS), sharex=True, sharey="row")
    for (condition, name), records in runs.items():
        top, bottom = panels[:, CONDITIONS.index(condition)]
        draw_loss(top, name, records)
        factors = [
            r.get("macro_rate", 1.0) * r.get("damping_factor", 1.0) for r in records
        ]
        bottom.plot(condition.rate * np.array(factors), color=COLORS[name], lw=1.4)
        bottom.set_xlabel("step")
        ends = (f"{n} {runs[condition, n][-1]['accuracy']:.1%}" for n in MAKERS)
        top.set_title(f"{condition.name}\n{', '.join(ends)}", size=10)
    for axes in panels[:, -1]:
        for stretch in poisoned_stretches(len(records)):
            axes.axvspan(stretch.start, stretch.stop, color=POISON_COLOR, lw=0)
    kinds = (" wrong\n labels,\n inputs\n x100", " inputs\n NaN")
    for stretch, kind in zip(poisoned_stretches(len(records)), kinds, strict=True):
        panels[1, -1].text(stretch.stop, 1e-6, kind, size=9)
    panels[0, 0].set(yscale="log", ylim=(1e-7, 1e6), ylabel="training loss")
    panels[1, 0].set(yscale="log", ylabel="learning rate in effect")
    handles = [Line2D([], [], color=c, label=n) for n, c in COLORS.items()]
    labels = ("lalerg bounded the gradient", "skipped the batch", "went back (revert)")
    for label, mark in zip(labels, MARKS.values(), strict=True):
        handles.append(Line2D([], [], color=mark, marker="|", ls="", label=label))
    handles.append(Patch(color=POISON_COLOR, label="bad batches"))
    figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=6,
        frameon=False,
        columnspacing=1.0,
        handlelength=1.2,
        fontsize="small",
    )
    note = (
        "Thin: loss of each batch. Thick: running median. Percentages: test accuracy."
    )
    figure.suptitle(note, size=9)
    figure.savefig(path, dpi=200)


def main() -> None:
    """Trains everything, prints the table and saves the figure."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--steps", type=int, default=1000, help="steps of each run")
    parser.add_argument("--seed", type=int, default=0, help="of weights and batches")
    parser.add_argument("--out", default="quickstart.png", help="file of the figure")
    parser.add_argument("--quick", action="store_true", help="60 steps: a mere trial")
    args = parser.parse_args()
    if args.steps < 10:
        parser.error("--steps must be at least 10")
    num_steps = 60 if args.quick else args.steps

    data, runs = load_data(), {}
    for condition in CONDITIONS:
        for name in MAKERS:
            steps = train(name, condition, data, num_steps, args.seed)
            title = f"{condition.name}, {name}".ljust(30)
            runs[condition, name] = list(track(steps, title, total=num_steps))
    print_table(runs)
    draw(runs, args.out)
    print(f"The figure is in {args.out}")


if __name__ == "__main__":
    main()
