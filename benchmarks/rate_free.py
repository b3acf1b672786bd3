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
