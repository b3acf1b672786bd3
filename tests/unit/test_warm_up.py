"""A schedule that goes on growing does not raise a rate that was found."""

import jax
import jax.numpy as jnp
import optax
import pytest
from helpers.audits import Driver

import lalerg_optax as lo
from lalerg_optax._macro import with_rate_found
from lalerg_optax._numbers import UNKNOWN
from lalerg_optax._search_rule import Phase


def steps(driver, *base_rates):
    """Takes a step at each rate of a schedule; returns the products with it."""
    products = []
    for driver.base_rate in base_rates:
        driver.tell()
        products.append(driver.rate * driver.base_rate)
    return products


def test_a_rate_that_was_found_stays_where_the_schedule_grows_on():
    found = Driver().end_search()
    product = found.rate
    assert steps(found, 1.5, 2.0, 8.0) == pytest.approx([product] * 3)


def test_it_falls_with_the_schedule_and_returns_to_where_it_was():
    found = Driver().end_search()
    rate = found.rate
    expected = [rate * factor for factor in (0.5, 0.01, 0.5, 1.0, 1.0)]
    assert steps(found, 0.5, 0.01, 0.5, 1.0, 4.0) == pytest.approx(expected)
    assert steps(found, 2.0) == pytest.approx([0.5 * rate])


def test_until_then_a_warm_up_multiplies_what_the_search_does():
    searching = Driver()
    searching.window(0.8)
    assert searching.phase is Phase.SEARCH
    rate = searching.rate
    assert steps(searching, 0.5, 2.0, 8.0) == [0.5 * rate, 2.0 * rate, 8.0 * rate]


def test_the_rise_is_still_that_of_the_same_product():
    found = Driver().end_search()
    before = found.rate**2 * float(found.state.avg_rise)
    assert before > 0.0
    steps(found, 1000.0)
    assert found.rate**2 * float(found.state.avg_rise) == pytest.approx(before)


@pytest.mark.parametrize("base_rate", [UNKNOWN, 0.0, 1.0])
def test_a_rate_that_is_not_known_or_zero_or_constant_changes_nothing(base_rate):
    found = Driver().end_search()
    rate = found.rate
    steps(found, base_rate, base_rate, 1.0)
    assert found.rate == rate


def test_a_leap_of_the_schedule_by_any_factor_keeps_all_finite():
    found = Driver().end_search()
    steps(found, 1e-30, 1e30, 1e36)
    leaves = jax.tree.leaves(found.state)
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in leaves)
    assert found.rate == 2.0**-40  # the least that a macro rate may be


def test_the_schedule_of_a_run_that_was_adopted_is_trusted():
    adopted = Driver()
    adopted.state = with_rate_found(adopted.state, 100)
    assert steps(adopted, 0.1, 0.2, 1.0) == pytest.approx([0.1, 0.2, 1.0])


def test_lalerg_holds_the_product_that_metrics_report():
    schedule = optax.linear_schedule(1e-3, 1.0, 2000)
    tx = lo.lalerg(schedule)
    params = jnp.array([3.0, -2.0])

    def step(carry, _):
        params, state = carry
        loss, grads = jax.value_and_grad(lambda p: jnp.sum((p - 1.0) ** 2))(params)
        updates, state = tx.update(grads, state, params, value=loss)
        params = lo.apply_updates(params, updates, state)
        report = lo.metrics(state)
        return (params, state), (report["is_searching"], report["learning_rate"])

    _, (is_searching, rates) = jax.lax.scan(step, (params, tx.init(params)), length=200)
    assert not is_searching[100:].any()
    # the schedule doubles in these steps, and the product does not grow by itself
    assert 0.9 < rates[-1] / rates[100] < 1.1
