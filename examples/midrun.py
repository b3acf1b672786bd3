"""Protects a run that is under way, without touching what it does.

A perceptron learns scikit-learn's handwritten digits with plain `optax.adamw` and a
cosine schedule. After 400 of 1200 steps there is a checkpoint (Orbax). Three runs go on
from it: plain AdamW with good batches only, which is how it ought to go; plain AdamW
with 20 bad batches, first wrong labels with inputs 100 times too large, then NaN; and
the same with AdamW protected: `lo.adopt` turns AdamW's state into that of
`lo.error_regulate(optax.adamw(schedule))`. At step 900 the state is turned back, and
plain AdamW finishes what is left.

What one learns: moments, step count and schedule go over unchanged, so that nothing is
warmed up again and, as long as nothing is wrong, the losses are the ones that AdamW
alone would have had. And the protection can be taken off again.

Run with: python examples/midrun.py
It takes 6 seconds on 2 x86 cores.
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
COLORS = {GOOD: "#777777", WRECKED: "#E69F00", SAVED: "#0072B2"}
MARKS = {lo.Verdict.SKIP: "#777777", lo.Verdict.REVERT: "#CC0033"}
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
    thirds, half, back = num_steps // 3, num_steps // 2, num_steps * 3 // 4
    return Plan(thirds, half, back, num_steps, min(20, num_steps // 12))


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
    """A run from a given state on, with a record of it."""

    def __init__(self, name: str, carry: Carry, first: int):
        self.name, self.carry, self.at = name, carry, first
        self.losses: list[float] = []
        self.verdicts: dict[int, int] = {}  # of the steps at which there was one

    def go_on(self, step: Callable, batches: list, last: int) -> None:
        """Trains up to a step."""
        for self.at in tqdm(range(self.at, last), self.name.ljust(22)):
            self.carry, loss = step(self.carry, batches[self.at])
            self.losses.append(float(loss))
            if isinstance(self.carry[1], lo.ErrorRegulateState):
                self.verdicts[self.at] = int(lo.metrics(self.carry[1])["verdict"])
        self.at = last

    def count(self, verdict: lo.Verdict) -> int:
        """Returns how many steps ended like that."""
        return list(self.verdicts.values()).count(verdict)


def save_and_restore(
    carry: Carry, seed: int, tx: optax.GradientTransformation
) -> Carry:
    """Returns what Orbax makes of a state: restored as what it is, AdamW's."""
    params = init_params(seed)
    target = params, tx.init(params)
    with tempfile.TemporaryDirectory() as folder, ocp.StandardCheckpointer() as saver:
        saver.save(Path(folder) / "adamw", carry)
        saver.wait_until_finished()
        return saver.restore(Path(folder) / "adamw", target)


def draw(runs: list[Run], before: Run, plan: Plan, path: str) -> None:
    """Saves the figure: the losses of the three runs, and what happened when."""
    figure = Figure(figsize=(8, 4.4), layout="constrained")
    axes = figure.subplots()
    place = axes.get_xaxis_transform()  # y: share of the height
    end = plan.poisoned + plan.length
    axes.axvspan(plan.poisoned, end, color="#FFCCCC", lw=0, label="bad batches")
    steps = {before: np.arange(plan.adopted)}
    steps |= {run: np.arange(plan.adopted, plan.end) for run in runs}
    for run, width in zip((before, *runs), (1.0, 2.5, 1.0, 1.0), strict=True):
        color, label = COLORS.get(run.name, "black"), run.name
        axes.plot(steps[run], run.losses, color=color, lw=width, label=label)
    (wrecked,) = (run for run in runs if run.name == WRECKED)
    last = np.flatnonzero(np.isfinite(wrecked.losses))[-1]
    axes.plot(
        *(plan.adopted + last, wrecked.losses[last]),
        "X",
        color=COLORS[WRECKED],
        mec="black",
        ms=8,
        label="NaN from here on, for good",
    )
    labels = ("protected run skips the batch", "protected run goes back")
    for (verdict, mark), label in zip(MARKS.items(), labels, strict=True):
        marked = [s for s, v in runs[-1].verdicts.items() if v == verdict]
        style = {"color": mark, "ms": 9, "transform": place, "label": label}
        axes.plot(marked, np.full(len(marked), 0.04), "|", **style)
    events = {"state\nadopted": plan.adopted, "handed\nback": plan.handed_back}
    for text, step in events.items():
        axes.axvline(step, color="black", lw=0.8, ls=":")
        axes.text(step + 5, 0.98, text, va="top", size=9, transform=place)
    axes.set(yscale="log", xlabel="step", ylabel="training loss of the batch")
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    figure.savefig(path, dpi=120)


def print_table(runs: list[Run], accuracies: list[float], apart: list[str]) -> None:
    """Prints how the three runs ended."""
    table = Table(
        title="After training",
        caption="differs: largest relative difference of the loss from that of the "
        "run with good batches, between adoption and the first bad batch",
    )
    for column in ("run", "accuracy", "loss", "skipped", "reverted", "differs"):
        table.add_column(column, justify="left" if column == "run" else "right")
    for run, accuracy, difference in zip(runs, accuracies, apart, strict=True):
        loss = f"{np.mean(run.losses[-20:]):.1e}"
        counts = (str(run.count(v)) if run.verdicts else "-" for v in MARKS)
        table.add_row(run.name, f"{accuracy:.1%}", loss, *counts, difference)
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
    schedule = optax.cosine_decay_schedule(3e-3, plan.end)
    adamw = optax.adamw(schedule)
    params = init_params(args.seed)
    before = Run("AdamW, until adoption", (params, adamw.init(params)), 0)
    plain_step = make_step(adamw)
    before.go_on(plain_step, good, plan.adopted)
    checkpoint = save_and_restore(before.carry, args.seed, adamw)

    runs = [Run(name, checkpoint, plan.adopted) for name in COLORS]
    undisturbed, wrecked, saved = runs
    undisturbed.go_on(plain_step, good, plan.end)
    wrecked.go_on(plain_step, bad, plan.end)

    # The same, adopted: one line, and the step is compiled for the new optimizer
    params, opt_state = checkpoint
    protected = lo.error_regulate(adamw)
    saved.carry = params, lo.adopt(protected, params, opt_state)
    saved.go_on(make_step(protected), bad, plan.handed_back)

    # ... and back; what AdamW cannot keep is the damping, which has recovered to 1
    params, opt_state = saved.carry
    damping = float(lo.metrics(opt_state)["damping"])
    saved.carry = params, lo.adopt(adamw, params, opt_state)
    saved.go_on(plain_step, bad, plan.end)

    accuracies = [
        float((scores_of(run.carry[0], x_test).argmax(-1) == y_test).mean())
        for run in runs
    ]
    healthy = slice(0, plan.poisoned - plan.adopted)
    expected = np.array(undisturbed.losses[healthy])
    apart = [float(np.max(np.abs(r.losses[healthy] / expected - 1.0))) for r in runs]
    print_table(runs, accuracies, [f"{x:.0e}" for x in apart])
    print(f"Handed back with a damping of {damping:.3g}.")
    draw(runs, before, plan, args.out)
    print(f"The figure is in {args.out}")
    if np.isfinite(wrecked.losses[-1]):
        sys.exit("The bad batches did no harm to the run without protection.")
    if not all(np.isfinite(x).all() for x in jax.tree.leaves(saved.carry)):
        sys.exit("The protected run has a state that is not finite.")
    if apart[-1] > 1e-3:
        sys.exit("The adopted run was not that of AdamW before the bad batches.")
    if accuracies[-1] < accuracies[0] - 0.02:
        sys.exit("The protected run ended worse than the one with good batches.")


if __name__ == "__main__":
    main()
