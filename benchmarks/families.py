"""Any method and any schedule: does the rate find itself for all of them?

A *family* is a method with a schedule: Muon with linear decay, AdamW with restarts. Of
each, the optimizer as Optax has it is tuned over 17 half decades; ``lalerg`` with the
same method as second level and the same schedule begins at nine decades of rates. A
cell is *within x %* when its final loss on the whole training set exceeds that of the
tuned optimizer *of its family* by at most x % of the drop that this one made.

    python benchmarks/families.py                       # all, for three hours
    python benchmarks/families.py --quick               # a minute
    python benchmarks/families.py --only methods --tasks mlp vae
    python benchmarks/families.py --report-only         # tables and figure

Methods run on six tasks, schedules on all. A row that is stored is not run again;
``--force`` runs it anew.
"""

from functools import partial
from typing import Any, NamedTuple

import optax
from decades import measure_all
from families_tables import Results, bare, draw, report
from optax import contrib
from peers import LALERG, WEIGHT_DECAY, Make, Peer, adamw, linear, of, warmup_cosine
from recipes import warm_restarts
from store import opened, options_of, publish
from sweeps import HALF_DECADES, Row, seen
from tasks import TASKS

import lalerg_optax as lo

METHODS_TASKS = ("mlp", "autoencoder", "regression", "residual", "vae", "photo")
QUICK_TASKS = ("logistic", "regression")
QUICK_FAMILIES = ("Muon", "warm-up and cosine")


class Family(NamedTuple):
    """A method with a schedule.

    Attributes:
      name: how the tables call it.
      group: what ``--only`` chooses.
      make: (learning rate or schedule, number of steps) to the optimizer as it is.
      own: the same to ``lalerg`` with this method.
      schedule: (learning rate, number of steps) to what both are given.
      tasks: names of the tasks.
    """

    name: str
    group: str
    make: Make
    own: Make
    schedule: Any = linear
    tasks: tuple[str, ...] = METHODS_TASKS


def method(name: str, factory: Any) -> Family:
    """Returns a family of a method with linear decay, as people write it."""
    return Family(
        name,
        "methods",
        of(factory),
        lambda rate, n: lo.lalerg(rate, micro=factory(1.0)),
    )


def scheduled(name: str, schedule: Any) -> Family:
    """Returns a family of AdamW with a schedule."""
    own = of(lo.lalerg, weight_decay=WEIGHT_DECAY)
    return Family(name, "schedules", of(adamw), own, schedule, tuple(TASKS))


def warmup_stable_decay(rate: Any, num_steps: int) -> Any:
    """Returns a tenth of warm-up, then the rate, and linear decay in the last fifth."""
    warm, last = num_steps // 10, num_steps // 5
    shape = optax.join_schedules(
        [
            optax.linear_schedule(0.0, 1.0, warm),
            optax.constant_schedule(1.0),
            optax.linear_schedule(1.0, 0.0, last),
        ],
        [warm, num_steps - last],
    )
    return lambda count: rate * shape(count)


def restarted(rate: Any, num_steps: int) -> Any:
    """Returns cosine decay with two warm restarts."""
    shape = warm_restarts(1.0, num_steps)
    return lambda count: rate * shape(count)


def sm3(rate: Any) -> Any:
    """SM3, which takes no schedule in Optax, with one."""
    return optax.chain(optax.scale_by_sm3(), optax.scale_by_learning_rate(rate))


FAMILIES = (
    method("Muon", contrib.muon),
    method("Muon, RMS of Adam", partial(contrib.muon, consistent_rms=0.2)),
    method("RMSProp", optax.rmsprop),
    method("momentum", partial(optax.sgd, momentum=0.9)),
    method("AdaGrad", optax.adagrad),
    method("Lion", optax.lion),
    method("Adafactor", partial(optax.adafactor, min_dim_size_to_factor=8)),
    method("LAMB", optax.lamb),
    method("NovoGrad", optax.novograd),
    method("Adan", optax.adan),
    method("SM3", sm3),
    method("RAdam", optax.radam),
    method("AdEMAMix", contrib.ademamix),
    scheduled("linear decay", linear),
    scheduled("warm-up and cosine", warmup_cosine),
    scheduled("warm-up, stable, decay", warmup_stable_decay),
    scheduled("warm restarts", restarted),
)
GROUPS = ("methods", "schedules")


def rows_of(family: Family) -> tuple[Row, Row]:
    """Returns the optimizer that is tuned, and ours."""
    base = Peer(bare(family.name), family.make, schedule=family.schedule)
    own = LALERG._replace(name=family.name, make=family.own, schedule=family.schedule)
    return (
        Row(base, family.group, rates=lambda tuned: HALF_DECADES, tasks=family.tasks),
        Row(own, family.group, tasks=family.tasks, final=seen),
    )


def main() -> None:
    """Measures, stores, and writes tables and figure."""
    options = options_of(__doc__, GROUPS, tuple(TASKS), tuple(TASKS))
    results = opened(Results, "families", options)
    families = [f for f in FAMILIES if f.group in options.only]
    if options.quick:
        families = [f for f in families if f.name in QUICK_FAMILIES]
        families = [f._replace(tasks=QUICK_TASKS) for f in families]
    jobs = [
        (name, row)
        for family in families
        for name in family.tasks
        if name in options.tasks
        for row in rows_of(family)
    ]
    forced = tuple(options.only) if options.force else ()
    if not options.report_only:
        measure_all(results, jobs, options.quick, forced)
    publish(results, report(results, FAMILIES), draw)


if __name__ == "__main__":
    main()
