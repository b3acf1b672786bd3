"""Adapters: callers that pass no loss, or no params, or neither."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training import train_state
from helpers.digits_run import ALONE, BURST, batches, init_params, loss_fn
from helpers.spies import spy

import lalerg_optax as lo
from lalerg_optax import Verdict

OPTIMIZERS = {
    "lalerg": lo.lalerg(1e-3),
    "error_regulate": lo.error_regulate(optax.adam(3e-3)),
}
all_optimizers = pytest.mark.parametrize(
    "name", ["error_regulate", pytest.param("lalerg", marks=pytest.mark.slow)]
)
ADAPTERS = (lo.without_value, lo.tracks_params, lo.value_from_gradient)


def train(call, init, params, loss_fn=loss_fn, data=None):
    """Trains on digits, with faults; returns params, state and all verdicts."""

    def step(carry, batch):
        params, state = carry
        loss, grads = jax.value_and_grad(loss_fn)(params, batch)
        updates, state = call(grads, state, params, loss)
        params = optax.apply_updates(params, updates)
        return (params, state), lo.metrics(state)["verdict"]

    carry = (params, init(params))
    data = batches() if data is None else data
    (params, state), verdicts = jax.jit(functools.partial(jax.lax.scan, step))(
        carry, data
    )
    return params, state, verdicts.tolist()


@functools.cache
def passing_all(tx, use_value=True):
    def call(grads, state, params, loss):
        return tx.update(grads, state, params, value=loss if use_value else None)

    return train(call, tx.init, init_params())


def passing_no_value(tx):
    def call(grads, state, params, loss):
        del loss
        return tx.update(grads, state, params)

    return call


def assert_faults_were_survived(params, verdicts, has_value=False):
    chex.assert_tree_all_finite(params)
    assert verdicts[ALONE] == Verdict.SKIP
    assert verdicts[ALONE + 1] == Verdict.ACCEPT
    first = Verdict.BOUND if has_value else Verdict.SKIP
    assert verdicts[BURST : BURST + 2] == [first, Verdict.REVERT]
    rows = batches(bad_row=None)
    assert loss_fn(params, jax.tree.map(lambda x: x[0], rows)) < 1.0


# ---- no loss ------------------------------------------------------------------------


@all_optimizers
def test_without_value_is_value_none(name):
    tx = OPTIMIZERS[name]
    wrapped = lo.without_value(tx)

    ours = train(passing_no_value(wrapped), wrapped.init, init_params())
    chex.assert_trees_all_equal(ours, passing_all(tx, use_value=False))
    assert_faults_were_survived(ours[0], ours[2])


def test_without_value_drops_a_value_that_is_passed():
    tx, params = lo.without_value(lo.lalerg()), jnp.ones(3)
    updates, state = tx.update(params, tx.init(params), params, value=jnp.nan)
    assert lo.metrics(state)["verdict"] == Verdict.ACCEPT
    assert np.all(updates < 0)


# ---- no params ----------------------------------------------------------------------


@all_optimizers
def test_tracked_params_are_those_of_the_caller(name):
    tx = lo.tracks_params(lo.without_value(OPTIMIZERS[name]))

    def call(grads, state, params, loss):
        del params, loss
        return tx.update(grads, state)

    params, state, verdicts = train(call, tx.init, init_params())
    chex.assert_trees_all_close(state.tracked_params, params, rtol=1e-4, atol=1e-6)
    assert_faults_were_survived(params, verdicts)
    _, _, expected = passing_all(OPTIMIZERS[name], use_value=False)
    assert verdicts == expected


def test_tracks_params_hands_a_loss_on():
    tx = lo.tracks_params(lo.lalerg())
    params = jnp.ones(3)
    _, state = tx.update(params, tx.init(params), value=5.0)
    assert lo.metrics(state)["avg_value"] == 5.0


def test_params_that_are_passed_are_tracked_from_there_on():
    tx = lo.tracks_params(lo.error_regulate(optax.sgd(0.5)))
    state = tx.init(jnp.ones(3))
    updates, state = tx.update(jnp.ones(3), state, jnp.full(3, 7.0), value=1.0)
    np.testing.assert_array_equal(updates, -0.5)
    np.testing.assert_array_equal(state.tracked_params, 6.5)


def test_a_revert_leads_to_the_anchor_up_to_rounding():
    tx = lo.tracks_params(lo.error_regulate(optax.sgd(0.1), anchor_every=1))
    params = jnp.array([1.0, -2.0, 1e-3])
    state = tx.init(params)
    for _ in range(30):
        updates, state = tx.update(params, state, value=jnp.sum(params**2))
        params = optax.apply_updates(params, updates)
    anchor = state.inner_state.anchor
    for _ in range(2):
        updates, state = tx.update(params, state, value=1e3)
        params = optax.apply_updates(params, updates)
    assert lo.metrics(state)["verdict"] == Verdict.REVERT
    np.testing.assert_allclose(params, anchor, rtol=1e-5)


def test_the_tracked_copy_is_not_an_alias():
    tx = lo.tracks_params(lo.lalerg())
    params = jnp.ones(3)
    state = tx.init(params)
    params.delete()
    assert jnp.sum(state.tracked_params) == 3.0


def test_tracks_params_refuses_a_state_of_its_inner_optimizer():
    inner, params = lo.lalerg(), jnp.ones(3)
    with pytest.raises(TypeError, match="needs a state of type TracksParamsState"):
        lo.tracks_params(inner).update(params, inner.init(params), value=1.0)


@all_optimizers
def test_a_loss_from_the_gradient_gives_the_run_of_one_that_is_passed(name):
    tx = OPTIMIZERS[name]
    wrapped = lo.value_from_gradient(tx)

    carrier, state, verdicts = train(
        passing_no_value(wrapped),
        wrapped.init,
        lo.Carrier(init_params()),
        lo.carry_value(loss_fn),
    )
    assert carrier.slot == 0.0
    expected_params, expected, expected_verdicts = passing_all(tx)
    assert verdicts == expected_verdicts
    chex.assert_trees_all_close(carrier.params, expected_params, rtol=1e-3, atol=1e-4)
    chex.assert_trees_all_close(
        lo.metrics(state)["grad_norm"], lo.metrics(expected)["grad_norm"], rtol=1e-3
    )


def test_nothing_but_the_loss_and_its_gradient_is_tracked_together():
    tx = lo.tracks_params(lo.value_from_gradient(lo.error_regulate(optax.sgd(0.25))))
    loss_fn = lo.carry_value(lambda p: jnp.sum(p**2))
    carrier = lo.Carrier(jnp.array([1.0, -2.0]))
    state = tx.init(carrier)
    for _ in range(3):
        updates, state = tx.update(jax.grad(loss_fn)(carrier), state)
        carrier = optax.apply_updates(carrier, updates)
    np.testing.assert_allclose(carrier.params, [0.125, -0.25])
    assert lo.metrics(state)["num_accepted"] == 3


def test_flax_train_state_by_itself_carries_the_loss():
    rows = batches()
    state = train_state.TrainState.create(
        apply_fn=None,
        params=lo.Carrier(init_params()),
        tx=lo.value_from_gradient(lo.lalerg(1e-3)),
    )

    def step(state, batch):
        grads = jax.grad(lo.carry_value(loss_fn))(state.params, batch)
        state = state.apply_gradients(grads=grads)
        return state, lo.metrics(state.opt_state)["verdict"]

    state, verdicts = jax.jit(functools.partial(jax.lax.scan, step))(state, rows)
    assert_faults_were_survived(state.params.params, verdicts.tolist(), has_value=True)


# ---- all of them ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("adapter", "value"), list(zip(ADAPTERS, (None, 5.0, 2.0), strict=True))
)
def test_an_adapter_hands_everything_on_and_the_value_as_it_says(adapter, value):
    seen, tree = [], lo.Carrier(jnp.ones(3), jnp.float32(2.0))
    tx = adapter(spy(seen))
    tx.update(tree, tx.init(tree), tree, value=5.0, key="for the inner one")
    assert seen == [{"key": "for the inner one", "value": value}]


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_an_adapter_of_a_transformation_that_takes_no_value_drops_it(adapter):
    tx, tree = adapter(optax.scale(-0.5)), lo.Carrier(jnp.ones(3))
    updates, _ = tx.update(tree, tx.init(tree), tree, value=5.0)
    np.testing.assert_array_equal(updates.params, -0.5)


# ---- errors -------------------------------------------------------------------------


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("bad", ["adam", 1e-3, optax.adam])
def test_an_adapter_of_no_transformation_is_a_type_error(adapter, bad):
    with pytest.raises(TypeError, match="tx must be an Optax gradient"):
        adapter(bad)


def test_what_a_caller_leaves_out_is_told_with_the_adapter_for_it():
    params = jnp.ones(3)
    for tx in (lo.lalerg(), lo.scale_by_macro_rate(), lo.error_regulate()):
        with pytest.raises(TypeError, match=r"without_value\(tx\) judges by gradient"):
            tx.update(params, tx.init(params), params)
    tx = lo.without_value(lo.lalerg())
    with pytest.raises(ValueError, match=r"wrap the optimizer in .*tracks_params\(tx"):
        tx.update(params, tx.init(params))
