"""Windows: how the losses since an audit compare with those before. Scalars only."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ._numbers import LARGEST
from ._scalars import count_if
from ._search_rule import MacroScalars, Phase, SearchRule

LARGEST_LOSS = 1e16  # its square, times the length of most windows, fits into float32


def choose(pred: jax.Array, new: MacroScalars, old: MacroScalars) -> MacroScalars:
    """Returns one of two records."""
    return jax.tree.map(lambda n, o: jnp.where(pred, n, o), new, old)


def observe(state: MacroScalars, loss: jax.Array | None) -> MacroScalars:
    """Adds a step, and its loss if it has one, to the window (Welford's sums)."""
    counted = count_if(jnp.ones((), jnp.bool_), state.window_count)
    steps = count_if(jnp.ones((), jnp.bool_), state.num_macro_steps)
    if loss is None:
        is_empty = state.window_count == 0
        square = jnp.where(is_empty, -1.0, state.window_sum_of_squares)
        return state._replace(
            window_count=counted, num_macro_steps=steps, window_sum_of_squares=square
        )
    is_without = state.window_sum_of_squares < 0.0
    state = choose(is_without, start_window(state), state)
    loss = jnp.clip(loss, -LARGEST_LOSS, LARGEST_LOSS)
    count = count_if(jnp.ones((), jnp.bool_), state.window_count)
    mean = state.window_mean + (loss - state.window_mean) / count
    square = (loss - state.window_mean) * (loss - mean)
    return state._replace(
        window_count=count,
        num_macro_steps=steps,
        window_mean=mean,
        window_sum_of_squares=jnp.minimum(
            state.window_sum_of_squares + square, LARGEST
        ),
    )


def start_loss(seen: MacroScalars, known: MacroScalars, rule: SearchRule) -> jax.Array:
    """Returns the loss at the start of a run, set once there are enough losses."""
    is_due = (seen.num_windows == 0) & (seen.window_count == rule.num_start)
    is_due &= seen.start_loss == -LARGEST
    start = seen.window_mean - jnp.sqrt(variance_of_mean(seen))
    return jnp.where(is_due, start, known.start_loss)


def start_window(state: MacroScalars) -> MacroScalars:
    """Forgets the losses since the last audit."""
    return state._replace(
        window_count=jnp.zeros((), jnp.int32),
        window_mean=jnp.zeros((), jnp.float32),
        window_sum_of_squares=jnp.zeros((), jnp.float32),
    )


def share(state: MacroScalars) -> jax.Array:
    """Returns how much of the run so far the window is."""
    return state.window_count / jnp.maximum(state.num_macro_steps, 1)


def weight(state: MacroScalars, rule: SearchRule) -> jax.Array:
    """Returns how much the window counts, once the rate is found."""
    return jnp.minimum(share(state) / rule.share, 1.0)


def variance_of_mean(state: MacroScalars) -> jax.Array:
    n = jnp.maximum(state.window_count, 2).astype(jnp.float32)
    return jnp.maximum(state.window_sum_of_squares, 0.0) / ((n - 1.0) * n)


class Loss(NamedTuple):
    """How the window compares with those before; bools."""

    is_best: jax.Array
    is_worse: jax.Array
    is_undone: jax.Array
    is_gaining: jax.Array
    is_flat: jax.Array
    is_down: jax.Array


def is_first_window(state: MacroScalars) -> jax.Array:
    """Returns whether this is the first window that later ones are compared with."""
    return (state.num_windows == 0) | (state.phase < Phase.SEARCH)


def compare(state: MacroScalars, rule: SearchRule, has_value: bool) -> Loss:
    rise = state.window_mean - state.best_window_mean
    # by the noise of the windows before: a blow-up must not widen its own margin
    count = jnp.maximum(state.window_count, 1)
    margin = rule.standard_errors * jnp.sqrt(2.0 * state.loss_variance / count)
    is_first = is_first_window(state)
    is_worse = ~is_first & (rise > margin) & has_value
    best_progress = state.first_window_mean - state.best_window_mean
    least = (
        rule.least_gain * share(state) * (state.first_window_mean - state.window_mean)
    )
    is_clear = ~is_first & (best_progress > 2.0 * margin) & has_value
    # at the floor the losses differ by less than they did on the way
    close = rule.standard_errors * jnp.sqrt(2.0 * variance_of_mean(state))
    return Loss(
        is_best=(is_first | (rise < 0.0)) & has_value,
        is_worse=is_worse,
        is_undone=is_worse
        & is_clear
        & (2.0 * (rise - margin) > best_progress)
        & (state.window_mean > state.last_window_mean),
        is_gaining=is_first | (-rise > least),
        is_down=state.window_mean - state.first_window_mean < -margin,
        is_flat=is_clear & (jnp.minimum(margin, close) - rise < least),
    )
