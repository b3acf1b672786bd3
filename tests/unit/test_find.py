"""States are found at any depth, under labels that tell them apart."""

import jax.numpy as jnp
import optax
import pytest

import lalerg_optax as lo
from lalerg_optax._find import find_states

PARAMS = {"a": jnp.ones(2), "b": jnp.ones(3)}
GROUPS = {"a": "x", "b": "y"}
CASES = {
    "bare": (lo.lalerg(), [""]),
    "nested": (optax.chain(optax.chain(optax.clip(1.0), lo.lalerg())), [""]),
    "twice in a chain": (optax.chain(lo.lalerg(), lo.lalerg()), ["0/", "1/"]),
    "groups": (
        optax.partition({"x": lo.lalerg(), "y": lo.lalerg()}, GROUPS),
        ["x/", "y/"],
    ),
    "one group of two": (
        optax.partition({"x": lo.lalerg(), "y": optax.sgd(0.1)}, GROUPS),
        ["x/"],
    ),
    "none": (optax.adam(0.1), []),
}


@pytest.mark.parametrize(("tx", "suffixes"), CASES.values(), ids=CASES)
def test_every_state_has_a_label_of_its_own(tx, suffixes):
    found = find_states(tx.init(PARAMS), lo.ErrorRegulateState)
    assert sorted(found) == suffixes
    assert all(isinstance(x, lo.ErrorRegulateState) for x in found.values())


def test_a_regulator_inside_of_another_is_not_counted_with_it():
    tx = lo.error_regulate(lo.lalerg())
    (found,) = find_states(tx.init(PARAMS), lo.ErrorRegulateState).values()
    assert isinstance(found.inner_state, lo.ErrorRegulateState)
