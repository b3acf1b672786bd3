"""Whether a link takes a step in: as the regulator says, or by what it sees itself."""

import jax.numpy as jnp
import numpy as np
import pytest

from lalerg_optax import Verdict
from lalerg_optax._gate import open_gate

UPDATES = {"a": jnp.array([1.0, -2.0]), "b": jnp.array(3.0)}


@pytest.mark.parametrize("verdict", list(Verdict))
def test_inside_of_a_regulator_its_verdict_decides_alone(verdict):
    updates = UPDATES | {"b": jnp.array(jnp.nan)}
    is_open, out = open_gate(updates, jnp.int32(verdict), jnp.float32(jnp.nan))
    assert bool(is_open) == (verdict in (Verdict.ACCEPT, Verdict.BOUND))
    assert out is updates


@pytest.mark.parametrize("value", [None, 1.0])
def test_alone_it_opens_for_finite_numbers_and_hands_them_on(value):
    is_open, out = open_gate(UPDATES, None, value)
    assert is_open
    for name, u in UPDATES.items():
        np.testing.assert_array_equal(out[name], u)


@pytest.mark.parametrize(
    ("entry", "value"),
    [(np.nan, 1.0), (np.inf, None), (3e38, 1.0), (1.0, np.nan), (1.0, -np.inf)],
)
def test_alone_it_shuts_for_what_is_not_finite_and_hands_on_zeros(entry, value):
    is_open, out = open_gate(UPDATES | {"b": jnp.array(entry)}, None, value)
    assert not is_open
    assert not any(np.any(u) for u in out.values())
