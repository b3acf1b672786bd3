"""Steps that are timed in turn, and what XLA says of them.

Machines are noisy, so times are ratios: two steps alternate in one process, with
donated buffers, after a warm-up. Beside them stand XLA's own counts, which do not vary.
"""

import platform
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import peers
from peers import Peer
from store import Store, table

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


class Timings(Store):
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
    """A compiled optimizer step with donated buffers, and what it is fed.

    Args:
      peer: the optimizer.
      params: what it steps.
      is_select: whether it is mapped over one set of params. A conditional is a select
        then: both of its branches run, and nothing has to wait for the predicate.
      options: of XLA.
    """

    def __init__(
        self,
        peer: Peer,
        params: PyTree,
        is_select: bool = False,
        options: dict[str, Any] | None = None,
    ) -> None:
        tx = optax.with_extra_args_support(peer.make(RATE, 0))

        def step(params: PyTree, state: PyTree, grads: PyTree, value: Any) -> PyTree:
            updates, state = tx.update(grads, state, params, value=value)
            return optax.apply_updates(params, updates), state

        init = tx.init
        if is_select:
            step, init = jax.vmap(step, (0, 0, 0, None)), jax.vmap(init)
            params = jax.tree.map(lambda x: x[None], params)
        grads = jax.tree.map(lambda p: 1e-3 * jnp.ones_like(p), params)
        params = jax.tree.map(jnp.copy, params)
        self.prepare(step, params, jax.jit(init)(params), grads, options)

    def prepare(
        self,
        step: Callable[..., PyTree],
        params: PyTree,
        state: PyTree,
        grads: PyTree,
        options: dict[str, Any] | None = None,
    ) -> None:
        """Compiles the step, and keeps what it begins with."""
        self.options, self.grads, self.carry = options, grads, (params, state)
        self.jitted = jax.jit(step, donate_argnums=(0, 1))
        self.args = (*self.carry, grads, jnp.float32(1.0))
        self.compiled, self.compile_seconds = self.compile()
        self.num_params = optax.tree.size(params)
        del self.args  # they are donated from here on

    def compile(self) -> tuple[Any, float]:
        """Traces, lowers and compiles; returns the program and the seconds."""
        jax.clear_caches()
        started = time.perf_counter()
        compiled = self.jitted.lower(*self.args).compile(self.options)
        return compiled, time.perf_counter() - started

    def begin(self, loss: jax.Array) -> None:
        """Takes a step, and does not wait for it."""
        self.carry = self.compiled(*self.carry, self.grads, loss)

    def __call__(self, value: float) -> float:
        """Takes a step; returns the seconds that it took."""
        loss = jax.block_until_ready(jnp.float32(value))
        started = time.perf_counter()
        self.begin(loss)
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
            "fusions": text.count(" fusion("),
            "conditionals": text.count(" conditional("),
        }


class TrainingStep(Step):
    """A whole training step: forward, backward, update.

    Args:
      peer: the optimizer.
      rate: its learning rate.
      loss_fn: (params, tokens) to the mean loss.
      params: of the model; they are copied.
      tokens: the batch.
    """

    def __init__(
        self,
        peer: Peer,
        rate: float,
        loss_fn: Callable[[PyTree, jax.Array], jax.Array],
        params: PyTree,
        tokens: jax.Array,
    ) -> None:
        tx = optax.with_extra_args_support(peer.make(rate, 0))

        def step(params: PyTree, state: PyTree, tokens: Any, value: Any) -> PyTree:
            loss, grads = jax.value_and_grad(loss_fn)(params, tokens)
            updates, state = tx.update(grads, state, params, value=loss + 0.0 * value)
            return optax.apply_updates(params, updates), state

        params = jax.tree.map(jnp.copy, params)
        self.prepare(step, params, jax.jit(tx.init)(params), tokens)


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


def warm_up(steps: Sequence[Step], seconds: float) -> float:
    """Takes steps, for so long at most; returns the seconds of a round of them."""
    started, once = time.perf_counter(), 0.0
    for loss in losses(WARM_UP):
        once = sum(step(loss) for step in steps)
        if time.perf_counter() - started > seconds:
            break
    return once


def in_turn(steps: Sequence[Step], seconds: float) -> np.ndarray:
    """Returns seconds a step, shape (repeats, len(steps)).

    As many whole periods of the anchor as there is time for, one at least, or five
    steps of a slow optimizer, all after a warm-up of as long.
    """
    once = warm_up(steps, seconds)
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


def compare(base: Step, own: Step, seconds: float) -> dict[str, Any]:
    """Measures a step against the one that it is compared with."""
    before, after = base.counts(), own.counts()
    told = ("temporaries", "copies", "bytes_accessed", "fusions")
    return {
        **ratio_of(in_turn((base, own), seconds)),
        **after,
        **{f"base_{name}": before[name] for name in told},
    }


def compare_training(base: Step, own: Step, repeats: int) -> dict[str, Any]:
    """Measures a whole training step against the one that it is compared with."""
    both = (base, own)
    for step in both:
        step(0.0)
    times = [[step(0.0) for step in both] for _ in range(repeats)]
    return {
        "num_params": own.num_params,
        **ratio_of(np.asarray(times)),
        "compile_seconds": own.compile_seconds,
        "base_compile_seconds": base.compile_seconds,
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


def shares_of_bandwidth(
    row: Row, entry: dict[str, Any], num_bytes: int, bandwidth: float
) -> dict[str, float]:
    """Returns which share of the copy bandwidth a row's steps use.

    AdamW reads p, g, mu, nu and writes p, mu, nu; lalerg reads g and the anchor more.

    Args:
      row: what was measured.
      entry: what came of it.
      num_bytes: of the params.
      bandwidth: bytes a second.
    """
    shares = {"copy_bandwidth": bandwidth}
    for name, is_it, key, passes in (
        ("adamw", row.against is peers.ADAMW, "base_milliseconds", 7),
        ("lalerg", row.peer is peers.LALERG, "milliseconds", 9),
    ):
        if is_it:
            rate = passes * num_bytes / (1e-3 * entry[key])
            shares[f"share_of_bandwidth_{name}"] = rate / bandwidth
    return shares


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
    "fusions": "fusions",
    "base_fusions": "of the base  ",
}


def as_text(value: Any) -> str:
    """Returns a number or a word as a table shows it."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.2f}" if abs(value) < 100 else f"{value:.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def part_table(
    results: Store, part: str, columns: dict[str, str] = COLUMNS
) -> list[str]:
    """Returns the rows of a part, with the columns that they have."""
    entries = [run for run in results.runs.values() if run["part"] == part]
    names = [c for c in columns if any(e.get(c) is not None for e in entries)]
    rows = [[as_text(entry.get(c)) for c in names] for entry in entries]
    return table([columns[c].strip() for c in names], rows)


def part_tables(
    results: Store,
    parts: Mapping[str, Callable[..., Iterable[Job]]],
    columns: dict[str, str] = COLUMNS,
) -> list[str]:
    """Returns the tables of all parts that are known, under what they are about."""
    known = {part for part, *_ in results.runs}
    lines = []
    for name, part in parts.items():
        if name in known:
            title = (part.__doc__ or "").strip().splitlines()[0]
            lines += [f"## {title}", "", *part_table(results, name, columns)]
    return lines
