"""What protection costs: time, memory and compilation of a step, next to its peers.

Times are ratios: every optimizer takes its steps in turn with the one that it is
compared with, in one process, because machines are noisy. Beside them stand XLA's own
counts, which are not. Two figures are told for the ratio: the median, and the mean over
the whole of several periods of the anchor, in which the rare steps have their share.

    python benchmarks/cost.py                          # all, half an hour on 2 cores
    python benchmarks/cost.py --quick                  # all of it, small and rough
    python benchmarks/cost.py --only steps training    # some of it
    python benchmarks/cost.py --device cuda            # the same on a GPU
    python benchmarks/cost.py --report-only            # the tables

A row that is stored is not run again, so that a run may be stopped and goes on later,
whatever machine it is from: ``--out`` begins a file of one's own, ``--force`` runs all
anew. Steps are taken one by one, not in the loop of ``train.py``:
it is single steps that are timed.
"""

from argparse import ArgumentParser
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import peers
from flax import linen as nn
from rich.progress import Progress
from store import opened, options_of, publish
from timing import (
    CLIPPED,
    NO_SEARCH,
    RATE,
    Job,
    Row,
    Step,
    Timings,
    TrainingStep,
    compare,
    compare_training,
    copy_bandwidth,
    make_params,
    part_tables,
    shares_of_bandwidth,
)

PyTree = Any

LALERG = Row(peers.LALERG, limit=1.35)
ROWS = (
    LALERG,
    Row(NO_SEARCH),
    *map(Row, peers.TIMED),
    Row(peers.LALERG_CLIPPED, CLIPPED, 0.6),
    LALERG._replace(against=peers.FINITE, limit=0.5),
    *map(Row, peers.TIMED_REGULATED, peers.BASES, [1.6] * len(peers.BASES)),
    Row(CLIPPED),
    Row(peers.FINITE),
    Row(peers.SKIPPING._replace(name="skip step, 6 sd (adamw)")),
    *map(Row, peers.TIMED_PEERS),
)


def measured_steps(row: Row, params: PyTree, seconds: float) -> dict[str, Any]:
    """Measures a row against what it is compared with."""
    base, own = (Step(peer, params) for peer in (row.against, row.peer))
    return compare(base, own, seconds)


# What is measured


def step_of(row: Row, num_params: int, quick: bool) -> dict[str, Any]:
    """Measures a row, and which share of the copy bandwidth is used."""
    before = copy_bandwidth(num_params)
    params = make_params(num_params, 32)
    entry = measured_steps(row, params, seconds=1.0 if quick else 12.0)
    bandwidth = (before + copy_bandwidth(num_params)) / 2
    return entry | shares_of_bandwidth(row, entry, 4 * num_params, bandwidth)


def steps(results: Timings, quick: bool) -> Iterator[Job]:
    """The optimizer step alone, with its parameters in 32 matrices."""
    del results
    num_params = 2**21 if quick else 2**25
    for row in ROWS:
        cells = {"num_params": num_params, "limit": row.limit}
        measured = partial(step_of, row, num_params, quick)
        yield Job(row, f"{num_params} parameters", cells, measured)


def sizes(results: Timings, quick: bool) -> Iterator[Job]:
    """Growing numbers of parameters, and params in bfloat16."""
    del results
    numbers = (10**6, 3 * 10**6) if quick else (10**6, 10**7, 5 * 10**7, 2 * 10**8)
    kinds = [(n, "float32") for n in numbers] + [(numbers[-2], "bfloat16")]
    row = LALERG._replace(limit=None)
    for num_params, dtype in kinds:

        def measured(num_params: int = num_params, dtype: str = dtype) -> PyTree:
            params = make_params(num_params, 16, dtype)
            return measured_steps(row, params, 1.0 if quick else 8.0)

        cells = {"num_params": num_params, "params": dtype, "limit": None}
        yield Job(row, f"{num_params} parameters, {dtype}", cells, measured)


def leaves(results: Timings, quick: bool) -> Iterator[Job]:
    """Many small leaves, of about 1,000 entries."""
    del results
    num_leaves = 200 if quick else 2000
    for row in (LALERG._replace(limit=1.5), Row(CLIPPED)):

        def measured(row: Row = row) -> dict[str, Any]:
            params = make_params(num_leaves * 1000, num_leaves)
            return measured_steps(row, params, 1.0 if quick else 12.0)

        cells = {"num_leaves": num_leaves, "limit": row.limit}
        yield Job(row, f"{num_leaves} leaves", cells, measured)


def build_of(results: Timings, row: Row, num_leaves: int, size: str) -> dict[str, Any]:
    """Compiles a step, three times if there are few leaves."""
    step = Step(row.peer, make_params(1000 * num_leaves, num_leaves))
    step.args = (*step.carry, step.grads, jnp.float32(1.0))
    again = 0 if num_leaves > 500 else 2
    times = [step.compile_seconds, *(step.compile()[1] for _ in range(again))]
    seconds = float(np.median(times))
    base = seconds
    if row.peer is not row.against:
        name = row.against.name
        base = results.runs["compilation", name, name, size]["build_seconds"]
    return {"build_seconds": seconds, "ratio": seconds / base}


def compilation(results: Timings, quick: bool) -> Iterator[Job]:
    """Tracing, lowering and compiling the optimizer step."""
    rows = (
        Row(peers.ADAMW),
        LALERG._replace(limit=1.5),
        Row(NO_SEARCH),
        Row(peers.REGULATED),
        Row(CLIPPED),
        Row(peers.FINITE),
    )
    for num_leaves in (4, 100) if quick else (4, 32, 150, 500, 2000):
        size = f"{num_leaves} leaves"
        for row in rows:
            cells = {"num_leaves": num_leaves, "limit": row.limit}
            measured = partial(build_of, results, row, num_leaves, size)
            yield Job(row, size, cells, measured)


class Block(nn.Module):
    """A transformer block."""

    num_heads: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns the activations, shape (batch, length, width)."""
        width, mask = x.shape[-1], nn.make_causal_mask(x[..., 0])
        attend = nn.MultiHeadDotProductAttention(self.num_heads)
        x = x + attend(nn.LayerNorm()(x), mask=mask)
        hidden = nn.gelu(nn.Dense(4 * width)(nn.LayerNorm()(x)))
        return x + nn.Dense(width)(hidden)


class Transformer(nn.Module):
    """A decoder of characters: 12 * depth * width^2 parameters and a few more."""

    width: int = 384
    depth: int = 6
    num_tokens: int = 256

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Returns logits, shape (batch, length, num_tokens)."""
        shape = (tokens.shape[-1], self.width)
        x = nn.Embed(self.num_tokens, self.width)(tokens)
        x = x + self.param("position", nn.initializers.normal(0.02), shape)
        for _ in range(self.depth):
            x = Block(num_heads=6)(x)
        return nn.Dense(self.num_tokens)(nn.LayerNorm()(x))


def training_of(row: Row, width: int, depth: int, repeats: int) -> dict[str, Any]:
    """Measures a whole training step."""
    tokens = jax.random.randint(jax.random.key(1), (32, 129), 0, 256)
    model = Transformer(width=width, depth=depth)

    def loss_fn(params: PyTree, tokens: Any) -> jax.Array:
        logits = model.apply(params, tokens[:, :-1])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
        return losses.mean()

    params = jax.jit(model.init)(jax.random.key(0), tokens[:, :-1])
    base, own = (
        TrainingStep(peer, rate, loss_fn, params, tokens)
        for peer, rate in ((row.against, 1e-4), (row.peer, RATE))
    )
    return compare_training(base, own, repeats)


def training(results: Timings, quick: bool) -> Iterator[Job]:
    """The whole training step of a transformer, on 32 x 128 tokens."""
    del results
    width, depth = (96, 2) if quick else (384, 6)
    row = LALERG._replace(limit=1.02)
    cells = {"width": width, "depth": depth, "limit": row.limit}
    measured = partial(training_of, row, width, depth, repeats=4 if quick else 30)
    yield Job(row, f"width {width}, depth {depth}", cells, measured)


PARTS: dict[str, Callable[[Timings, bool], Iterator[Job]]] = {
    part.__name__: part for part in (steps, sizes, leaves, compilation, training)
}


def measure_all(
    results: Timings, only: Iterable[str], quick: bool, force: bool
) -> None:
    """Measures and stores every row that is not stored yet."""
    todo = [(part, job) for part in only for job in PARTS[part](results, quick)]
    with Progress() as progress:
        for part, job in progress.track(todo, description="rows"):
            key = (part, job.row.peer.name, job.row.against.name, job.size)
            results.measure(key, job.cells, job.measured, force)


# Tables


def report(results: Timings) -> str:
    """Returns everything as Markdown."""
    lines = [
        "# What protection costs",
        "",
        f"{results.made()} Ratios are medians of steps "
        "taken in turn; bytes, temporaries (bytes) and state (entries) are per "
        "parameter and come from XLA.",
        "",
        *part_tables(results, PARTS),
    ]
    return "\n".join(lines)


def with_trace(parser: ArgumentParser) -> None:
    """Adds an option."""
    parser.add_argument("--trace", type=Path, help="write a profile to this folder")


def main() -> None:
    """Measures, stores, and writes the tables."""
    options = options_of(__doc__, tuple(PARTS), more=with_trace)
    results = opened(Timings, "cost", options)
    if not options.report_only:
        if options.trace:
            jax.profiler.start_trace(str(options.trace))
        measure_all(results, options.only, options.quick, options.force)
        if options.trace:
            jax.profiler.stop_trace()
    publish(results, report(results))


if __name__ == "__main__":
    main()
