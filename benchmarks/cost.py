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

import platform
import re
import time
from argparse import ArgumentParser
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import peers
from flax import linen as nn
from peers import Peer
from rich.progress import Progress
from store import Store, opened, options_of, publish, table

PyTree = Any
RATE = 1e-9  # the gradient does not change, and a search would take params far away
WARM_UP = 300  # steps, after which the anchor moves as seldom as it ever does
PERIOD = 32  # steps from anchor to anchor


class Row(NamedTuple):
    """An optimizer, what it is compared with, and how much longer it may take."""

    peer: Peer
    against: Peer = peers.ADAMW
    limit: float | None = None


CLIPPED = peers.CLIPPED._replace(name="clip, adamw")
NO_SEARCH = peers.NO_SEARCH._replace(name="lalerg, search=False")
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


class Results(Store):
    """What has been measured; the machine is told by its device."""

    identity = ("part", "optimizer", "against", "size")

    def __init__(self, path: Path, command: str = "") -> None:
        super().__init__(path, command)
        machine = f"{platform.machine()} {jax.devices()[0].device_kind}"
        self.now["machine"]["platform"] = machine

    def made(self) -> str:
        """Returns with what all this was made, and on what."""
        machine, versions = self.about["machine"], self.about["versions"]
        return (
            f"Made with `{self.about['command']}` on {machine['platform']}, "
            f"{machine['cores']} cores; Python {versions['python']}, "
            f"JAX {versions['jax']}, Optax {versions['optax']}."
        )


class Step:
    """A compiled optimizer step with donated buffers, and what it is fed."""

    def __init__(self, peer: Peer, params: PyTree) -> None:
        tx = optax.with_extra_args_support(peer.make(RATE, 0))

        def step(params: PyTree, state: PyTree, grads: PyTree, value: Any) -> PyTree:
            updates, state = tx.update(grads, state, params, value=value)
            return optax.apply_updates(params, updates), state

        self.grads = jax.tree.map(lambda p: 1e-3 * jnp.ones_like(p), params)
        self.carry = (jax.tree.map(jnp.copy, params), jax.jit(tx.init)(params))
        self.jitted = jax.jit(step, donate_argnums=(0, 1))
        self.args = (*self.carry, self.grads, jnp.float32(1.0))
        self.compiled, self.compile_seconds = self.compile()
        self.num_params = optax.tree.size(params)
        del self.args  # they are donated from here on

    def compile(self) -> tuple[Any, float]:
        """Traces, lowers and compiles; returns the program and the seconds."""
        jax.clear_caches()
        started = time.perf_counter()
        compiled = self.jitted.lower(*self.args).compile()
        return compiled, time.perf_counter() - started

    def __call__(self, value: float) -> float:
        """Takes a step; returns the seconds that it took."""
        loss = jax.block_until_ready(jnp.float32(value))
        started = time.perf_counter()
        self.carry = self.compiled(*self.carry, self.grads, loss)
        jax.block_until_ready(self.carry)
        return time.perf_counter() - started

    def counts(self) -> dict[str, float]:
        """Returns what XLA says of the program, per parameter."""
        memory, text = self.compiled.memory_analysis(), self.compiled.as_text()
        shapes = {",".join(map(str, p.shape)) for p in jax.tree.leaves(self.carry[0])}
        pattern = rf"\w+\[(?:{'|'.join(map(re.escape, shapes))})\]\S* copy\("
        return {
            "bytes_accessed": self.compiled.cost_analysis()["bytes accessed"]
            / self.num_params,
            "temporaries": memory.temp_size_in_bytes / self.num_params,
            "state": optax.tree.size(self.carry[1]) / self.num_params,
            "copies": len(re.findall(pattern, text)),
        }


@lru_cache(maxsize=1)
def make_params(num_params: int, num_leaves: int, dtype: Any = jnp.float32) -> PyTree:
    """Returns square matrices with together about ``num_params`` entries."""
    side = max(1, round((num_params / num_leaves) ** 0.5))
    keys = jax.random.split(jax.random.key(0), num_leaves)
    return {
        f"w{i:04}": 0.02 * jax.random.normal(key, (side, side), dtype)
        for i, key in enumerate(keys)
    }


def losses(num: int) -> Iterator[float]:
    """Yields losses with 1 % of noise."""
    yield from 1.0 + 0.01 * np.random.default_rng(0).standard_normal(num)


def in_turn(steps: list[Step], seconds: float) -> np.ndarray:
    """Returns seconds a step, shape (repeats, len(steps)).

    As many whole periods of the anchor as there is time for, one at least, or five
    steps of a slow optimizer, all after a warm-up of as long.
    """
    started, once = time.perf_counter(), 0.0
    for loss in losses(WARM_UP):
        once = sum(step(loss) for step in steps)
        if time.perf_counter() - started > seconds:
            break
    periods = round(seconds / (once * PERIOD))
    repeats = max(1, periods) * PERIOD if once < 1.0 else 5
    return np.asarray([[step(loss) for step in steps] for loss in losses(repeats)])


def ratio_of(times: np.ndarray) -> dict[str, float]:
    """Returns how much longer the second column takes than the first."""
    return {
        "ratio": float(np.median(times[:, 1] / times[:, 0])),
        "mean_ratio": float(times[:, 1].mean() / times[:, 0].mean()),
        "milliseconds": 1e3 * float(np.median(times[:, 1])),
        "base_milliseconds": 1e3 * float(np.median(times[:, 0])),
        "repeats": len(times),
    }


def compare(row: Row, params: PyTree, seconds: float) -> dict[str, Any]:
    """Measures a row against what it is compared with."""
    steps = [Step(peer, params) for peer in (row.against, row.peer)]
    base, own = (step.counts() for step in steps)
    return {
        **ratio_of(in_turn(steps, seconds)),
        **own,
        "base_temporaries": base["temporaries"],
        "base_copies": base["copies"],
        "base_bytes_accessed": base["bytes_accessed"],
    }


def copy_bandwidth(num_params: int) -> float:
    """Returns bytes a second when 1 is added to an array in place."""
    x = jnp.ones(num_params)
    add = jax.jit(lambda x: x + 1.0, donate_argnums=0)
    seconds = []
    for _ in range(21):
        started = time.perf_counter()
        x = jax.block_until_ready(add(x))
        seconds.append(time.perf_counter() - started)
    return 8.0 * num_params / float(np.median(seconds[1:]))


# What is measured


class Job(NamedTuple):
    """A row of a table.

    Attributes:
      row: what is compared with what.
      size: of the model, in words; it tells rows apart.
      cells: the same in numbers.
      measured: measures it.
    """

    row: Row
    size: str
    cells: dict[str, Any]
    measured: Callable[[], dict[str, Any]]


def step_of(row: Row, num_params: int, quick: bool) -> dict[str, Any]:
    """Measures a row, and which share of the copy bandwidth is used."""
    before = copy_bandwidth(num_params)
    entry = compare(row, make_params(num_params, 32), seconds=1.0 if quick else 12.0)
    bandwidth = (before + copy_bandwidth(num_params)) / 2
    entry |= {"copy_bandwidth": bandwidth}
    # AdamW reads p, g, mu, nu and writes p, mu, nu; lalerg reads g and the anchor more
    for name, is_it, key, least_bytes in (
        ("adamw", row.against is peers.ADAMW, "base_milliseconds", 28),
        ("lalerg", row.peer is peers.LALERG, "milliseconds", 36),
    ):
        if is_it:
            rate = least_bytes * num_params / (1e-3 * entry[key])
            entry[f"share_of_bandwidth_{name}"] = rate / bandwidth
    return entry


def steps(results: Results, quick: bool) -> Iterator[Job]:
    """The optimizer step alone, with its parameters in 32 matrices."""
    del results
    num_params = 2**21 if quick else 2**25
    for row in ROWS:
        cells = {"num_params": num_params, "limit": row.limit}
        measured = partial(step_of, row, num_params, quick)
        yield Job(row, f"{num_params} parameters", cells, measured)


def sizes(results: Results, quick: bool) -> Iterator[Job]:
    """Growing numbers of parameters, and params in bfloat16."""
    del results
    numbers = (10**6, 3 * 10**6) if quick else (10**6, 10**7, 5 * 10**7, 2 * 10**8)
    kinds = [(n, "float32") for n in numbers] + [(numbers[-2], "bfloat16")]
    row = LALERG._replace(limit=None)
    for num_params, dtype in kinds:

        def measured(num_params: int = num_params, dtype: str = dtype) -> PyTree:
            params = make_params(num_params, 16, dtype)
            return compare(row, params, 1.0 if quick else 8.0)

        cells = {"num_params": num_params, "params": dtype, "limit": None}
        yield Job(row, f"{num_params} parameters, {dtype}", cells, measured)


def leaves(results: Results, quick: bool) -> Iterator[Job]:
    """Many small leaves, of about 1,000 entries."""
    del results
    num_leaves = 200 if quick else 2000
    for row in (LALERG._replace(limit=1.5), Row(CLIPPED)):

        def measured(row: Row = row) -> dict[str, Any]:
            params = make_params(num_leaves * 1000, num_leaves)
            return compare(row, params, 1.0 if quick else 12.0)

        cells = {"num_leaves": num_leaves, "limit": row.limit}
        yield Job(row, f"{num_leaves} leaves", cells, measured)


def build_of(results: Results, row: Row, num_leaves: int, size: str) -> dict[str, Any]:
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


def compilation(results: Results, quick: bool) -> Iterator[Job]:
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


class TrainingStep(Step):
    """A whole training step: forward, backward, update."""

    def __init__(self, peer: Peer, rate: float, model: nn.Module, tokens: Any) -> None:
        tx = optax.with_extra_args_support(peer.make(rate, 0))

        def loss_fn(params: PyTree, tokens: Any) -> jax.Array:
            logits = model.apply(params, tokens[:, :-1])
            losses = optax.softmax_cross_entropy_with_integer_labels(
                logits, tokens[:, 1:]
            )
            return losses.mean()

        def step(params: PyTree, state: PyTree, tokens: Any, value: Any) -> PyTree:
            loss, grads = jax.value_and_grad(loss_fn)(params, tokens)
            updates, state = tx.update(grads, state, params, value=loss + 0.0 * value)
            return optax.apply_updates(params, updates), state

        params = jax.jit(model.init)(jax.random.key(0), tokens[:, :-1])
        self.grads = tokens
        self.carry = (params, jax.jit(tx.init)(params))
        self.jitted = jax.jit(step, donate_argnums=(0, 1))
        self.args = (*self.carry, tokens, jnp.float32(0.0))
        self.compiled, self.compile_seconds = self.compile()
        self.num_params = optax.tree.size(params)
        del self.args


def training_of(row: Row, width: int, depth: int, repeats: int) -> dict[str, Any]:
    """Measures a whole training step."""
    tokens = jax.random.randint(jax.random.key(1), (32, 129), 0, 256)
    model = Transformer(width=width, depth=depth)
    base, own = (
        TrainingStep(peer, rate, model, tokens)
        for peer, rate in ((row.against, 1e-4), (row.peer, RATE))
    )
    both = [base, own]
    for step in both:
        step(0.0)
    times = [[step(0.0) for step in both] for _ in range(repeats)]
    return {
        "num_params": own.num_params,
        **ratio_of(np.asarray(times)),
        "compile_seconds": own.compile_seconds,
        "base_compile_seconds": base.compile_seconds,
    }


def training(results: Results, quick: bool) -> Iterator[Job]:
    """The whole training step of a transformer, on 32 x 128 tokens."""
    del results
    width, depth = (96, 2) if quick else (384, 6)
    row = LALERG._replace(limit=1.02)
    cells = {"width": width, "depth": depth, "limit": row.limit}
    measured = partial(training_of, row, width, depth, repeats=4 if quick else 30)
    yield Job(row, f"width {width}, depth {depth}", cells, measured)


PARTS: dict[str, Callable[[Results, bool], Iterator[Job]]] = {
    part.__name__: part for part in (steps, sizes, leaves, compilation, training)
}


def measure_all(
    results: Results, only: Iterable[str], quick: bool, force: bool
) -> None:
    """Measures and stores every row that is not stored yet."""
    todo = [(part, job) for part in only for job in PARTS[part](results, quick)]
    with Progress() as progress:
        for part, job in progress.track(todo, description="rows"):
            key = (part, job.row.peer.name, job.row.against.name, job.size)
            results.measure(key, job.cells, job.measured, force)


# Tables

COLUMNS = {
    "optimizer": "optimizer",
    "against": "against",
    "params": "params",
    "num_params": "parameters",
    "num_leaves": "leaves",
    "ratio": "time ratio",
    "mean_ratio": "mean ratio",
    "limit": "at most",
    "milliseconds": "ms",
    "build_seconds": "seconds",
    "bytes_accessed": "bytes (XLA)",
    "temporaries": "temporaries",
    "base_temporaries": "of the base",
    "copies": "copies",
    "base_copies": "of the base ",
    "state": "state",
    "share_of_bandwidth_lalerg": "share of copy bandwidth",
    "share_of_bandwidth_adamw": "the same of adamw",
    "compile_seconds": "compile, s",
    "base_compile_seconds": "of adamw, s",
}


def as_text(value: Any) -> str:
    """Returns a number or a word as a table shows it."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.2f}" if abs(value) < 100 else f"{value:.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def part_table(results: Results, part: str) -> list[str]:
    """Returns the rows of a part, with the columns that they have."""
    entries = [run for run in results.runs.values() if run["part"] == part]
    names = [c for c in COLUMNS if any(e.get(c) is not None for e in entries)]
    rows = [[as_text(entry.get(c)) for c in names] for entry in entries]
    return table([COLUMNS[c].strip() for c in names], rows)


def report(results: Results) -> str:
    """Returns everything as Markdown."""
    lines = [
        "# What protection costs",
        "",
        f"{results.made()} Ratios are medians of steps "
        "taken in turn; bytes, temporaries (bytes) and state (entries) are per "
        "parameter and come from XLA.",
        "",
    ]
    known = {part for part, *_ in results.runs}
    for name, part in PARTS.items():
        if name in known:
            title = (part.__doc__ or "").strip()
            lines += [f"## {title}", "", *part_table(results, name)]
    return "\n".join(lines)


def with_trace(parser: ArgumentParser) -> None:
    """Adds an option."""
    parser.add_argument("--trace", type=Path, help="write a profile to this folder")


def main() -> None:
    """Measures, stores, and writes the tables."""
    options = options_of(__doc__, tuple(PARTS), more=with_trace)
    results = opened(Results, "cost", options)
    if not options.report_only:
        if options.trace:
            jax.profiler.start_trace(str(options.trace))
        measure_all(results, options.only, options.quick, options.force)
        if options.trace:
            jax.profiler.stop_trace()
    publish(results, report(results))


if __name__ == "__main__":
    main()
