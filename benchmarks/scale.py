"""Does it hold for larger models: a decoder-only transformer on text by bytes.

    python benchmarks/scale.py                             # 1 M, minutes on 2 cores
    python benchmarks/scale.py --table                     # what docs show, 3 hours
    python benchmarks/scale.py --size 4m 12m               # hours
    python benchmarks/scale.py --optimizer lalerg --rate 1e-6 1e-2
    python benchmarks/scale.py --optimizer skipping lalerg --faults
    python benchmarks/scale.py --size long --steps 20000
    python benchmarks/scale.py --size 30m 124m --device cuda --dtype bfloat16
    python benchmarks/scale.py --quick                     # tiny, half a minute
    python benchmarks/scale.py --report-only               # tables and figure

A run reads two bytes for every parameter, or takes ``--steps``. It may be interrupted:
the next call goes on from its last checkpoint, which is written every two minutes to
the folder ``--checkpoints``. The batch of a step depends on the seed and on the number
of the step alone. What is read stands in ``texts.py``, the model in ``decoder.py``. The
held-out loss, in nats a byte, is that of fixed windows of files that are not learnt
from. What is stored of a run, and the tables, stand in ``scale_tables.py``.
"""

import json
import math
import shutil
import statistics
import time
from argparse import ArgumentParser
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import decoder
import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
import peers
import rate_free
import texts
from decoder import SIZES
from fault_zoo import FAULTS, HOOKS, NONE, Fault, Plan
from jax import lax
from peers import Peer
from scale_tables import Runs, draw, report
from store import opened, options_of, publish, rounded
from texts import Text
from train import PLAIN, stepping

import lalerg_optax as lo

PyTree = Any
PIECE = 20  # steps that are compiled as one, after which the host looks on
LOOK, LAST_LOOK = 4, 32  # batches of held-out text, on the way and in the end
SAVE_EVERY = 120.0  # seconds
BYTES_PER_PARAM = 2

# Optimizers


def matrices_of(params: PyTree) -> PyTree:
    """Returns which axes of a leaf are a matrix, where layers are scanned, for Muon."""
    return jax.tree.map(
        lambda p: optax.contrib.MuonDimensionNumbers(1, 2) if p.ndim == 3 else None,
        params,
    )


muon = partial(
    optax.contrib.muon, consistent_rms=0.2, muon_weight_dimension_numbers=matrices_of
)  # the matrices of layers, with the scale of Adam, which takes the rest


def warmed_up(peer: Peer) -> Peer:
    """Returns an optimizer with the schedule that transformers are trained with."""
    return peer._replace(schedule=peers.warmup_cosine)


OPTIMIZERS: dict[str, tuple[Peer, float]] = {  # and the rate by default, not tuned
    "adamw": (peers.WARMED_UP, 1e-3),
    "nadamw": (warmed_up(peers.NADAMW), 1e-3),
    "muon": (warmed_up(Peer("muon", peers.of(muon))), 3e-3),
    "prodigy": (rate_free.PRODIGY, 1.0),  # a schedule that begins at zero gives it NaN
    "schedule_free": (rate_free.SCHEDULE_FREE, 1e-3),
    "skipping": (warmed_up(peers.SKIPPING), 1e-3),
    "regulated": (warmed_up(peers.REGULATED), 1e-3),
    "no_search": (warmed_up(peers.NO_SEARCH), 1e-3),
    "lalerg": (peers.LALERG, 1e-6),
    "lalerg_warmed_up": (warmed_up(peers.LALERG), 1e-6),
    "lalerg_muon": (
        warmed_up(peers.LALERG._replace(make=peers.lalerg(micro=muon(1.0)))),
        1e-6,
    ),
    "lalerg_average": (
        peers.LALERG._replace(
            make=peers.lalerg(average=True),
            schedule=peers.as_it_is,
            eval_params=lo.eval_params,
        ),
        1e-6,
    ),
}

# Faults

BY_NAME = {fault.name: fault for fault in FAULTS}
TEXT_POISON = Fault("random bytes, 20 steps", "poisoned batches", {"poison": 1}, 20)
STRUCK = {  # in the course of a run with faults, by the share of it that is over
    0.2: BY_NAME["gradient nan in one entry, 1 step"],
    0.3: BY_NAME["gradient x 1e6, 3 steps"],
    0.4: BY_NAME["gradient x -100, 10 steps"],
    0.5: BY_NAME["parameter: top exponent bit flipped"],
    0.6: BY_NAME["update x -100, 3 steps"],
    0.7: TEXT_POISON,
}
PLACE = 12_345  # chooses the leaf and the entry that are hit


def plan_of(num_steps: int) -> Plan:
    """Returns what happens at every step of a run with faults."""
    plan = NONE.plan(0, num_steps)
    plan.place[:] = PLACE
    for share, fault in STRUCK.items():
        first = int(share * num_steps)
        for name, value in fault.what.items():
            getattr(plan, name)[first : first + fault.length] = value
    return plan


# A run


class Run(NamedTuple):
    """A run of training; it takes a multiple of ``PIECE`` steps.

    Attributes:
      size: name of the size.
      optimizer: name of the optimizer.
      rate: learning rate that it is given.
      seed: of params and batches.
      num_steps: after which the schedule ends.
      dtype: of the matrix products.
      has_faults: whether it is struck by the faults of `STRUCK`.
    """

    size: str
    optimizer: str
    rate: float
    seed: int
    num_steps: int
    dtype: str = "float32"
    has_faults: bool = False


class Seen(NamedTuple):
    """What is told after a piece of a run.

    Attributes:
      step: steps taken.
      train: mean loss of the piece.
      held_out: loss of a few held-out batches.
      seconds: that the piece took.
      macro_rate: of an optimizer that has one, else 1.
    """

    step: int
    train: float
    held_out: float
    seconds: float
    macro_rate: float = 1.0


def whole_pieces(num_steps: float) -> int:
    """Returns at least so many steps, in pieces."""
    return PIECE * max(1, -int(-num_steps // PIECE))


def num_params_of(name: str) -> int:
    """Returns the number of parameters of a size."""
    init = partial(decoder.init, size=SIZES[name])
    leaves = jax.tree.leaves(jax.eval_shape(init, jax.random.key(0)))
    return sum(math.prod(leaf.shape) for leaf in leaves)


def steps_of(name: str) -> int:
    """Returns the steps in which two bytes are read for every parameter."""
    num_bytes = SIZES[name].batch * SIZES[name].length
    return whole_pieces(BYTES_PER_PARAM * num_params_of(name) / num_bytes)


def windows(text: jax.Array, starts: jax.Array, length: int) -> jax.Array:
    """Returns windows of text, one byte longer than what is read of them."""
    rows = starts[:, None] + jnp.arange(length + 1)[None]
    return text[rows].astype(jnp.int32)


def beginning(run: Run) -> tuple[PyTree, PyTree, PyTree]:
    """Returns params, nothing else, and the state of the optimizer."""
    peer, _ = OPTIMIZERS[run.optimizer]
    params = decoder.init(jax.random.key(run.seed), SIZES[run.size])
    return params, (), peer.at(run.rate, run.num_steps).init(params)


def piece_of(run: Run) -> Any:
    """Returns the jitted (carry, first step, text) to (carry, loss) of a piece."""
    size, (peer, _) = SIZES[run.size], OPTIMIZERS[run.optimizer]
    key = jax.random.key(run.seed + 1)
    hooks = (HOOKS if run.has_faults else PLAIN)._replace(apply=peer.apply)
    plan = plan_of(run.num_steps) if run.has_faults else None

    def piece(carry: PyTree, first: jax.Array, text: jax.Array) -> PyTree:
        def gradient(params: PyTree, rest: PyTree, i: jax.Array, now: Any) -> PyTree:
            most = len(text) - size.length - 1
            draw = jax.random.fold_in(key, i)
            starts = jax.random.randint(draw, (size.batch,), 0, most)
            tokens = windows(text, starts, size.length)
            if now is not None:
                noise = jax.random.randint(draw, tokens.shape, 0, decoder.NUM_TOKENS)
                tokens = jnp.where(now.poison > 0, noise, tokens)
            loss, grads = jax.value_and_grad(decoder.loss_of)(
                params, tokens, size, run.dtype
            )
            return (loss, rest), grads

        step = stepping(peer.at(run.rate, run.num_steps), gradient, hooks)
        steps = first + jnp.arange(PIECE)
        now = jax.tree.map(lambda a: jnp.asarray(a)[steps], plan)
        carry, losses = lax.scan(step, carry, (steps, now))
        return carry, losses.mean()

    return jax.jit(piece, donate_argnums=0)


def look_of(run: Run) -> Callable[..., jax.Array]:
    """Returns (carry, held-out text, number of batches) to the loss."""
    size, (peer, _) = SIZES[run.size], OPTIMIZERS[run.optimizer]

    def look(carry: PyTree, text: jax.Array, num: int) -> jax.Array:
        params, _, state = carry
        params = peer.eval_params(state, params)
        most = len(text) - size.length - 1
        starts = jnp.linspace(0, most, num * size.batch).astype(jnp.int32)
        losses = lax.map(
            lambda starts: decoder.loss_of(
                params, windows(text, starts, size.length), size, run.dtype
            ),
            starts.reshape(num, size.batch),
        )
        return losses.mean()

    return jax.jit(look, static_argnums=2)


class Saver:
    """The checkpoint of a run, in a folder of its own.

    What the host knows stands in ``progress.json``, which is written after the arrays
    and names their folder: a checkpoint is there as a whole, or it is not.
    """

    def __init__(self, folder: Path, every: float = SAVE_EVERY) -> None:
        self.folder, self.every = folder.resolve(), every
        self.progress = self.folder / "progress.json"
        self.saved = time.monotonic()

    def load(self, run: Run, digest: str, carry: PyTree) -> tuple[PyTree, list[Seen]]:
        """Returns the carry of a run and what was seen, as far as it has come."""
        if not self.progress.exists():
            return carry, []
        stored = json.loads(self.progress.read_text())
        if stored["run"] != list(run) or stored["digest"] != digest:
            return carry, []
        seen = [Seen(*entry) for entry in stored["seen"]]
        with ocp.StandardCheckpointer() as checkpointer:
            return checkpointer.restore(self.folder / stored["arrays"], carry), seen

    def is_due(self) -> bool:
        """Returns whether it is time to save."""
        return time.monotonic() - self.saved >= self.every

    def save(self, run: Run, digest: str, carry: PyTree, seen: list[Seen]) -> None:
        """Writes a checkpoint, and removes those before it."""
        arrays = f"step_{seen[-1].step}"
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(self.folder / arrays, carry, force=True)
            checkpointer.wait_until_finished()
        told = {"run": run, "digest": digest, "arrays": arrays, "seen": seen}
        part = self.progress.with_suffix(".part")
        part.write_text(json.dumps(told))
        part.replace(self.progress)
        for other in self.folder.glob("step_*"):
            if other.name != arrays:
                shutil.rmtree(other)
        self.saved = time.monotonic()

    def remove(self) -> None:
        """Removes everything: the run has ended."""
        shutil.rmtree(self.folder, ignore_errors=True)


def metrics_of(run: Run, carry: PyTree) -> dict[str, Any]:
    """Returns the metrics of an optimizer of this library; of others none."""
    return lo.metrics(carry[2]) if OPTIMIZERS[run.optimizer][0].is_own else {}


def tell(run: Run, now: Seen) -> None:
    """Prints how far a run has come."""
    left = now.seconds / PIECE * (run.num_steps - now.step) / 60
    print(
        f"{run.size} {run.optimizer} at {run.rate:g}: step {now.step:,} of "
        f"{run.num_steps:,}, loss {now.train:.3f}, held out {now.held_out:.3f}, "
        f"{left:.1f} minutes left",
        flush=True,
    )


def train_run(
    run: Run,
    text: Text,
    is_over: Callable[[], bool] = lambda: False,
    saver: Saver | None = None,
    told: Callable[[Run, Seen], None] = tell,
) -> dict[str, Any]:
    """Trains, and returns what a store keeps of it.

    Args:
      run: what is trained, and how.
      text: what is read.
      is_over: asked after each piece; a run that ends early is ``stopped``.
      saver: of its checkpoints, if any.
      told: hears of each piece.
    """
    size = SIZES[run.size]
    learnt, held_out = (jnp.asarray(part) for part in (text.train, text.held_out))
    carry, seen = jax.jit(beginning, static_argnums=0)(run), list[Seen]()
    num_params = optax.tree.size(carry[0])
    if saver is not None:
        carry, seen = saver.load(run, text.digest, carry)
    piece = piece_of(run).lower(carry, jnp.int32(0), learnt).compile()
    look = look_of(run)
    first = seen[-1].step if seen else 0
    for start in range(first, run.num_steps, PIECE):
        started = time.perf_counter()
        carry, loss = piece(carry, jnp.int32(start), learnt)
        loss = float(jax.block_until_ready(loss))
        seconds = time.perf_counter() - started
        held = float(look(carry, held_out, LOOK))
        macro_rate = float(metrics_of(run, carry).get("macro_rate", 1.0))
        seen.append(Seen(start + PIECE, loss, held, round(seconds, 4), macro_rate))
        told(run, seen[-1])
        is_stopped = is_over() and seen[-1].step < run.num_steps
        if saver is not None and (is_stopped or saver.is_due()):
            saver.save(run, text.digest, carry, seen)
        if is_stopped:
            break
    pace = statistics.median(now.seconds for now in seen)
    counts, metrics = (
        ("num_skipped", "num_bounded", "num_reverts"),
        metrics_of(run, carry),
    )
    steps = seen[-1].step
    return {
        "num_params": num_params,
        "steps": steps,
        "stopped": steps < run.num_steps,
        "bytes_read": steps * size.batch * size.length,
        "train_loss": rounded(seen[-1].train),
        "held_out_loss": rounded(float(look(carry, held_out, LAST_LOOK))),
        "bytes_per_second": round(PIECE * size.batch * size.length / pace),
        "step_milliseconds": rounded(1e3 * pace / PIECE),
        **{name: int(metrics[name]) for name in counts if name in metrics},
        "seen": [
            [now.step, *map(rounded, (now.train, now.held_out, now.macro_rate))]
            for now in seen
        ],
    }


# What is run


class Sweep(NamedTuple):
    """Runs of an optimizer: all rates with all seeds."""

    size: str
    optimizer: str
    rates: tuple[float, ...]
    num_seeds: int = 1
    num_steps: int = 0  # two bytes a parameter
    has_faults: bool = False


small = partial(Sweep, "tiny", num_seeds=3, num_steps=2000)
TABLE = (  # what the tables of the documentation hold
    small("adamw", (1e-3, 3e-3, 1e-2, 3e-2)),
    small("no_search", (3e-3, 1e-2)),
    small("regulated", (3e-3, 3e-2)),
    small("lalerg", (1e-6, 1.0)),
    small("lalerg_warmed_up", (1e-6, 1.0)),
    small("muon", (3e-3, 1e-2)),
    small("lalerg_muon", (1e-6,)),
    small("lalerg_average", (1e-6,)),
    small("lalerg", (1e-6,), has_faults=True),
    small("no_search", (3e-3,), has_faults=True),
    small("regulated", (3e-3,), has_faults=True),
    small("skipping", (3e-3,), has_faults=True),
    Sweep("250k", "adamw", (1e-3, 3e-3)),
    Sweep("1m", "adamw", (1e-3, 3e-3, 1e-2)),
    Sweep("1m", "no_search", (3e-3,), has_faults=True),
    *(
        Sweep(size, name, rates)
        for size in ("250k", "1m")
        for name, rates in {
            "no_search": (3e-3,),
            "lalerg": (1e-6,),
            "lalerg_warmed_up": (1e-6,),
        }.items()
    ),
)


def runs_of(options: Any) -> list[Run]:
    """Returns what is to be run."""
    sweeps = [
        Sweep(
            size,
            name,
            tuple(options.rate or [OPTIMIZERS[name][1]]),
            num_steps=2 * PIECE if options.quick else options.steps,
            has_faults=options.faults,
        )
        for size in (["tiny"] if options.quick else options.size)
        for name in options.optimizer
    ]
    return [
        Run(
            sweep.size,
            sweep.optimizer,
            rate,
            seed,
            whole_pieces(sweep.num_steps or steps_of(sweep.size)),
            options.dtype,
            sweep.has_faults,
        )
        for sweep in (TABLE if options.table else sweeps)
        for rate in sweep.rates
        for seed in (range(sweep.num_seeds) if options.table else options.seed)
    ]


def run_all(results: Runs, options: Any) -> None:
    """Trains and stores what is not stored yet."""
    text = texts.text_of(options.text)
    folder = options.checkpoints or results.path.with_suffix("")
    for run in runs_of(options):
        key = (*run[:4], run.has_faults, run.num_steps)
        cells = {"dtype": run.dtype, "digest": text.digest}
        saver = Saver(folder / "-".join(map(str, key)))
        measured = partial(train_run, run, text, saver=saver)
        results.measure(key, cells, measured, options.force)
        saver.remove()


def with_runs(parser: ArgumentParser) -> None:
    """Adds the options of a run."""
    sizes, names = list(SIZES), list(OPTIMIZERS)
    parser.add_argument("--size", nargs="+", choices=sizes, default=["1m"])
    parser.add_argument(
        "--optimizer", nargs="+", choices=names, default=["adamw", "lalerg"]
    )
    parser.add_argument("--rate", nargs="+", type=float, help="of its own by default")
    parser.add_argument("--seed", nargs="+", type=int, default=[0])
    parser.add_argument(
        "--steps", type=int, default=0, help="by default two bytes a parameter"
    )
    parser.add_argument("--table", action="store_true", help="all that docs show")
    parser.add_argument("--faults", action="store_true", help="strike runs with faults")
    parser.add_argument("--text", choices=texts.SOURCES, default="stdlib")
    parser.add_argument("--dtype", default="float32", help="of the matrix products")
    parser.add_argument("--checkpoints", type=Path, help="a folder, beside the results")


def main() -> None:
    """Trains, stores, and writes the table."""
    options = options_of(__doc__, (), more=with_runs)
    results = opened(Runs, "scale", options)
    if not options.report_only:
        run_all(results, options)
    publish(results, report(results), draw)


if __name__ == "__main__":
    main()
