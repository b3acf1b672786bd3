"""The training loop of every benchmark, and the places where a benchmark steps in.

A run is one ``scan``, a pure function that a benchmark maps over rates and seeds
(`grid`) or faults and compiles as a whole; ``scale.py`` scans the same step in pieces.
Two loops stand elsewhere: ``timing.py`` takes single steps, because it times them, and
``alarms.py`` judges losses that no training made.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from tasks import Batch, Task

PyTree = Any
Start = tuple[PyTree, PyTree]
Gradient = Callable[[PyTree, PyTree, jax.Array, Any], PyTree]
Change = Callable[[Batch, Any], Batch]


class Taken(NamedTuple):
    """A step that was taken.

    Attributes:
      loss: of the batch.
      grads: that the optimizer was given.
      updates: that were applied.
      params: after the step.
      state: of the optimizer after the step.
      now: what the plan says of the step.
    """

    loss: jax.Array
    grads: PyTree
    updates: PyTree
    params: PyTree
    state: PyTree
    now: Any


class Hooks(NamedTuple):
    """What a benchmark changes of a step; ``now`` is what its plan says of the step.

    Attributes:
      strike: (params, state, now) to both, before the gradient is taken.
      told: (loss, grads, now) to what the optimizer is given of them.
      more: now to further arguments of the optimizer's ``update``.
      bent: (updates, now) to those that are applied.
      apply: (params, updates, state) to the new params.
      keep: what is kept of a step that was taken; None to keep nothing.
    """

    strike: Callable[..., tuple[PyTree, PyTree]] = lambda params, state, now: (
        params,
        state,
    )
    told: Callable[..., tuple[jax.Array, PyTree]] = lambda loss, grads, now: (
        loss,
        grads,
    )
    more: Callable[[Any], dict[str, Any]] = lambda now: {}
    bent: Callable[[PyTree, Any], PyTree] = lambda updates, now: updates
    apply: Callable[..., PyTree] = lambda params, updates, state: optax.apply_updates(
        params, updates
    )
    keep: Callable[[Taken], Any] = lambda taken: taken.loss


PLAIN = Hooks()


class End(NamedTuple):
    """Where a run ended.

    Attributes:
      params: of the model.
      rest: whatever else the model keeps, such as batch statistics.
      state: of the optimizer.
      kept: what was kept of every step, along the first axis.
    """

    params: PyTree
    rest: PyTree
    state: PyTree
    kept: Any


def stepping(tx: Any, gradient: Gradient, hooks: Hooks = PLAIN) -> Callable[..., Any]:
    """Returns a step of training, for ``scan``.

    Args:
      tx: the transformation.
      gradient: (params, rest, number of the step, now) to ((loss, new rest), gradient).
      hooks: what is changed of a step, and what is kept of it.

    Returns:
      From ((params, rest, state), (number of the step, now)) to the same carry after
      the step, and what is kept of it.
    """
    tx = optax.with_extra_args_support(tx)

    def step(carry: PyTree, at: PyTree) -> tuple[PyTree, Any]:
        params, rest, state = carry
        i, now = at
        params, state = hooks.strike(params, state, now)
        (loss, rest), grads = gradient(params, rest, i, now)
        value, grads = hooks.told(loss, grads, now)
        more = hooks.more(now)
        updates, state = tx.update(grads, state, params, value=value, **more)
        updates = hooks.bent(updates, now)
        params = hooks.apply(params, updates, state)
        taken = Taken(loss, grads, updates, params, state, now)
        return (params, rest, state), hooks.keep(taken)

    return step


def train(
    tx: Any,
    gradient: Gradient,
    start: Start,
    num_steps: int,
    plan: Any = None,
    hooks: Hooks = PLAIN,
) -> End:
    """Trains.

    Args:
      tx: the transformation.
      gradient: (params, rest, number of the step, now) to ((loss, new rest), gradient).
      start: params and the rest.
      num_steps: steps of the run.
      plan: arrays over the steps; ``now`` is an entry of each.
      hooks: what is changed of a step, and what is kept of it.
    """
    params, rest = start
    carry, kept = lax.scan(
        stepping(tx, gradient, hooks),
        (params, rest, tx.init(params)),
        (jnp.arange(num_steps), plan),
    )
    return End(*carry, kept)


def as_it_is(batch: Batch, now: Any) -> Batch:
    """Returns a batch."""
    del now
    return batch


def on_batch(
    task: Task,
    size: int,
    params: PyTree,
    rest: PyTree,
    keys: jax.Array,
    now: Any = None,
    change: Change = as_it_is,
) -> PyTree:
    """Draws a batch; returns ((loss, new rest), gradient).

    Args:
      task: the task.
      size: examples of the batch.
      params: of the model.
      rest: whatever else the model keeps.
      keys: two, to draw the batch and for the model's own noise.
      now: what the plan says of the step.
      change: (batch, now) to the batch that is taken in its place.
    """
    draw, noise = keys
    chosen = jax.random.randint(draw, (size,), 0, len(task.train[0]))
    batch = change(tuple(a[chosen] for a in task.train), now)
    grad = jax.value_and_grad(task.loss, has_aux=True)
    return grad(params, rest, batch, noise, True)


def keys_at(key: jax.Array, i: jax.Array) -> jax.Array:
    """Returns the two keys of a step."""
    return jax.random.split(jax.random.fold_in(key, i))


def train_on(
    task: Task,
    tx: Any,
    seed: jax.Array,
    num_steps: int,
    plan: Any = None,
    hooks: Hooks = PLAIN,
    change: Change = as_it_is,
) -> tuple[Start, End]:
    """Trains on batches of a task; returns where the run began and ended.

    A pure function of the seed, of the plan and of what the others close over.
    """
    key = jax.random.key(seed)

    def gradient(params: PyTree, rest: PyTree, i: jax.Array, now: Any) -> PyTree:
        keys = keys_at(key, i)
        return on_batch(task, task.batch_size, params, rest, keys, now, change)

    start = task.init(key)
    return start, train(tx, gradient, start, num_steps, plan, hooks)


def grid(
    run: Callable[[jax.Array, PyTree], PyTree],
    rates: jax.Array,
    seeds: PyTree,
    side_by_side: bool = True,
) -> PyTree:
    """Runs all rates and seeds; results are [rate, seed, ...].

    Args:
      run: (rate, seed) to what is left of a run.
      rates: learning rates, or whatever else belongs to all seeds.
      seeds: arrays with what differs from seed to seed along the first axis.
      side_by_side: seeds are inside, so that batches are drawn once for all rates. Else
        one run after the other: side by side they leave the cache if they are many,
        and take both sides of every condition.
    """
    if side_by_side:
        return jax.vmap(jax.vmap(run, (None, 0)), (0, None))(rates, seeds)
    return lax.map(lambda rate: lax.map(lambda seed: run(rate, seed), seeds), rates)


def full_loss(
    task: Task, data: Batch, params: PyTree, rest: PyTree, chunk: int = 512
) -> jax.Array:
    """Returns the mean loss over a whole set, taken a piece at a time."""
    num_chunks = -(-len(data[0]) // chunk)
    cut = len(data[0]) - len(data[0]) % num_chunks  # pieces of one size
    pieces = tuple(a[:cut].reshape(num_chunks, -1, *a.shape[1:]) for a in data)
    key = jax.random.key(0)
    losses = lax.map(lambda b: task.loss(params, rest, b, key, False)[0], pieces)
    return losses.mean()


def is_finite(tree: PyTree) -> jax.Array:
    """Returns whether every entry is."""
    return jnp.stack([jnp.isfinite(x).all() for x in jax.tree.leaves(tree)]).all()


def is_zero(tree: PyTree) -> jax.Array:
    """Returns whether every entry is."""
    return jnp.stack([jnp.all(x == 0) for x in jax.tree.leaves(tree)]).all()
