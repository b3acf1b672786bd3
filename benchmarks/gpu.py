"""What protection costs on a GPU, and whether a large model trains: within minutes.

    python benchmarks/gpu.py                        # 7 minutes on one GPU
    python benchmarks/gpu.py --seconds 300          # fewer
    python benchmarks/gpu.py --only steps runs      # some of it
    python benchmarks/gpu.py --quick --device cpu   # does it run? no figures
    python benchmarks/gpu.py --report-only          # the tables

Parts stand in the order of their importance, and results are written after each row. No
row begins that would probably end after ``--seconds``; whatever still runs a minute
later is ended with exit code 3. Either way a further call goes on where this one ended,
on a card of the same kind. A row that fails is stored with its error, and is measured
again; then the exit code is 1, as it is where there is no GPU.

Steps alternate as in ``cost.py``; the questions that only a GPU has (does the host wait
for the one conditional of a step?) stand in ``traces.py``. Three forms of ``lalerg``
answer it: as it is; with the conditional as a select, so that there is no predicate to
wait for, though both branches run at every step; and without XLA's command buffers,
in which a conditional is decided by the device. Rates of the runs are not tuned.
"""

import os
import sys
import threading
import time
from argparse import ArgumentParser
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import decoder
import jax
import peers
import scale
import scale_tables
import texts
from peers import Peer
from store import opened, options_of, publish
from timing import (
    CLIPPED,
    COLUMNS,
    NO_SEARCH,
    PERIOD,
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
from traces import compare_waits

GRACE = 60.0  # seconds after the limit, for a row that takes longer than it should
NUM_PARAMS = 32 * 1968**2  # 124 M
RUNS = (("30m", "adamw", 1e-3), ("124m", "adamw", 6e-4))  # each with lalerg beside it
TINY = (("tiny", "adamw", 1e-3),)
START = 1e-6  # where lalerg begins
FEWEST_STEPS = 200  # for which a run is begun

SELECT = peers.LALERG._replace(name="lalerg, as a select")
UNBUFFERED = peers.LALERG._replace(name="lalerg, no command buffers")
FORMS: dict[str, dict[str, Any]] = {
    SELECT.name: {"is_select": True},
    UNBUFFERED.name: {"options": {"xla_gpu_enable_command_buffer": ""}},
}
ROWS = (
    Row(peers.LALERG_CLIPPED, CLIPPED, 1.1),
    Row(peers.LALERG),
    Row(peers.REGULATED),
    Row(NO_SEARCH),
    Row(peers.LALERG, peers.FINITE),
    Row(SELECT),
    Row(CLIPPED),
    Row(peers.FINITE),
    Row(peers.TIMED[0]),
)
TRAINING_ROWS = (
    Row(peers.LALERG, limit=1.01),
    Row(peers.LALERG_CLIPPED, CLIPPED, 1.01),
)
WAITING_ROWS = (
    Row(peers.LALERG),
    Row(SELECT),
    Row(UNBUFFERED),
    Row(peers.LALERG_CLIPPED, CLIPPED),
    Row(NO_SEARCH),
    Row(peers.FINITE),
)
HALF_ROWS = ROWS[:5]


class Clock:
    """How much time is left, and how long a row of each part has taken at most."""

    def __init__(self, seconds: float) -> None:
        self.end, self.longest = time.monotonic() + seconds, dict[str, float]()

    def left(self) -> float:
        """Returns seconds; below zero after the end."""
        return self.end - time.monotonic()

    def allows(self, part: str) -> bool:
        """Returns whether a row of a part probably ends in time."""
        other = max(self.longest.values(), default=0.0)
        return self.left() > self.longest.get(part, other)

    def took(self, part: str, seconds: float) -> None:
        """Remembers how long a row took."""
        self.longest[part] = max(self.longest.get(part, 0.0), seconds)


class Bench:
    """What the parts share: sizes, the clock, and steps that are compiled already."""

    def __init__(self, results: Timings, clock: Clock, quick: bool) -> None:
        self.results, self.clock, self.quick = results, clock, quick
        self.num_params, self.num_leaves = (2**12, 2) if quick else (NUM_PARAMS, 32)
        self.size = "tiny" if quick else "124m"
        self.dtype = "float32" if quick else "bfloat16"  # of matrix products
        self.seconds = 0.1 if quick else 4.0  # for a row, after it is compiled
        self.made: dict[tuple[str, str], Step] = {}

    def step(self, peer: Peer, dtype: str) -> Step:
        """Returns the optimizer step of params of a type."""
        if any(kind != dtype for kind, _ in self.made):
            self.made.clear()  # the memory of those of another type
        key = dtype, peer.name
        if key not in self.made:
            params = make_params(self.num_params, self.num_leaves, dtype)
            self.made[key] = Step(peer, params, **FORMS.get(peer.name, {}))
        return self.made[key]

    def training_step(self, peer: Peer, rate: float) -> Step:
        """Returns the whole training step of the transformer."""
        size = decoder.SIZES[self.size]
        shape = (size.batch, size.length + 1)
        tokens = jax.random.randint(jax.random.key(1), shape, 0, decoder.NUM_TOKENS)
        params = decoder.init(jax.random.key(0), size)
        loss_fn = partial(decoder.loss_of, size=size, dtype=self.dtype)
        return TrainingStep(peer, rate, loss_fn, params, tokens)

    def words(self, dtype: str) -> str:
        """Returns what the params of a step are."""
        return f"{self.num_params} parameters, {dtype}"

    def step_seconds(self, size: str) -> float:
        """Returns about how long a training step of a size takes."""
        key = ("training", peers.LALERG.name, peers.ADAMW.name, self.size)
        known = self.results.runs.get(key, {}).get("milliseconds")
        if known is None:
            run = scale.Run(size, "adamw", START, 0, 2 * scale.PIECE, self.dtype)
            entry = scale.train_run(run, texts.text_of())
            return 1e-3 * float(entry["step_milliseconds"])
        num_bytes = {name: s.batch * s.length for name, s in decoder.SIZES.items()}
        share = scale.num_params_of(size) / scale.num_params_of(self.size)
        share *= num_bytes[size] / num_bytes[self.size]
        # small products are less efficient
        return 1e-3 * float(known) * min(1.0, 1.5 * share)

    def num_steps(self, size: str, share: float) -> int:
        """Returns for how many steps a share of the time is enough, for two runs.

        If one of the two is stored, the other takes as many.
        """
        if self.quick:
            return scale.PIECE
        for run in self.results.runs.values():
            if (run["part"], run["size"]) == ("runs", size) and "num_steps" in run:
                return int(run["num_steps"])
        seconds_a_step = self.step_seconds(size)
        compiling = self.clock.longest.get("training", 60.0) / 2.0
        seconds = share * self.clock.left() / 2.0 - compiling
        return int(0.8 * seconds / seconds_a_step) // scale.PIECE * scale.PIECE


# What is measured


def step_of(bench: Bench, row: Row, dtype: str) -> dict[str, Any]:
    """Measures an optimizer step, and which share of the copy bandwidth is used."""
    base, own = bench.step(row.against, dtype), bench.step(row.peer, dtype)
    entry = compare(base, own, bench.seconds)
    if dtype == "float32":  # moments of bfloat16 params need not be of their type
        bandwidth = copy_bandwidth(bench.num_params)
        entry |= shares_of_bandwidth(row, entry, 4 * bench.num_params, bandwidth)
    return entry


def steps(bench: Bench) -> Iterator[Job]:
    """The optimizer step alone, float32 parameters in 32 matrices."""
    for row in ROWS:
        cells = {"num_params": bench.num_params, "limit": row.limit}
        measured = partial(step_of, bench, row, "float32")
        yield Job(row, bench.words("float32"), cells, measured)


def training_of(bench: Bench, row: Row) -> dict[str, Any]:
    """Measures a whole training step, and for what it waits."""
    base = bench.training_step(row.against, 1e-4)
    own = bench.training_step(row.peer, RATE)
    # first, for it warms up: early in a run the anchor moves more often
    waits = compare_waits(base, own, 2.0 * bench.seconds, PERIOD)
    entry = compare_training(base, own, 2 if bench.quick else 40)
    timed = {f"queued_{n}": waits.pop(n) for n in ("ratio", "mean_ratio")}
    return waits | entry | timed


def training(bench: Bench) -> Iterator[Job]:
    """The whole training step of a transformer."""
    for row in TRAINING_ROWS[: 1 if bench.quick else None]:
        cells = {"limit": row.limit}
        yield Job(row, bench.size, cells, partial(training_of, bench, row))


def waits(bench: Bench) -> Iterator[Job]:
    """Whether the host waits for the optimizer step alone: queues of 16 steps."""
    for row in WAITING_ROWS:

        def measured(row: Row = row) -> dict[str, Any]:
            both = bench.step(row.against, "float32"), bench.step(row.peer, "float32")
            return compare_waits(*both, bench.seconds)

        cells = {"num_params": bench.num_params}
        yield Job(row, bench.words("float32"), cells, measured)


def half(bench: Bench) -> Iterator[Job]:
    """The optimizer step alone, bfloat16 parameters in 32 matrices."""
    for row in HALF_ROWS:
        cells = {"num_params": bench.num_params, "limit": row.limit}
        measured = partial(step_of, bench, row, "bfloat16")
        yield Job(row, bench.words("bfloat16"), cells, measured)


class NoTimeError(Exception):
    """There is not enough time left for a row to be worth it."""


def run_of(bench: Bench, run: scale.Run, share: float) -> dict[str, Any]:
    """Trains for as many steps as there is time for."""
    bench.made.clear()
    num_steps = bench.num_steps(run.size, share)
    if num_steps < FEWEST_STEPS and not bench.quick:
        raise NoTimeError
    entry = scale.train_run(
        run._replace(num_steps=num_steps),
        texts.text_of("stdlib" if bench.quick else "installed"),
        is_over=lambda: bench.clock.left() < 15.0,  # the last look is compiled
    )
    return entry | {"num_steps": num_steps}


def runs(bench: Bench) -> Iterator[Job]:
    """Training a transformer, for as many steps as there is time for."""
    chosen = TINY if bench.quick else RUNS
    for i, (size, name, rate) in enumerate(chosen):
        share = 0.4 if i + 1 < len(chosen) else 0.95
        for optimizer, at in ((name, rate), ("lalerg", START)):
            run = scale.Run(size, optimizer, at, 0, 0, bench.dtype)
            row = Row(scale.OPTIMIZERS[optimizer][0]._replace(name=optimizer))
            row = row._replace(against=row.peer)
            cells = {"rate": at, "seed": run.seed, "dtype": bench.dtype}
            yield Job(row, size, cells, partial(run_of, bench, run, share))


PARTS: dict[str, Callable[..., Iterator[Job]]] = {
    part.__name__: part for part in (steps, training, waits, half, runs)
}


def guarded(job: Job) -> dict[str, Any]:
    """Measures a row; what goes wrong with it is told, and the rest goes on."""
    try:
        return job.measured()
    except NoTimeError:
        raise
    except Exception as error:  # out of memory, an option that is not known, ...
        message = f"{type(error).__name__}: {error}"[:300]
        print(message, file=sys.stderr, flush=True)
        return {"error": message}


def measure_all(bench: Bench, only: list[str], force: bool) -> str:
    """Measures and stores what is not stored yet; returns how it ended."""
    results, clock = bench.results, bench.clock
    device = jax.devices()[0].device_kind
    for part in only:
        for job in PARTS[part](bench):
            if not clock.allows(part):
                return f"stopped by the time limit in {part}"
            key = (part, job.row.peer.name, job.row.against.name, job.size)
            print(f"{max(0.0, clock.left()):.0f} s left: {', '.join(key)}", flush=True)
            cells = {"device": device, "error": None} | job.cells
            before = time.monotonic()
            try:
                results.measure(key, cells, partial(guarded, job), force)
            except NoTimeError:
                return f"no time for {part}"
            clock.took(part, time.monotonic() - before)
            results.path.with_suffix(".md").write_text(report(results) + "\n")
    return "complete"


# Tables

WAITS = {
    "enqueued": "enqueued, share",
    "base_enqueued": "of the base",
    "host_copies": "copies to the host",
    "base_host_copies": "of the base ",
    "host_waits": "waits",
    "base_host_waits": "of the base  ",
    "more_waits": "more of both",
    "idle": "idle, share",
    "base_idle": "of the base   ",
    "kernels": "kernels",
    "base_kernels": "of the base    ",
    "queued_ratio": "time ratio, queued",
    "error": "error",
}


def report(results: Timings) -> str:
    """Returns everything as Markdown."""
    parts = {name: part for name, part in PARTS.items() if part is not runs}
    lines = [
        "# On a GPU",
        "",
        f"{results.made()} Ratios are medians of steps taken in turn. Bytes and "
        "temporaries (bytes), state (entries) and fusions come from XLA, the first "
        "three per parameter. Copies to the host, waits of the host and kernels are "
        "counts of a step, from a profile.",
        "",
        *part_tables(results, parts, COLUMNS | WAITS),
    ]
    trained = [run for run in results.runs.values() if run["part"] == "runs"]
    if trained:
        lines += [f"## {runs.__doc__}", "", *scale_tables.runs_table(trained)]
    return "\n".join(lines)


def end() -> None:
    """Ends the process: results are stored after each row."""
    print("Ended: a row took much longer than those before.", flush=True)
    os._exit(3)


def with_seconds(parser: ArgumentParser) -> None:
    """Adds an option."""
    parser.add_argument("--seconds", type=float, default=420.0, help="time limit")


def main() -> None:
    """Measures, stores, and writes the tables."""
    options = options_of(__doc__, tuple(PARTS), more=with_seconds, device="cuda")
    if options.report_only:
        jax.config.update("jax_platforms", "cpu")
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # it asserts that there is one
        found = f"JAX finds no device {options.device!r}" + f" ({error})" * bool(
            str(error)
        )
        sys.exit(
            f"There is no GPU, and nothing was measured: {found}. To see whether all "
            "of it runs on a CPU: python benchmarks/gpu.py --quick --device cpu"
        )
    if options.quick:  # what takes time is to compile
        jax.config.update("jax_disable_most_optimizations", True)
    results = opened(Timings, "gpu", options, device="cuda")
    if not options.report_only:
        watchdog = threading.Timer(max(0.0, options.seconds) + GRACE, end)
        watchdog.daemon = True
        watchdog.start()
        bench = Bench(results, Clock(options.seconds), options.quick)
        results.notes["ended"] = measure_all(bench, options.only, options.force)
        results.save()
        print(f"{results.notes['ended']}\n")
        watchdog.cancel()
    publish(results, report(results))
    sys.exit(any(run.get("error") for run in results.runs.values()))


if __name__ == "__main__":
    main()
