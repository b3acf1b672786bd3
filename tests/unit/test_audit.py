"""Looks back at the anchor: when they are taken, what they tell, what they move."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from helpers.judged import judge, make

import lalerg_optax as lo
from lalerg_optax import Verdict
from lalerg_optax._search_rule import Phase


def test_anchor_is_refreshed_while_healthy_and_not_while_in_doubt():
    losses, grads = make()
    _, report, _ = judge(losses, grads)
    ages = report["anchor_age"]
    assert np.max(ages[:40]) <= 5, "often in the beginning"
    assert np.max(ages) <= 40
    assert np.sum(np.diff(ages[300:]) < 0) >= 2
    losses[300:] += 0.15  # half of what is tolerated
    _, report, states = judge(losses, grads)
    is_suspect = np.asarray(report["conduct"]) > 0
    is_moved = np.any(np.diff(states.anchor, axis=0) != 0.0, axis=1)
    assert np.sum(is_suspect) > 5
    assert not np.any(is_moved & is_suspect[1:])


def regulated():
    return lo.error_regulate(lo.scale_by_macro_rate(), audit=True)


def run_looks(cosines, num_before=5, reach=1e-3, last_reach=None):
    """Steps away from the anchor, then looks back with gradients of these cosines."""
    tx = regulated()
    update = jax.jit(tx.update)
    start = jnp.array([1.0, 0.0])
    reaches = [reach] * len(cosines)
    reaches[-1] = reach if last_reach is None else last_reach
    state = tx.init(start)
    for _ in range(num_before - 3):
        _, state = update(jnp.array([1.0, 0.0]), state, start, value=1.0)
    for cosine, reach in zip(cosines, reaches, strict=True):
        grads = -jnp.array([np.sqrt(1.0 - cosine**2), cosine], jnp.float32)
        there = start + jnp.array([0.0, reach])
        _, state = update(grads, state, there, value=1.0)
    return state


def test_two_looks_say_nothing_yet():
    state = run_looks([0.5, 0.6])
    assert state.num_looks == 2
    assert state.num_audits_passed == 0
    np.testing.assert_array_equal(state.anchor, [1.0, 0.0])


def test_looks_that_agree_move_the_anchor_and_tell_their_mean_and_error():
    state = run_looks([0.5, 0.6, 0.55, 0.45])
    assert state.num_audits_passed == 1
    assert state.num_looks == 0
    # each weighs as much as the steps that it looks back on: 2 to 5
    weights = np.arange(2.0, 6.0) / 14.0
    looks = np.array([0.5, 0.6, 0.55, 0.45])
    mean = weights @ looks
    np.testing.assert_allclose(state.alignment, mean, rtol=1e-5)
    error = np.sqrt(4.0 / 3.0 * np.sum((weights * (looks - mean)) ** 2))
    np.testing.assert_allclose(state.alignment_error, error, rtol=1e-4)
    assert state.inner_state.macro_rate == 0.5**2


def test_looks_that_disagree_go_on_and_the_start_is_taken_in_the_end():
    looks = [0.5, -0.5] * 8
    assert run_looks(looks[:-1]).num_looks == 15
    state = run_looks(looks)
    assert state.num_looks == 0
    assert state.verdict == Verdict.ACCEPT
    assert state.inner_state.phase == Phase.SEARCH, "unclear, and no failure"


def test_looks_that_agree_on_uphill_go_back_to_the_start():
    state = run_looks([-0.5, -0.6, -0.55])
    assert state.verdict == Verdict.REVERT
    assert state.inner_state.macro_rate == 0.5**4
    np.testing.assert_array_equal(state.anchor, [1.0, 0.0])


def test_a_start_that_leads_far_from_the_params_goes_back_whatever_it_saw():
    state = run_looks([0.9], reach=10.0)
    assert state.verdict == Verdict.REVERT
    np.testing.assert_allclose(state.inner_state.macro_rate, 1e-4, rtol=1e-3)


def test_a_start_that_is_far_at_the_last_look_does_not_move_the_anchor_there():
    state = run_looks([0.5, 0.6, 0.55, 0.45], last_reach=0.02)
    assert state.verdict == Verdict.REVERT
    np.testing.assert_array_equal(state.anchor, [1.0, 0.0])


def test_without_a_level_that_lowers_the_rate_a_start_is_not_repeated_for_ever():
    """Around an optimizer that no audit reaches."""
    tx = lo.error_regulate(lo.scale_by_micro_rate(), audit=True)
    params, state, update = jnp.ones(4), tx.init(jnp.ones(4)), jax.jit(tx.update)
    rng = np.random.default_rng(0)
    for _ in range(300):
        grads = jnp.asarray(rng.standard_normal(4), jnp.float32)
        updates, state = update(grads, state, params, value=1.0)
        params = lo.apply_updates(params, updates, state)
    assert state.num_revert_steps <= 2 * 9
    assert state.num_accepted > 250


def test_a_zero_gradient_tells_nothing():
    tx = regulated()
    state, update = tx.init(jnp.ones(2)), jax.jit(tx.update)
    for _ in range(40):
        _, state = update(jnp.zeros(2), state, jnp.ones(2), value=0.0)
    assert state.num_looks == 0
    assert state.num_audits_passed == 0
    assert state.inner_state.macro_rate == 1.0


def test_an_average_that_starts_anew_forgets_how_large_the_old_one_was():
    tx = lo.error_regulate(optax.sgd(1e-4), audit=True)
    params = jnp.ones(4)
    state = tx.init(params)
    averages, verdicts = [], []
    # fresh gradients say from step 2 on that the steps before them led uphill
    for t, loss in enumerate([1e10] * 6 + [6.0] * 3):
        grads = jnp.full(4, -0.1 if t >= 2 else 1.0)
        updates, state = tx.update(grads, state, params, value=jnp.float32(loss))
        params = lo.apply_updates(params, updates, state)
        averages.append(float(state.avg_value))
        verdicts.append(int(state.verdict))
    first = verdicts.index(Verdict.REVERT)
    assert verdicts == [0] * first + [Verdict.REVERT] * 2 + [0] * (7 - first)
    assert averages[first - 1] == np.float32(1e10)
    assert averages[-1] == 6.0
