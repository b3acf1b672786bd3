"""Penzai's trainer passes params but no loss, and keeps the state in a variable."""

import jax
import numpy as np
import optax
import pytest
from client_packages import breast_cancer, import_client

import lalerg_optax as lo
from lalerg_optax import Verdict

pz = import_client("penzai.pz")
basic_training = import_client("penzai.toolshed.basic_training")
simple_mlp = import_client("penzai.models.simple_mlp")

OPTIMIZERS = {
    "lalerg": lambda: lo.without_value(lo.lalerg(1e-2)),
    "error_regulate": lambda: lo.without_value(lo.error_regulate(optax.adam(1e-2))),
}


def loss_fn(model, state, rng, x, y):
    del rng
    logits = model(pz.nx.wrap(x, "batch", "features")).unwrap("batch", "features")
    loss = optax.losses.sigmoid_binary_cross_entropy(logits[:, 0], y).mean()
    return loss, state, {"loss": loss}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_bad_batch_is_skipped_by_the_trainer(name):
    trainer = basic_training.StatefulTrainer.build(
        root_rng=jax.random.key(0),
        model=simple_mlp.MLP.from_config(jax.random.key(1), [30, 8, 1]),
        optimizer_def=OPTIMIZERS[name](),
        loss_fn=loss_fn,
    )
    x, y = breast_cancer()
    rows = np.random.default_rng(0).integers(0, len(y), (100, 64))
    told = []
    for t, batch in enumerate(rows):
        xs = np.where(t == 60, np.float32(np.nan), x[batch])
        told.append(float(trainer.step(x=xs, y=y[batch])["loss"]))
        report = lo.metrics(trainer.state.value.opt_state)
        assert t != 60 or report["verdict"] == Verdict.SKIP
    assert np.isnan(told).nonzero()[0].tolist() == [60]
    assert np.mean(told[-10:]) < 0.3 * told[0]
    assert report["num_skipped"] == 1
