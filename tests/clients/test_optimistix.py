"""Optimistix passes the loss, the gradient and the function with every step."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from client_packages import breast_cancer, import_client

import lalerg_optax as lo

optx = import_client("optimistix")

OPTIMIZERS = {
    "lalerg": lambda: lo.lalerg(1e-3, weight_decay=0.0),
    "error_regulate": lambda: lo.error_regulate(optax.adam(3e-2)),
}
all_optimizers = pytest.mark.parametrize("name", OPTIMIZERS)


def loss_fn(params, data):
    """Returns the loss of a logistic regression with a little weight decay."""
    x, y = data
    logits = x @ params["w"] + params["b"]
    loss = optax.losses.sigmoid_binary_cross_entropy(logits, y).mean()
    return loss + 1e-3 * jnp.sum(params["w"] ** 2)


def minimise(tx, loss_fn=loss_fn, max_steps=2000):
    solver = optx.OptaxMinimiser(tx, rtol=1e-4, atol=1e-5)
    params = {"w": jnp.zeros(30), "b": jnp.zeros(())}
    return optx.minimise(
        loss_fn, solver, params, breast_cancer(), max_steps=max_steps, throw=False
    )


@all_optimizers
def test_a_regression_ends_where_it_does_with_adam_and_no_later(name):
    bare = minimise(optax.adam(3e-2))
    ours = minimise(OPTIMIZERS[name]())
    assert ours.result == optx.RESULTS.successful
    assert ours.stats["num_steps"] <= bare.stats["num_steps"]
    losses = [loss_fn(end.value, breast_cancer()) for end in (ours, bare)]
    np.testing.assert_allclose(*losses, rtol=1e-3)


def test_looks_back_guide_the_search():
    report = lo.metrics(minimise(OPTIMIZERS["lalerg"]()).state.opt_state)
    assert report["num_audits_passed"] > 0
    assert report["macro_rate"] > 1.0


def broken_beyond(radius):
    """Returns the loss, not finite where weights are large."""

    def broken(params, data):
        is_far = jnp.max(jnp.abs(params["w"])) > radius
        return loss_fn(params, data) * jnp.where(is_far, jnp.nan, 1.0)

    return broken


@all_optimizers
def test_a_function_that_is_not_finite_everywhere_does_not_end_the_search(name):
    far = minimise(OPTIMIZERS[name]()).value["w"]
    radius = 0.7 * float(jnp.max(jnp.abs(far)))
    fn = broken_beyond(radius)
    bare = minimise(optax.adam(3e-2), fn, 500)
    assert not np.all(np.isfinite(bare.value["w"]))
    ours = minimise(OPTIMIZERS[name](), fn, 500)
    assert np.all(np.isfinite(ours.value["w"]))
    assert jnp.max(jnp.abs(ours.value["w"])) < 1.5 * radius
    report = lo.metrics(ours.state.opt_state)
    assert report["num_skipped"] > 0
    assert report["num_revert_steps"] > 0
