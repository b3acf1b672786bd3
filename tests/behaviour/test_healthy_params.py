"""healthy_params: the last params that were judged, whatever the state is made of."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lalerg_optax as lo

PARAMS = {"a": jnp.linspace(1.0, 2.0, 24), "b": jnp.full((3, 5), 0.5, jnp.bfloat16)}


def loss_fn(params):
    return sum(jnp.sum(jnp.square(p.astype(jnp.float32))) for p in params.values())


def trained(tx, num_steps, scale=1.0):
    """Returns all params of a run and the last state."""

    @jax.jit
    def step(params, state, scale):
        loss, grads = jax.value_and_grad(loss_fn)(params)
        updates, state = tx.update(grads, state, params, value=scale * loss)
        return lo.apply_updates(params, updates, state), state

    seen, state = [PARAMS], tx.init(PARAMS)
    for i in range(num_steps):
        factor = scale if i >= num_steps - 1 else 1.0
        params, state = step(seen[-1], state, factor)
        seen.append(params)
    return seen, state


@pytest.mark.parametrize("memory", ["device", "pinned_host"])
def test_they_are_those_before_a_step_that_was_healthy(memory):
    tx = lo.error_regulate(optax.sgd(0.01), anchor_memory=memory)
    seen, state = trained(tx, 60)
    healthy = jax.jit(lo.healthy_params)(seen[-1], state)
    age = int(state.anchor_age)
    assert 0 < age <= 32
    chex.assert_trees_all_equal(healthy, seen[-1 - age])
    chex.assert_trees_all_equal_shapes_and_dtypes(healthy, PARAMS)


def test_in_doubt_they_are_those_of_before():
    tx = lo.error_regulate(optax.sgd(0.01))
    _, before = trained(tx, 59)
    seen, state = trained(tx, 60, scale=1e3)
    assert state.verdict == lo.Verdict.BOUND
    healthy = lo.healthy_params(seen[-1], state)
    chex.assert_trees_all_equal(healthy, lo.healthy_params(seen[-2], before))


def test_params_of_no_regulator_are_taken_over_and_a_narrow_anchor_widened():
    label = {"a": "own", "b": "other"}
    own = lo.error_regulate(optax.sgd(0.01), anchor_dtype="bfloat16")
    tx = optax.partition({"own": own, "other": optax.sgd(0.01)}, label)
    seen, state = trained(optax.with_extra_args_support(tx), 40)
    healthy = lo.healthy_params(seen[-1], state)
    np.testing.assert_array_equal(healthy["b"], seen[-1]["b"])
    assert healthy["a"].dtype == jnp.float32
    assert any(
        np.array_equal(healthy["a"], np.asarray(p["a"].astype(jnp.bfloat16), "f4"))
        for p in seen
    )


@pytest.mark.parametrize("names", [("v", "w"), ("a", "c")])
def test_params_of_another_model_are_refused(names):
    """By name, and not in order: that would give the weights of another layer."""
    old = {"a": jnp.zeros(3), "b": jnp.zeros(3)}
    state = lo.error_regulate(optax.sgd(0.1)).init(old)
    others = dict.fromkeys(names, jnp.ones(3))
    with pytest.raises(ValueError, match="params do not fit the state"):
        lo.healthy_params(others, state)
    with pytest.raises(ValueError, match="params do not fit the state"):
        lo.healthy_params({"a": jnp.zeros(4), "b": jnp.zeros(3)}, state)
