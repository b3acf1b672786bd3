"""Rate: the learning rate of an optimizer, found in what it is made of.

Optax keeps the step of a schedule in its state, and the schedule itself in the closure
of the update. Both are needed to tell the rate. Where a part is made in another way,
the rate is not known, and nothing else depends on it.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ._find import find_states
from ._numbers import UNKNOWN

# states of what finds a rate by itself
OWN_RATE: tuple[type, ...] = (
    *(
        getattr(optax.contrib, name)
        for name in (
            *("COCOBState", "DAdaptAdamWState", "DoGState", "DoWGState"),
            *("MechanicState", "MomoAdamState", "MomoState", "ProdigyState"),
            *("ReduceLROnPlateauState", "ScheduleFreeState"),
        )
    ),
    optax.ScaleByBacktrackingLinesearchState,
    optax.ScaleByZoomLinesearchState,
)
_INJECTED = (optax.InjectHyperparamsState, optax.InjectStatefulHyperparamsState)


def enclosed(function: Any) -> dict[str, Any]:
    """Returns what a function of Optax takes from the one that it was made in."""
    module = getattr(function, "__module__", None) or ""
    if module.partition(".")[0] not in ("optax", "lalerg_optax"):
        return {}  # names in other closures may mean anything
    try:
        return dict(inspect.getclosurevars(function).nonlocals)
    except (TypeError, ValueError):  # no Python function, or not all is there yet
        return {}


def _factors(update: Callable[..., Any], state: Any) -> list[Any]:
    """Returns the factors that the links of a chain multiply updates by.

    None stands for what is frozen, whatever its rate.
    """
    made_of = enclosed(update)
    if getattr(update, "__qualname__", "").startswith("set_to_zero."):
        return [None]
    if hasattr(made_of.get("tx"), "update"):  # a wrapper without a state
        return _factors(made_of["tx"].update, state)
    if isinstance(state, _INJECTED):  # the update computes the rate of its step
        schedule = made_of.get("sched_hps", {}).get("learning_rate")
        if schedule is not None:
            return [schedule(state.hyperparams_states["learning_rate"])]
        return [state.hyperparams.get("learning_rate", UNKNOWN)]
    if "update_fns" in made_of and isinstance(state, tuple):
        pairs = zip(made_of["update_fns"], state, strict=False)
        return [factor for link in pairs for factor in _factors(*link)]
    if "step_size_fn" in made_of and isinstance(state, optax.ScaleByScheduleState):
        return [made_of["step_size_fn"](state.count)]
    if "step_size" in made_of and state == optax.EmptyState():
        return [made_of["step_size"]]
    if "transforms" in made_of and isinstance(state, optax.PartitionState):
        groups = [
            _of_group(tx.update, state.inner_states[name].inner_state)
            for name, tx in made_of["transforms"].items()
            if name in state.inner_states
        ]
        return _common([rate for rates in groups for rate in rates])
    if hasattr(made_of.get("inner"), "update") and hasattr(state, "inner_state"):
        return _factors(made_of["inner"].update, state.inner_state)
    return []


def _of_group(update: Callable[..., Any], state: Any) -> list[jax.Array]:
    """Returns the rate of a group: 1 without any, and nothing if it is frozen."""
    factors = _factors(update, state)
    if factors and all(factor is None for factor in factors):
        return []
    return _product(factors, state) or [jnp.ones((), jnp.float32)]


def _product(factors: list[Any], state: Any) -> list[jax.Array]:
    """Returns the product of all factors, which may be unknown; nothing without any."""
    factors = [f for f in factors if f is not None and jnp.ndim(f) == 0]
    rates = [f for f in factors if isinstance(f, jax.Array) or abs(f) != 1.0]
    if not factors:
        return []
    if len(rates) > 1 and _has_masks(state):
        return [jnp.full((), UNKNOWN, jnp.float32)]
    values = [jnp.asarray(factor, jnp.float32) for factor in factors]
    is_known = jnp.stack([value != UNKNOWN for value in values]).all()
    product = jnp.abs(functools.reduce(jnp.multiply, values))
    return [jnp.where(is_known & jnp.isfinite(product), product, UNKNOWN)]


def _has_masks(state: Any) -> bool:
    """Returns whether anything is masked, apart from the groups of a partition."""
    kinds = (optax.MaskedState, optax.PartitionState)
    nodes = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, kinds))
    return any(isinstance(node, optax.MaskedState) for node in nodes)


def _common(rates: list[jax.Array]) -> list[jax.Array]:
    """Returns the rate of all groups, if they have the same."""
    if not rates:
        return []
    is_same = jnp.stack([rate == rates[0] for rate in rates]).all()
    return [jnp.where(is_same, rates[0], UNKNOWN)]


def learning_rate(tx: Any, state: Any) -> jax.Array:
    """Returns the learning rate of the next step of ``tx``, or `UNKNOWN`.

    It is the size of the product of all constants and schedules that updates are
    multiplied by: in chains, in Optax's own optimizers, in ``optax.inject_hyperparams``
    and, where all groups have the same, in ``optax.partition``.
    """
    unknown = jnp.full((), UNKNOWN, jnp.float32)
    if any(find_states(state, kind) for kind in OWN_RATE):
        return unknown
    try:
        rates = _product(_factors(tx.update, state), state)
    except Exception:  # a schedule that cannot be traced, say
        return unknown
    return rates[0] if rates else unknown
