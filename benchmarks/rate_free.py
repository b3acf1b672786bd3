"""Optimizers that are compared because they find a rate themselves, or claim one.

Each stands here once, in its most favourable documented form, as in ``peers.py``.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from peers import WEIGHT_DECAY, Peer, adamw, as_it_is, linear, of

PyTree = Any


class AveragedState(NamedTuple):
    """State of `averaged`: the average, its length, and the state of the inner."""

    average: PyTree
    count: jax.Array
    inner_state: PyTree


def averaged(inner: optax.GradientTransformation, gamma: float = 8.0) -> Any:
    """Keeps the average of the params with polynomial decay that DoG's authors use."""

    def init_fn(params: PyTree) -> AveragedState:
        return AveragedState(params, jnp.zeros((), jnp.int32), inner.init(params))

    def update_fn(updates: PyTree, state: AveragedState, params: Any = None) -> PyTree:
        updates, inner_state = inner.update(updates, state.inner_state, params)
        count = state.count + 1
        weight = (1.0 + gamma) / (count + gamma)
        average = jax.tree.map(
            lambda a, p, u: a + weight * (p + u - a), state.average, params, updates
        )
        return updates, AveragedState(average, count, inner_state)

    return optax.GradientTransformation(init_fn, update_fn)


def estimating(name: str, factory: Callable[..., Any]) -> tuple[Peer, Peer]:
    """Returns the two ways to give a rate to an optimizer that estimates its own."""
    return (
        Peer(
            name,
            of(factory, weight_decay=WEIGHT_DECAY),
            sweep_note="multiplier with linear decay, as its docstring recommends",
        ),
        Peer(
            f"{name}, first estimate",
            lambda rate, n: factory(
                linear(1.0, n), estim_lr0=rate, weight_decay=WEIGHT_DECAY
            ),
            sweep_note="the rate as its first estimate, multiplier 1 with linear decay",
            schedule=as_it_is,
        ),
    )


PRODIGY, PRODIGY_FIRST = estimating("prodigy", optax.contrib.prodigy)
DADAPT, DADAPT_FIRST = estimating("dadapt_adamw", optax.contrib.dadapt_adamw)
MECHANIZED = Peer(
    "mechanize(adamw)",
    lambda rate, n: optax.contrib.mechanize(adamw(rate)),
    sweep_note="linear decay inside; its own decay left at the default that it "
    "recommends",
)
DOG = Peer(
    "dog",
    lambda rate, n: averaged(optax.contrib.dog(rate, weight_decay=WEIGHT_DECAY)),
    sweep_note="constant multiplier and the averaging that its authors recommend",
    schedule=as_it_is,
    eval_params=lambda state, params: state.average,
)
DOG_FIRST = DOG._replace(
    name="dog, first estimate",
    make=lambda rate, n: averaged(
        optax.contrib.dog(init_step=("learning_rate", rate), weight_decay=WEIGHT_DECAY)
    ),
    sweep_note="the rate as its first step, multiplier 1, the same averaging",
)
MOMO = Peer(
    "momo_adam",
    of(optax.contrib.momo_adam, weight_decay=WEIGHT_DECAY),
    sweep_note="linear decay; its lower bound 0 is one for every task",
)
SCHEDULE_FREE = Peer(
    "schedule_free_adamw",
    lambda rate, n: optax.contrib.schedule_free_adamw(
        rate, warmup_steps=n // 10, weight_decay=WEIGHT_DECAY
    ),
    sweep_note="constant after a warm-up of a tenth, evaluated at its average",
    schedule=as_it_is,
    eval_params=optax.contrib.schedule_free_eval_params,
)
SCHEDULE_FREE_DEFAULTS = SCHEDULE_FREE._replace(
    name="schedule_free_adamw, default rate",
    make=lambda rate, n: optax.contrib.schedule_free_adamw(
        rate, warmup_steps=max(1, n // 50)
    ),
    sweep_note="all defaults of Optax and of its authors: 0.0025, b1 = 0.9, no weight "
    "decay; with the warm-up of 2 % of their AlgoPerf submission, because they "
    "recommend one and name no default. One rate, so three runs a task",
)


class ScheduleFreePlusState(NamedTuple):
    """State of `schedule_free_plus`; the params are y, where gradients are taken.

    Attributes:
      x: average, which is evaluated.
      z: params that are averaged.
      mean: average of gradients.
      square: average of squared gradients.
      norm: average of the L1 norm of gradients.
      max_rate: largest rate so far.
      weight_sum: sum of all weights in the average.
      count: steps so far.
    """

    x: PyTree
    z: PyTree
    mean: PyTree
    square: PyTree
    norm: jax.Array
    max_rate: jax.Array
    weight_sum: jax.Array
    count: jax.Array


def schedule_free_plus(
    multiplier: optax.ScalarOrSchedule = 1.0,
    *,
    b1: float = 0.9,
    b2: float = 0.95,
    eps: float = 1e-8,
    beta: float = 0.9,
    last_beta: float = 0.965,
    anneal_steps: int = 0,
    start_steps: int = 0,
    power: float = 0.0,
    norm_decay: float = 0.0,
    weight_decay: float = 0.0,
) -> optax.GradientTransformationExtraArgs:
    r"""ScheduleFree+'s rule, restated from its author's reference with its defaults.

    With the loss f and its gradient g at y, and averages without bias as in Adam:

    .. math::

        \gamma &= \text{multiplier} \cdot
            \max(0, f + \beta \langle g, z - x \rangle) \, / \,
            \big( \sqrt{\pi / 2} \; \overline{\lVert g \rVert_1} \big) \\
        z &\leftarrow z - \gamma^2 \lambda y
            - \gamma \, \bar g / (\sqrt{\overline{g^2}} + \epsilon) \\
        x &\leftarrow x + c \, (z - x), \quad
            c = w_t / \textstyle\sum_s w_s, \quad
            w_t = t^\text{power} \, (\max_{s \le t} \gamma_s)^2 \\
        y &\leftarrow \beta x + (1 - \beta) z

    Args:
      multiplier: of the rate; its warm-up, if there is one.
      b1: decay of the average of gradients.
      b2: decay of the average of their squares.
      eps: added to the root of the latter.
      beta: share of the average in y at first.
      last_beta: the same after ``anneal_steps``, between which ``1 - beta`` goes
        geometrically.
      anneal_steps: 0 to leave ``beta`` as it is.
      start_steps: at first, in which x is z.
      power: of the number of the step in its weight in the average.
      norm_decay: of the average of the L1 norm; 0 for none.
      weight_decay: lambda; it is multiplied by the square of the rate.

    References:
      Defazio, `ScheduleFree+ <https://arxiv.org/abs/2605.19095>`_, 2026;
      ``adamc_schedulefree_plus_paper.py`` in `facebookresearch/schedule_free
      <https://github.com/facebookresearch/schedule_free>`_.
    """

    def init_fn(params: PyTree) -> ScheduleFreePlusState:
        zeros = optax.tree.zeros_like(params)
        zero = jnp.zeros(())
        count = jnp.zeros((), jnp.int32)
        largest = jnp.full((), eps)
        return ScheduleFreePlusState(
            params, params, zeros, zeros, zero, largest, zero, count
        )

    def update_fn(
        updates: PyTree,
        state: ScheduleFreePlusState,
        params: Any = None,
        *,
        value: Any,
        **extra: Any,
    ) -> PyTree:
        del extra
        x, z, before = state.x, state.z, state.count
        count = before + 1
        progress = jnp.minimum(before / max(anneal_steps, 1), 1.0) * (anneal_steps > 0)
        rest = (1.0 - beta) ** (1.0 - progress) * (1.0 - last_beta) ** progress
        inner = (1.0 - rest) * optax.tree.vdot(updates, optax.tree.sub(z, x))
        length = jnp.sqrt(jnp.pi / 2.0) * optax.tree.norm(updates, ord=1)
        norm = norm_decay * state.norm + (1.0 - norm_decay) * length
        unbiased = norm / (1.0 - norm_decay**count)
        polyak = jnp.maximum(0.0, value + inner) / unbiased
        polyak = jnp.where(unbiased == 0.0, 0.0, polyak)  # nothing to divide by
        factor = multiplier(before) if callable(multiplier) else multiplier
        rate = jnp.maximum(factor, eps) * polyak

        mean = optax.tree.update_moment(updates, state.mean, b1, 1)
        square = optax.tree.update_moment(updates, state.square, b2, 2)
        z = jax.tree.map(
            lambda z, y, m, s: (
                z - rate**2 * weight_decay * y - rate * m / (jnp.sqrt(s) + eps)
            ),
            z,
            params,
            optax.tree.bias_correction(mean, b1, count),
            optax.tree.bias_correction(square, b2, count),
        )
        max_rate = jnp.maximum(state.max_rate, rate)
        is_averaged = before >= start_steps
        weight = is_averaged * count**power * max_rate**2
        weight_sum = state.weight_sum + weight
        share = jnp.where(is_averaged, weight / weight_sum, 1.0)
        x = jax.tree.map(lambda x, z: (1.0 - share) * x + share * z, x, z)
        moved = jax.tree.map(
            lambda x, z, y: (1.0 - rest) * x + rest * z - y, x, z, params
        )
        return moved, ScheduleFreePlusState(
            x, z, mean, square, norm, max_rate, weight_sum, count
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def warmed_up_plus(multiplier: Any, num_steps: int) -> Any:
    """Returns ScheduleFree+ with a warm-up of a tenth, as schedule-free has it."""
    warm = max(1, num_steps // 10)
    return schedule_free_plus(
        lambda count: multiplier * jnp.minimum((count + 1) / warm, 1.0),
        anneal_steps=num_steps,
        start_steps=2 * warm,
    )


SCHEDULE_FREE_PLUS = Peer(
    "schedule_free_plus",
    warmed_up_plus,
    sweep_note="ScheduleFree+, restated from its author's reference (arXiv "
    "2605.19095): the rate as a multiplier of Polyak's step, which is 1 where it is "
    "said to need none, constant after a warm-up of a tenth; it averages after twice "
    "that, beta goes from 0.9 to 0.965 over the run, no weight decay; evaluated at its "
    "average",
    schedule=as_it_is,
    eval_params=lambda state, params: state.x,
)
SCHEDULE_FREE_PLUS_ALONE = SCHEDULE_FREE_PLUS._replace(
    name="schedule_free_plus, multiplier 1",
    sweep_note="as schedule_free_plus, but without a rate, which is how it is meant. "
    "Three runs a task",
)
