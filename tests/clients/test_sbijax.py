"""sbijax passes params but no loss, and keeps the state of its ``train`` to itself."""

import functools

import jax
import numpy as np
import optax
import pytest
from client_packages import breast_cancer, import_client

import lalerg_optax as lo
from lalerg_optax import Verdict

sbijax, nn = import_client("sbijax"), import_client("sbijax.nn")

OPTIMIZERS = {
    "lalerg": lambda: lo.without_value(lo.lalerg(1e-2, search=False, weight_decay=0.0)),
    "error_regulate": lambda: lo.without_value(lo.error_regulate(optax.adam(1e-2))),
    "adam": lambda: optax.adam(1e-2),
}
OURS = [name for name in OPTIMIZERS if name != "adam"]
NUM_EPOCHS = 20


def data(poisoned=False):
    x = np.array(breast_cancer()[0][:, :4])
    if poisoned:
        x[17, 3] = np.nan
    return {"theta": x[:, :2], "y": x[:, 2:]}


def estimator():
    return sbijax.npe(nn.make_maf(2, n_layers=2, hidden_sizes=(8,)))


@functools.cache
def losses(name, poisoned=False):
    """Returns the validation loss of every epoch."""
    _, info = sbijax.train(
        jax.random.key(1),
        estimator(),
        data(poisoned),
        optimizer=OPTIMIZERS[name](),
        n_iter=NUM_EPOCHS,
        batch_size=64,
        n_early_stopping_patience=NUM_EPOCHS,
    )
    return np.asarray(info.losses)[:, 1]


@pytest.mark.parametrize("name", OURS)
def test_a_row_with_a_nan_in_every_epoch_is_survived(name):
    bare = losses("adam")
    assert bare[-1] < 0.0 < 2.0 < bare[0]
    # every eighth step is lost, and after two in a row it is gone back
    assert losses(name, poisoned=True)[-1] < 0.75 * bare[0]


def test_without_protection_a_row_with_a_nan_is_fatal():
    assert not np.isfinite(losses("adam", poisoned=True)[-1])


@pytest.mark.parametrize("name", OURS)
def test_the_state_can_be_seen_with_the_step_of_sbijax(name):
    tx, fns, batch = OPTIMIZERS[name](), estimator().train, data()
    batch = {key: x[:64] for key, x in batch.items()}
    state = fns.init_fn(tx, jax.random.key(0), batch)
    step = jax.jit(functools.partial(fns.step_fn, tx))
    for t in range(21):
        y = batch["y"] * np.float32(np.nan if t == 20 else 1.0)
        _, state = step(jax.random.key(t), state, batch | {"y": y})
    report = lo.metrics(state.opt_state)
    assert (report["verdict"], report["num_skipped"]) == (Verdict.SKIP, 1)
