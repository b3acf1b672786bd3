"""Flax NNX as it is, and linen by our TrainState."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from flax.training import train_state
from helpers.spies import spy
from sklearn.datasets import load_digits

import lalerg_optax as lo
from lalerg_optax import Verdict
from lalerg_optax.flax import TrainState


@pytest.fixture(scope="module")
def batch():
    images, labels = load_digits(return_X_y=True)
    return images[:128].astype(np.float32) / 16.0, labels[:128]


def cross_entropy(logits, labels):
    return optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def poisoned(batch):
    images, labels = batch
    images = images.copy()
    images[3, 5] = np.nan
    return images, labels


OPTIMIZERS = {
    "lalerg": lambda: lo.lalerg(1e-3),
    "error_regulate": lambda: lo.error_regulate(optax.adam(3e-3)),
}
all_optimizers = pytest.mark.parametrize("name", OPTIMIZERS)

# ---- NNX ----------------------------------------------------------------------------


class NNXModel(nnx.Module):
    def __init__(self, rngs):
        self.hidden = nnx.Linear(64, 32, rngs=rngs)
        self.norm = nnx.BatchNorm(32, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)
        self.out = nnx.Linear(32, 10, rngs=rngs)

    def __call__(self, x):
        return self.out(self.dropout(nnx.relu(self.norm(self.hidden(x)))))


@nnx.jit
def nnx_step(model, optimizer, batch):
    def loss_fn(model):
        return cross_entropy(model(batch[0]), batch[1])

    loss, grads = nnx.value_and_grad(loss_fn)(model)
    optimizer.update(model, grads, value=loss)
    return loss, lo.metrics(optimizer.opt_state)


def nnx_model_and_optimizer(name):
    model = NNXModel(nnx.Rngs(0))
    return model, nnx.Optimizer(model, OPTIMIZERS[name](), wrt=nnx.Param)


def nnx_params(model):
    return jax.tree.map(jnp.copy, nnx.as_pure(nnx.state(model, nnx.Param)))


@all_optimizers
def test_nnx_optimizer_trains_as_it_is(name, batch):
    model, optimizer = nnx_model_and_optimizer(name)
    losses = [nnx_step(model, optimizer, batch)[0] for _ in range(60)]
    assert losses[-1] < 0.5 * losses[0]
    report = lo.metrics(optimizer.opt_state)
    assert (
        report["num_accepted"] + report["num_revert_steps"] + report["num_skipped"]
        == 60
    )
    assert report["num_accepted"] >= 55


@all_optimizers
def test_nan_batch_leaves_the_params_of_an_nnx_model_bit_identical(name, batch):
    model, optimizer = nnx_model_and_optimizer(name)
    for _ in range(8):  # the first ones may be taken back
        nnx_step(model, optimizer, batch)
    before = nnx_params(model)
    loss, report = nnx_step(model, optimizer, poisoned(batch))
    assert jnp.isnan(loss)
    assert report["verdict"] == Verdict.SKIP
    chex.assert_trees_all_equal(nnx_params(model), before)
    assert optimizer.step[...] == 9


@nnx.jit
def nnx_step_with_clean_statistics(model, optimizer, batch):
    """The step of the documentation of `lalerg_optax.flax`."""
    before = nnx.as_pure(nnx.state(model, nnx.BatchStat))

    def loss_fn(model):
        return cross_entropy(model(batch[0]), batch[1])

    loss, grads = nnx.value_and_grad(loss_fn)(model)
    optimizer.update(model, grads, value=loss)
    is_accepted = lo.metrics(optimizer.opt_state)["verdict"] == Verdict.ACCEPT
    after = nnx.as_pure(nnx.state(model, nnx.BatchStat))
    nnx.update(
        model, jax.tree.map(lambda a, b: jnp.where(is_accepted, a, b), after, before)
    )


def nnx_statistics(model):
    return jax.tree.map(jnp.copy, nnx.as_pure(nnx.state(model, nnx.BatchStat)))


def test_batch_statistics_of_a_rejected_step_of_nnx_can_be_kept_out(batch):
    model, optimizer = nnx_model_and_optimizer("error_regulate")
    start = nnx_statistics(model)
    nnx_step_with_clean_statistics(model, optimizer, batch)
    before = nnx_statistics(model)
    with pytest.raises(AssertionError):
        chex.assert_trees_all_close(before, start)
    nnx_step_with_clean_statistics(model, optimizer, poisoned(batch))
    chex.assert_trees_all_equal(nnx_statistics(model), before)
    nnx_step(model, optimizer, poisoned(batch))  # the user's forward pass sets them
    assert any(jnp.any(jnp.isnan(x)) for x in jax.tree.leaves(nnx_statistics(model)))


def test_nnx_update_without_value_is_a_type_error():
    model, optimizer = nnx_model_and_optimizer("lalerg")
    grads = nnx.state(model, nnx.Param)
    with pytest.raises(TypeError, match="'value'"):
        optimizer.update(model, grads)


# ---- linen --------------------------------------------------------------------------


class LinenModel(linen.Module):
    @linen.compact
    def __call__(self, x, is_training):
        x = linen.Dense(32)(x)
        x = linen.BatchNorm(use_running_average=not is_training)(x)
        x = linen.Dropout(0.1, deterministic=not is_training)(linen.relu(x))
        return linen.Dense(10)(x)


class BatchNormState(TrainState):
    batch_stats: Any


def linen_state(tx, cls=BatchNormState):
    model = LinenModel()
    variables = model.init(jax.random.key(0), jnp.ones((2, 64)), is_training=False)
    stats = {"batch_stats": variables["batch_stats"]} if cls is BatchNormState else {}
    return cls.create(apply_fn=model.apply, params=variables["params"], tx=tx, **stats)


@jax.jit
def linen_step(state, batch):
    def loss_fn(params):
        logits, new = state.apply_fn(
            {"params": params, "batch_stats": state.batch_stats},
            batch[0],
            is_training=True,
            mutable=["batch_stats"],
            rngs={"dropout": jax.random.fold_in(jax.random.key(1), state.step)},
        )
        return cross_entropy(logits, batch[1]), new["batch_stats"]

    grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
    (loss, batch_stats), grads = grad_fn(state.params)
    return loss, state.apply_gradients(grads=grads, value=loss, batch_stats=batch_stats)


@all_optimizers
def test_train_state_trains_a_model_with_batch_norm_and_dropout(name, batch):
    state = start = linen_state(OPTIMIZERS[name]())
    losses = []
    for _ in range(60):
        loss, state = linen_step(state, batch)
        losses.append(loss)
    assert losses[-1] < 0.5 * losses[0]
    assert state.step == 60
    assert lo.metrics(state.opt_state)["num_accepted"] >= 55
    with pytest.raises(AssertionError):
        chex.assert_trees_all_close(state.batch_stats, start.batch_stats)


def test_train_state_hands_the_loss_on(batch):
    loss, state = linen_step(linen_state(lo.lalerg(1e-3)), batch)
    np.testing.assert_array_equal(lo.metrics(state.opt_state)["avg_value"], loss)


@all_optimizers
def test_nan_batch_leaves_the_params_of_a_linen_model_bit_identical(name, batch):
    state = linen_state(OPTIMIZERS[name]())
    for _ in range(8):  # the first ones may be taken back
        _, state = linen_step(state, batch)
    loss, after = linen_step(state, poisoned(batch))
    assert jnp.isnan(loss)
    assert lo.metrics(after.opt_state)["verdict"] == Verdict.SKIP
    chex.assert_trees_all_equal(after.params, state.params)
    assert after.step == state.step + 1


@jax.jit
def linen_step_with_clean_statistics(state, batch):
    """The step of the documentation of `lalerg_optax.flax`."""
    _, updated = linen_step(state, batch)
    is_accepted = lo.metrics(updated.opt_state)["verdict"] == Verdict.ACCEPT
    stats = jax.tree.map(
        lambda a, b: jnp.where(is_accepted, a, b),
        updated.batch_stats,
        state.batch_stats,
    )
    return updated.replace(batch_stats=stats)


def test_batch_statistics_of_a_rejected_step_of_linen_can_be_kept_out(batch):
    start = linen_state(OPTIMIZERS["error_regulate"]())
    state = linen_step_with_clean_statistics(start, batch)
    with pytest.raises(AssertionError):
        chex.assert_trees_all_close(state.batch_stats, start.batch_stats)
    after = linen_step_with_clean_statistics(state, poisoned(batch))
    chex.assert_trees_all_equal(after.batch_stats, state.batch_stats)
    _, as_it_is = linen_step(state, poisoned(batch))
    stats = jax.tree.leaves(as_it_is.batch_stats)
    assert any(jnp.any(jnp.isnan(x)) for x in stats)


def test_train_state_reverts_bit_for_bit_where_params_are_not_finite():
    state = linen_state(lo.lalerg(1e-3), TrainState)
    broken = state.replace(params=jax.tree.map(lambda p: p * jnp.inf, state.params))
    step = jax.jit(lambda s: s.apply_gradients(grads=s.params, value=jnp.nan))
    broken = step(step(broken))
    assert lo.metrics(broken.opt_state)["verdict"] == Verdict.REVERT
    chex.assert_trees_all_equal(broken.params, state.params)


def test_train_state_without_value_is_a_type_error():
    state = linen_state(lo.lalerg(1e-3), TrainState)
    with pytest.raises(TypeError, match="'value'"):
        state.apply_gradients(grads=state.params)


def test_train_state_takes_none_as_the_value():
    state = linen_state(lo.lalerg(1e-3), TrainState)
    state = state.apply_gradients(grads=state.params, value=None)
    assert lo.metrics(state.opt_state)["num_accepted"] == 1


def test_train_state_hands_extra_args_on_and_replaces_other_fields():
    seen = []
    state = linen_state(lo.error_regulate(spy(seen)))
    state = state.apply_gradients(
        grads=state.params, value=1.0, extra_args={"key": 7}, batch_stats="new"
    )
    assert seen[-1]["key"] == 7
    assert state.batch_stats == "new"


def test_linen_train_state_alone_does_not_forward_the_loss():
    state = linen_state(lo.lalerg(1e-3), train_state.TrainState)
    with pytest.raises(TypeError, match="value"):
        state.apply_gradients(grads=state.params, value=1.0)
