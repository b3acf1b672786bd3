"""What protection costs: time, memory and compilation of a step, next to its peers.

Times are ratios: every optimizer takes its steps in turn with the one that it is
compared with, in one process, because machines are noisy. Beside them stand XLA's own
counts, which are not. Two figures are told for the ratio: the median, and the mean over
the whole of several periods of the anchor, in which the rare steps have their share.

    python benchmarks/cost.py                       # all, about 25 minutes on 2 cores
    python benchmarks/cost.py --quick               # all of it, small and rough
    python benchmarks/cost.py --only steps train    # some of it
    python benchmarks/cost.py --device cuda         # the same on a GPU
"""

import argparse
import json
import os
import platform
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from rich.progress import track

import lalerg_optax as lo

PyTree = Any
RATE = 1e-9  # the gradient does not change, and a search would take params far away
CLIP = 1.0
WARM_UP = 300  # steps, after which the anchor moves as seldom as it ever does
PERIOD = 32  # steps from anchor to anchor


class Row(NamedTuple):
    """An optimizer, what it is compared with, and how much longer it may take."""

    name: str
    make: Callable[[], Any]
    against: str = "adamw"
    limit: float | None = None


def skip_step(inner: optax.GradientTransformation, window: int = 128) -> Any:
    """The skip-step rule of MaxText, levanter and OLMo, restated.

    The update is zeroed if loss or gradient norm exceeds the mean plus six standard
    deviations of the last 128 steps.
    """
    inner = optax.with_extra_args_support(inner)

    def init_fn(params: PyTree) -> PyTree:
        return jnp.zeros((2, window)), jnp.zeros((), jnp.int32), inner.init(params)

    def update_fn(
        updates: PyTree, state: PyTree, params: Any = None, *, value: Any, **extra: Any
    ) -> PyTree:
        recent, count, inner_state = state
        now = jnp.stack([value, optax.tree.norm(updates)])
        limit = recent.mean(axis=1) + 6.0 * recent.std(axis=1)
        is_good = jnp.all(now <= limit) | (count < window)
        updates, inner_state = inner.update(updates, inner_state, params, **extra)
        updates = jax.tree.map(lambda u: jnp.where(is_good, u, 0), updates)
        recent = recent.at[:, count % window].set(now)
        return updates, (recent, count + 1, inner_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


INNER: dict[str, Callable[[], Any]] = {
    "adamw": lambda: optax.adamw(RATE),
    "lion": lambda: optax.lion(RATE),
    "sgd, momentum": lambda: optax.sgd(RATE, momentum=0.9),
    "adafactor": lambda: optax.adafactor(RATE),
    "muon": lambda: optax.contrib.muon(RATE),
}
BASES: dict[str, Callable[[], Any]] = INNER | {
    "clip, adamw": lambda: optax.chain(
        optax.clip_by_global_norm(CLIP), optax.adamw(RATE)
    ),
    "apply_if_finite(adamw)": lambda: optax.apply_if_finite(optax.adamw(RATE), 5),
}
LALERG = Row("lalerg", lambda: lo.lalerg(RATE), limit=1.35)
ROWS = (
    LALERG,
    Row("lalerg, search=False", lambda: lo.lalerg(RATE, search=False)),
    Row("lalerg, bf16 anchor", lambda: lo.lalerg(RATE, anchor_dtype="bfloat16")),
    Row(
        "lalerg, anchor in host memory",
        lambda: lo.lalerg(RATE, anchor_memory="pinned_host"),
    ),
    Row(
        "lalerg, clip_norm", lambda: lo.lalerg(RATE, clip_norm=CLIP), "clip, adamw", 0.6
    ),
    LALERG._replace(against="apply_if_finite(adamw)", limit=0.5),
    *(
        Row(
            f"error_regulate({name})",
            lambda make=make: lo.error_regulate(make()),
            name,
            1.6,
        )
        for name, make in INNER.items()
    ),
    Row("clip, adamw", BASES["clip, adamw"]),
    Row("apply_if_finite(adamw)", BASES["apply_if_finite(adamw)"]),
    Row("skip step, 6 sd (adamw)", lambda: skip_step(optax.adamw(RATE))),
    Row("prodigy", lambda: optax.contrib.prodigy(RATE)),
    Row(
        "mechanize(adamw)",
        lambda: optax.contrib.mechanize(optax.adamw(RATE), weight_decay=0.0),
    ),
    Row("schedule_free_adamw", lambda: optax.contrib.schedule_free_adamw(RATE)),
)


class Step:
    """A compiled optimizer step with donated buffers, and what it is fed."""

    def __init__(self, make: Callable[[], Any], params: PyTree) -> None:
        tx = optax.with_extra_args_support(make())

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
    steps = [Step(BASES[row.against], params), Step(row.make, params)]
    base, own = (step.counts() for step in steps)
    return {
        "optimizer": row.name,
        "against": row.against,
        "limit": row.limit,
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


def measure_steps(quick: bool) -> Iterator[dict[str, Any]]:
    """The optimizer step alone, with its parameters in 32 matrices."""
    num_params = 2**21 if quick else 2**25
    params = make_params(num_params, 32)
    # AdamW reads p, g, mu, nu and writes p, mu, nu; lalerg reads g and the anchor more
    least_bytes = {"lalerg": 36, "lalerg, search=False": 36}
    for row in ROWS:
        before = copy_bandwidth(num_params)
        entry = compare(row, params, seconds=1.0 if quick else 12.0)
        bandwidth = (before + copy_bandwidth(num_params)) / 2
        entry |= {"num_params": num_params, "copy_bandwidth": bandwidth}
        for name, key in (("adamw", "base_milliseconds"), ("lalerg", "milliseconds")):
            if entry["optimizer" if name == "lalerg" else "against"] == name:
                rate = least_bytes.get(name, 28) * num_params / (1e-3 * entry[key])
                entry[f"share_of_bandwidth_{name}"] = rate / bandwidth
        yield entry


def measure_sizes(quick: bool) -> Iterator[dict[str, Any]]:
    """Growing numbers of parameters, and params in bfloat16."""
    sizes = (10**6, 3 * 10**6) if quick else (10**6, 10**7, 5 * 10**7, 2 * 10**8)
    for num_params in sizes:
        params = make_params(num_params, 16)
        yield compare(LALERG, params, 1.0 if quick else 8.0) | {
            "limit": None,
            "num_params": num_params,
            "params": "float32",
        }
    params = make_params(sizes[-2], 16, jnp.bfloat16)
    yield compare(LALERG, params, 1.0 if quick else 8.0) | {
        "limit": None,
        "num_params": sizes[-2],
        "params": "bfloat16",
    }


def measure_leaves(quick: bool) -> Iterator[dict[str, Any]]:
    """Many small leaves, of about 1,000 entries."""
    num_leaves = 200 if quick else 2000
    params = make_params(num_leaves * 1000, num_leaves)
    lalerg = LALERG._replace(limit=1.5)
    for row in (lalerg, Row("clip, adamw", BASES["clip, adamw"])):
        yield compare(row, params, 1.0 if quick else 12.0) | {"num_leaves": num_leaves}


def measure_compilation(quick: bool) -> Iterator[dict[str, Any]]:
    """Tracing, lowering and compiling the optimizer step."""
    rows = (
        Row("adamw", BASES["adamw"]),
        LALERG,
        Row("lalerg, search=False", lambda: lo.lalerg(RATE, search=False)),
        Row("error_regulate(adamw)", lambda: lo.error_regulate(optax.adamw(RATE))),
        Row("clip, adamw", BASES["clip, adamw"]),
        Row("apply_if_finite(adamw)", BASES["apply_if_finite(adamw)"]),
    )
    for num_leaves in (4, 100) if quick else (4, 32, 150, 500, 2000):
        base = 0.0
        for row in rows:
            step = Step(row.make, make_params(1000 * num_leaves, num_leaves))
            step.args = (*step.carry, step.grads, jnp.float32(1.0))
            again = 0 if num_leaves > 500 else 2
            times = [step.compile_seconds, *(step.compile()[1] for _ in range(again))]
            seconds = float(np.median(times))
            base = base or seconds
            yield {
                "optimizer": row.name,
                "against": "adamw",
                "num_leaves": num_leaves,
                "seconds": seconds,
                "ratio": seconds / base,
                "limit": 1.5 if row.name == "lalerg" else None,
            }


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

    def __init__(self, make: Callable[[], Any], model: nn.Module, tokens: Any) -> None:
        tx = optax.with_extra_args_support(make())

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


def measure_training(quick: bool) -> Iterator[dict[str, Any]]:
    """The whole training step of a transformer, on 32 x 128 tokens."""
    model = Transformer(width=96, depth=2) if quick else Transformer()
    tokens = jax.random.randint(jax.random.key(1), (32, 129), 0, 256)
    for row in (LALERG._replace(limit=1.02),):
        makers = (lambda: optax.adamw(1e-4), row.make)
        steps: list[Step] = [TrainingStep(make, model, tokens) for make in makers]
        repeats = 4 if quick else 30
        for step in steps:
            step(0.0)
        times = [[step(0.0) for step in steps] for _ in range(repeats)]
        yield {
            "optimizer": row.name,
            "against": "adamw",
            "limit": row.limit,
            "num_params": steps[1].num_params,
            **ratio_of(np.asarray(times)),
            "compile_seconds": steps[1].compile_seconds,
            "base_compile_seconds": steps[0].compile_seconds,
        }


PARTS: dict[str, Callable[[bool], Iterator[dict[str, Any]]]] = {
    "steps": measure_steps,
    "sizes": measure_sizes,
    "leaves": measure_leaves,
    "compilation": measure_compilation,
    "training": measure_training,
}
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
    "seconds": "seconds",
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


def table(entries: list[dict[str, Any]]) -> str:
    """Returns entries as a Markdown table of the columns that they have."""
    names = [c for c in COLUMNS if any(e.get(c) is not None for e in entries)]
    rows = [[COLUMNS[c].strip() for c in names], ["---"] * len(names)]
    rows += [[as_text(entry.get(c)) for c in names] for entry in entries]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def report(results: dict[str, Any]) -> str:
    """Returns everything as Markdown."""
    machine = results["machine"]
    lines = [
        "# What protection costs",
        "",
        f"Made with `{results['command']}` on {machine['device']}, "
        f"{machine['cores']} cores; Python {machine['python']}, "
        f"JAX {machine['jax']}, Optax {machine['optax']}. Ratios are medians of steps "
        "taken in turn; bytes, temporaries (bytes) and state (entries) are per "
        "parameter and come from XLA.",
        "",
    ]
    for part, entries in results["parts"].items():
        title = (PARTS[part].__doc__ or "").strip()
        lines += [f"## {title}", "", table(entries), ""]
    return "\n".join(lines)


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", help="cpu, cuda, rocm or tpu")
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--quick", action="store_true", help="small and rough")
    parser.add_argument("--trace", type=Path, help="write a profile to this folder")
    parser.add_argument("--out", type=Path, help="write PATH.json and PATH.md")
    options = parser.parse_args()
    jax.config.update("jax_platforms", options.device)

    quick = " --quick" if options.quick else ""
    device = jax.devices()[0]
    results: dict[str, Any] = {
        "command": f"python benchmarks/cost.py --device {options.device}{quick}",
        "machine": {
            "device": f"{platform.machine()} {device.device_kind}",
            "cores": len(os.sched_getaffinity(0)),
            "python": platform.python_version(),
            "jax": jax.__version__,
            "optax": optax.__version__,
        },
        "parts": {},
    }
    if options.trace:
        jax.profiler.start_trace(str(options.trace))
    for part in options.only:
        entries = results["parts"][part] = []
        for entry in track(PARTS[part](options.quick), description=f"{part:12}"):
            entries.append(entry)
            if options.out:  # nothing is lost if the run ends early
                options.out.parent.mkdir(parents=True, exist_ok=True)
                options.out.with_suffix(".json").write_text(
                    json.dumps(results, indent=1) + "\n"
                )
    if options.trace:
        jax.profiler.stop_trace()
    print(report(results))
    if options.out:
        options.out.with_suffix(".md").write_text(report(results) + "\n")


if __name__ == "__main__":
    main()
