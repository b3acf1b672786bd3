"""False alarms: how often a run that has no fault is objected to.

Two kinds of evidence. *Real training*: every task of ``tasks.py``, AdamW and lalerg,
three rates up to tuned AdamW's (taken from ``results/decades.json``), linear decay and
a constant rate, one or two seeds. *Noise*: losses that are stationary or fall as a real
training curve does, and gradient norms, drawn at random and judged by the regulator
around a transformation that never moves. Peers see the same losses and norms.

    python benchmarks/alarms.py --out benchmarks/results/alarms   # half an hour
    python benchmarks/alarms.py --quick                           # under a minute
    python benchmarks/alarms.py --only noise                      # some of it
    python benchmarks/alarms.py --report-only                     # the tables

What is stored is not run again, so that a run may be stopped and goes on later;
``--force`` runs it anew.
"""

import json
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import peers
from decades_tables import Results as Decades
from jax import lax
from peers import Peer
from rich.progress import Progress
from store import RESULTS, Store, opened, options_of, publish, rounded, table
from tasks import DEVELOPMENT, REPORT, TASKS, Task
from train import Hooks, Taken, grid, train_on

import lalerg_optax as lo

PyTree = Any
SHARES = (0.1, 1 / 3, 1.0)  # of tuned AdamW's rate
NUM_SEEDS = 2
COSTLY = ("patches", "characters")  # one seed, and yet most of the time
MAX_LISTED = 60
AUDIT, SECOND = "audit", "second step of a revert"
QUICK_TASKS = ("logistic",)
QUICK_NOISES = ("normal, 5 %", "Student t(3), 5 %", "falling, 20 % of its level")
PARTS = ("noise", "training")


# Rules

# steps that a revert takes, 0 if a rule only skips
RULES = {name: 2 if name == "error_regulate" else 0 for name in peers.RULES}
TOLD_ONLY = {name: f"{name}, told only" for name in RULES}


@partial(jax.jit, static_argnames="name")
def verdicts_of(name: str, losses: jax.Array, norms: jax.Array) -> jax.Array:
    """Returns what a rule says of every step, int32, shape (num_runs, num_steps).

    A rule that only skips never reverts: two alarms in a row stand as one skip and
    one revert, which is what it would do if it went back at the second.
    """
    tx = peers.RULES[name]()

    def judged(losses: jax.Array, norms: jax.Array) -> jax.Array:
        def step(state: PyTree, seen: PyTree) -> PyTree:
            loss, norm = seen
            updates, state = tx.update(norm, state, jnp.zeros(()), value=loss)
            if name == "error_regulate":
                return state, state.verdict
            return state, (updates == 0.0).astype(jnp.int32)

        return lax.scan(step, tx.init(jnp.zeros(())), (losses, norms))[1]

    return jax.vmap(judged)(losses, norms)


def count(verdicts: np.ndarray, issues: int) -> dict[str, int]:
    """Returns steps, skips and reverts of runs along the last axis.

    Args:
      verdicts: 0, 1 or 2 for every step.
      issues: steps that a revert takes; 0 if the rule only skips.
    """
    skips = int(np.sum(verdicts == lo.Verdict.SKIP))
    if issues:
        reverted = np.sum(verdicts == lo.Verdict.REVERT, axis=-1)
        reverts = int(np.sum(-(-reverted // issues)))  # the run may end in between
    else:
        reverts = int(np.sum((verdicts[..., 1:] == 1) & (verdicts[..., :-1] == 1)))
    return {"steps": int(verdicts.size), "skips": skips, "reverts": reverts}


# Noise


class Noise(NamedTuple):
    """Losses and gradient norms that nothing is wrong with.

    Attributes:
      losses: (key, number of runs, number of steps) to losses, one row for each run.
      norms: the same for the gradient norm; 30 % lognormal noise unless said.
      num_steps: length of a run; as many runs as make up the total.
      most: skips and reverts in 10,000 steps that are tolerated.
    """

    losses: Callable[[jax.Array, tuple[int, int]], jax.Array]
    norms: Callable[[jax.Array, tuple[int, int]], jax.Array] = lambda key, shape: (
        jnp.exp(0.3 * jax.random.normal(key, shape))
    )
    num_steps: int = 10_000
    most: tuple[float, float] = (1.0, 0.0)


def normal(scale: float) -> Callable[..., jax.Array]:
    """Returns a maker of 1 plus normal noise."""
    return lambda key, shape: 1.0 + scale * jax.random.normal(key, shape)


def lognormal(scale: float) -> Callable[..., jax.Array]:
    """Returns a maker of the exponential of normal noise."""
    return lambda key, shape: jnp.exp(scale * jax.random.normal(key, shape))


def student(scale: float) -> Callable[..., jax.Array]:
    """Returns a maker of 1 plus noise with heavy tails: three degrees of freedom."""
    return lambda key, shape: 1.0 + scale * jax.random.t(key, 3.0, shape)


def constant(level: float) -> Callable[..., jax.Array]:
    """Returns a maker of always the same loss."""
    return lambda key, shape: jnp.full(shape, level)


@cache
def curves() -> np.ndarray:
    """Returns a training curve of each task, as a share of its drop, [task, piece]."""
    stored = json.loads((RESULTS / "decades.json").read_text())["runs"]
    runs = [np.array(r["curve"]) for r in stored if r["optimizer"] == "adamw"]
    return np.stack([(c - c.min()) / (c.max() - c.min()) for c in runs])


def falling(
    noise: Callable[..., jax.Array], floor: float
) -> Callable[[jax.Array, tuple[int, int]], jax.Array]:
    """Returns a maker of the curves of all tasks in turn, with noise.

    Args:
      noise: what 1 is replaced by.
      floor: where the curves end, as a share of their drop.
    """

    def losses(key: jax.Array, shape: tuple[int, int]) -> jax.Array:
        shapes = curves()
        at = np.linspace(0.0, shapes.shape[1] - 1.0, shape[1])
        level = [np.interp(at, np.arange(shapes.shape[1]), c) for c in shapes]
        chosen = jnp.asarray(np.stack(level))[np.arange(shape[0]) % len(shapes)]
        return (chosen + floor) * noise(key, shape)

    return losses


NOISES = {
    "normal, 1 %": Noise(normal(0.01)),
    "normal, 5 %": Noise(normal(0.05)),
    "normal, 20 %": Noise(normal(0.2)),
    "lognormal, 20 %": Noise(lognormal(0.2)),
    "Student t(3), 5 %": Noise(student(0.05), most=(30.0, 1.0)),
    "normal, 5 %; norm: lognormal, 100 %": Noise(normal(0.05), lognormal(1.0)),
    "lognormal, 20 %; norm: the same": Noise(lognormal(0.2), lognormal(0.2)),
    "normal, 5 %; norm: Student t(3), 20 %": Noise(
        normal(0.05),
        lambda key, shape: jnp.abs(student(0.2)(key, shape)),
        most=(30.0, 1.0),
    ),
    "falling, 5 % of its level": Noise(falling(normal(0.05), 0.1), num_steps=2000),
    "falling, 20 % of its level": Noise(falling(lognormal(0.2), 0.1), num_steps=2000),
    "falling to almost 0, 20 % of its level": Noise(
        falling(lognormal(0.2), 1e-3), num_steps=2000
    ),
    "constant": Noise(constant(2.3), most=(0.0, 0.0)),
    "constant, 0": Noise(constant(0.0), most=(0.0, 0.0)),
}
NUM_NOISE_STEPS = 200_000

# one draw, told in other units; its tails are heavy enough to be objected to
VARIANTS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "as it is": lambda x: x,
    "near zero (times 1e-6)": lambda x: 1e-6 * x,
    "times 1e6": lambda x: 1e6 * x,
    "negative (less 100)": lambda x: x - 100.0,
    "offset (plus 1e4)": lambda x: x + 1e4,
}


def draw(noise: Noise, total: int) -> tuple[jax.Array, jax.Array]:
    """Returns losses and norms of as many runs as make up the total."""
    shape = (max(1, total // noise.num_steps), noise.num_steps)
    keys = jax.random.split(jax.random.key(7))
    return noise.losses(keys[0], shape), noise.norms(keys[1], shape)


def measure_noise(name: str, total: int) -> Iterator[dict[str, Any]]:
    """What the rules say of noise."""
    signals = draw(NOISES[name], total)
    for rule, issues in RULES.items():
        verdicts = np.asarray(verdicts_of(rule, *signals))
        yield {"noise": name, "rule": rule} | count(verdicts, issues)


def measure_units(total: int) -> Iterator[dict[str, Any]]:
    """Whether the unit and the zero of the loss make a difference."""
    losses, norms = draw(Noise(student(0.2)), total)
    first: np.ndarray | None = None
    for name, change in VARIANTS.items():
        verdicts = np.asarray(verdicts_of("error_regulate", change(losses), norms))
        first = verdicts if first is None else first
        different = int(np.sum(verdicts != first))
        yield {"variant": name, "different": different} | count(verdicts, 2)


# Real training


class Seen(NamedTuple):
    """What is kept of every step, float32 or int32."""

    loss: Any
    grad_norm: Any
    verdict: Any
    scaled_error: Any
    scaled_norm_error: Any
    num_audits_passed: Any
    is_searching: Any


SIGNALS = ("loss", "grad_norm", "scaled_error", "scaled_norm_error")


def seen_of(peer: Peer, taken: Taken) -> Seen:
    """Returns what is kept of a step; nothing but the signals if nobody judges it."""
    seen = {name: jnp.zeros(()) for name in Seen._fields}
    if peer.is_own:
        report = lo.metrics(taken.state)
        seen |= {name: report[name] for name in Seen._fields if name in report}
    else:
        seen["grad_norm"] = optax.tree.norm(taken.grads)
    return Seen(**seen | {"loss": taken.loss})


OPTIMIZERS = {
    peer.name: peer
    for peer in (
        peers.ADAMW,
        peers.REGULATED,
        peers.NO_SEARCH._replace(name="lalerg, search=False"),
        peers.LALERG,
    )
}
ADAMW, SEARCHING = peers.ADAMW.name, peers.LALERG.name
SLOPES = {"linear": 1.0, "constant": 0.0}


def runs_of(
    task: Task, name: str, rates: list[float], num_seeds: int, num_steps: int
) -> dict[str, Seen]:
    """Runs all cells of an optimizer; arrays are [cell, step], by schedule."""
    peer = OPTIMIZERS[name]
    hooks = Hooks(keep=partial(seen_of, peer))

    def cell(is_float: bool, slope: Any, rate: Any, seed: jax.Array) -> Seen:
        def decayed(count: jax.Array) -> jax.Array:
            return rate * (1.0 - slope * count / num_steps)

        tx = peer.make(rate if is_float else decayed, num_steps)
        _, end = train_on(task, tx, seed, num_steps, hooks=hooks)
        return end.kept

    def cells(is_float: bool, *slopes: float) -> list[Seen]:
        def over_slopes(slope: Any, rates: jax.Array, seeds: jax.Array) -> Seen:
            return grid(partial(cell, is_float, slope), rates, seeds)

        runs = jax.jit(jax.vmap(over_slopes, (0, None, None)))
        out = runs(jnp.asarray(slopes), jnp.asarray(rates), jnp.arange(num_seeds))
        flat = jax.tree.map(
            lambda x: np.asarray(x).reshape(len(slopes), -1, num_steps), out
        )
        return [jax.tree.map(lambda x, i=i: x[i], flat) for i in range(len(slopes))]

    if name == SEARCHING:  # what it does with a float is not what it does with a
        found = cells(False, SLOPES["linear"]) + cells(True, SLOPES["constant"])
    else:  # schedule; to the others it is the same
        found = cells(False, *SLOPES.values())
    return dict(zip(SLOPES, found, strict=True))


def cause(seen: Seen, at: tuple[int, int]) -> str:
    """Returns what a step was rejected for."""
    names = {"scaled_error": "loss", "scaled_norm_error": "norm"}
    found = [word for name, word in names.items() if getattr(seen, name)[at] > 1.0]
    if found:
        return " and ".join(found)
    cell, step = at
    is_second = step > 0 and seen.verdict[cell, step - 1] == lo.Verdict.REVERT
    return SECOND if is_second else AUDIT


def listed(
    seen: Seen, is_settled: np.ndarray, rates: list[float], num_seeds: int
) -> list[dict[str, Any]]:
    """Returns every step that was not accepted, with what was seen."""
    entries = []
    is_rejected = np.isin(seen.verdict, (lo.Verdict.SKIP, lo.Verdict.REVERT))
    for cell, step in np.argwhere(is_rejected).tolist():
        at = cell, step
        entries.append(
            {
                "rate": rates[cell // num_seeds],
                "seed": cell % num_seeds,
                "step": step,
                "verdict": lo.Verdict(int(seen.verdict[at])).name,
                "cause": cause(seen, at),
                "is_settled": bool(is_settled[at]),
            }
            | {name: rounded(getattr(seen, name)[at]) for name in SIGNALS}
        )
    return entries


def measure_task(name: str, task: str, cells: dict[str, Any]) -> Iterator[PyTree]:
    """What is said of real training on a task, by schedule."""
    for schedule, seen in runs_of(TASKS[task](), name, **cells).items():
        about = {"task": task, "schedule": schedule}
        if name == ADAMW:
            for rule, issues in RULES.items():
                verdicts = np.asarray(verdicts_of(rule, seen.loss, seen.grad_norm))
                counts = count(verdicts, issues)
                yield {"judged_by": TOLD_ONLY[rule], **about, "all": counts}
            continue
        # until its start is known to be good and its rate is found, lalerg tries
        # rates that are too high, and goes back from them
        is_settled = seen.is_searching == 0
        if name == SEARCHING:
            is_settled &= seen.num_audits_passed > 0
        settled = count(np.where(is_settled, seen.verdict, 0), 2)
        yield {
            "judged_by": name,
            **about,
            "all": count(seen.verdict, 2),
            "settled": settled | {"steps": int(is_settled.sum())},
            "alarms": listed(seen, is_settled, cells["rates"], cells["num_seeds"]),
        }


# Results


class Results(Store):
    """What has been measured, in parts."""

    identity = ("part",)

    def entries(self, part: str) -> list[dict[str, Any]]:
        """Returns all entries of parts whose names begin so."""
        runs = [run for (name,), run in self.runs.items() if name.startswith(part)]
        return [entry for run in runs for entry in run["entries"]]


class Job(NamedTuple):
    """A part of the whole: its name, its size, and what measures it."""

    name: str
    cells: dict[str, Any]
    measure: Callable[..., Iterator[dict[str, Any]]]


def jobs(only: list[str], tasks: list[str], quick: bool) -> Iterator[Job]:
    """Yields what is to be measured."""
    if "noise" in only:
        total = {"total": 20_000 if quick else NUM_NOISE_STEPS}
        for name in QUICK_NOISES if quick else NOISES:
            yield Job(f"noise: {name}", total, partial(measure_noise, name))
        yield Job("units", total, measure_units)
    if "training" not in only:
        return
    decades = Decades(RESULTS / "decades.json")
    decades.load()
    for name in OPTIMIZERS:
        for task in QUICK_TASKS if quick else tasks:
            tuned = decades.reference(task, "rates")
            cells = {
                "rates": [float(f"{share * tuned:.4g}") for share in SHARES],
                "num_seeds": 1 if quick or task in COSTLY else NUM_SEEDS,
                "num_steps": decades.runs[task, ADAMW]["num_steps"],
            }
            yield Job(
                f"training: {name}: {task}",
                cells,
                lambda name=name, task=task, **cells: measure_task(name, task, cells),
            )


def entries_of(job: Job) -> dict[str, Any]:
    """Returns what is stored of a job."""
    return {"entries": list(job.measure(**job.cells))}


def measure_all(results: Results, todo: list[Job], force: bool) -> None:
    """Measures and stores every part that is not stored yet."""
    with Progress() as progress:
        bar = progress.add_task("", total=len(todo))
        for job in todo:
            progress.update(bar, description=job.name[:48].ljust(48))
            results.measure((job.name,), job.cells, partial(entries_of, job), force)
            progress.advance(bar)


# Tables


def total(entries: list[dict[str, Any]], key: str = "all") -> dict[str, int]:
    """Returns the sums of counts."""
    names = ("steps", "skips", "reverts")
    return {n: sum(e[key][n] for e in entries if key in e) for n in names}


def per_10_000(number: float, steps: int) -> str:
    """Returns a frequency as a table shows it."""
    return f"{1e4 * number / steps:.2g}" if steps else ""


def training_table(results: Results) -> list[str]:
    """Returns what was objected to in real training."""
    entries = results.entries("training")
    rows = []
    for name in dict.fromkeys(e["judged_by"] for e in entries):
        own = [e for e in entries if e["judged_by"] == name]
        row = [name, f"{total(own)['steps']:,}"]
        for tasks in (TASKS, DEVELOPMENT, REPORT):
            sums = total([e for e in own if e["task"] in tasks])
            row += [per_10_000(sums["skips"], sums["steps"]), str(sums["reverts"])]
        if "settled" in own[0]:
            sums = total(own, "settled")
            row += [per_10_000(sums["skips"], sums["steps"]), str(sums["reverts"])]
        else:
            row += ["", ""]
        rows.append(row)
    header = ["judged by", "steps"]
    for name in ("all tasks", "chosen on", "not chosen on", "all, rate found"):
        header += [f"{name}: skips in 10,000", "reverts"]
    return table(header, rows)


def alarms_table(results: Results) -> list[str]:
    """Returns every alarm in real training."""
    rows = []
    for e in results.entries("training"):
        for a in e.get("alarms", []):
            if a["cause"] in (AUDIT, SECOND):
                continue
            errors = (
                f"{a[name]:.2f}" if abs(a[name]) < 1e3 else f"{a[name]:.0e}"
                for name in SIGNALS[2:]
            )
            rows.append(
                [
                    e["judged_by"],
                    e["task"],
                    f"{e['schedule']} {a['rate']:.1e}, seed {a['seed']}",
                    str(a["step"]),
                    a["verdict"],
                    a["cause"] + ("" if a["is_settled"] else ", rate not found yet"),
                    f"{a['loss']:.3g}",
                    f"{a['grad_norm']:.3g}",
                    *errors,
                ]
            )
    header = ["judged by", "task", "rate", "step", "verdict", "because of"]
    header += ["loss", "norm", "error: loss", "norm "]
    more = max(0, len(rows) - MAX_LISTED)
    lines = table(header, rows[:MAX_LISTED])
    return [*lines, f"And {more} more, in the JSON file.", ""] if more else lines


def noise_table(results: Results) -> list[str]:
    """Returns what was objected to in noise."""
    entries = results.entries("noise")
    rows = []
    for name in dict.fromkeys(e["noise"] for e in entries):
        own = {e["rule"]: e for e in entries if e["noise"] == name}
        skips, reverts = (f"{most:g}" for most in NOISES[name].most)
        row = [name, f"{own['error_regulate']['steps']:,}", skips, reverts]
        for rule in RULES:
            steps = own[rule]["steps"]
            row += [per_10_000(own[rule][k], steps) for k in ("skips", "reverts")]
        rows.append(row)
    header = ["noise of the loss", "steps", "at most: skips", "reverts"]
    for rule in RULES:
        header += [f"{rule}: skips", "reverts"]
    return table(header, rows)


def units_table(results: Results) -> list[str]:
    """Returns whether the unit of the loss makes a difference."""
    keys = ("steps", "skips", "reverts", "different")
    rows = [
        [e["variant"], *(f"{e[key]:,}" for key in keys)]
        for e in results.entries("units")
    ]
    header = ["loss", "steps", "skips", "reverts", "steps judged differently"]
    return table(header, rows)


def report(results: Results) -> str:
    """Returns everything as Markdown."""
    lines = [
        "# False alarms",
        "",
        results.made(),
        "",
        "Nothing is wrong with any of these runs. A rule that only skips has no "
        "reverts; in its place two alarms in a row are counted.",
        "",
    ]
    if results.entries("training"):
        rates = "a tenth, a third and all of tuned AdamW's rate"
        lines += [
            "## Real training",
            "",
            f"At {rates}, with linear decay to zero and a constant rate. *Told only*: "
            "the rule sees plain AdamW's losses and gradient norms and changes "
            'nothing. "Chosen on" are the tasks on which constants of the library '
            'were chosen. "Rate found" leaves out the steps in which lalerg still '
            "tries higher and higher rates, or goes back from a start that failed.",
            "",
            *training_table(results),
            "## Every alarm",
            "",
            "What the optimizers objected to, in the order of the table, but for the "
            "second steps of reverts and the failed starts that an audit told:",
            "",
            *alarms_table(results),
        ]
    if results.entries("noise"):
        lines += [
            "## Noise",
            "",
            "In 10,000 steps. Gradient norms have 30 % of lognormal noise unless said "
            "otherwise; the falling losses follow AdamW's curves on the tasks.",
            "",
            *noise_table(results),
        ]
    if results.entries("units"):
        lines += [
            "## The same noise in other units",
            "",
            "Student t(3), 20 %, judged by `error_regulate`.",
            "",
            *units_table(results),
        ]
    return "\n".join(lines)


def main() -> None:
    """Measures, stores, and writes the tables."""
    options = options_of(__doc__, PARTS, tuple(TASKS), tuple(TASKS))
    results = opened(Results, "alarms", options)
    if not options.report_only:
        todo = list(jobs(options.only, options.tasks, options.quick))
        measure_all(results, todo, options.force)
    publish(results, report(results))


if __name__ == "__main__":
    main()
