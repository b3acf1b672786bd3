"""GPJax passes params but no loss."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from client_packages import diabetes, import_client

import lalerg_optax as lo

gpx = import_client("gpjax")

OPTIMIZERS = {
    "lalerg": lambda: lo.without_value(lo.lalerg(1e-3)),
    "error_regulate": lambda: lo.without_value(lo.error_regulate(optax.adam(3e-2))),
    "adam": lambda: optax.adam(3e-2),
}
BATCH_SIZE = 32
OURS = [name for name in OPTIMIZERS if name != "adam"]


def objective(posterior, data):
    return -gpx.objectives.conjugate_mll(posterior, data) / data.n


def batch_objective(posterior, data, num_batches=200):
    """What is minimized: that of all data is another, which a better fit may raise."""
    indices = np.random.default_rng(0).choice(data.n, (num_batches, BATCH_SIZE))

    def of_batch(x, y):
        return objective(posterior, gpx.Dataset(X=x, y=y))

    return float(jnp.mean(jax.vmap(of_batch)(data.X[indices], data.y[indices])))


def dataset(poisoned=False):
    x, y = (np.array(a[:200], np.float64) for a in diabetes())
    if poisoned:
        x[17, 3] = np.nan
    return gpx.Dataset(X=jnp.asarray(x), y=jnp.asarray(y[:, None]))


@functools.cache
def fit(name, poisoned=False, num_iters=150):
    with jax.enable_x64(True):
        prior = gpx.gps.Prior(
            mean_function=gpx.mean_functions.Constant(),
            kernel=gpx.kernels.RBF(lengthscale=jnp.ones(10)),
        )
        model, losses = gpx.fit(
            model=prior * gpx.likelihoods.Gaussian(),
            objective=objective,
            train_data=dataset(poisoned),
            optim=OPTIMIZERS[name](),
            num_iters=num_iters,
            batch_size=BATCH_SIZE,
            verbose=False,
            safe=False,
        )
        return batch_objective(model, dataset()), np.asarray(losses)


@pytest.mark.parametrize("name", OURS)
def test_a_gaussian_process_is_fitted_as_well_as_by_adam(name):
    ours, losses = fit(name)
    bare, _ = fit("adam")
    assert ours < bare + 0.02 * (losses[0] - bare)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_batches_with_a_nan_are_survived(name):
    loss, losses = fit(name, poisoned=True)
    assert np.isnan(losses).sum() > 0
    assert np.isnan(loss) == (name == "adam")
    if name in OURS:
        assert np.isnan(losses).sum() < 50
