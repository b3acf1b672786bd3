"""Levanter's contract, restated: it is heavy to install.

Its ``take_train_step`` passes params by name and the arguments ``obj_fn`` (a function
or None), ``loss`` (a number or None) and ``grams``; older versions pass ``obj_fn``
alone. What is not trained is None; params and state are one tree, saved by its leaves.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from client_packages import breast_cancer, import_client

import lalerg_optax as lo
from lalerg_optax import Verdict

eqx = import_client("equinox")

OPTIMIZERS = {
    "lalerg": lambda: lo.lalerg(1e-2),
    "error_regulate": lambda: lo.error_regulate(optax.adamw(1e-2)),
}
all_optimizers = pytest.mark.parametrize("name", OPTIMIZERS)


class TrainerState(eqx.Module):
    """The parts of Levanter's that an optimizer meets."""

    step: jax.Array
    model: eqx.Module
    optimizer: optax.GradientTransformation = eqx.field(static=True)
    opt_state: optax.OptState

    def take_step(self, grads, **extra_args):
        trainable = eqx.filter(self.model, eqx.is_inexact_array)
        updates, opt_state = self.optimizer.update(
            grads, self.opt_state, params=trainable, **extra_args
        )
        model = eqx.apply_updates(self.model, updates)
        return TrainerState(self.step + 1, model, self.optimizer, opt_state)


def start(tx):
    model = eqx.nn.MLP(30, "scalar", 8, 1, key=jax.random.key(0))
    opt_state = tx.init(eqx.filter(model, eqx.is_inexact_array))
    return TrainerState(jnp.zeros((), jnp.int32), model, tx, opt_state)


def loss_fn(model, batch):
    logits = jax.vmap(model)(batch[0])
    return optax.losses.sigmoid_binary_cross_entropy(logits, batch[1]).mean()


@functools.partial(eqx.filter_jit, donate="all-except-first")
def train_step(batch, state, passes_loss=True):
    loss, grads = eqx.filter_value_and_grad(loss_fn)(state.model, batch)
    told = {"loss": loss, "grams": None} if passes_loss else {}

    def obj_fn(model):
        return loss_fn(model, batch)

    return state.take_step(grads, obj_fn=obj_fn, **told)


def run(state, num_steps, bad_step=None, **how):
    x, y = breast_cancer()
    for t in range(num_steps):
        rows = np.random.default_rng(t).integers(0, len(y), 64)
        batch = x[rows], np.where(t == bad_step, np.float32(np.nan), y[rows])
        state = train_step(batch, state, **how)
    return state


@all_optimizers
def test_a_step_with_a_nan_is_skipped_and_the_run_goes_on(name):
    tx = OPTIMIZERS[name]()
    state = run(start(tx), 100, bad_step=60)
    assert loss_fn(state.model, breast_cancer()) < 0.15
    report = lo.metrics(state.opt_state)
    assert (report["num_skipped"], state.step) == (1, 100)
    assert report["avg_value"] > 0.0  # it has seen the loss


@all_optimizers
def test_without_a_loss_the_adapter_is_named(name):
    with pytest.raises(TypeError, match="without_value"):
        run(start(OPTIMIZERS[name]()), 1, passes_loss=False)
    tx = lo.without_value(OPTIMIZERS[name]())
    report = lo.metrics(run(start(tx), 21, bad_step=20, passes_loss=False).opt_state)
    assert (report["verdict"], report["num_skipped"]) == (Verdict.SKIP, 1)


@all_optimizers
def test_a_loss_of_none_is_no_loss(name):
    state = start(OPTIMIZERS[name]())
    grads = eqx.filter(state.model, eqx.is_inexact_array)
    take_step = eqx.filter_jit(TrainerState.take_step)
    report = lo.metrics(take_step(state, grads, obj_fn=None, loss=None).opt_state)
    assert (report["num_accepted"], report["avg_value"]) == (1, 0.0)


@all_optimizers
def test_the_shape_of_the_state_is_known_without_making_it(name):
    """Levanter restores into what ``eqx.filter_eval_shape`` returns."""
    tx = OPTIMIZERS[name]()
    shapes = eqx.filter_eval_shape(start, tx)
    made = run(start(tx), 1)
    assert jax.tree.structure(shapes.opt_state) == jax.tree.structure(made.opt_state)
    for shape, array in zip(*map(jax.tree.leaves, (shapes, made)), strict=True):
        if eqx.is_array(array):
            assert (shape.shape, shape.dtype) == (array.shape, array.dtype)
