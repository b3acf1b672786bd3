"""The loss in the gradient, for callers that pass none."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.digits_run import batches, init_params, loss_fn

import lalerg_optax as lo


def test_a_carried_loss_changes_neither_loss_nor_gradient():
    batch = jax.tree.map(lambda x: x[0], batches())
    carrier = lo.Carrier(jax.tree.map(jnp.asarray, init_params()))
    loss, grads = jax.value_and_grad(loss_fn)(carrier.params, batch)
    carried, both = jax.value_and_grad(lo.carry_value(loss_fn))(carrier, batch)
    chex.assert_trees_all_equal((carried, both.params), (loss, grads))
    assert both.slot == loss


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
def test_a_loss_that_is_not_finite_is_carried_as_it_is(bad):
    carrying = lo.carry_value(lambda p: jnp.sum(p) + bad)
    loss, grads = jax.value_and_grad(carrying)(lo.Carrier(jnp.ones(2)))
    np.testing.assert_array_equal([loss, grads.slot], [bad, bad])
    np.testing.assert_array_equal(grads.params, 1.0)


def test_aux_is_handed_through():
    carrying = lo.carry_value(lambda p: (jnp.sum(p), {"n": 2}), has_aux=True)
    grad_fn = jax.value_and_grad(carrying, has_aux=True)
    (loss, aux), grads = grad_fn(lo.Carrier(jnp.ones(2)))
    assert (loss, aux, grads.slot) == (2.0, {"n": 2}, 2.0)


def test_the_mean_over_examples_carries_the_mean_loss():
    losses = jnp.array([1.0, 2.0, 6.0])
    carrying = lo.carry_value(lambda p, x: p * x)
    mapped = jax.vmap(jax.grad(carrying), in_axes=(None, 0))
    grads = mapped(lo.Carrier(jnp.ones(())), losses)
    assert jnp.mean(grads.slot) == 3.0


def test_keyword_arguments_reach_the_loss():
    carrying = lo.carry_value(lambda p, x, *, power: jnp.sum(p * x) ** power)
    assert carrying(lo.Carrier(jnp.ones(2)), 3.0, power=2) == 36.0


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_a_loss_of_any_width_is_carried(dtype):
    params = jnp.array([1.0, 2.0], dtype)
    loss, grads = jax.value_and_grad(lo.carry_value(jnp.sum))(lo.Carrier(params))
    assert (loss, loss.dtype, grads.slot) == (3.0, dtype, 3.0)
    assert grads.params.dtype == dtype


def test_the_slot_adds_no_curvature():
    carrying = lo.carry_value(lambda p: jnp.sum(p**3))
    hessian = jax.hessian(carrying)(lo.Carrier(jnp.array([1.0, 2.0])))
    np.testing.assert_array_equal(hessian.params.params, np.diag([6.0, 12.0]))
    for rest in (hessian.params.slot, hessian.slot.params, hessian.slot.slot):
        np.testing.assert_array_equal(rest, 0.0)


def test_micro_batches_carry_their_mean_loss():
    tx = optax.MultiSteps(lo.value_from_gradient(lo.lalerg()), every_k_schedule=2)
    params = lo.Carrier(jnp.ones(3))
    state = tx.init(params)
    for loss in (2.0, 4.0):
        grads = lo.Carrier(jnp.ones(3), jnp.asarray(loss))
        _, state = tx.update(grads, state, params)
    assert lo.metrics(state)["avg_value"] == 3.0


def test_params_that_are_no_carrier_are_a_type_error():
    tx, params = lo.value_from_gradient(lo.lalerg()), jnp.ones(3)
    carrier = lo.Carrier(params)
    state = tx.init(carrier)
    message = r"lalerg_optax\.Carrier, got .*start from"
    for call in (
        lambda: tx.init(params),
        lambda: tx.update(params, state, carrier),
        lambda: tx.update(carrier, state, params),
        lambda: lo.carry_value(jnp.sum)(params),
    ):
        with pytest.raises(TypeError, match=message):
            call()
