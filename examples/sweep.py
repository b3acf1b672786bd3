"""Sweeps eight decades of learning rates, with several seeds, in one compiled run.

A perceptron with two hidden layers learns scikit-learn's handwritten digits. With
`optax.inject_hyperparams` the learning rate is a number in the optimizer's state, and
`jax.vmap` trains all rates and seeds at once: one compilation for each optimizer, and
one step for the whole grid. Both optimizers have a linear decay to zero, which is what
AdamW likes best; the swept number is where it starts.

What one learns: AdamW has the right loss at one or two of the rates, and a sweep is
there to find them. With lalerg it hardly matters which rate is given, because the macro
level multiplies it by a factor that it finds; the last panel shows what comes of it. On
test images it is right in 97.0 to 97.7 % at all rates, AdamW in 97.7 % at its best: the
lower training loss buys nothing here. The search is bold, which costs 4 to 26 of the
3,000 steps of a row of the table, skipped or spent on reverts (two steps each).

Run with: python examples/sweep.py
It takes 35 seconds of processor time (x86).
"""

import argparse
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure  # not pyplot: nothing needs a display
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tqdm import tqdm

import lalerg_optax as lo

BATCH_SIZE = 64
STRIDE = 20  # steps between two looks at the progress
MAKERS = {"AdamW": optax.adamw, "lalerg": lo.lalerg}
COLORS = {"AdamW": "#E69F00", "lalerg": "#0072B2"}
Results = dict[str, dict[str, np.ndarray]]  # of an optimizer: name, (rate, seed)


def make_optimizer(name: str, num_steps: int) -> optax.GradientTransformation:
    """Returns an optimizer that has its learning rate in its state."""

    def make(learning_rate: jax.typing.ArrayLike) -> optax.GradientTransformation:
        def schedule(count: jax.Array) -> jax.Array:
            return learning_rate * (1.0 - count / num_steps)

        return MAKERS[name](schedule, weight_decay=1e-4)

    tx = optax.inject_hyperparams(make)(learning_rate=1e-3)
    return optax.with_extra_args_support(tx)  # AdamW ignores the value


def init_params(key: jax.Array) -> optax.Params:
    """Returns the weights of a perceptron: 64 pixels, twice 64 units, ten scores."""
    sizes = (64, 64, 64, 10)
    return [
        {
            "kernel": jax.random.normal(k, (m, n)) * (2.0 / m) ** 0.5,
            "bias": jnp.zeros(n),
        }
        for k, m, n in zip(jax.random.split(key, 3), sizes, sizes[1:], strict=False)
    ]


def scores_of(params: optax.Params, x: jax.Array) -> jax.Array:
    """Returns the scores of the ten digits for every image."""
    *hidden, last = params
    for layer in hidden:
        x = jax.nn.relu(x @ layer["kernel"] + layer["bias"][None])
    return x @ last["kernel"] + last["bias"][None]


def loss_fn(params: optax.Params, x: jax.Array, y: jax.Array) -> jax.Array:
    """Returns the mean cross entropy."""
    losses = optax.softmax_cross_entropy_with_integer_labels
    return losses(scores_of(params, x), y).mean()


def sweep(
    name: str, rates: np.ndarray, num_seeds: int, num_steps: int, seed: int, data: list
) -> dict[str, np.ndarray]:
    """Trains at all rates with all seeds; returns how the runs ended."""
    tx = make_optimizer(name, num_steps)
    x_train, y_train, x_test, y_test = map(jnp.asarray, data)

    def init(rate: jax.Array, key: jax.Array) -> tuple[Any, ...]:
        params = init_params(key)
        opt_state = tx.init(params)
        opt_state.hyperparams["learning_rate"] = rate
        return params, opt_state, key

    def train_step(carry: tuple[Any, ...], step: jax.Array) -> tuple[tuple, None]:
        params, opt_state, key = carry
        rows = jax.random.randint(
            jax.random.fold_in(key, step), (BATCH_SIZE,), 0, len(x_train)
        )
        grad_fn = jax.value_and_grad(loss_fn)
        loss, grads = grad_fn(params, x_train[rows], y_train[rows])
        updates, opt_state = tx.update(grads, opt_state, params, value=loss)
        return (lo.apply_updates(params, updates, opt_state), opt_state, key), None

    def go_on(carry: tuple[Any, ...], steps: jax.Array) -> tuple[Any, ...]:
        return jax.lax.scan(train_step, carry, steps)[0]

    def result(carry: tuple[Any, ...], rate: jax.Array) -> dict[str, jax.Array]:
        params, opt_state, _ = carry
        is_right = scores_of(params, x_test).argmax(-1) == y_test
        told = {"loss": loss_fn(params, x_train, y_train), "accuracy": is_right.mean()}
        if name == "AdamW":
            return {**told, "rate": rate}
        report = lo.metrics(opt_state)
        counts = {k: report[k] for k in ("num_skipped", "num_reverts")}
        return {**told, **counts, "rate": rate * report["macro_rate"]}

    grid = [
        jnp.asarray(x)
        for x in np.meshgrid(rates, np.arange(seed, seed + num_seeds), indexing="ij")
    ]
    keys = jax.vmap(jax.vmap(jax.random.key))(grid[1])
    carry = jax.jit(jax.vmap(jax.vmap(init)))(grid[0], keys)
    all_at_once = jax.vmap(jax.vmap(go_on, (0, None)), (0, None))
    all_at_once = jax.jit(all_at_once, donate_argnums=0)
    for first in tqdm(range(0, num_steps, STRIDE), f"{name}, all runs"):
        carry = all_at_once(carry, jnp.arange(first, first + STRIDE))
    return jax.device_get(jax.jit(jax.vmap(jax.vmap(result)))(carry, grid[0]))


def print_table(results: Results, rates: np.ndarray) -> None:
    """Prints what the seeds came to at every rate."""
    table = Table(
        title="After training",
        caption="medians of the seeds; loss: of the whole training set; in effect: the "
        "rate before its decay; bad: steps skipped + reverts, of all seeds",
    )
    for column in ("given", "AdamW loss", "right", "lalerg loss", "right"):
        table.add_column(column, justify="right")
    table.add_column("in effect", justify="right")
    table.add_column("bad", justify="right")
    for i, rate in enumerate(rates):
        cells = [f"{rate:.0e}"]
        for told in results.values():
            loss, accuracy = (np.median(told[k][i]) for k in ("loss", "accuracy"))
            cells += [f"{loss:.1e}", f"{accuracy:.1%}"]
        told = results["lalerg"]
        counts = (str(told[k][i].sum()) for k in ("num_skipped", "num_reverts"))
        found = f"{np.median(told['rate'][i]):.0e}"
        table.add_row(*cells, found, " + ".join(counts))
    Console().print(table)


def draw(results: Results, rates: np.ndarray, path: str) -> None:
    """Saves the figure: loss, accuracy and rate in effect against the rate given."""
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    panels = figure.subplots(1, 3, sharex=True)
    for name, told in results.items():
        for axes, key in zip(panels, ("loss", "accuracy", "rate"), strict=True):
            points = np.where(np.isfinite(told[key]), told[key], np.nan)
            color, xs = COLORS[name], np.broadcast_to(rates[:, None], points.shape)
            axes.plot(rates, np.median(points, axis=1), color=color, label=name)
            axes.plot(xs.ravel(), points.ravel(), "o", color=color, ms=3, alpha=0.6)
    first, second, third = panels
    first.set(xscale="log", yscale="log", ylabel="final training loss")
    second.set(ylabel="test accuracy", ylim=(0, 1.02))
    third.set(yscale="log", ylabel="rate in effect, before its decay")
    for axes in panels:
        axes.set_xlabel("learning rate given")
    first.legend(frameon=False)
    figure.suptitle("Line: median of the seeds; dots: each run", size=9)
    figure.savefig(path, dpi=120)


def check(results: Results) -> None:
    """Ends the script with a message if a run was not what it should be."""
    told = results["lalerg"]
    if not np.isfinite(told["loss"]).all():
        sys.exit("A run with lalerg ended with a loss that is not finite.")
    if not (told["loss"] < np.log(10.0)).all():
        sys.exit("A run with lalerg ended no better than by guessing.")
    if not told["loss"].max() < np.median(results["AdamW"]["loss"], axis=1).max():
        sys.exit("lalerg at its worst rate was no better than AdamW at its worst.")


def main() -> None:
    """Sweeps, prints the table, saves the figure and checks."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--steps", type=int, default=1000, help="steps of each run")
    parser.add_argument("--seeds", type=int, default=3, help="runs at each rate")
    parser.add_argument("--seed", type=int, default=0, help="the first of them")
    parser.add_argument("--out", default="sweep.png", help="file of the figure")
    help_quick = "3 rates, 1 seed, 100 steps: a mere trial"
    parser.add_argument("--quick", action="store_true", help=help_quick)
    args = parser.parse_args()
    if args.steps < 100 or args.steps % STRIDE or args.seeds < 1:
        parser.error(f"--steps must be a multiple of {STRIDE}, at least 100")
    rates = 10.0 ** np.arange(-7.0, 2.0)
    if args.quick:
        args.steps, args.seeds, rates = 100, 1, rates[::4]

    images, labels = load_digits(return_X_y=True)
    images = (images / 16.0).astype(np.float32)
    x_train, x_test, y_train, y_test = train_test_split(
        images, labels, test_size=400, random_state=0, stratify=labels
    )
    data = [x_train, y_train, x_test, y_test]
    results = {
        name: sweep(name, rates, args.seeds, args.steps, args.seed, data)
        for name in MAKERS
    }
    print_table(results, rates)
    draw(results, rates, args.out)
    print(f"The figure is in {args.out}")
    check(results)


if __name__ == "__main__":
    main()
