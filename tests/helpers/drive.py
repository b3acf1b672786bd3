"""Ways to run an optimizer: fed with signals, or trained on a task.

Both are one program each, a scan over all steps, that is compiled once for the same
optimizer. Where only the end of a run counts, there is a third.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import lalerg_optax as lo


class Step(NamedTuple):
    """What is seen of one step; of a run, all of it with the steps as leading axis."""

    value: Any
    grads: Any
    before: Any  # params
    updates: Any
    params: Any
    state: Any


class Task(NamedTuple):
    """Params at first, the loss of params and a batch, and the batches of all steps."""

    params: Any
    loss_fn: Callable[[Any, Any], jax.Array]
    batches: Any


def everything(step):
    return step


def values(step):
    return step.value


def updates_of(step):
    return step.updates


def plainly(params, updates, state):
    """Applies updates as Optax does."""
    del state
    return optax.apply_updates(params, updates)


def stay(params, updates, state):
    """Applies nothing."""
    del updates, state
    return params


@functools.lru_cache(256)
def runner(tx, signals_of, see=everything, apply_updates=lo.apply_updates):
    """Returns a jitted run over inputs from params and state on.

    Args:
      tx: any transformation.
      signals_of: function of params and the inputs of a step to value and gradient,
        and maybe a dict of further arguments of ``update``.
      see: function of a `Step` to what is returned of it.
      apply_updates: function of params, updates and state.
    """
    if isinstance(tx, optax.GradientTransformation):  # MultiSteps is none
        tx = optax.with_extra_args_support(tx)

    def step(carry, inputs):
        before, state = carry
        value, grads, *further = signals_of(before, inputs)
        extra_args = further[0] if further else {}
        updates, state = tx.update(grads, state, before, value=value, **extra_args)
        params = apply_updates(before, updates, state)
        step = Step(value, grads, before, updates, params, state)
        return (params, state), see(step)

    return jax.jit(functools.partial(jax.lax.scan, step))


def _as_they_are(params, signals):
    del params
    return signals


def drive(tx, params, signals, state=None, **how):
    """Feeds a transformation with signals.

    Args:
      tx: the transformation.
      params: where it begins.
      signals: values, or None, and gradients of all steps.
      state: that of the transformation, if it is not a fresh one.
      **how: `runner`'s ``see`` and ``apply_updates``.

    Returns:
      The last params and state, and what was seen of all steps.
    """
    state = tx.init(params) if state is None else state
    (params, state), seen = runner(tx, _as_they_are, **how)((params, state), signals)
    return params, state, seen


@functools.lru_cache(256)
def _signals_of(loss_fn):
    return jax.value_and_grad(loss_fn)


def train(tx, task, state=None, **how):
    """Trains on a task; as `drive`, with the loss and the gradient of the task."""
    state = tx.init(task.params) if state is None else state
    run = runner(tx, _signals_of(task.loss_fn), **how)
    (params, state), seen = run((task.params, state), task.batches)
    return params, state, seen


def square(params, _=None):
    """The simplest loss: |p|^2."""
    return sum(jnp.sum(p**2) for p in jax.tree.leaves(params))


@functools.lru_cache(256)
def _descent(tx):
    def step(_, carry):
        params, state = carry
        value, grads = jax.value_and_grad(square)(params)
        updates, state = tx.update(grads, state, params, value=value)
        return lo.apply_updates(params, updates, state), state

    return jax.jit(lambda n, carry: jax.lax.fori_loop(0, n, step, carry))


def descend(tx, params, num_steps, state=None):
    """Returns params and state after so many steps on the square of the params."""
    state = tx.init(params) if state is None else state
    return _descent(tx)(num_steps, (params, state))
