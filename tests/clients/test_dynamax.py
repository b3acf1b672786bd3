"""Dynamax passes neither loss nor params."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from client_packages import import_client
from sklearn.datasets import load_digits

import lalerg_optax as lo

import_client("dynamax")
models = import_client("dynamax.hidden_markov_model")

# TensorFlow Probability asks for the shape of None, which JAX is about to refuse.
pytestmark = pytest.mark.filterwarnings(
    "ignore:shape requires ndarray or scalar arguments:DeprecationWarning"
)

OPTIMIZERS = {
    "lalerg": lambda: lo.tracks_params(lo.without_value(lo.lalerg(1e-2))),
    "error_regulate": lambda: lo.tracks_params(
        lo.without_value(lo.error_regulate(optax.adam(1e-2)))
    ),
    "adam": lambda: optax.adam(1e-2),
}
OURS = [name for name in OPTIMIZERS if name != "adam"]


def ones(poisoned=False):
    """Returns images of the digit 1, each a sequence of eight rows of pixels."""
    digits = load_digits()
    images = digits.images[digits.target == 1][:96].astype(np.float32) / 16.0
    noise = np.random.default_rng(0).normal(0.0, 0.1, images.shape)
    images += noise.astype(np.float32)  # some pixels are always blank
    if poisoned:
        images[40, 3, 2] = np.nan
    return jnp.asarray(images)


def jitted(tx):
    """Returns an optimizer for Dynamax, which calls update outside of jit."""
    return optax.GradientTransformationExtraArgs(tx.init, jax.jit(tx.update))


def make_model():
    hmm = models.DiagonalGaussianHMM(num_states=3, emission_dim=8)
    return hmm, *hmm.initialize(jax.random.key(0))


@jax.jit
def loss_of(params):
    hmm, _, _ = make_model()
    return -jax.vmap(hmm.marginal_log_prob, in_axes=(None, 0))(params, ones()).mean()


@functools.cache
def final_loss(name, poisoned, num_epochs=12):
    """Fits a hidden Markov model, and returns the loss that it ends with."""
    hmm, params, props = make_model()
    params, _ = hmm.fit_sgd(
        params,
        props,
        ones(poisoned),
        optimizer=jitted(OPTIMIZERS[name]()),
        batch_size=16,
        num_epochs=num_epochs,
        shuffle=True,
    )
    return loss_of(params)


@pytest.mark.parametrize("name", OURS)
def test_a_sequence_with_a_nan_in_every_epoch_is_survived(name):
    _, start, _ = make_model()
    # one batch in six is skipped, and two of them in a row take params back
    bare = final_loss("adam", poisoned=False, num_epochs=10)
    drop = loss_of(start) - bare
    assert final_loss(name, poisoned=True) < bare + 0.1 * drop


def test_without_protection_a_sequence_with_a_nan_is_fatal():
    assert jnp.isnan(final_loss("adam", poisoned=True))
