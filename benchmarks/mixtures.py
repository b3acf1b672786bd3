"""Nothing is censored: is rare data learnt, or taken for harm?

A guard that takes a *hard* batch for a *harmful* update silently keeps a model from
learning what is rare. Here every optimizer trains on honest streams of data as people
have them: batches of a rare kind, blocks, a kind that comes up in mid-run, two levels
of loss, class imbalance, buckets of length, two tasks on one trunk, classes that are
added, inputs that change, rewards that are sparse. Nothing is wrong with any of them.

A run *passes* when its final loss on the rare part of the training data is at most 1.10
times that of bare AdamW plus 0.05, and no kind of batch was rejected more than five
times. In continual learning the mean loss of the whole run takes its place, at most
1.05 times AdamW's. AdamW's is the mean of its seeds or, because they differ where data
are rare, the worst of them: both are told. What a failure looks like is shown by
"adamw, blind", which drops every batch that has something rare in it.

    python benchmarks/mixtures.py --out benchmarks/results/mixtures   # half an hour
    python benchmarks/mixtures.py --quick                             # about a minute
    python benchmarks/mixtures.py --tasks CHOOSE --only lalerg adamw  # some of it
    python benchmarks/mixtures.py --report-only                       # the tables

Constants of the library may be chosen on the streams of ``CHOOSE``, the others are
there to report; both words name their streams for ``--tasks``. Every optimizer has the
rate of AdamW's that is best for the stream, of seven half decades, by the mean of the
losses on all parts of the data (in continual learning, by the loss of the run). What is
stored is not run again, so that a run may be stopped and goes on later; ``--force``
runs it anew.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from mixtures_tables import OPTIMIZERS, TUNING, Runs, report
from peers import ADAMW, Peer, linear
from rich.progress import Progress
from store import opened, options_of, publish, rounded
from streams import CHOOSE, FAMILIES, REPORT, STREAMS, Family, Problem, Stream, When
from train import Hooks, Taken, is_zero, train

import lalerg_optax as lo

PyTree = Any

RATES = tuple(float(f"{10 ** (k / 2):.5g}") for k in range(-8, -1))
NUM_SEEDS = 3
QUICK_STREAMS = ("rare_20", "scales")
QUICK_OPTIMIZERS = ("adamw", "error_regulate(adamw)")
QUICK_STEPS = 300


class Prepared(NamedTuple):
    """What is the same for every optimizer.

    Attributes:
      problem: the problem.
      params: those at the start, [seed].
      indices: of all batches, [stream, seed, step, example].
      kinds: of all batches, [stream, seed, step].
    """

    problem: Problem
    params: PyTree
    indices: jax.Array
    kinds: jax.Array


def prepare(
    family: Family, whens: Iterable[When], num_seeds: int, num_steps: int
) -> Prepared:
    """Draws start and batches of all runs of a family."""
    problem = family.make()
    keys = jax.vmap(jax.random.key)(jnp.arange(num_seeds))
    params = jax.jit(jax.vmap(problem.init))(keys)

    @jax.jit
    def plan(when: When, key: jax.Array) -> PyTree:
        steps = jnp.arange(num_steps)
        return jax.vmap(problem.draw, (0, None, None))(steps, key, when)

    numbers = When(*map(jnp.asarray, zip(*whens, strict=True)))
    indices, kinds = jax.vmap(jax.vmap(plan, (None, 0)), (0, None))(numbers, keys)
    return Prepared(problem, params, indices, kinds)


def verdict_of(peer: Peer, taken: Taken) -> jax.Array:
    """Returns what became of a step, int8."""
    if peer.is_own:
        verdict = lo.metrics(taken.state)["verdict"]
    else:  # of a gradient that is not zero AdamW always makes an update
        is_skipped = is_zero(taken.updates) & ~is_zero(taken.grads)
        verdict = jnp.where(is_skipped, lo.Verdict.SKIP, lo.Verdict.ACCEPT)
    return verdict.astype(jnp.int8)


def run(
    problem: Problem,
    peer: Peer,
    is_decayed: bool,
    rate: jax.Array,
    params: PyTree,
    indices: jax.Array,
    kinds: jax.Array,
) -> dict[str, jax.Array]:
    """One run; a pure function of the last four."""
    num_steps = len(kinds)
    schedule = linear(rate, num_steps) if is_decayed else rate

    def gradient(params: PyTree, rest: PyTree, i: jax.Array, now: PyTree) -> PyTree:
        del i
        batch = tuple(a[now[0]] for a in problem.data)
        loss, grads = jax.value_and_grad(problem.loss)(params, batch)
        return (loss, rest), grads

    hooks = Hooks(
        more=lambda now: {"is_rare": now[1] == problem.num_kinds - 1},
        apply=peer.apply,
        keep=lambda taken: (taken.loss, verdict_of(peer, taken)),
    )
    tx, plan = peer.make(schedule, num_steps), (indices, kinds)
    end = train(tx, gradient, (params, None), num_steps, plan, hooks)
    losses, verdicts = end.kept
    is_skipped, is_reverted = (
        verdicts == verdict for verdict in (lo.Verdict.SKIP, lo.Verdict.REVERT)
    )
    is_rejected = is_skipped | is_reverted
    told = {
        "num_accepted": (~is_rejected).sum(),
        "num_skipped": is_skipped.sum(),
        "num_revert_steps": is_reverted.sum(),
    }
    if peer.is_own:
        report = lo.metrics(end.state)
        told = {name: report[name] for name in told}
    common_loss, rare_loss = problem.final(end.params)
    return {
        "rare_loss": rare_loss,
        "common_loss": common_loss,
        "mean_loss": losses.mean(),
        **told,
        "steps": by_kind(jnp.ones_like(is_rejected), kinds, problem.num_kinds),
        "rejected": by_kind(is_rejected, kinds, problem.num_kinds),
        "bound": by_kind(verdicts == lo.Verdict.BOUND, kinds, problem.num_kinds),
    }


def by_kind(flags: jax.Array, kinds: jax.Array, num_kinds: int) -> jax.Array:
    """Returns how many steps of each kind have a flag."""
    return (flags[:, None] & (kinds[:, None] == jnp.arange(num_kinds))).sum(axis=0)


def measure(
    prepared: Prepared, peer: Peer, family: Family, rates: list[float]
) -> list[dict[str, Any]]:
    """Runs all streams of a family and all seeds, each stream at its rate."""
    problem, params, indices, kinds = prepared
    started = time.perf_counter()
    one = partial(run, problem, peer, family.is_decayed)
    cells = jax.jit(jax.vmap(jax.vmap(one, (None, 0, 0, 0)), (0, None, 0, 0)))
    out = cells(jnp.asarray(rates, jnp.float32), params, indices, kinds)
    out = jax.tree.map(np.asarray, out)
    seconds = round((time.perf_counter() - started) / len(rates), 1)
    return [
        {"seconds": seconds} | {name: rounded(x[i]) for name, x in out.items()}
        for i in range(len(rates))
    ]


def tune(prepared: Prepared, family: Family, rates: list[float]) -> list[Any]:
    """Runs AdamW at all rates; returns what it is judged by, [rate, seed] a stream."""
    problem, params, indices, kinds = prepared
    started = time.perf_counter()

    def one(rate: jax.Array, *given: PyTree) -> jax.Array:
        end = run(problem, ADAMW, family.is_decayed, rate, *given)
        if family.is_continual:
            return end["mean_loss"]
        return (end["common_loss"] + end["rare_loss"]) / 2.0

    seeds = jax.vmap(one, (None, 0, 0, 0))
    every = jax.vmap(jax.vmap(seeds, (0, None, None, None)), (None, None, 0, 0))
    out = jax.jit(every)(jnp.asarray(rates, jnp.float32), params, indices, kinds)
    losses = np.asarray(out)
    seconds = round((time.perf_counter() - started) / len(losses), 1)
    return [{"seconds": seconds, "losses": rounded(x)} for x in losses]


def jobs_of(
    results: Runs,
    family: Family,
    group: list[Stream],
    peers: list[Peer],
    quick: bool,
) -> Iterator[tuple[str, list[dict[str, Any]], Callable[[], list[Any]]]]:
    """Yields what is run of some streams of a family: tuning first, as all need a rate.

    Each is a name, what tells its runs from others, by stream, and a function that runs
    all streams when it is first called.
    """
    size = {
        "num_seeds": NUM_SEEDS,
        "num_steps": QUICK_STEPS if quick else family.num_steps,
    }
    prepared = cache(partial(prepare, family, [s.when for s in group], **size))
    same = [
        size | {"when": list(s.when), "is_decayed": family.is_decayed} for s in group
    ]
    tried = list(RATES[::3] if quick else RATES)
    cells = [c | {"rates": tried} for c in same]
    yield TUNING, cells, cache(lambda: tune(prepared(), family, tried))
    rates = [results.rate(stream.name) for stream in group]
    cells = [c | {"rate": rate} for c, rate in zip(same, rates, strict=True)]
    for p in peers:
        yield p.name, cells, cache(lambda p=p: measure(prepared(), p, family, rates))


def measure_all(
    results: Runs,
    streams: list[Stream],
    peers: list[Peer],
    quick: bool,
    forced: tuple[str, ...],
) -> None:
    """Runs every family and optimizer that is not stored yet; stores it by stream."""
    families = list(dict.fromkeys(stream.family for stream in streams))
    with Progress() as progress:
        bar = progress.add_task("", total=len(families) * (1 + len(peers)))
        for family in families:
            group = [stream for stream in streams if stream.family == family]
            jobs = jobs_of(results, FAMILIES[family], group, peers, quick)
            for name, cells, measured in jobs:
                label = f"{family}: {name}"
                progress.update(bar, description=label[:40].ljust(40))
                for i, stream in enumerate(group):
                    results.measure(
                        (stream.name, name),
                        cells[i],
                        lambda i=i, s=stream, m=measured: {"half": s.half} | m()[i],
                        name in forced,
                    )
                progress.advance(bar)


def main() -> None:
    """Measures, stores, and writes the tables."""
    names = [peer.name for peer in OPTIMIZERS]
    options = options_of(__doc__, names, tuple(STREAMS), (CHOOSE, REPORT, *STREAMS))
    results = opened(Runs, "mixtures", options)
    if not options.report_only:
        streams = [s for s in STREAMS.values() if {s.name, s.half} & set(options.tasks)]
        # the others are compared with it
        peers = [p for p in OPTIMIZERS if p.name in (ADAMW.name, *options.only)]
        if options.quick:
            streams = [s for s in streams if s.name in QUICK_STREAMS]
            peers = [p for p in peers if p.name in QUICK_OPTIMIZERS]
        forced = tuple(options.only) if options.force else ()
        forced += (TUNING,) * (ADAMW.name in forced)
        measure_all(results, streams, peers, options.quick, forced)
    publish(results, report(results))


if __name__ == "__main__":
    main()
