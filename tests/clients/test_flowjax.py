"""FlowJAX passes params but no loss, and keeps the state of its ``fit`` to itself."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from client_packages import breast_cancer, import_client

import lalerg_optax as lo
from lalerg_optax import Verdict

import_client("flowjax")
bijections = import_client("flowjax.bijections")
distributions = import_client("flowjax.distributions")
flows = import_client("flowjax.flows")
losses = import_client("flowjax.train.losses")
train = import_client("flowjax.train")
eqx, paramax = import_client("equinox"), import_client("paramax")

OPTIMIZERS = {
    "lalerg": lambda: lo.without_value(lo.lalerg(1e-3, weight_decay=0.0)),
    "error_regulate": lambda: lo.without_value(lo.error_regulate(optax.adam(1e-2))),
    "adam": lambda: optax.adam(1e-2),
}
OURS = [name for name in OPTIMIZERS if name != "adam"]


def data(poisoned=False):
    x = np.array(breast_cancer()[0][:, :2])
    if poisoned:
        x[17, 1] = np.nan
    return jnp.asarray(x)


def make_flow():
    return flows.masked_autoregressive_flow(
        jax.random.key(0),
        base_dist=distributions.Normal(jnp.zeros(2)),
        transformer=bijections.Affine(),
        flow_layers=2,
        nn_width=8,
    )


def loss_of(flow):
    return -float(flow.log_prob(data()).mean())


@functools.cache
def fit(name, poisoned=False):
    """Returns the flow that ``fit_to_data`` ends with."""
    flow, _ = train.fit_to_data(
        jax.random.key(1),
        make_flow(),
        data(poisoned),
        optimizer=OPTIMIZERS[name](),
        max_epochs=20,
        batch_size=64,
        val_prop=0.1,
        max_patience=20,
        return_best=False,
        show_progress=False,
    )
    return flow


@pytest.mark.parametrize("name", OURS)
def test_a_row_with_a_nan_in_every_epoch_is_survived(name):
    bare, start = loss_of(fit("adam")), loss_of(make_flow())
    assert loss_of(fit(name, poisoned=True)) < bare + 0.1 * (start - bare)


def test_without_protection_a_row_with_a_nan_is_fatal():
    assert not np.isfinite(loss_of(fit("adam", poisoned=True)))


@pytest.mark.parametrize("name", OURS)
def test_the_state_can_be_seen_with_the_step_of_flowjax(name):
    tx, loss_fn = OPTIMIZERS[name](), losses.MaximumLikelihoodLoss()
    params, static = eqx.partition(
        make_flow(),
        eqx.is_inexact_array,
        is_leaf=lambda leaf: isinstance(leaf, paramax.NonTrainable),
    )
    opt_state = tx.init(params)
    for t in range(21):
        batch = data()[:64] * jnp.where(t == 20, jnp.nan, 1.0)
        params, opt_state, _ = train.step(
            params, static, batch, optimizer=tx, opt_state=opt_state, loss_fn=loss_fn
        )
    report = lo.metrics(opt_state)
    assert (report["verdict"], report["num_skipped"]) == (Verdict.SKIP, 1)
