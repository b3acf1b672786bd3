"""Verdicts, as numbers and as what they mean."""

import jax.numpy as jnp
import numpy as np
import pytest

import lalerg_optax as lo
from lalerg_optax._verdict import is_applied


@pytest.mark.parametrize("kind", [int, np.int32, np.asarray, jnp.int32])
def test_a_number_of_any_kind_is_a_verdict(kind):
    assert [lo.Verdict(kind(i)).name for i in range(4)] == [
        *("ACCEPT", "SKIP", "REVERT", "BOUND")
    ]


@pytest.mark.parametrize("value", [4, jnp.int32(7), "ACCEPT", None])
def test_what_is_no_verdict_is_a_value_error(value):
    with pytest.raises(ValueError, match="not a valid Verdict"):
        lo.Verdict(value)


def test_the_update_of_a_bounded_step_is_applied():
    assert is_applied(jnp.arange(4)).tolist() == [True, False, False, True]
