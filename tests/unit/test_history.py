"""The window of recent losses: median, spread, and nothing but finite numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import reference

import lalerg_optax as lo


@pytest.mark.parametrize("size", [1, 2, 21, 128])
def test_median_and_upper_spread_are_those_of_the_reference(size):
    rng = np.random.default_rng(size)
    values = rng.lognormal(0.0, 2.0, 300).astype(np.float32)
    values[rng.random(300) < 0.1] = np.nan
    values[rng.random(300) < 0.1] = -np.inf
    history, expected = lo.LossHistory.empty(size), reference.LossHistory(size)
    record = jax.jit(lambda history, value: history.record(value))
    look = jax.jit(lambda history: history.centre_and_spread())
    np.testing.assert_array_equal(look(history), expected.centre_and_spread())
    for value in values:
        history = record(history, value)
        expected.record(float(value))
        np.testing.assert_allclose(
            look(history), expected.centre_and_spread(), rtol=1e-6
        )
        assert history.num_values == len(expected.values)
        assert history.start_value == np.float32(expected.start_value)


def all_finite(tree):
    return all(bool(jnp.all(jnp.isfinite(x))) for x in jax.tree.leaves(tree))


def test_history_holds_only_finite_numbers_and_the_latest_ones():
    history = lo.LossHistory.empty(size=8)
    fed = [5.0, np.nan, 4.0, np.inf, 3.0, -np.inf, *np.arange(20.0)]
    for loss in fed:
        history = history.record(loss)
        assert all_finite(history)
    assert sorted(history.values.tolist()) == list(np.arange(12.0, 20.0))
    assert history.start_value == 0.0, "the smallest of the first ones"
    median, spread = history.centre_and_spread()
    assert median == 15.0
    np.testing.assert_allclose(spread, (19.0 - 15.0) / 1.645, rtol=1e-6)
