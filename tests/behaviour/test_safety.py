"""Nothing that is not finite gets in; nothing finite is locked out."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.drive import drive, plainly, runner, stay
from helpers.forms import flat
from helpers.judged import BAD
from hypothesis import example, given, settings
from hypothesis import strategies as st

import lalerg_optax as lo
from lalerg_optax import Verdict

FORMS = {
    "lalerg": lo.lalerg(1e-2),
    "lalerg without search": lo.lalerg(1e-2, search=False),
    "regulated adamw": lo.error_regulate(optax.adamw(1e-2)),
    "regulated momentum": lo.error_regulate(optax.sgd(1e-2, momentum=0.9)),
    "flat": flat(1e-2),
}
ALONE = {
    "micro": lo.scale_by_micro_rate(),
    "macro": lo.scale_by_macro_rate(),
    "regulator": lo.error_regulate(),
}


def all_finite(tree):
    return all(bool(jnp.all(jnp.isfinite(x))) for x in jax.tree.leaves(tree))


def signals_of(params, faults):
    """|p - 1|^2, whose loss and gradient can be spoilt."""
    loss, grad = jax.value_and_grad(lambda p: jnp.sum((p - 1.0) ** 2))(params)
    return loss + faults[0], grad + faults[1:]


def seen_of(step):
    leaves = jax.tree.leaves((step.params, step.state))
    is_finite = jnp.stack([jnp.all(jnp.isfinite(x)) for x in leaves]).all()
    return step, lo.metrics(step.state) | {"is_finite": is_finite}


NUM_STEPS = 220


def spoilt_run(tx, steps, value=0.0, grad=0.0):
    """Adds to value and gradient at some steps; returns what is seen of all steps."""
    faults = np.zeros((NUM_STEPS, 7), np.float32)
    faults[steps, 0] = value
    faults[steps, 1:] = grad
    run = runner(tx, signals_of, seen_of, plainly)
    start = jnp.zeros(6)
    seen = run((start, tx.init(start)), faults)[1]
    return jax.tree.map(np.asarray, seen)


@pytest.mark.parametrize("tx", FORMS.values(), ids=FORMS.keys())
@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("where", ["value", "one entry", "all entries"])
@pytest.mark.parametrize("num_bad", [1, 40])
def test_bad_numbers_cost_their_own_steps_and_nothing_else(tx, bad, where, num_bad):
    fault = {
        "value": {"value": bad},
        "one entry": {"grad": np.where(np.arange(6) == 2, bad, 0.0)},
        "all entries": {"grad": bad},
    }[where]
    is_bad = slice(30, 30 + num_bad)
    step, report = spoilt_run(tx, is_bad, **fault)
    assert np.all(report["is_finite"])
    is_kept = report["verdict"][is_bad] != Verdict.REVERT
    params, before = (x[is_bad][is_kept] for x in (step.params, step.before))
    chex.assert_trees_all_equal(params, before)
    first, last = 29, 29 + num_bad
    accepted = report["num_accepted"]
    if tx is not FORMS["flat"] or where == "value":
        assert accepted[last] == accepted[first], "always counted"
        rejected = report["num_skipped"] + report["num_revert_steps"]
        assert rejected[last] == num_bad
    else:  # there the links before the regulator keep a bad gradient from it
        assert report["num_micro_held"][last] == num_bad
    assert accepted[last + 5] == accepted[last] + 5


@pytest.mark.parametrize("tx", ALONE.values(), ids=ALONE.keys())
@pytest.mark.parametrize("bad", [*BAD, 1e30])
def test_each_link_alone_keeps_bad_updates_out(tx, bad):
    params = jnp.ones(4)
    state = tx.init(params)
    _, state = tx.update(jnp.ones(4), state, params, value=1.0)
    updates, after = tx.update(
        jnp.ones(4).at[1].set(bad), state, params, value=jnp.float32(1.0)
    )
    assert all_finite((updates, after))
    chex.assert_trees_all_equal(updates, jnp.zeros(4))  # 1e30 squared overflows
    updates, after = tx.update(jnp.ones(4), after, params, value=1.0)
    assert jnp.all(updates != 0.0), "goes on at once"


@pytest.mark.parametrize("tx", [ALONE["macro"], ALONE["regulator"]])
@pytest.mark.parametrize("bad", BAD)
def test_links_that_see_the_loss_reject_a_bad_one(tx, bad):
    params = jnp.ones(4)
    updates, state = tx.update(jnp.ones(4), tx.init(params), params, value=bad)
    chex.assert_trees_all_equal(updates, jnp.zeros(4))
    assert all_finite(state)


@pytest.mark.parametrize("tx", FORMS.values(), ids=FORMS.keys())
def test_bad_numbers_from_the_very_first_step_on(tx):
    step, report = spoilt_run(tx, slice(20), np.nan, np.nan)
    chex.assert_trees_all_equal(step.params[19], np.zeros(6, np.float32))
    assert np.all(report["is_finite"])
    assert np.sum((step.params[-1] - 1.0) ** 2) < 3.0


def test_an_update_that_is_not_finite_never_reaches_the_params():
    blow_up = optax.stateless(lambda u, _: jax.tree.map(lambda x: x / 0.0, u))
    tx = lo.error_regulate(blow_up)
    params = {"a": jnp.array([1.0, 0.0]), "b": jnp.array(3e38)}
    state = tx.init(params)
    grads = {"a": jnp.array([1.0, 0.0]), "b": jnp.array(1.0)}
    updates, state = tx.update(grads, state, params, value=1.0)
    assert all_finite(optax.apply_updates(params, updates))


def test_a_parameter_hit_between_steps_never_gets_into_the_anchor():
    tx = lo.error_regulate(optax.sgd(0.1))
    params = jnp.array([1.0, 2.0, 3.0])
    state = tx.init(params)
    # entry 2 is hit, and plays no part in loss and gradient
    for t in range(40):
        params = params.at[2].set(jnp.nan) if t == 10 else params
        updates, state = tx.update(jnp.array([0.1, 0.1, 0.0]), state, params, value=1.0)
        params = optax.apply_updates(params, updates)
    assert state.anchor_age < 10
    assert all_finite(state)
    assert state.anchor[0] < 1.0
    assert state.anchor[2] == 3.0


PATIENCE = 32  # the default


PLAIN = lo.error_regulate(optax.sgd(1e-3))


def verdict_of(step):
    return step.state.verdict


def verdicts_of(losses):
    signals = jnp.asarray(losses, jnp.float32), jnp.ones((len(losses), 2))
    _, state, verdicts = drive(
        PLAIN, jnp.ones(2), signals, see=verdict_of, apply_updates=stay
    )
    assert all_finite(state)
    return np.asarray(verdicts)


@pytest.mark.parametrize(
    "shift", [2.0, 10.0, 1e3, 1e30], ids=lambda shift: f"to {shift}"
)
def test_a_new_level_is_accepted_soon(shift):
    noise = 0.02 * np.random.default_rng(0).standard_normal(400)
    losses = np.where(np.arange(400) < 200, 1.0, shift) * (1.0 + noise)
    verdicts = verdicts_of(losses)
    assert np.sum(verdicts == Verdict.REVERT) == 4
    assert not np.any(verdicts == Verdict.SKIP)
    assert 0 < np.sum(verdicts == Verdict.BOUND) <= PATIENCE + 1
    assert np.all(verdicts[200 + PATIENCE + 6 :] == Verdict.ACCEPT)


def test_losses_that_always_rise_faster_than_tolerated_are_learnt_from_nonetheless():
    losses = np.concatenate([np.ones(50), 10.0 ** np.linspace(0, 37, 350)])
    losses[:50] += 0.01 * np.random.default_rng(0).standard_normal(50)
    verdicts = verdicts_of(losses)
    assert np.sum(verdicts == Verdict.BOUND) > 30
    assert np.sum(verdicts == Verdict.REVERT) < 0.1 * 350
    assert not np.any(verdicts == Verdict.SKIP)


finite_losses = st.lists(
    st.floats(allow_nan=False, allow_infinity=False, width=32),
    min_size=1,
    max_size=12,
)


@settings(max_examples=60, deadline=None)
@given(levels=finite_losses, length=st.integers(1, 60), seed=st.integers(0, 99))
@example(levels=[0.0, 3.4e38, -3.4e38], length=50, seed=0)
@example(levels=[1.0, 10.0, 100.0, 1e3, 1e4, 1e5, 1e6, 1e7], length=31, seed=0)
def test_no_sequence_of_finite_losses_is_rejected_for_more_than_two_steps(
    levels, length, seed
):
    rng = np.random.default_rng(seed)
    losses = np.repeat(np.asarray(levels, np.float64), length)
    losses = losses * (1.0 + 0.01 * rng.standard_normal(losses.size))
    losses = np.clip(losses, -3.4e38, 3.4e38)
    losses = np.resize(losses, 720)  # one shape: one compilation
    verdicts = verdicts_of(losses)
    assert not np.any(verdicts == Verdict.SKIP)
    is_rejected = verdicts == Verdict.REVERT
    assert not np.any(is_rejected[2:] & is_rejected[1:-1] & is_rejected[:-2])


def test_one_nan_does_not_freeze_the_judge():
    _, report = spoilt_run(PLAIN, [150, 160], value=[np.nan, 100.0])
    verdicts = report["verdict"][:200].tolist()
    assert verdicts[150] == Verdict.SKIP
    assert verdicts[160] == Verdict.BOUND, "the next outlier is still found"
    assert verdicts.count(Verdict.ACCEPT) == 198


@pytest.mark.parametrize("bad", BAD)
def test_an_infinite_first_loss_does_not_blind_the_judge(bad):
    last = 61
    for value, grad, verdict in ((1e4, 0.0, Verdict.BOUND), (0.0, 1e4, Verdict.SKIP)):
        values, grads = [bad, value], np.array([[bad], [grad]])
        step, report = spoilt_run(PLAIN, [0, last], values, grads)
        assert 5.0 < step.state.history.start_value[last - 1, 0] <= 6.0
        assert report["verdict"][last] == verdict
