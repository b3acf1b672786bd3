"""No number of steps: how good is a run wherever it is stopped?

Some optimizers are *told* the number of steps, and decay to zero: they make a run of
their own for each stopping point. Of the others a single run is read at all of them.
Excess is the loss on the whole training set above that of AdamW tuned, over half
decades, *for each stopping point*, with linear decay to zero, in % of the drop that it
made. ``lalerg`` begins at 1e-6, 1e-3 and 1; others are tuned for each stopping point.

    python benchmarks/anytime.py               # all tasks to 4,000 steps, seven further
    python benchmarks/anytime.py --quick       # a minute
    python benchmarks/anytime.py --only lalerg --tasks mlp vae
    python benchmarks/anytime.py --most 16000  # all tasks, for many hours
    python benchmarks/anytime.py --report-only # tables and figure

A row that is stored is not run again; ``--force`` runs it anew.
"""

from argparse import ArgumentParser
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import peers
import rate_free
from anytime_tables import LAST, READ, TUNED, Results, draw, report
from decades import start_losses
from jax import lax
from peers import Peer
from rich.progress import Progress
from store import opened, options_of, publish, rounded
from sweeps import HALF_DECADES, NUM_SEEDS, best_index
from tasks import TASKS, Task
from train import PLAIN, full_loss, grid, keys_at, on_batch, stepping

import lalerg_optax as lo

PyTree = Any
Readout = dict[str, Callable[[PyTree, PyTree], PyTree]]
STOPS = (100, 400, 1_000, 4_000, 16_000)
MOST, QUICK_MOST = 4_000, 400
FURTHER = (  # cheap ones, to the last stopping point
    *("mlp", "autoencoder", "logistic", "regression", "factorization"),
    *("vae", "photo"),
)
QUICK_TASKS = ("logistic", "regression")
STARTS = (1e-6, 1e-3, 1.0)
SPAN = 2  # half decades on each side of the middle one
WARMUP = 100  # steps, where a method needs it and the length of the run is not known


def decaying(rate: Any, num_steps: Any) -> Any:
    """Returns the linear decay to zero, also where the number of steps is traced."""
    return lambda count: rate * jnp.clip(1.0 - count / num_steps, 0.0, 1.0)


class Row(NamedTuple):
    """An optimizer, and how its params are read out.

    Attributes:
      peer: the optimizer.
      group: what ``--only`` chooses.
      is_told: whether it knows the number of steps.
      read: by name, (state, params) to what is evaluated.
    """

    peer: Peer
    group: str
    read: Readout
    is_told: bool = False

    @property
    def is_tuned(self) -> bool:
        """Whether the best of its rates is what counts."""
        return not self.peer.is_own


JUST_LAST: Readout = {LAST: lambda state, params: params}
BOTH = JUST_LAST | {READ: lo.eval_params}
ROWS = (
    Row(
        peers.ADAMW._replace(name=TUNED, schedule=decaying),
        "peers",
        JUST_LAST,
        is_told=True,
    ),
    Row(
        Peer(
            "adamw, constant",
            lambda rate, n: rate_free.averaged(peers.adamw(rate)),
            schedule=peers.as_it_is,
        ),
        "peers",
        JUST_LAST | {READ: lambda state, params: state.average},
    ),
    Row(
        rate_free.SCHEDULE_FREE._replace(
            make=lambda rate, n: optax.contrib.schedule_free_adamw(
                rate, warmup_steps=WARMUP, weight_decay=peers.WEIGHT_DECAY
            )
        ),
        "peers",
        {READ: rate_free.SCHEDULE_FREE.eval_params},
    ),
    Row(
        Peer(
            "lalerg(average=True)",
            peers.lalerg(average=True),
            schedule=peers.as_it_is,
            is_own=True,
        ),
        "lalerg",
        BOTH,
    ),
    Row(
        Peer(
            "lalerg, linear decay",
            peers.lalerg(average=True),
            schedule=decaying,
            is_own=True,
        ),
        "told",
        BOTH,
        is_told=True,
    ),
)
GROUPS = tuple(dict.fromkeys(row.group for row in ROWS))


def program(task: Task, row: Row) -> Callable[..., jax.Array]:
    """Returns (rates, seeds, steps told, stops) to losses, [rate, seed, stop, read]."""

    def run(stops: jax.Array, steps: jax.Array, rate: Any, seed: Any) -> jax.Array:
        key = jax.random.key(seed)

        def gradient(params: PyTree, rest: PyTree, i: jax.Array, now: Any) -> PyTree:
            return on_batch(task, task.batch_size, params, rest, keys_at(key, i), now)

        hooks = PLAIN._replace(apply=row.peer.apply, keep=lambda taken: None)
        tx = row.peer.at(rate, steps)
        step = stepping(tx, gradient, hooks)

        def segment(carry: PyTree, ends: tuple[jax.Array, jax.Array]) -> PyTree:
            carry = lax.fori_loop(*ends, lambda i, c: step(c, (i, None))[0], carry)
            params, rest, state = carry
            losses = [
                full_loss(task, task.train, read(state, params), rest)
                for read in row.read.values()
            ]
            return carry, jnp.stack(losses)

        params, rest = task.init(key)
        starts = jnp.concatenate([jnp.zeros_like(stops[:1]), stops[:-1]])
        return lax.scan(segment, (params, rest, tx.init(params)), (starts, stops))[1]

    return jax.jit(
        lambda rates, seeds, steps, stops: grid(
            partial(run, stops, steps), rates, seeds
        )
    )


def measure(
    run: Callable[..., jax.Array], row: Row, middle: float, stops: list[int], num: int
) -> dict[str, Any]:
    """Runs all cells of a row; a best rate at the end of its range moves the range."""

    def losses(rates: tuple[float, ...]) -> np.ndarray:
        ends = jnp.asarray(stops, jnp.int32)
        args = jnp.asarray(rates, jnp.float32), jnp.arange(num)
        return np.asarray(run(*args, jnp.float32(stops[-1]), ends))

    rates, read = STARTS, list(row.read)
    if not row.is_tuned:
        return {"rates": rates, "read": read, "train_loss": rounded(losses(rates))}
    at = int(np.argmin(np.abs(np.log(np.divide(HALF_DECADES, middle)))))
    found: dict[float, np.ndarray] = {}
    wanted = set(range(at - SPAN, at + SPAN + 1))
    while True:
        wanted = {min(max(k, 0), len(HALF_DECADES) - 1) for k in wanted}
        rates = tuple(HALF_DECADES[k] for k in sorted(wanted))
        new = tuple(rate for rate in rates if rate not in found)
        found |= dict(zip(new, losses(new), strict=True))
        cells = np.stack([found[rate] for rate in rates])
        best = {
            best_index(cells[:, :, i, j])
            for i in range(len(stops))
            for j in range(len(read))
        }
        lowest, highest = min(wanted), max(wanted)
        more = {lowest - 1} if 0 in best and lowest > 0 else set()
        if len(rates) - 1 in best and highest < len(HALF_DECADES) - 1:
            more |= {highest + 1}
        if not more:
            break
        wanted |= more
    return {"rates": rates, "read": read, "train_loss": rounded(cells)}


def with_most(parser: ArgumentParser) -> None:
    """Adds how far runs go."""
    parser.add_argument("--most", type=int, help="steps, on all tasks")


def stops_of(task: str, most: int | None, quick: bool) -> list[int]:
    """Returns the stopping points of a task."""
    if most is None:
        most = STOPS[-1] if task in FURTHER else MOST
    return [n for n in STOPS if n <= (QUICK_MOST if quick else most)]


def main() -> None:
    """Measures, stores, and writes tables and figure."""
    options = options_of(__doc__, GROUPS, tuple(TASKS), tuple(TASKS), with_most)
    results = opened(Results, "anytime", options)
    names = [t for t in options.tasks if t in QUICK_TASKS or not options.quick]
    rows = [row for row in ROWS if row.group in options.only]
    num = 1 if options.quick else NUM_SEEDS
    jobs = [] if options.report_only else [(t, row) for t in names for row in rows]
    made: dict[str, Task] = {}
    with Progress() as progress:
        bar = progress.add_task("", total=len(jobs))
        for name, row in jobs:
            progress.update(bar, description=f"{name}: {row.peer.name}"[:44].ljust(44))
            task = made.setdefault(name, TASKS[name]())
            if name not in results.starts:
                results.starts[name] = start_losses(task)
            stops = stops_of(name, options.most, options.quick)
            run = program(task, row)
            for steps in stops if row.is_told else stops[-1:]:
                key = (name, row.peer.name, steps)
                cells = {"stops": [steps] if row.is_told else stops, "num_seeds": num}
                middle = results.rate_before(name, row.peer.name, steps)
                results.measure(
                    key,
                    cells,
                    partial(measure, run, row, middle, cells["stops"], num),
                    force=options.force,
                )
            progress.advance(bar)
    publish(results, report(results), draw)


if __name__ == "__main__":
    main()
