"""A foreign transformation: what it is handed, how it stays finite and begins anew."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.judged import REVERT
from helpers.spies import spy
from helpers.trees import TREES

import lalerg_optax as lo
from lalerg_optax import Verdict


@pytest.mark.parametrize(
    "micro", [optax.scale_by_lion(), optax.trace(0.9), optax.scale_by_adam(), None]
)
def test_a_failed_start_leaves_nothing_in_the_moments(micro):
    tx = lo.lalerg(1e3, micro=micro)
    params = jnp.array([0.3, -0.2, 0.1])
    state = tx.init(params)
    update = jax.jit(lambda g, s, p, v: tx.update(g, s, p, value=v))
    had_moments = False
    for _ in range(10):
        loss, grad = jax.value_and_grad(lambda p: jnp.sum(p**2))(params)
        updates, state = update(grad, state, params, loss)
        params = lo.apply_updates(params, updates, state)
        moments = [x for x in jax.tree.leaves(state.inner_state[0]) if x.shape == (3,)]
        if state.verdict == REVERT:
            break
        had_moments = had_moments or any(jnp.any(x != 0.0) for x in moments)
    assert state.verdict == REVERT
    assert had_moments
    chex.assert_trees_all_equal(moments, [jnp.zeros(3)] * len(moments))


def square_loss(params, target=0.0):
    return 0.5 * sum(jnp.sum(jnp.square(p - target)) for p in jax.tree.leaves(params))


def test_extra_args_reach_the_wrapped_transformation():
    seen, params = [], jnp.ones(2)
    tx = lo.error_regulate(optax.chain(optax.identity(), spy(seen)))
    tx.update(params, tx.init(params), params, value=3.0, key="for the inner one")
    assert seen[0]["key"] == "for the inner one"
    assert seen[0]["value"] == 3.0
    assert seen[0]["verdict"] == Verdict.ACCEPT


def test_extra_args_of_an_outer_regulator_do_not_leak():
    seen, params = [], jnp.ones(2)
    tx = lo.error_regulate(
        optax.chain(spy(seen), lo.error_regulate(spy(seen))), audit=True
    )
    tx.update(params, tx.init(params), params, value=jnp.nan)
    outside, inside = seen
    assert outside["verdict"] == Verdict.SKIP
    assert outside["audit"] is not None
    # the inner regulator sees a zero gradient and a loss that is usable
    assert inside["verdict"] == Verdict.ACCEPT
    assert inside["audit"] is None


@pytest.mark.parametrize(
    ("value_fn", "extra"),
    [
        (square_loss, {"target": 3.0}),
        (lambda params, **kwargs: square_loss(params, **kwargs), {}),
        (functools.partial(square_loss, target=2.0), {}),
        (lambda params, verdict=None: square_loss(params), {}),
    ],
    ids=["by name", "all keywords", "partial", "a name of ours"],
)
def test_a_line_search_gets_what_its_function_takes(value_fn, extra):
    params = TREES["float32"]
    search = optax.scale_by_backtracking_linesearch(15)
    results = []
    for tx in (search, lo.error_regulate(search)):
        tx = optax.chain(optax.sgd(1.0), tx)
        loss, grads = jax.value_and_grad(value_fn)(params, **extra)
        updates, _ = tx.update(
            grads,
            tx.init(params),
            params,
            value=loss,
            grad=grads,
            value_fn=value_fn,
            **extra,
        )
        results.append(updates)
    chex.assert_trees_all_close(*results)
    assert np.any(results[0]["w"] != 0)


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_a_line_search_sees_no_more_of_a_gradient_than_other_links(bad):
    seen, params = [], jnp.array([3.0, 4.0])
    tx = lo.error_regulate(spy(seen), clip_norm=1.0)
    state = tx.init(params)
    for grads in (params, bad * params):
        _, state = tx.update(grads, state, params, value=1.0, grad=grads)
    np.testing.assert_allclose(seen[0]["grad"], [0.6, 0.8], rtol=1e-6)
    np.testing.assert_array_equal(seen[1]["grad"], 0.0)


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
def test_a_scalar_of_the_inner_state_that_would_not_be_finite_keeps_its_value(bad):
    def update(updates, state, params=None):
        del params
        return updates, {"estimate": state["estimate"] * bad, "count": state["count"]}

    inner = optax.GradientTransformation(
        lambda _: {"estimate": jnp.float32(2.5), "count": jnp.int32(3)}, update
    )
    tx, params = lo.error_regulate(inner), jnp.ones(2)
    _, state = tx.update(params, tx.init(params), params, value=1.0)
    assert state.inner_state == {"estimate": 2.5, "count": 3}
