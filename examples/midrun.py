"""Protects a run that is under way, without touching what it does.

A perceptron learns scikit-learn's handwritten digits with plain `optax.adamw` and a
cosine schedule. After a third of its steps it is saved (Orbax), and three runs go on
from there: plain AdamW with good batches, which is how it ought to go; plain AdamW with
20 bad batches, first wrong labels with inputs 100 times too large, then NaN; and the
same with AdamW protected: `lo.adopt` turns its state into that of
`lo.error_regulate(optax.adamw(schedule))`. For the last quarter the state is turned
back, and plain AdamW finishes what is left.

What one learns: moments, step count and schedule go over as they are. Nothing is warmed
up again, and up to rounding the losses are those that AdamW alone would have had, until
a batch is objected to. The regulator begins with no history, so that the run
is judged a little more strictly at first.

Run with: python examples/midrun.py
It takes 12 seconds of processor time (x86).
"""

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from matplotlib.figure import Figure  # not pyplot: nothing needs a display
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tqdm import tqdm

import lalerg_optax as lo

BATCH_SIZE = 64
GOOD, WRECKED, SAVED = (
    "AdamW, good batches",
    "AdamW, bad batches",
    "adopted, bad batches",
)
BEFORE = "AdamW, until saved"
COLORS = {BEFORE: "black", GOOD: "#BBBBBB", WRECKED: "#E69F00", SAVED: "#0072B2"}
MARKS = {
    lo.Verdict.BOUND: ("#009E73", "a gradient is bounded"),
    lo.Verdict.SKIP: ("#777777", "a batch is skipped"),
    lo.Verdict.REVERT: ("#CC0033", "params go back"),
}
Carry = tuple[optax.Params, optax.OptState]


class Plan(NamedTuple):
    """The steps at which something happens."""

    adopted: int
    poisoned: int
    handed_back: int
    end: int
    length: int  # of the poisoned stretch


def make_plan(num_steps: int) -> Plan:
    """Returns when to save, to poison and to hand back."""
    third, half, late = num_steps // 3, num_steps // 2, num_steps * 3 // 4
    return Plan(third, half, late, num_steps, min(20, num_steps // 12))


def init_params(seed: int) -> optax.Params:
    """Returns the weights of a perceptron: 64 pixels, 128 units, ten scores."""
    rng = np.random.default_rng(seed)
    shapes = {"hidden": (64, 128), "out": (128, 10)}
    weights = {k: rng.standard_normal(s) / s[0] ** 0.5 for k, s in shapes.items()}
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), weights)


def scores_of(params: optax.Params, images: jax.Array) -> jax.Array:
    """Returns the scores of the ten digits for every image."""
    return jax.nn.relu(images @ params["hidden"]) @ params["out"]


def make_step(tx: optax.GradientTransformation) -> Callable:
    """Returns the jitted training step: one for plain AdamW and for all others."""
    tx = optax.with_extra_args_support(tx)  # AdamW ignores the value

    def loss_fn(
        params: optax.Params, images: jax.Array, labels: jax.Array
    ) -> jax.Array:
        losses = optax.softmax_cross_entropy_with_integer_labels
        return losses(scores_of(params, images), labels).mean()

    @jax.jit
    def step(carry: Carry, batch: tuple) -> tuple[Carry, jax.Array]:
        params, opt_state = carry
        loss, grads = jax.value_and_grad(loss_fn)(params, *batch)
        updates, opt_state = tx.update(grads, opt_state, params, value=loss)
        return (lo.apply_updates(params, updates, opt_state), opt_state), loss

    return step


def make_batches(
    images: np.ndarray, labels: np.ndarray, plan: Plan, seed: int, is_poisoned: bool
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Returns the batches of all steps, the same ones for the same seed."""
    rng = np.random.default_rng(seed)
    rows = rng.integers(0, len(images), (plan.end, BATCH_SIZE))
    xs, ys = images[rows], labels[rows]
    if is_poisoned:
        half = plan.length // 2
        scaled = slice(plan.poisoned, plan.poisoned + half)
        xs[scaled] *= 100.0
        ys[scaled] = rng.permuted(ys[scaled], axis=1)
        xs[plan.poisoned + half : plan.poisoned + plan.length] = np.nan
    return list(zip(xs, ys, strict=True))


class Run:
    """A run from a step on, with a record of what came of every step."""

    def __init__(self, name: str, carry: Carry, first: int):
        self.name, self.carry, self.first = name, carry, first
        self.losses, self.verdicts = [], []

    def go_on(self, step: Callable, batches: list, last: int) -> None:
        """Trains up to a step."""
        done = self.first + len(self.losses)
        for batch in tqdm(batches[done:last], self.name.ljust(22)):
            self.carry, loss = step(self.carry, batch)
            self.losses.append(float(loss))
            opt_state = self.carry[1]
            is_protected = isinstance(opt_state, lo.ErrorRegulateState)
            verdict = lo.metrics(opt_state)["verdict"] if is_protected else 0
            self.verdicts.append(int(verdict))


def save_and_restore(carry: Carry) -> Carry:
    """Returns what Orbax makes of params and state: the same, as what they are."""
    with tempfile.TemporaryDirectory() as folder, ocp.StandardCheckpointer() as saver:
        saver.save(Path(folder) / "run", carry)
        saver.wait_until_finished()
        return saver.restore(Path(folder) / "run", carry)


def accuracy(params: optax.Params, images: np.ndarray, labels: np.ndarray) -> float:
    """Returns the share of images that are recognised."""
    return float((scores_of(params, images).argmax(-1) == labels).mean())


def draw(runs: list[Run], plan: Plan, path: str) -> None:
    """Saves the figure: the losses of all runs, and the bad batches at close range."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    end, widths = plan.poisoned + plan.length, (1.0, 3.0, 1.6, 1.0)
    for axes in panels:
        place = axes.get_xaxis_transform()  # y: share of the height
        axes.axvspan(plan.poisoned, end, color="#FFCCCC", lw=0, label="bad batches")
        for run, width in zip(runs, widths, strict=True):
            steps = run.first + np.arange(len(run.losses))
            style = {"color": COLORS[run.name], "lw": width, "label": run.name}
            axes.plot(steps, run.losses, **style)
            if np.isnan(run.losses[-1]):
                last = np.flatnonzero(np.isfinite(run.losses))[-1]
                style = {"color": COLORS[run.name], "mec": "black", "ms": 8, "ls": ""}
                text = "NaN from here on, for good"
                axes.plot(
                    steps[last], run.losses[last], marker="X", label=text, **style
                )
            for verdict, (mark, label) in MARKS.items():
                marked = steps[np.array(run.verdicts) == verdict]
                style = {"color": mark, "ms": 9, "transform": place}
                label = label if run is runs[-1] else None
                heights = np.full(len(marked), 0.04)
                axes.plot(marked, heights, "|", label=label, **style)
    axes, close = panels
    for text, step in {
        "adopted": plan.adopted,
        "handed back": plan.handed_back,
    }.items():
        axes.axvline(step, color="black", lw=0.8, ls=":")
        place = axes.get_xaxis_transform()
        axes.text(step, 0.95, f" {text}", va="top", size=9, transform=place)
    axes.set(yscale="log", xlabel="step", ylabel="training loss of the batch")
    close.set(xlabel="step", title="The bad batches at close range")
    close.set_xlim(plan.poisoned - plan.length, end + plan.length)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False)
    figure.savefig(path, dpi=120)


def print_table(runs: list[Run], accuracies: list[float], apart: list[float]) -> None:
    """Prints how the three runs ended."""
    table = Table(
        title="After training",
        caption="loss: mean of the last 20 batches; differs: largest relative "
        "difference from the losses of the first run, until a step is objected to",
    )
    counted = ("bounded", "skipped", "reverted")
    for column in ("run", "accuracy", "loss", *counted, "differs"):
        table.add_column(column, justify="left" if column == "run" else "right")
    for run, accuracy, difference in zip(runs, accuracies, apart, strict=True):
        loss = f"{np.mean(run.losses[-20:]):.1e}"
        counts = [
            str(run.verdicts.count(v)) if any(run.verdicts) else "-" for v in MARKS
        ]
        table.add_row(run.name, f"{accuracy:.1%}", loss, *counts, f"{difference:.0e}")
    Console().print(table)


def main() -> None:
    """Trains, adopts, poisons, hands back; prints, draws and checks."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--steps", type=int, default=1200, help="steps of a run")
    parser.add_argument("--seed", type=int, default=0, help="of weights and batches")
    parser.add_argument("--out", default="midrun.png", help="file of the figure")
    parser.add_argument("--quick", action="store_true", help="240 steps: a mere trial")
    args = parser.parse_args()
    if args.steps < 240:
        parser.error("--steps must be at least 240")
    plan = make_plan(240 if args.quick else args.steps)

    images, labels = load_digits(return_X_y=True)
    images = (images / 16.0).astype(np.float32)
    x_train, x_test, y_train, y_test = train_test_split(
        images, labels, test_size=400, random_state=0, stratify=labels
    )
    good, bad = (
        make_batches(x_train, y_train, plan, args.seed, is_poisoned)
        for is_poisoned in (False, True)
    )

    # The run that is under way: plain AdamW, saved at some step
    adamw = optax.adamw(optax.cosine_decay_schedule(3e-3, plan.end))
    plain_step, params = make_step(adamw), init_params(args.seed)
    before = Run(BEFORE, (params, adamw.init(params)), 0)
    before.go_on(plain_step, good, plan.adopted)
    saved = save_and_restore(before.carry)

    # Two that go on as they are
    undisturbed, wrecked = (Run(name, saved, plan.adopted) for name in (GOOD, WRECKED))
    undisturbed.go_on(plain_step, good, plan.end)
    wrecked.go_on(plain_step, bad, plan.end)

    # One that is adopted ...
    params, opt_state = saved
    tx = lo.error_regulate(adamw)
    protected = Run(SAVED, (params, lo.adopt(tx, params, opt_state)), plan.adopted)
    protected.go_on(make_step(tx), bad, plan.handed_back)

    # ... and handed back; AdamW has no place for the damping, which should be 1 again
    params, opt_state = protected.carry
    damping = float(lo.metrics(opt_state)["damping_factor"])
    protected.carry = params, lo.adopt(adamw, params, opt_state)
    protected.go_on(plain_step, bad, plan.end)

    runs = [undisturbed, wrecked, protected]
    accuracies = [accuracy(run.carry[0], x_test, y_test) for run in runs]
    expected = np.array(undisturbed.losses[: plan.poisoned - plan.adopted])
    apart = []
    for run in runs:
        objections = np.flatnonzero(run.verdicts[: len(expected)])
        healthy = slice(objections[0] if len(objections) else None)
        ratios = np.array(run.losses[: len(expected)])[healthy] / expected[healthy]
        apart.append(float(np.abs(ratios - 1.0).max()))
    print_table(runs, accuracies, apart)
    print(f"Handed back at a damping of {damping:.3g}; below 1, the rate jumps up.")
    draw([before, *runs], plan, args.out)
    print(f"The figure is in {args.out}")

    if np.isfinite(wrecked.losses[-1]):
        sys.exit("The bad batches did no harm to the run without protection.")
    if not all(np.isfinite(x).all() for x in jax.tree.leaves(protected.carry)):
        sys.exit("The protected run has a state that is not finite.")
    if apart[-1] > 1e-3:
        sys.exit("The adopted run was not that of AdamW before the first objection.")
    if accuracies[-1] < accuracies[0] - 0.02:
        sys.exit("The protected run ended worse than the one with good batches.")


if __name__ == "__main__":
    main()
