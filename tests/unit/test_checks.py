"""What the checks say by themselves; through the factories: test_hyperparameters.py."""

import jax.numpy as jnp
import pytest

from lalerg_optax._checks import check_growing, check_range, check_state_type


@pytest.mark.parametrize(
    ("value", "interval"),
    [(0.0, r"\(0\.0, 1\.0\]"), (1.1, r"\(0\.0, 1\.0\]"), (float("nan"), "range")],
)
def test_a_number_out_of_range_is_named_with_its_range(value, interval):
    with pytest.raises(ValueError, match=rf"rate must be .*{interval}"):
        check_range("rate", value, 0.0, 1.0, low_open=True)


def test_a_number_has_to_be_in_the_range_in_float32_too():
    with pytest.raises(ValueError, match=r"\[0\.0, 1\.0\)"):
        check_range("decay", 1.0 - 1e-9, 0.0, 1.0, high_open=True)
    check_range("decay", 1.0 - 1e-7, 0.0, 1.0, high_open=True)


def test_an_array_may_have_no_value_yet_and_passes():
    check_range("rate", jnp.float32(-1.0), 0.0, 1.0)


def test_a_number_that_does_not_grow_is_one_object_and_a_pair_is_two():
    first, last = check_growing("b2", 0.9, 0.0, 1.0)
    assert first is last
    assert check_growing("b2", (0.9, 0.99), 0.0, 1.0) == (0.9, 0.99)


def test_a_state_of_another_kind_is_a_type_error_that_names_both():
    with pytest.raises(
        TypeError, match=r"link needs a state of type dict, got .* list"
    ):
        check_state_type("link", [], dict)
