"""Tunix's trainer passes gradients to ``nnx.Optimizer``, which adds the params."""

import functools

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from client_packages import breast_cancer, import_client
from flax import nnx

import lalerg_optax as lo

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # tunix's own
peft_trainer = import_client("tunix.sft.peft_trainer")

OPTIMIZERS = {
    "lalerg": lambda: lo.without_value(lo.lalerg(1e-3)),
    "error_regulate": lambda: lo.without_value(lo.error_regulate(optax.adam(1e-2))),
    "adam": lambda: optax.adam(1e-2),
}
OURS = [name for name in OPTIMIZERS if name != "adam"]
NUM_STEPS, BATCH, POISONED = 150, 64, 20


def mean_loss(model, input_tokens, input_mask):
    logits = model(input_tokens)[:, 0]
    return optax.sigmoid_binary_cross_entropy(logits, input_mask).mean()


def batches(poisoned):
    x, y = breast_cancer()
    rng = np.random.default_rng(0)
    for t in range(NUM_STEPS):
        rows = rng.integers(0, len(y), BATCH)
        factor = np.float32(np.nan if poisoned and t == POISONED else 1.0)
        yield {"input_tokens": factor * x[rows], "input_mask": y[rows]}


@functools.cache
def fit(name, poisoned=False):
    """Returns the mean loss in the end and the state of the optimizer."""
    rngs = nnx.Rngs(0)
    model = nnx.Sequential(
        nnx.Linear(30, 8, rngs=rngs), nnx.relu, nnx.Linear(8, 1, rngs=rngs)
    )
    config = peft_trainer.TrainingConfig(
        eval_every_n_steps=NUM_STEPS, max_steps=NUM_STEPS, pbar_description=None
    )
    trainer = peft_trainer.PeftTrainer(model, OPTIMIZERS[name](), config)
    trainer = trainer.with_loss_fn(mean_loss).with_gen_model_input_fn(lambda x: x)
    trainer.train(list(batches(poisoned)))
    x, y = breast_cancer()
    return float(mean_loss(model, jnp.asarray(x), jnp.asarray(y))), trainer.optimizer


@pytest.mark.parametrize("name", OURS)
def test_a_batch_of_nan_is_survived(name):
    loss, optimizer = fit(name, poisoned=True)
    assert loss < fit("adam")[0] + 0.05 * np.log(2.0)
    assert lo.metrics(nnx.pure(optimizer.opt_state))["num_skipped"] == 1


def test_without_protection_a_batch_of_nan_is_fatal():
    assert not np.isfinite(fit("adam", poisoned=True)[0])
