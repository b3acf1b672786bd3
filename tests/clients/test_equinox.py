"""Equinox: the loop is the user's, and what is not trained is None among the params."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from client_packages import breast_cancer, import_client

import lalerg_optax as lo
from lalerg_optax import Verdict

eqx = import_client("equinox")

NUM_STEPS, BATCH_SIZE, BAD_STEP = 240, 64, 90
OPTIMIZERS = {
    "lalerg": lambda: lo.lalerg(1e-3),
    "error_regulate": lambda: lo.error_regulate(optax.adam(1e-2)),
    "adam": lambda: optax.with_extra_args_support(optax.adam(1e-2)),
}
OURS = [name for name in OPTIMIZERS if name != "adam"]
all_of_ours = pytest.mark.parametrize("name", OURS)


def make_model():
    return eqx.nn.MLP(30, "scalar", 16, 1, key=jax.random.key(0))


def only_the_last_layer(model):
    """Returns which leaves are trained: a tree of booleans."""
    nothing = jax.tree.map(lambda _: False, model)
    is_array = jax.tree.map(eqx.is_inexact_array, model.layers[-1])
    return eqx.tree_at(lambda m: m.layers[-1], nothing, is_array)


def loss_fn(params, static, batch):
    x, y = batch
    logits = jax.vmap(eqx.combine(params, static))(x)
    return optax.losses.sigmoid_binary_cross_entropy(logits, y).mean()


@eqx.filter_jit
def step(params, static, opt_state, batch, tx):
    loss, grads = eqx.filter_value_and_grad(loss_fn)(params, static, batch)
    updates, opt_state = tx.update(grads, opt_state, params, value=loss)
    return lo.apply_updates(params, updates, opt_state), opt_state, loss


@functools.cache
def batches(bad_step=None):
    x, y = breast_cancer()
    rows = np.random.default_rng(0).integers(0, len(y), (NUM_STEPS, BATCH_SIZE))
    xs, ys = x[rows], y[rows]
    if bad_step is not None:
        xs[bad_step, 5, 7] = np.nan
    return xs, ys


@functools.cache
def train(name, bad_step=None, trained=eqx.is_inexact_array):
    """Returns the model at the end, and reports of all steps if they are ours."""
    tx, model = OPTIMIZERS[name](), make_model()
    spec = trained(model) if trained is only_the_last_layer else trained
    params, static = eqx.partition(model, spec)
    opt_state, reports = tx.init(params), []
    for batch in zip(*batches(bad_step), strict=True):
        params, opt_state, _ = step(params, static, opt_state, batch, tx)
        reports.append(lo.metrics(opt_state) if name in OURS else {})
    return eqx.combine(params, static), reports


def full_loss(model):
    return float(loss_fn(*eqx.partition(model, eqx.is_array), breast_cancer()))


@all_of_ours
def test_a_model_with_a_bad_batch_ends_as_well_as_with_adam_without(name):
    model, reports = train(name, BAD_STEP)
    start, bare = full_loss(make_model()), full_loss(train("adam")[0])
    assert full_loss(model) < bare + 0.05 * (start - bare)
    assert reports[BAD_STEP]["verdict"] == Verdict.SKIP
    assert reports[-1]["num_skipped"] == 1
    assert reports[-1]["num_accepted"] >= NUM_STEPS - 5


def test_without_protection_a_bad_batch_is_fatal():
    assert np.isnan(full_loss(train("adam", BAD_STEP)[0]))


@all_of_ours
def test_what_is_not_trained_stays_and_needs_no_state(name):
    before = make_model()
    after, _ = train(name, trained=only_the_last_layer)
    chex.assert_trees_all_equal(after.layers[0].weight, before.layers[0].weight)
    assert jnp.any(after.layers[-1].weight != before.layers[-1].weight)
    params, _ = eqx.partition(before, only_the_last_layer(before))
    state = OPTIMIZERS[name]().init(params)
    assert len(jax.tree.leaves(state.anchor)) == 2  # weight and bias


@all_of_ours
def test_the_whole_model_may_be_updated_as_equinox_does(name):
    """With eqx.apply_updates, which leaves alone what is None in the updates."""
    tx, model = OPTIMIZERS[name](), make_model()
    params, static = eqx.partition(model, eqx.is_inexact_array)
    batch = tuple(x[0] for x in batches())
    loss, grads = eqx.filter_value_and_grad(loss_fn)(params, static, batch)
    update = eqx.filter_jit(tx.update)
    updates, state = update(grads, tx.init(params), params, value=loss)
    theirs = eqx.apply_updates(model, updates)
    ours = eqx.combine(lo.apply_updates(params, updates, state), static)
    assert eqx.tree_equal(theirs, ours)
    assert not eqx.tree_equal(theirs, model)


@all_of_ours
def test_the_state_is_saved_by_equinox_and_restored_bit_for_bit(name, tmp_path):
    tx = OPTIMIZERS[name]()
    params, static = eqx.partition(make_model(), eqx.is_inexact_array)
    opt_state, path = tx.init(params), tmp_path / "run.eqx"
    start = params, opt_state
    all_batches = list(zip(*batches(BAD_STEP), strict=True))[BAD_STEP - 20 :][:40]
    for t, batch in enumerate(all_batches):
        if t == 21:  # just after the skip
            eqx.tree_serialise_leaves(path, (params, opt_state))
        params, opt_state, _ = step(params, static, opt_state, batch, tx)
    resumed = eqx.tree_deserialise_leaves(path, start)
    assert lo.metrics(resumed[1])["verdict"] == Verdict.SKIP
    for batch in all_batches[21:]:
        *resumed, _ = step(resumed[0], static, resumed[1], batch, tx)
    chex.assert_trees_all_equal(tuple(resumed), (params, opt_state))
