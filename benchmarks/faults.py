"""A zoo of faults: what is left of a run that meets one.

Every optimizer trains every task at the rate of tuned AdamW (``decades.json``) with
linear decay, five seeds, once without and once with each of the faults below. A run is
*within 5 %* when its final loss on the whole training set exceeds that of the same
optimizer and seed without fault by at most 5 % of the drop that was made without it.

    python benchmarks/faults.py --out benchmarks/results/faults     # all, for hours
    python benchmarks/faults.py --quick                             # under 2 minutes
    python benchmarks/faults.py --tasks mlp photo --only lalerg     # some of it
    python benchmarks/faults.py --tasks SMALL                       # batch sizes 1, 8
    python benchmarks/faults.py --report-only                       # table and figure

With small batches, "mlp, batch 1", tasks and tuned rates are those of ``noise.json``.

A fault is data: for every step, what happens to batch, gradient, loss, update, rate,
parameters and moments. So one program for each task and optimizer runs them all. What
is stored is not run again, so that a run may be stopped and goes on later; ``--force``
runs it anew.
"""

import zlib
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from cost import skip_step
from decades import WEIGHT_DECAY, Results, adamw, linear
from jax import lax
from noise import CASES as NOISE_CASES
from noise import stored as noise_stored
from rich.progress import Progress
from store import RESULTS, Store, opened, options_of, publish, rounded, table
from tasks import DEVELOPMENT, TASKS, Batch, Task, _full_loss

import lalerg_optax as lo

PyTree = Any

NUM_SEEDS = 5
WITHIN = 5.0  # %
EARLIEST, LATEST = 0.2, 0.6  # where a fault begins, in units of the run
AT_A_TIME = 8  # faults run side by side; more do not fit into a cache
FAULT_TASKS = (
    "mlp",
    "autoencoder",
    "regression",
    "factorization",
    "photo",
    "words",
)
SMALL_BATCHES = {  # tasks of noise.py, the second half of them held back
    f"{name}, batch {size}": (name, size)
    for name in ("mlp", "logistic", "affairs", "photo", "words", "rows")
    for size in (1, 8)
}


# Faults


class Plan(NamedTuple):
    """What happens at every step; each is an array over the steps.

    Attributes:
      poison: 0 nothing, 1 targets of other examples, 2 inputs times 100, 3 all examples
        are one.
      grad_factor: factor of the gradient.
      grad_term: added to the gradient where ``grad_reach`` says.
      grad_reach: 0 nowhere, 1 one entry, 2 one leaf, 3 all.
      row_factor: factor of a row of a leaf: what a number that is an operand of a
        matrix product does to the gradient of the weights.
      row_exponent: power of two that is such a factor, too.
      grad_flip: bits of one entry of the gradient that are flipped.
      loss_scale: if above 0, gradients are those of float16 with this loss scale.
      loss_term: added to the loss.
      update_factor: factor of the update, behind the optimizer's back.
      rate_factor: factor of the learning rate's schedule.
      target: what is hit between two steps: 0 nothing, 1 a parameter, 2 an entry of the
        first moment, 3 of the second.
      keep: bits of the entry that is hit which stay.
      flip: bits of it which are flipped (after that).
      place: a random number that chooses leaf and entry.
    """

    poison: Any = 0
    grad_factor: Any = 1.0
    grad_term: Any = 0.0
    grad_reach: Any = 0
    row_factor: Any = 1.0
    row_exponent: Any = 0
    grad_flip: Any = 0
    loss_scale: Any = 0.0
    loss_term: Any = 0.0
    update_factor: Any = 1.0
    rate_factor: Any = 1.0
    target: Any = 0
    keep: Any = 0xFFFFFFFF
    flip: Any = 0
    place: Any = 0


_DTYPES = Plan(*(np.float32 if isinstance(x, float) else np.uint32 for x in Plan()))


class Fault(NamedTuple):
    """A fault.

    Attributes:
      name: how the tables call it.
      family: what it is a kind of.
      what: fields of the `Plan` at the steps that are hit.
      length: number of steps hit in a row.
      share: if above 0, that share of all steps is hit instead.
      every: if above 0, each so many-th step is hit instead.
      base: fields of the `Plan` at all other steps.
    """

    name: str
    family: str
    what: dict[str, Any]
    length: int = 1
    share: float = 0.0
    every: int = 0
    base: Mapping[str, Any] = MappingProxyType({})

    def plan(self, seed: int, num_steps: int) -> Plan:
        """Returns what happens at every step of a run."""
        rng = np.random.default_rng([seed, zlib.crc32(self.name.encode())])
        first = int(num_steps * rng.uniform(EARLIEST, LATEST))
        steps = np.arange(num_steps)
        is_hit = (steps >= first) & (steps < first + self.length)
        if self.share:  # not the first: there is nothing to tell what it should be
            is_hit = (rng.random(num_steps) < self.share) & (steps > 0)
        if self.every:
            is_hit = steps % self.every == self.every - 1
        what = {"place": rng.integers(2**31)} | self.what
        fields = {
            name: np.where(is_hit, what.get(name, default), default).astype(dtype)
            for name, default, dtype in zip(
                Plan._fields, Plan(**self.base), _DTYPES, strict=True
            )
        }
        return Plan(**fields)


NONE = Fault("none", "none", {}, 0)
REACHES = {"one entry": 1, "one leaf": 2, "all": 3}
POISONS = {"shuffled targets": 1, "inputs x 100": 2, "constant batch": 3}
TARGETS = {"parameter": 1, "first moment": 2, "second moment": 3}
BITS = {"sign": 31, "top exponent": 30, "low exponent": 23, "top mantissa": 22}
VALUES = {"Inf": 0x7F800000, "NaN": 0x7FC00000}


OPERANDS = {  # a flipped bit of a number below 2: by what it is multiplied
    "sign": {"row_factor": -1.0},
    "exponent + 8": {"row_exponent": 8},
    "exponent + 32": {"row_exponent": 32},
    "top exponent": {"row_exponent": 128},
}


def _counted(num_steps: int) -> str:
    return f"{num_steps} step" + "s" * (num_steps > 1)


FAULTS = (
    *(
        Fault(
            f"gradient {value} in {where}, {_counted(length)}",
            "gradient not finite",
            {"grad_term": float(value), "grad_reach": reach},
            length,
        )
        for value, length in (("nan", 1), ("inf", 1), ("nan", 10))
        for where, reach in REACHES.items()
    ),
    *(
        Fault(
            f"loss {value}, {_counted(length)}",
            "loss not finite",
            {"loss_term": float(value)},
            length,
        )
        for value, length in (("nan", 1), ("inf", 1), ("nan", 10))
    ),
    *(
        Fault(
            f"gradient x {factor:.0e}, {_counted(length)}".replace("e+0", "e"),
            "gradient too large",
            {"grad_factor": factor},
            length,
        )
        for factor in (1e3, 1e6, 1e9)
        for length in (1, 3, 10)
    ),
    *(
        Fault(
            f"gradient x {factor:g}, {_counted(length)}",
            "ascent",
            {"grad_factor": factor},
            length,
        )
        for factor, length in ((-1.0, 10), (-1.0, 30), (-100.0, 3), (-100.0, 10))
    ),
    *(
        Fault(
            f"update x {factor:g}, {_counted(length)}",
            "ascent",
            {"update_factor": factor},
            length,
        )
        for factor, length in ((-10.0, 10), (-100.0, 1), (-100.0, 3), (-1000.0, 3))
    ),
    *(
        Fault(f"{kind}, {when}", "poisoned batches", {"poison": code}, *how)
        for kind, code in POISONS.items()
        for when, how in {
            "1 step": (1,),
            "20 steps": (20,),
            "5 % of steps": (0, 0.05),
        }.items()
    ),
    *(
        Fault(f"rate x {factor:g}, 50 steps", "rate bomb", {"rate_factor": factor}, 50)
        for factor in (30.0, 1000.0)
    ),
    *(
        Fault(
            f"{name}: {bit} bit flipped",
            f"{name.split()[-1]} hit",
            {"target": target, "flip": 1 << position},
        )
        for name, target in TARGETS.items()
        for bit, position in BITS.items()
    ),
    *(
        Fault(
            f"{name}: becomes {value}",
            f"{name.split()[-1]} hit",
            {"target": target, "keep": 0, "flip": bits},
        )
        for name, target in TARGETS.items()
        for value, bits in VALUES.items()
    ),
    # as they show in the gradient of the weights (arXiv 2604.00726)
    *(
        Fault(f"operand of a product: {bit} bit flipped", "matrix product hit", what)
        for bit, what in OPERANDS.items()
    ),
    *(
        Fault(
            f"entry of a product: {bit} bit flipped",
            "matrix product hit",
            {"grad_flip": 1 << position},
        )
        for bit, position in BITS.items()
    ),
    Fault(
        "operand of a product: exponent + 32, 1 % of steps",
        "matrix product hit",
        OPERANDS["exponent + 32"],
        share=0.01,
    ),
    # the largest float16 is 65504
    Fault(
        "loss scale 2^32 at every 50th step",
        "loss scale overflow",
        {"loss_scale": 2.0**32},
        every=50,
        base={"loss_scale": 2.0**10},
    ),
    Fault(
        "loss scale 2^32, 10 steps",
        "loss scale overflow",
        {"loss_scale": 2.0**32},
        10,
        base={"loss_scale": 2.0**10},
    ),
)
FAMILIES = tuple(dict.fromkeys(fault.family for fault in FAULTS))


def poisoned(batch: Batch, train: Batch, poison: jax.Array) -> Batch:
    """Returns a batch with what its plan does to it."""
    *inputs, targets = batch

    def larger(a: jax.Array, whole: jax.Array) -> jax.Array:
        if jnp.issubdtype(a.dtype, jnp.floating):
            return 100.0 * a
        return (100 * a) % (whole.max(axis=0) + 1)  # some other index

    scaled = tuple(larger(a, w) for a, w in zip(inputs, train, strict=False))
    same = tuple(jnp.broadcast_to(a[:1], a.shape) for a in batch)
    choices = (
        batch,
        (*inputs, jnp.roll(targets, 1, axis=0)),
        (*scaled, targets),
        same,
    )
    return jax.tree.map(
        lambda *leaves: jnp.select([poison == i for i in range(4)], leaves), *choices
    )


def _pick(tree: PyTree, place: jax.Array) -> tuple[PyTree, PyTree, PyTree]:
    """Returns which leaf and, in every leaf, which entry and row it chooses: bools.

    A row is what belongs to one output: all entries that are equal in their last index.
    """
    leaves, structure = jax.tree.flatten(tree)
    is_leaf = [place % len(leaves) == i for i in range(len(leaves))]
    is_entry, is_row = [], []
    for leaf, chosen in zip(leaves, is_leaf, strict=True):
        number = lax.iota(jnp.uint32, leaf.size).reshape(leaf.shape)
        width = leaf.shape[-1] if leaf.ndim else 1
        entry = place // len(leaves) % leaf.size
        is_entry.append(chosen & (number == entry))
        is_row.append(chosen & (number % width == entry % width))
    return tuple(map(structure.unflatten, (is_leaf, is_entry, is_row)))


def spoilt(grads: PyTree, plan: Plan) -> PyTree:
    """Returns gradients with what their plan does to them."""

    def spoil(
        g: jax.Array, leaf: jax.Array, entry: jax.Array, row: jax.Array
    ) -> jax.Array:
        scale = jnp.where(plan.loss_scale > 0.0, plan.loss_scale, 1.0)
        half = (scale * g).astype(jnp.float16).astype(g.dtype) / scale
        g = plan.grad_factor * jnp.where(plan.loss_scale > 0.0, half, g)
        reach = plan.grad_reach
        is_hit = (reach == 3) | ((reach == 2) & leaf) | ((reach == 1) & entry)
        g = jnp.where(is_hit, g + plan.grad_term, g)
        multiplied = jnp.ldexp(plan.row_factor * g, plan.row_exponent.astype(jnp.int32))
        g = jnp.where(row, multiplied, g)
        bits = lax.bitcast_convert_type(g, jnp.uint32) ^ plan.grad_flip
        return jnp.where(entry, lax.bitcast_convert_type(bits, g.dtype), g)

    return jax.tree.map(spoil, grads, *_pick(grads, plan.place))


def struck(tree: PyTree, plan: Plan, target: int) -> PyTree:
    """Returns a tree with one entry hit, if that is what the plan aims at."""
    _, is_entry, _ = _pick(tree, plan.place)

    def strike(x: jax.Array, entry: jax.Array) -> jax.Array:
        bits = lax.bitcast_convert_type(x, jnp.uint32)
        hit = lax.bitcast_convert_type((bits & plan.keep) ^ plan.flip, x.dtype)
        return jnp.where(entry & (plan.target == target), hit, x)

    return jax.tree.map(strike, tree, is_entry)


def struck_moments(state: PyTree, plan: Plan) -> PyTree:
    """Returns an optimizer's state with a moment hit, if that is what is aimed at."""

    def is_adam(node: Any) -> bool:
        return isinstance(node, optax.ScaleByAdamState | lo.ScaleByMicroRateState)

    def strike(node: Any) -> Any:
        if not is_adam(node):
            return node
        mu = struck(node.mu, plan, TARGETS["first moment"])
        return node._replace(mu=mu, nu=struck(node.nu, plan, TARGETS["second moment"]))

    return jax.tree.map(strike, state, is_leaf=is_adam)


# Optimizers


class Optimizer(NamedTuple):
    """A column of the table.

    Attributes:
      name: how the tables call it.
      make: schedule to the transformation.
      note: how it is run.
      is_own: whether it is of this library, and params are applied with its
        ``apply_updates``.
    """

    name: str
    make: Callable[[optax.Schedule], Any]
    note: str
    is_own: bool = False


class ZClipState(NamedTuple):
    """State of `zclip`: statistics of the gradient norm, and how many were seen."""

    mean: jax.Array
    variance: jax.Array
    count: jax.Array


def zclip(
    alpha: float = 0.97, threshold: float = 2.5, warmup: int = 25, eps: float = 1e-6
) -> optax.GradientTransformation:
    """ZClip's rule, restated from the paper with its defaults.

    With mean and standard deviation of the gradient norm (exponential averages, started
    with those of 25 steps) and ``z = (norm - mean) / std``, a gradient with z above 2.5
    is scaled down to the norm ``mean + 2.5 std / (z / 2.5)``, which is then what enters
    the averages.

    References:
      Kumar et al., `ZClip <https://arxiv.org/abs/2504.02507>`_, 2025.
    """

    def init_fn(params: PyTree) -> ZClipState:
        del params
        return ZClipState(jnp.zeros(()), jnp.zeros(()), jnp.zeros((), jnp.int32))

    def update_fn(updates: PyTree, state: ZClipState, params: Any = None) -> PyTree:
        del params
        norm = optax.tree.norm(updates)
        is_warm = state.count >= warmup
        std = jnp.sqrt(state.variance)
        z = (norm - state.mean) / (std + eps)
        is_clipped = is_warm & (z > threshold)
        limit = state.mean + threshold * std / (z / threshold)
        seen = jnp.where(is_clipped, limit, norm)
        scale = jnp.where(is_clipped, limit / (norm + eps), 1.0)
        weight = jnp.where(is_warm, 1.0 - alpha, 1.0 / (state.count + 1.0))
        mean = state.mean + weight * (seen - state.mean)
        # while it warms up, that of all values so far
        distance = jnp.where(is_warm, seen - mean, seen - state.mean)
        square = distance * (seen - mean)
        variance = (1.0 - weight) * state.variance + weight * square
        updates = jax.tree.map(lambda u: scale * u, updates)
        return updates, ZClipState(mean, variance, state.count + 1)

    return optax.GradientTransformation(init_fn, update_fn)


ADAMW = Optimizer("adamw", adamw, "`optax.adamw`")
OPTIMIZERS = (
    Optimizer(
        "lalerg",
        lambda rate: lo.lalerg(rate, weight_decay=WEIGHT_DECAY),
        "`search=True`",
        is_own=True,
    ),
    Optimizer(
        "lalerg, no search",
        lambda rate: lo.lalerg(rate, weight_decay=WEIGHT_DECAY, search=False),
        "`search=False`",
        is_own=True,
    ),
    Optimizer(
        "error_regulate(adamw)",
        lambda rate: lo.error_regulate(adamw(rate)),
        "all defaults",
        is_own=True,
    ),
    ADAMW,
    Optimizer(
        "clip + adamw",
        lambda rate: optax.chain(optax.clip_by_global_norm(1.0), adamw(rate)),
        "global norm 1",
    ),
    Optimizer(
        "apply_if_finite(adamw)",
        lambda rate: optax.apply_if_finite(adamw(rate), 10**6),
        "any number of errors in a row is tolerated",
    ),
    Optimizer(
        "skip_step(adamw)",
        lambda rate: skip_step(adamw(rate)),
        "loss or norm above mean + 6 sd of 128 steps is dropped",
    ),
    Optimizer(
        "zclip + adamw",
        lambda rate: optax.chain(zclip(), adamw(rate)),
        "norms with a z-score above 2.5 are clipped, restated from arXiv 2504.02507",
    ),
)
SMALL_OPTIMIZERS = (
    "lalerg",
    "lalerg, no search",
    "error_regulate(adamw)",
    "adamw",
    "clip + adamw",
)
QUICK_TASKS = ("regression", "photo")
QUICK_OPTIMIZERS = ("lalerg", "lalerg, no search", "adamw", "clip + adamw")
QUICK_STEPS = 300


# Runs


def all_finite(tree: PyTree) -> jax.Array:
    """Returns whether every entry is."""
    return jnp.stack([jnp.isfinite(x).all() for x in jax.tree.leaves(tree)]).all()


def run(
    task: Task,
    optimizer: Optimizer,
    rate: float,
    seed: jax.Array,
    plan: Plan,
    see: Callable[[PyTree], Any] = lambda state: None,
) -> dict[str, Any]:
    """One run; a pure function of seed and plan."""
    num_steps = len(plan.poison)
    schedule = linear(rate, num_steps)
    tx = optax.with_extra_args_support(
        optimizer.make(lambda count: schedule(count) * plan.rate_factor[count])
    )
    key = jax.random.key(seed)

    def step(carry: PyTree, now: tuple[jax.Array, Plan]) -> tuple[PyTree, PyTree]:
        params, rest, state = carry
        i, happens = now
        params = struck(params, happens, TARGETS["parameter"])
        state = struck_moments(state, happens)
        draw, noise = jax.random.split(jax.random.fold_in(key, i))
        chosen = jax.random.randint(draw, (task.batch_size,), 0, len(task.train[0]))
        batch = tuple(a[chosen] for a in task.train)
        batch = poisoned(batch, task.train, happens.poison)
        grad = jax.value_and_grad(task.loss, has_aux=True)
        (loss, rest), grads = grad(params, rest, batch, noise, True)
        updates, state = tx.update(
            spoilt(grads, happens), state, params, value=loss + happens.loss_term
        )
        updates = jax.tree.map(lambda u: happens.update_factor * u, updates)
        if optimizer.is_own:
            params = lo.apply_updates(params, updates, state)
        else:
            params = optax.apply_updates(params, updates)
        return (params, rest, state), (all_finite(params), loss, see(state))

    params, rest = task.init(key)
    start_loss = _full_loss(task, task.train, params, rest)
    (params, rest, state), (is_finite, losses, seen) = lax.scan(
        step, (params, rest, tx.init(params)), (jnp.arange(num_steps), plan)
    )
    result = {
        "train_loss": _full_loss(task, task.train, params, rest),
        "start_loss": start_loss,
        "num_not_finite": (~is_finite).sum(),
    }
    if optimizer.is_own:
        report = lo.metrics(state)
        result |= {k: report[k] for k in ("num_skipped", "num_reverted")}
    if seen is not None:
        result |= {"losses": losses, "seen": seen}
    return result


def measure(
    task: Task,
    optimizer: Optimizer,
    rate: float,
    faults: Iterable[Fault],
    num_seeds: int,
    num_steps: int,
    see: Callable[[PyTree], Any] = lambda state: None,
) -> dict[str, np.ndarray]:
    """Runs all faults and seeds in one program; arrays are [fault, seed]."""
    plans = jax.tree.map(
        lambda *rows: jnp.asarray(np.stack(rows)),
        *(
            jax.tree.map(
                lambda *rows: np.stack(rows),
                *(fault.plan(seed, num_steps) for seed in range(num_seeds)),
            )
            for fault in faults
        ),
    )
    one = partial(run, task, optimizer, rate, see=see)

    @jax.jit
    def cells(seeds: jax.Array, plans: Plan) -> PyTree:
        return lax.map(
            lambda plan: jax.vmap(one)(seeds, plan), plans, batch_size=AT_A_TIME
        )

    return jax.tree.map(np.asarray, cells(jnp.arange(num_seeds), plans))


def task_of(name: str) -> Task:
    """Returns a task, that of small batches among them."""
    if name not in SMALL_BATCHES:
        return TASKS[name]()
    of, size = SMALL_BATCHES[name]
    case = NOISE_CASES[of]
    return case.make()._replace(batch_size=size, num_steps=case.num_steps)


def rates_of(names: Iterable[str]) -> dict[str, float]:
    """Returns the rates of tuned AdamW."""
    tuned = Results(RESULTS / "decades.json")
    tuned.load()
    noisy = noise_stored()
    return {
        name: noisy.reference(*SMALL_BATCHES[name], "rates")
        if name in SMALL_BATCHES
        else tuned.reference(name, "rates")
        for name in names
    }


def entry_of(task: Task, optimizer: Optimizer, **settings: Any) -> dict[str, Any]:
    """Runs all faults of an optimizer and a task; returns what is stored of them."""
    return {f: rounded(x) for f, x in measure(task, optimizer, **settings).items()}


class Runs(Store):
    """What has been measured, and what follows from it."""

    def get(self, task: str, name: str, field: str) -> np.ndarray:
        """Returns a field of all runs, NaN where it was not finite."""
        return np.asarray(self.runs[task, name][field], float)

    def has(self, task: str, name: str) -> bool:
        """Returns whether an optimizer was run on a task."""
        return (task, name) in self.runs

    def faults(self, task: str, name: str) -> list[str]:
        """Returns the names of the faults that were run."""
        return self.runs[task, name]["faults"]

    def fault_free(self, task: str, name: str, field: str = "train_loss") -> np.ndarray:
        """Returns how the runs without fault ended, by seed."""
        where = self.faults(task, name).index(NONE.name)
        return self.get(task, name, field)[where]

    def excess_of(self, task: str, name: str, against: str = "") -> np.ndarray:
        """Returns losses in % of the drop above those without fault, [fault, seed].

        They are those of the same optimizer and seed, or the mean of another optimizer.
        """
        reference = self.fault_free(task, against or name)
        drop = self.fault_free(task, against or name, "start_loss") - reference
        if against:
            reference = reference.mean()
        excess = self.get(task, name, "train_loss") - reference
        excess = 100.0 * excess / drop.mean()
        return np.where(np.isnan(excess), np.inf, excess)

    def select(
        self, name: str, family: str = "", field: str = "", tasks: Iterable[str] = TASKS
    ) -> np.ndarray:
        """Returns excesses, or a field, of all runs of an optimizer with a fault."""
        found = [np.zeros(0)]
        for task in tasks:
            if self.has(task, name):
                names = [
                    fault.name for fault in FAULTS if family in ("", fault.family)
                ] or [family]
                known = self.faults(task, name)
                where = [known.index(n) for n in names if n in known]
                values = (
                    self.get(task, name, field) if field else self.excess_of(task, name)
                )
                found.append(values[where].ravel())
        return np.concatenate(found)


def measure_all(
    results: Runs,
    rates: dict[str, float],
    jobs: list[tuple[str, Optimizer]],
    faults: tuple[Fault, ...],
    quick: bool,
    force: bool,
) -> None:
    """Runs every optimizer and task that is not stored yet; stores it."""
    made: dict[str, Task] = {}
    with Progress() as progress:
        bar = progress.add_task("", total=len(jobs))
        for name, optimizer in jobs:
            label = f"{name}: {optimizer.name}"
            progress.update(bar, description=label[:36].ljust(36))
            if name not in made:
                made[name] = task_of(name)
            task = made[name]
            settings = {
                "rate": rates[name],
                "num_seeds": 1 if quick else NUM_SEEDS,
                "num_steps": QUICK_STEPS if quick else task.num_steps,
            }
            cells = settings | {"faults": [fault.name for fault in faults]}
            results.measure(
                (name, optimizer.name),
                cells,
                partial(entry_of, task, optimizer, faults=faults, **settings),
                force,
            )
            progress.advance(bar)


# Tables


def share(excess: np.ndarray) -> str:
    """Returns how many % of runs are within 5 %."""
    if not excess.size:
        return ""
    within = 100.0 * np.mean(excess <= WITHIN)
    return f"{within:.0f}" if within in (0.0, 100.0) else f"{within:.1f}"


def percent(x: float) -> str:
    """Returns an excess as a table shows it."""
    return f"{x:+.3g}" if np.isfinite(x) else "not finite"


def names_of(results: Runs) -> list[str]:
    """Returns the optimizers that were measured."""
    known = {name for _, name in results.runs}
    return [o.name for o in OPTIMIZERS if o.name in known]


def tasks_of(results: Runs, *names: str) -> list[str]:
    """Returns the tasks on which all these were measured."""
    return [t for t in TASKS if all(results.has(t, name) for name in names)]


def family_table(results: Runs) -> list[str]:
    """Returns the share of runs within 5 %, by family of faults."""
    names = names_of(results)
    lines = [[f, *(share(results.select(n, f)) for n in names)] for f in FAMILIES]
    lines.append(["**all**", *(f"**{share(results.select(n))}**" for n in names)])
    sets = {"chosen on": DEVELOPMENT, "held back": set(TASKS) - set(DEVELOPMENT)}
    for title, tasks in sets.items():
        cells = (share(results.select(n, tasks=tasks)) for n in names)
        lines.append([f"all, on tasks {title}", *cells])
    not_finite = []
    for name in names:
        hit = results.select(name, "parameter hit", "num_not_finite")
        every = results.select(name, field="num_not_finite")
        not_finite.append(f"{(every > 0).sum()} ({(hit > 0).sum()})")
    lines.append(["runs with a parameter not finite (of those hit)", *not_finite])
    number = [str(results.select(n).size) for n in names]
    tasks = [str(len(tasks_of(results, n))) for n in names]
    return table(["fault", *names], [*lines, ["runs", *number], ["tasks", *tasks]])


def small_table(results: Runs) -> list[str]:
    """Returns the share of runs within 5 % at small batch sizes."""
    names = [
        name
        for name in names_of(results)
        if any(results.has(task, name) for task in SMALL_BATCHES)
    ]
    if not names:
        return ["Not measured yet.", ""]
    lines = []
    for title, part in (("chosen on", slice(0, 6)), ("held back", slice(6, None))):
        for size in (1, 8):
            tasks = [
                task
                for task in tuple(SMALL_BATCHES)[part]
                if SMALL_BATCHES[task][1] == size
                and all(results.has(task, name) for name in names)
            ]
            cells = [share(results.select(n, tasks=tasks)) for n in names]
            told = ", ".join(SMALL_BATCHES[task][0] for task in tasks)
            if tasks:
                lines.append([f"batch size {size}, tasks {title}: {told}", *cells])
    for family in FAMILIES:
        cells = [share(results.select(n, family, tasks=SMALL_BATCHES)) for n in names]
        lines.append([family, *cells])
    cells = [share(results.select(n, tasks=SMALL_BATCHES)) for n in names]
    lines.append(["**all**", *(f"**{cell}**" for cell in cells)])
    return table(["fault", *names], lines)


def fault_table(results: Runs) -> list[str]:
    """Returns the share of runs within 5 %, fault by fault."""
    names = names_of(results)
    by_name = {
        name: np.concatenate(
            [_by_fault(results, task, name) for task in tasks_of(results, name)], axis=1
        )
        for name in names
    }
    lines = [
        [
            fault.name,
            *(share(by_name[name][i][by_name[name][i] > -np.inf]) for name in names),
        ]
        for i, fault in enumerate(FAULTS)
    ]
    return table(["fault", *names], [line for line in lines if any(line[1:])])


def _by_fault(results: Runs, task: str, name: str) -> np.ndarray:
    """Returns excesses, [fault, seed]; minus infinity where it was not run."""
    known, excess = results.faults(task, name), results.excess_of(task, name)
    none = np.full(excess.shape[1], -np.inf)
    return np.stack(
        [excess[known.index(f.name)] if f.name in known else none for f in FAULTS]
    )


def task_table(results: Runs) -> list[str]:
    """Returns shares task by task, and what each costs where there is no fault."""
    names = names_of(results)
    lines = []
    for task in tasks_of(results, *names):
        cells = [share(results.select(name, tasks=[task])) for name in names]
        lines.append([task, *cells])
    header = ["task", *names]
    lines_free = []
    for task in tasks_of(results, ADAMW.name, *names):
        cells = []
        for name in names:
            where = results.faults(task, name).index(NONE.name)
            cells.append(
                percent(results.excess_of(task, name, ADAMW.name)[where].mean())
            )
        lines_free.append([task, *cells])
    return [
        "Runs within 5 %, task by task:",
        "",
        *table(header, lines),
        "Without fault, % of the drop of tuned AdamW above it, mean over seeds:",
        "",
        *table(header, lines_free),
    ]


def miss_table(results: Runs) -> list[str]:
    """Returns the runs of this library that are not within 5 %."""
    lines = []
    for optimizer in OPTIMIZERS:
        known = [t for t in (*TASKS, *SMALL_BATCHES) if results.has(t, optimizer.name)]
        for task in known if optimizer.is_own else ():
            excess = results.excess_of(task, optimizer.name)
            skipped, reverted = (
                results.get(task, optimizer.name, field)
                for field in ("num_skipped", "num_reverted")
            )
            for i, seed in np.argwhere(excess > WITHIN):
                lines.append(
                    [
                        optimizer.name,
                        task,
                        results.faults(task, optimizer.name)[i],
                        str(seed),
                        percent(excess[i, seed]),
                        f"{skipped[i, seed]:.0f}",
                        f"{reverted[i, seed]:.0f}",
                    ]
                )
    header = ["optimizer", "task", "fault", "seed", "excess, %", "skipped", "reverted"]
    return table(header, lines)


def report(results: Runs) -> str:
    """Returns everything as Markdown."""
    names = names_of(results)
    seeds = {entry["num_seeds"] for entry in results.runs.values()}
    lines = [
        "# Faults",
        "",
        results.made(),
        "",
        f"{len(FAULTS)} faults, {' or '.join(map(str, sorted(seeds)))} seeds, at the "
        "rate of tuned AdamW with linear decay. Tables give % of the runs whose final "
        "loss on the whole training set exceeds that of the same optimizer and seed "
        "without fault by at most 5 % of the drop that it made. A fault begins between "
        f"{EARLIEST:.0%} and {LATEST:.0%} of the run. No rule was chosen on the tasks "
        f"that are held back ({', '.join(t for t in TASKS if t not in DEVELOPMENT)}).",
        "",
        *family_table(results),
        "## Small batches",
        "",
        "Tasks of `noise.py` at batch sizes 1 and 8, at the rate of AdamW tuned "
        "at that batch size.",
        "",
        *small_table(results),
        "## Fault by fault",
        "",
        *fault_table(results),
        "## Task by task",
        "",
        *task_table(results),
        "## Runs of this library that are not within 5 %",
        "",
        *miss_table(results),
        "## How each is run",
        "",
        *(f"- {o.name}: {o.note}." for o in OPTIMIZERS if o.name in names),
    ]
    return "\n".join(lines)


def draw(results: Runs, path: Path) -> None:
    """Writes the figure: share of runs within 5 %, a row for each fault."""
    import matplotlib.pyplot as plt

    names = names_of(results)
    shares = np.full((len(FAULTS), len(names)), np.nan)
    for column, name in enumerate(names):
        parts = [_by_fault(results, t, name) for t in tasks_of(results, name)]
        excess = np.concatenate(parts, axis=1)
        is_run = excess > -np.inf
        within = 100.0 * (is_run & (excess <= WITHIN)).sum(axis=1)
        shares[:, column] = within / np.where(
            is_run.any(axis=1), is_run.sum(axis=1), np.nan
        )
    kept = np.isfinite(shares).any(axis=1)
    figure, axis = plt.subplots(
        figsize=(2.8 + 0.55 * len(names), 1.5 + 0.17 * kept.sum()), layout="constrained"
    )
    image = axis.imshow(shares[kept], aspect="auto", cmap="RdYlGn", vmin=0, vmax=100)
    labels = [fault.name for fault, k in zip(FAULTS, kept, strict=True) if k]
    axis.set_yticks(range(len(labels)), labels, fontsize=7)
    axis.set_xticks(range(len(names)), names, fontsize=8, rotation=40, ha="left")
    axis.xaxis.tick_top()
    families = [fault.family for fault, k in zip(FAULTS, kept, strict=True) if k]
    for i in range(1, len(families)):
        if families[i] != families[i - 1]:
            axis.axhline(i - 0.5, color="black", linewidth=0.8)
    figure.colorbar(image, ax=axis, label="% of runs within 5 % of the fault-free drop")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main() -> None:
    """Measures, stores, and writes tables and figure."""
    names = [optimizer.name for optimizer in OPTIMIZERS]
    words = ("SMALL", *TASKS, *SMALL_BATCHES)
    options = options_of(__doc__, names, (*FAULT_TASKS, "SMALL"), words)
    results = opened(Runs, "faults", options)
    if not options.report_only:
        tasks, faults = [t for t in options.tasks if t != "SMALL"], (NONE, *FAULTS)
        tasks += [t for t in SMALL_BATCHES if "SMALL" in options.tasks]
        chosen = [o for o in OPTIMIZERS if o.name in options.only]
        if options.quick:
            tasks = [t for t in tasks if t in QUICK_TASKS]
            chosen = [o for o in chosen if o.name in QUICK_OPTIMIZERS]
            faults = (NONE, *FAULTS[::3])
        jobs = [
            (task, optimizer)
            for task in tasks
            for optimizer in chosen
            if task not in SMALL_BATCHES or optimizer.name in SMALL_OPTIMIZERS
        ]
        measure_all(
            results, rates_of(tasks), jobs, faults, options.quick, options.force
        )
    publish(results, report(results), draw)


if __name__ == "__main__":
    main()
