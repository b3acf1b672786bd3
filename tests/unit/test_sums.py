"""Sums over trees: as exact as one long sum, whatever the leaves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lalerg_optax._sums import global_norm, sum_entries

TREES = {
    "one array": [np.array([3.0, -4.0])],
    "shapes": [np.ones((2, 3)), np.array(2.0), np.zeros((0, 4)), np.arange(5.0)],
    "many small leaves of one shape": [np.full(7, 0.1 * i) for i in range(200)],
    "nothing": [],
}


def norm_of(leaves):
    """Returns the norm of all entries, in double precision."""
    return np.sqrt(sum(np.sum(np.abs(np.asarray(x, complex)) ** 2) for x in leaves))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "complex64"])
@pytest.mark.parametrize("leaves", TREES.values(), ids=TREES)
def test_the_norm_is_that_of_all_entries_in_float32(leaves, dtype):
    tree = [jnp.asarray(x, dtype) for x in leaves]
    found = jax.jit(global_norm)(tree)
    assert (found.dtype, found.shape) == (jnp.float32, ())
    np.testing.assert_allclose(found, norm_of(tree), rtol=1e-6)


def test_both_parts_of_a_complex_entry_count():
    np.testing.assert_allclose(global_norm([jnp.array([3.0 + 4.0j, -12.0j])]), 13.0)


def test_a_narrow_sum_does_not_overflow_or_stall():
    # in float16 the sum of squares is infinite, in bfloat16 it stays at 256
    for dtype, value in (("float16", 200.0), ("bfloat16", 1.0)):
        norm = global_norm(jnp.full(4096, value, dtype))
        np.testing.assert_allclose(norm, 64.0 * value, rtol=1e-6)


@pytest.mark.parametrize("num_leaves", [1, 64, 65, 150])
def test_entries_of_several_trees_are_taken_together(num_leaves):
    rng = np.random.default_rng(num_leaves)
    first, second = rng.standard_normal((2, num_leaves, 3)).astype(np.float32)
    found = sum_entries(lambda x, y: x * y, list(first), list(second))
    np.testing.assert_allclose(found, np.sum(first * second), rtol=1e-5, atol=1e-5)
