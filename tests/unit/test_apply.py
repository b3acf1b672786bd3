"""Params from the state: a revert is exact, and what was hit is healed."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.judged import BAD

import lalerg_optax as lo
from lalerg_optax import Verdict
from lalerg_optax._records import RegulatorScalars
from lalerg_optax._scalars import pack, unpack


def all_finite(tree):
    return all(bool(jnp.all(jnp.isfinite(x))) for x in jax.tree.leaves(tree))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("hit", [*BAD, 3e37, -2e19])
def test_a_hit_parameter_that_no_batch_looks_at_is_healed_at_once(dtype, hit):
    tx = lo.error_regulate(optax.sgd(0.1))
    params = {"seen": jnp.ones(2, dtype), "row": jnp.array([1.0, 1e18, 3.0], dtype)}
    state = tx.init(params)
    grads = {"seen": jnp.full(2, 0.1, dtype), "row": jnp.zeros(3, dtype)}
    before = params["row"]
    params["row"] = before.at[2].set(hit)
    updates, state = tx.update(grads, state, params, value=1.0)
    assert state.verdict == Verdict.ACCEPT
    params = lo.apply_updates(params, updates, state)
    chex.assert_trees_all_equal(params["row"], before)
    assert jnp.all(params["seen"] < 1.0), "all others take their step"
    assert all(p.dtype == dtype for p in params.values())


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("blow_up", [1.0, 1e3, 1e6, "inf", "nan"])
def test_revert_is_exact(dtype, blow_up):
    rng = np.random.default_rng(0)
    anchor = jnp.asarray(rng.standard_normal(4096), dtype)
    largest = float(jnp.finfo(dtype).max)
    if isinstance(blow_up, str):
        params = anchor.at[::7].set(float(blow_up))
    else:
        far = np.clip(
            blow_up * rng.standard_normal(4096).astype(np.float64), -largest, largest
        )
        params = jnp.asarray(far, dtype)
        assert all_finite(params)
    tx = lo.error_regulate(optax.sgd(0.1))

    update = jax.jit(lambda s, p: tx.update(jnp.ones_like(p), s, p, value=jnp.nan))

    def rejected(apply_updates):
        state, p = tx.init(anchor), params
        trail = []
        for _ in range(3):  # SKIP, REVERT, REVERT
            updates, state = update(state, p)
            assert updates.dtype == dtype
            assert all_finite(updates)
            p = apply_updates(p, updates, state)
            trail.append(p)
        assert state.num_revert_steps == 2
        return trail

    trail = rejected(lo.apply_updates)
    chex.assert_trees_all_equal(trail[1], anchor)
    chex.assert_trees_all_equal(trail[2], anchor)
    if not isinstance(blow_up, str):
        trail = rejected(lambda p, u, _: optax.apply_updates(p, u))
        chex.assert_trees_all_equal(trail[2], anchor)


def test_members_made_under_vmap_go_back_alone_outside_of_it():
    """Two members, and two entries in the last axis: a verdict is no column's."""
    tx = lo.error_regulate(optax.sgd(0.1))
    good = {"w": jnp.array([[1.0, 2.0], [3.0, 4.0]]), "b": jnp.array([5.0, 6.0])}

    def decided(member, verdict):
        state = tx.init(member)
        known = unpack(RegulatorScalars, state.scalars)
        return state._replace(scalars=pack(known._replace(verdict=verdict)))

    state = jax.vmap(decided)(good, jnp.array([Verdict.ACCEPT, Verdict.REVERT]))
    params = jax.tree.map(lambda p: p + 1.0, good)
    updates = jax.tree.map(jnp.zeros_like, good)
    healed = lo.apply_updates(params, updates, state)
    assert healed["w"].tolist() == [[2.0, 3.0], [3.0, 4.0]]
    assert healed["b"].tolist() == [6.0, 6.0]
    expected = jax.vmap(lo.apply_updates)(params, updates, state)
    assert jax.tree.all(jax.tree.map(jnp.array_equal, healed, expected))
