"""Every optimizer that is compared, once, in its most favourable documented form.

A benchmark chooses from these, and may call one by another name. Those that find a
rate themselves stand in ``rate_free.py``, the methods that ``methods.py`` protects in
``recipes.py``.
"""

import importlib
import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

import lalerg_optax as lo

PyTree = Any
Make = Callable[[Any, int], Any]
WEIGHT_DECAY = 1e-4  # Optax's default for AdamW, given to all that take one
NUM_ERRORS = 10**6  # in a row that are tolerated: any number

# Learning rates over a run


def linear(rate: Any, num_steps: int) -> optax.Schedule:
    """Returns the decay to zero that everyone gets who wants one."""
    return optax.linear_schedule(rate, 0.0, num_steps)


def warmup_cosine(rate: Any, num_steps: int, part: int = 10) -> optax.Schedule:
    """Returns a cosine decay after a warm-up of a part of the run, usually a tenth."""
    shape = optax.warmup_cosine_decay_schedule(0.0, 1.0, num_steps // part, num_steps)
    return lambda count: rate * shape(count)


def as_it_is(rate: Any, num_steps: int) -> Any:
    """Returns the rate."""
    del num_steps
    return rate


class Peer(NamedTuple):
    """An optimizer.

    Attributes:
      name: how the tables call it.
      make: (learning rate or schedule, number of steps) to the transformation.
      note: how it is run, and why so.
      sweep_note: the same where its rate is swept, with what becomes of the rate; as
        ``note`` if empty.
      schedule: (learning rate, number of steps) to what ``make`` is given where it is
        swept.
      eval_params: (state, params) to the params to evaluate.
      is_own: whether it is of this library.
      package: what has to be installed for it, besides what all need.
    """

    name: str
    make: Make
    note: str = ""
    sweep_note: str = ""
    schedule: Callable[[Any, int], Any] = linear
    eval_params: Callable[[PyTree, PyTree], PyTree] = lambda state, params: params
    is_own: bool = False
    package: str = ""

    @property
    def is_there(self) -> bool:
        """Whether what it needs is installed."""
        return not self.package or importlib.util.find_spec(self.package) is not None

    def at(self, rate: Any, num_steps: int) -> Any:
        """Returns the transformation where the rate is swept."""
        return self.make(self.schedule(rate, num_steps), num_steps)

    def apply(self, params: PyTree, updates: PyTree, state: PyTree) -> PyTree:
        """Returns the new params, as the optimizer's own documentation has it."""
        if self.is_own:
            return lo.apply_updates(params, updates, state)
        return optax.apply_updates(params, updates)


def of(factory: Callable[..., Any], **options: Any) -> Make:
    """Returns a ``make`` of a factory that need not know the number of steps."""
    return lambda rate, n: factory(rate, **options)


# AdamW, bare and guarded

adamw = partial(optax.adamw, weight_decay=WEIGHT_DECAY)


def skip_step(inner: optax.GradientTransformation, window: int = 128) -> Any:
    """The skip-step rule of MaxText, levanter and OLMo, restated.

    Where loss or gradient norm exceeds the mean plus six standard deviations
    (Bessel's) of the last 128 steps, the update is zero and ``inner`` keeps its state.
    It begins when half of the window is full; every value is recorded, also NaN.

    References:
      ``skip_step_on_spikes`` in `AI-Hypercomputer/maxtext
      <https://github.com/AI-Hypercomputer/maxtext>`_.
    """
    inner = optax.with_extra_args_support(inner)

    def init_fn(params: PyTree) -> PyTree:
        return jnp.zeros((2, window)), jnp.zeros((), jnp.int32), inner.init(params)

    def update_fn(
        updates: PyTree, state: PyTree, params: Any = None, *, value: Any, **extra: Any
    ) -> PyTree:
        recent, count, inner_state = state
        now = jnp.stack([value, optax.tree.norm(updates)])
        number = jnp.minimum(count, window)
        is_there = (jnp.arange(window) < number)[None]
        mean = recent.sum(axis=1, where=is_there) / jnp.maximum(number, 1)
        squares = jnp.square(recent - mean[:, None]).sum(axis=1, where=is_there)
        std = jnp.sqrt(squares / jnp.maximum(number - 1, 1))
        is_good = jnp.all(now <= mean + 6.0 * std) | (count + 1 < max(2, window // 2))
        updates, inner_state = lax.cond(
            is_good,
            lambda: inner.update(updates, inner_state, params, **extra),
            lambda: (optax.tree.zeros_like(updates), inner_state),
        )
        recent = recent.at[:, count % window].set(now)
        return updates, (recent, count + 1, inner_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def mad_step(inner: optax.GradientTransformation, window: int = 128) -> Any:
    """Skips where the loss exceeds the median plus six times its absolute deviation.

    The deviation is the median absolute one of the last 128 losses times 1.4826, the
    usual robust estimate of a standard deviation. An alarm is recorded as the largest
    loss that was tolerated, as in `lalerg_optax.error_regulate`.
    """

    def init_fn(params: PyTree) -> PyTree:
        return jnp.zeros(window), jnp.zeros((), jnp.int32), inner.init(params)

    def update_fn(
        updates: PyTree, state: PyTree, params: Any = None, *, value: Any, **extra: Any
    ) -> PyTree:
        recent, count, inner_state = state
        median = jnp.median(recent)
        deviation = 1.4826 * jnp.median(jnp.abs(recent - median))
        limit = jnp.where(count < window, jnp.inf, median + 6.0 * deviation)
        updates, inner_state = inner.update(updates, inner_state, params)
        updates = jax.tree.map(lambda u: jnp.where(value <= limit, u, 0), updates)
        recent = recent.at[count % window].set(jnp.minimum(value, limit))
        return updates, (recent, count + 1, inner_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


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


def blind(inner: optax.GradientTransformation) -> Any:
    """Drops every batch that has something rare in it: what a censor would do."""

    def update_fn(
        updates: PyTree,
        state: PyTree,
        params: Any = None,
        *,
        is_rare: Any,
        **extra: Any,
    ) -> PyTree:
        del extra
        after = inner.update(updates, state, params)
        before = optax.tree.zeros_like(updates), state
        return jax.tree.map(lambda b, a: jnp.where(is_rare, b, a), before, after)

    return optax.GradientTransformationExtraArgs(inner.init, update_fn)


ADAMW = Peer(
    "adamw",
    of(adamw),
    "`optax.adamw`",
    "linear decay to zero; also the reference, which is the best of 17 half decades",
)
CONSTANT = ADAMW._replace(
    name="adamw, constant", sweep_note="no schedule", schedule=as_it_is
)
WARMED_UP = ADAMW._replace(
    name="adamw, warm-up and cosine", sweep_note="the same", schedule=warmup_cosine
)
NADAMW = Peer(
    "nadamw", of(optax.nadamw, weight_decay=WEIGHT_DECAY), sweep_note="linear decay"
)
CLIPPED = Peer(
    "clip + adamw",
    lambda rate, n: optax.chain(optax.clip_by_global_norm(1.0), adamw(rate)),
    "global norm 1",
    "global norm 1, linear decay",
)
FINITE = Peer(
    "apply_if_finite(adamw)",
    lambda rate, n: optax.apply_if_finite(adamw(rate), NUM_ERRORS),
    "any number of errors in a row is tolerated",
    "linear decay; any number of errors in a row is tolerated",
)
SKIPPING = Peer(
    "skip_step(adamw)",
    lambda rate, n: skip_step(adamw(rate)),
    "loss or norm above mean + 6 sd of 128 steps is dropped",
    "linear decay; loss or norm above mean + 6 sd of 128 steps is dropped",
)
ZCLIPPED = Peer(
    "zclip + adamw",
    lambda rate, n: optax.chain(zclip(), adamw(rate)),
    "norms with a z-score above 2.5 are clipped, restated from arXiv 2504.02507",
)
BLIND = Peer(
    "adamw, blind",
    lambda rate, n: blind(adamw(rate)),
    "drops whatever has something rare in it, to show what a failure looks like",
)
PLATEAU = Peer(
    "reduce_on_plateau(adamw)",
    lambda rate, n: optax.chain(
        adamw(rate),
        optax.contrib.reduce_on_plateau(
            factor=0.5, patience=5, accumulation_size=max(1, n // 40)
        ),
    ),
    sweep_note="factor and patience of Optax's example, with means of a fortieth of "
    "the run",
    schedule=as_it_is,
)

# Other methods, at a rate that has to be tuned, or at the one that is recommended

# mlcommons/algorithmic-efficiency,
# algorithms/baselines/self_tuning/jax_nadamw_full_budget.py, HPARAMS; without its
# dropout, which is the model's, and with Optax's bias correction at the first steps
ALGOPERF_RATE = 0.0017486387539278373
ALGOPERF = Peer(
    "nadamw, AlgoPerf's setting",
    of(
        optax.nadamw,
        b1=1.0 - 0.06733926164,
        b2=0.9955159689799007,
        weight_decay=0.08121616522670176,
    ),
    sweep_note="`optax.nadamw` as AlgoPerf's baseline without tuning has it: rate "
    "0.00175, b1 = 0.933, b2 = 0.9955, weight decay 0.0812, 2 % of warm-up, cosine "
    "decay. One rate, so three runs a task",
    schedule=partial(warmup_cosine, part=50),
)


def slow_decay(b1: float, b3: float, num_steps: int) -> optax.Schedule:
    """Returns AdEMAMix's decay of the slow average: its half-life grows linearly."""

    def schedule(count: Any) -> Any:
        progress = jnp.minimum(count / num_steps, 1.0)
        slowness = (1.0 - progress) / jnp.log(b1) + progress / jnp.log(b3)
        return jnp.exp(1.0 / slowness)

    return schedule


ADEMAMIX = Peer(
    "ademamix",
    lambda rate, n: optax.contrib.ademamix(
        rate,
        b3=slow_decay(0.9, 0.999, n),
        alpha=optax.linear_schedule(0.0, 5.0, n),
        weight_decay=WEIGHT_DECAY,
    ),
    sweep_note="linear decay; alpha to 5 and b3 to 0.999, which Optax names for short "
    "runs, grow over the run as its authors have it",
)


def matrices_of(params: PyTree) -> PyTree:
    """Returns which axes of a leaf of Flax's are a matrix, for Muon.

    Those of two axes, as in Optax, but for biases; and the kernels of attention, where
    the axis that is split into heads counts as one.
    """

    def axes_of(path: Any, leaf: Any) -> Any:
        names = [getattr(entry, "key", None) for entry in path]
        if "bias" in names or leaf.ndim not in (2, 3):
            return None
        if leaf.ndim == 2:
            return optax.contrib.MuonDimensionNumbers(0, 1)
        if "out" in names:
            return optax.contrib.MuonDimensionNumbers((0, 1), 2)
        return optax.contrib.MuonDimensionNumbers(0, (1, 2))

    return jax.tree_util.tree_map_with_path(axes_of, params)


MUON = Peer(
    "muon",
    of(
        optax.contrib.muon,
        weight_decay=WEIGHT_DECAY,
        adam_weight_decay=WEIGHT_DECAY,
        consistent_rms=0.2,
        muon_weight_dimension_numbers=matrices_of,
    ),
    sweep_note="`optax.contrib.muon`, linear decay: Muon for all matrices, those of "
    "attention too, NAdam for the rest, at one rate, with the scale of Adam "
    "(`consistent_rms=0.2`) that its docstring recommends for that",
)
AURA = Peer(
    "adam_aura",
    lambda rate, n: importlib.import_module("aura_optax").adam_aura(
        rate, weight_decay=WEIGHT_DECAY
    ),
    sweep_note="`aura_optax.adam_aura`: Adam with a multiplier of each parameter that "
    "follows how far consecutive updates agree; linear decay",
    package="aura_optax",
)

# This library


def lalerg(**options: Any) -> Make:
    """Returns a ``make`` of `lalerg_optax.lalerg`."""
    return of(lo.lalerg, **{"weight_decay": WEIGHT_DECAY} | options)


LALERG = Peer("lalerg", lalerg(), "`search=True`", "linear decay to zero", is_own=True)
NO_SEARCH = LALERG._replace(
    name="lalerg without search",
    make=lalerg(search=False),
    note="`search=False`",
    sweep_note="search=False, linear decay to zero",
)
ADAMS_RULE = LALERG._replace(
    name="lalerg with Adam's rule",
    make=lalerg(b2=0.999, gradient_share=0.0),
    sweep_note="b2=0.999, gradient_share=0, linear decay to zero",
)
LONG_MEMORY = LALERG._replace(
    name="lalerg, b2 = 0.999",
    make=lalerg(b2=0.999),
    note="a second moment that remembers ten times as long",
)
DEFAULT = LALERG._replace(
    name="lalerg()",
    make=lambda rate, n: lo.lalerg(),
    sweep_note="no argument, no schedule, number of steps not known",
)
REGULATED = Peer(
    "error_regulate(adamw)",
    lambda rate, n: lo.error_regulate(adamw(rate)),
    "all defaults",
    "linear decay to zero",
    is_own=True,
)

# Only their steps are timed (``cost.py``): with the defaults of Optax, but for the
# decay of mechanize, which would be taken beside AdamW's

BASES = (
    ADAMW,
    Peer("lion", of(optax.lion)),
    Peer("sgd, momentum", of(optax.sgd, momentum=0.9)),
    Peer("adafactor", of(optax.adafactor)),
    Peer("muon", of(optax.contrib.muon)),
)
TIMED = (
    LALERG._replace(name="lalerg, bf16 anchor", make=lalerg(anchor_dtype="bfloat16")),
    LALERG._replace(
        name="lalerg, anchor in host memory", make=lalerg(anchor_memory="pinned_host")
    ),
)
LALERG_CLIPPED = LALERG._replace(name="lalerg, clip_norm", make=lalerg(clip_norm=1.0))
TIMED_REGULATED = tuple(
    Peer(
        f"error_regulate({base.name})",
        lambda rate, n, base=base: lo.error_regulate(base.make(rate, n)),
        is_own=True,
    )
    for base in BASES
)
TIMED_PEERS = (
    Peer("prodigy", of(optax.contrib.prodigy)),
    Peer(
        "mechanize(adamw)",
        lambda rate, n: optax.contrib.mechanize(adamw(rate), weight_decay=0.0),
    ),
    Peer("schedule_free_adamw", of(optax.contrib.schedule_free_adamw)),
)

# What a rule says of losses and norms alone, around what never moves (``alarms.py``)

RULES: dict[str, Callable[[], Any]] = {
    "error_regulate": lambda: lo.error_regulate(optax.sgd(0.0)),
    "skip step, 6 sd": lambda: skip_step(optax.identity()),
    "6 MAD": lambda: mad_step(optax.identity()),
}
