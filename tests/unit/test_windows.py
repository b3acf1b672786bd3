"""A window of losses: its mean and spread, and how it compares with those before."""

import jax.numpy as jnp
import numpy as np
import pytest

from lalerg_optax._scalars import pack, unpack
from lalerg_optax._search_rule import MacroScalars, Phase, SearchRule
from lalerg_optax._windows import (
    compare,
    observe,
    start_loss,
    start_window,
    variance_of_mean,
)


def window(losses, **known):
    """Returns what is known after these losses, of a run that is under way."""
    usual = {"phase": int(Phase.STEER), "num_windows": 3, "num_macro_steps": 40}
    state = unpack(MacroScalars, pack(MacroScalars(**usual | known)))
    for loss in losses:
        state = observe(state, jnp.float32(loss))
    return state


@pytest.mark.parametrize("offset", [0.0, 100.0, -1e4])
def test_mean_and_spread_are_those_of_the_losses(offset):
    losses = offset + np.random.default_rng(0).standard_normal(20)
    state = window(losses)
    assert state.window_count == 20
    assert state.num_macro_steps == 60
    np.testing.assert_allclose(state.window_mean, np.mean(losses), rtol=1e-5)
    wanted = np.var(losses, ddof=1) / 20
    np.testing.assert_allclose(variance_of_mean(state), wanted, rtol=1e-3)


def test_steps_without_a_loss_are_counted_and_are_no_losses():
    state = start_window(window([]))
    for _ in range(5):
        state = observe(state, None)
    assert (state.window_count, state.num_macro_steps) == (5, 45)
    assert variance_of_mean(state) == 0.0
    state = observe(state, jnp.float32(3.0))
    assert (state.window_count, state.num_macro_steps) == (1, 46)
    assert (state.window_mean, state.window_sum_of_squares) == (3.0, 0.0)


def test_a_window_that_starts_again_has_nothing_in_it():
    state = start_window(window([1.0, 2.0, 4.0]))
    assert (state.window_count, state.window_mean) == (0, 0.0)
    assert state.window_sum_of_squares == 0.0
    assert state.num_macro_steps == 43


@pytest.mark.parametrize(
    ("loss", "is_best", "is_worse"),
    [(0.5, True, False), (1.1, False, False), (3.0, False, True)],
)
def test_a_window_is_worse_only_beyond_the_noise_of_those_before(
    loss, is_best, is_worse
):
    known = {"best_window_mean": 1.0, "first_window_mean": 9.0, "loss_variance": 0.1}
    seen = compare(window([loss] * 8, **known), SearchRule(), has_value=True)
    assert (bool(seen.is_best), bool(seen.is_worse)) == (is_best, is_worse)


@pytest.mark.parametrize(
    ("loss", "last", "is_undone"),
    [(6.0, 1.0, True), (4.0, 1.0, False), (6.0, 8.0, False)],
)
def test_progress_is_undone_where_half_of_it_is_gone_and_the_loss_still_rises(
    loss, last, is_undone
):
    known = {"best_window_mean": 1.0, "first_window_mean": 9.0}
    state = window([loss] * 8, last_window_mean=last, **known)
    assert bool(compare(state, SearchRule(), has_value=True).is_undone) == is_undone


@pytest.mark.parametrize(
    "known", [{"num_windows": 0}, {"phase": int(Phase.START)}], ids=["first", "start"]
)
def test_the_first_window_is_compared_with_none(known):
    seen = compare(window([1e6] * 4, **known), SearchRule(), has_value=True)
    assert seen.is_best
    assert not (seen.is_worse | seen.is_undone | seen.is_flat)


def test_without_a_loss_a_window_says_nothing():
    known = {"best_window_mean": 1.0, "first_window_mean": 9.0}
    seen = compare(window([5.0] * 8, **known), SearchRule(), has_value=False)
    assert not (seen.is_best | seen.is_worse | seen.is_undone | seen.is_flat)


@pytest.mark.parametrize(
    ("num_losses", "known", "is_noted"),
    [
        (8, {"num_windows": 0}, True),
        (7, {"num_windows": 0}, False),
        (9, {"num_windows": 0}, False),
        (8, {"num_windows": 1}, False),
        (8, {"num_windows": 0, "start_loss": 5.0}, False),
    ],
    ids=["due", "too few", "too late", "after a window", "known"],
)
def test_where_a_run_begins_is_noted_after_its_first_eight_losses(
    num_losses, known, is_noted
):
    losses = np.arange(1.0, num_losses + 1.0)
    state = window(losses, num_macro_steps=0, **known)
    found = start_loss(state, state, SearchRule())
    error = np.std(losses, ddof=1) / num_losses**0.5
    wanted = np.mean(losses) - error if is_noted else state.start_loss
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
