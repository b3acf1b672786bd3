"""What is too large, too small, or no number to compute with."""

import jax.numpy as jnp
import numpy as np
import pytest

from lalerg_optax._numbers import LARGEST, SMALLEST, is_representable, wide


@pytest.mark.parametrize(
    ("dtype", "wanted"),
    [
        ("bfloat16", "float32"),
        ("float16", "float32"),
        ("float32", "float32"),
        ("complex64", "complex64"),
    ],
)
def test_computing_is_done_in_float32_at_least(dtype, wanted):
    assert wide(jnp.ones(1, dtype)) == wanted


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "complex64"])
def test_an_entry_is_sound_whose_square_is_finite(dtype):
    entries = jnp.array([0.0, -3.0, 1e19, 1e20, -1e30, jnp.inf, jnp.nan], dtype)
    assert is_representable(entries).tolist() == [True] * 3 + [False] * 4


def test_what_stands_for_infinity_leaves_room_for_a_sum():
    assert np.isfinite(np.float32(LARGEST) * 10)
    assert np.float32(1.0) / np.float32(SMALLEST) < LARGEST
