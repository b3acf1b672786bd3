"""What is changed on purpose is looked at anew, instead of being taken back."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lalerg_optax as lo

KEY = jax.random.key(0)
INPUTS = jax.random.normal(KEY, (64, 6))
TARGETS = jnp.sin(INPUTS.sum(axis=1))
START = {
    "body": 0.5 * jax.random.normal(jax.random.key(1), (6, 16)),
    "head": 0.3 * jax.random.normal(jax.random.key(2), (16,)),
}


def loss_fn(params, noise, scale):
    outputs = jnp.tanh(INPUTS @ params["body"]) @ params["head"]
    return scale * jnp.mean((outputs - TARGETS) ** 2) + 0.01 * noise


def train(tx, params, state, steps, scale=1.0, shift=0.0):
    """Returns params, state and all losses and verdicts."""

    @jax.jit
    def run(params, state):
        def step(carry, noise):
            params, state = carry
            loss, grads = jax.value_and_grad(loss_fn)(params, noise, scale)
            updates, state = tx.update(grads, state, params, value=loss + shift)
            params = lo.apply_updates(params, updates, state)
            return (params, state), (loss, lo.metrics(state)["verdict"])

        noise = jax.random.normal(KEY, (steps,))
        return jax.lax.scan(step, (params, state), noise)

    (params, state), (losses, verdicts) = run(params, state)
    return params, state, np.asarray(losses), np.asarray(verdicts)


FORMS = {
    "error_regulate": lo.error_regulate(optax.adam(3e-3)),
    "lalerg": lo.lalerg(1e-3),
}


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("told", [True, False], ids=["told", "not told"])
def test_a_new_head_stays_where_it_is_told(name, told):
    tx = FORMS[name]
    params, state, *_ = train(tx, START, tx.init(START), 400)
    params = params | {"head": jnp.full(16, 2.0)}
    if told:
        state = lo.rebase(params, state)
    before = lo.metrics(state)
    _, state, losses, verdicts = train(tx, params, state, 30)
    num_reverts = int(lo.metrics(state)["num_reverts"] - before["num_reverts"])
    assert (num_reverts == 0) == told
    if told:
        assert not np.any(verdicts == lo.Verdict.BOUND)
        assert losses[-1] < losses[0]


def test_the_recorder_names_a_head_that_was_reset_and_what_to_say():
    tx, recorder = lo.error_regulate(optax.sgd(0.1), local=True), lo.Recorder()
    params, update = START, jax.jit(tx.update)
    state = tx.init(params)
    for step in range(20):
        if step == 10:
            params = params | {"head": jnp.full(16, 2.0)}
        updates, state = update(params, state, params, value=1.0)
        params = lo.apply_updates(params, updates, state)
        recorder.record(state)
    with pytest.warns(lo.InterventionWarning) as caught:
        recorder.flush()
    (warning,) = caught
    assert str(warning.message).startswith("params of head were not where the last")
    assert "(at step 10)" in str(warning.message)
    assert "lalerg_optax.rebase" in str(warning.message)


@pytest.mark.parametrize("change", [{"scale": 30.0}, {"shift": 50.0}])
def test_another_loss_is_no_harm(change):
    tx = FORMS["lalerg"]
    params, state, *_ = train(tx, START, tx.init(START), 400)
    rate = lo.metrics(state)["macro_rate"]
    changed = lo.rebase(params, state)
    _, changed, _, verdicts = train(tx, params, changed, 100, **change)
    assert not np.any(verdicts == lo.Verdict.REVERT)
    assert np.sum(verdicts != lo.Verdict.ACCEPT) <= 5  # moments know the old scale
    assert 0.2 < lo.metrics(changed)["macro_rate"] / rate < 5.0
    _, _, _, verdicts = train(tx, params, state, 100, **change)
    assert np.any(verdicts == lo.Verdict.REVERT)


def test_counters_rate_and_moments_are_kept():
    tx = FORMS["lalerg"]
    params, state, *_ = train(tx, START, tx.init(START), 100)
    _, state = tx.update(params, state, params, value=jnp.nan)
    new = lo.rebase(params, state)
    chex.assert_trees_all_equal_shapes_and_dtypes(new, state)
    chex.assert_trees_all_equal(new.inner_state[0], state.inner_state[0])
    before, after = lo.metrics(state), lo.metrics(new)
    for key in ("macro_rate", "num_accepted", "num_skipped", "damping_factor"):
        assert after[key] == before[key]
    assert after["num_audits_passed"] >= 1
    assert int(new.history.num_values[0]) == 0


def test_it_can_be_jitted_and_shares_nothing_with_the_params():
    tx = FORMS["error_regulate"]
    state = tx.init(START)
    chex.assert_trees_all_equal(
        jax.jit(lo.rebase)(START, state), lo.rebase(START, state)
    )
    new = lo.rebase(START, state)
    for a, p in zip(*map(jax.tree.leaves, (new.anchor, START)), strict=True):
        assert a.unsafe_buffer_pointer() != p.unsafe_buffer_pointer()


def test_groups_have_their_own_params():
    tx = optax.partition(
        {"a": lo.error_regulate(optax.sgd(0.1)), "b": optax.sgd(0.1)},
        {"body": "a", "head": "b"},
    )
    params = jax.tree.map(lambda p: p + 1.0, START)
    state = lo.rebase(params, tx.init(START))
    chex.assert_trees_all_equal(lo.healthy_params(START, state)["body"], params["body"])


def test_one_mask_may_hide_a_whole_subtree():
    """Of a frozen body of two layers, with a head that is trained."""
    start = {"body": [jnp.zeros(2), jnp.zeros(5)], "head": jnp.zeros(3)}
    mask = {"body": False, "head": True}
    tx = optax.masked(lo.error_regulate(optax.sgd(0.1)), mask)
    params = jax.tree.map(lambda p: p + 1.0, start)
    state = lo.rebase(params, tx.init(start))
    chex.assert_trees_all_equal(lo.healthy_params(start, state)["head"], params["head"])
    frozen = lo.healthy_params(params, state)["body"]
    chex.assert_trees_all_equal(frozen, params["body"])


def test_what_does_not_fit_is_refused():
    tx = FORMS["error_regulate"]
    state = tx.init(START)
    with pytest.raises(ValueError, match="params do not fit the state"):
        lo.rebase(START | {"head": jnp.ones(3)}, state)
    with pytest.raises(ValueError, match="made for 2 leaves"):
        lo.rebase({"other": jnp.ones(3)}, state)
    with pytest.raises(ValueError, match="no state of error_regulate"):
        lo.rebase(START, optax.adam(0.1).init(START))


def test_params_that_are_tracked_are_rebased():
    tx = lo.tracks_params(lo.error_regulate(optax.sgd(0.01)))
    params = jnp.ones(3)
    state = tx.init(params)
    params = jnp.full(3, 9.0)
    state = lo.rebase(params, state)
    for _ in range(8):
        updates, state = tx.update(params * jnp.nan, state, value=jnp.nan)
        params = optax.apply_updates(params, updates)
    assert lo.metrics(state)["num_reverts"] >= 1
    np.testing.assert_allclose(params, 9.0)


def test_a_half_group_of_micro_batches_is_forgotten():
    tx, params = lo.accumulate(lo.error_regulate(optax.sgd(1.0)), 2), jnp.ones(3)
    _, state = tx.update(1e6 * params, tx.init(params), params, value=1e6)
    state = lo.rebase(params, state)
    updates, state = tx.update(params, state, params, value=1.0)
    np.testing.assert_allclose(updates, -1.0)
    assert lo.metrics(state)["avg_value"] == 1.0


def test_the_state_of_nnx_is_rebased():
    nnx = pytest.importorskip("flax.nnx")
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, lo.lalerg(1e-3), wrt=nnx.Param)
    model.kernel[...] = jnp.full((2, 3), 9.0)
    with pytest.raises(ValueError, match=r"NNX params are nnx.state\(model, nnx.Param"):
        lo.rebase(model, optimizer.opt_state)
    params = nnx.state(model, nnx.Param)
    optimizer.opt_state = lo.rebase(params, optimizer.opt_state)
    anchor = optimizer.opt_state.anchor
    assert all(
        jnp.all(a == p)
        for a, p in zip(*map(jax.tree.leaves, (anchor, params)), strict=True)
    )
    grads = jax.tree.map(jnp.ones_like, params)
    optimizer.update(model, grads, value=jnp.float32(1.0))
    assert jnp.all(model.kernel[...] < 9.0)
