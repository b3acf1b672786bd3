"""Muon as second level finds its rate: attention, convolutions, recurrence.

Against Muon itself at the best of seven rates, half decades apart. Two seeds of params
and of batches, one after the other in one program.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib
from sklearn.datasets import load_digits

import lalerg_optax as lo

pytestmark = pytest.mark.slow

NUM_STEPS, BATCH, NUM_TRAIN = 400, 32, 1400
RATES = 10.0 ** np.arange(-3.0, 0.5, 0.5)  # of Muon, tuned
STARTS = np.array([1e-6, 10.0])
SEEDS = np.arange(3)
WIDTH = 16


class Attention(nn.Module):
    """Two blocks of a transformer over the rows of an image."""

    @nn.compact
    def __call__(self, images):
        x = nn.Dense(WIDTH)(images)
        x += self.param("place", nn.initializers.normal(0.5), (1, 8, WIDTH))
        for _ in range(2):
            q, k, v = jnp.split(nn.Dense(3 * WIDTH)(nn.LayerNorm()(x)), 3, axis=-1)
            weights = nn.softmax(q @ jnp.swapaxes(k, -1, -2) / np.sqrt(WIDTH))
            x += nn.Dense(WIDTH)(weights @ v)
            x += nn.Dense(WIDTH)(nn.gelu(nn.Dense(2 * WIDTH)(nn.LayerNorm()(x))))
        return nn.Dense(10)(nn.LayerNorm()(x).mean(axis=-2))


class Convolution(nn.Module):
    """Two layers of convolutions, and one that reads them."""

    @nn.compact
    def __call__(self, images):
        x = images[..., None]
        for features in (8, 16):
            x = nn.relu(nn.Conv(features, (3, 3), strides=2)(x))
        return nn.Dense(10)(x.reshape(*x.shape[:-3], -1))


class Recurrence(nn.Module):
    """A GRU reads an image row by row."""

    @nn.compact
    def __call__(self, images):
        return nn.Dense(10)(nn.RNN(nn.GRUCell(WIDTH))(images)[..., -1, :])


def matrices(params):
    """Returns the axes of Muon's matrices: what a kernel sees, and its channels."""

    def axes(p):
        if p.ndim < 2:
            return None  # Adam's
        return contrib.MuonDimensionNumbers(tuple(range(p.ndim - 1)), p.ndim - 1)

    return jax.tree.map(axes, params)


MUON = functools.partial(contrib.muon, consistent_rms=0.2)
OF_KERNELS = functools.partial(MUON, muon_weight_dimension_numbers=matrices)
CASES = {
    "attention": (Attention(), contrib.muon),
    "attention, RMS of Adam": (Attention(), MUON),
    "convolution, kernels by Adam": (Convolution(), contrib.muon),
    "convolution": (Convolution(), OF_KERNELS),
    "recurrence": (Recurrence(), contrib.muon),
}


def loss_fn(model, params, batch):
    logits = model.apply(params, batch[0])
    return optax.losses.softmax_cross_entropy_with_integer_labels(
        logits, batch[1]
    ).mean()


@functools.cache
def data():
    images, labels = load_digits(return_X_y=True)
    images = (images.reshape(-1, 8, 8) / 16.0).astype(np.float32)
    return images, labels.astype(np.int32)


def ends(model, make, rates):
    """Returns losses at first and in the end, and errors; by rate and seed."""
    images, labels = data()
    whole = images[:NUM_TRAIN], labels[:NUM_TRAIN]
    held_out = images[NUM_TRAIN:], labels[NUM_TRAIN:]

    def run(rate, seed):
        tx = optax.with_extra_args_support(make(lambda t: rate * (1.0 - t / NUM_STEPS)))
        start_key, key = jax.random.split(jax.random.key(seed))
        params = start = model.init(start_key, images[:1])

        def step(carry, key):
            params, state = carry
            rows = jax.random.randint(key, (BATCH,), 0, NUM_TRAIN)
            batch = tuple(jnp.asarray(a)[rows] for a in whole)
            loss, grads = jax.value_and_grad(lambda p: loss_fn(model, p, batch))(params)
            updates, state = tx.update(grads, state, params, value=loss)
            return (optax.apply_updates(params, updates), state), None

        keys = jax.random.split(key, NUM_STEPS)
        (params, _), _ = jax.lax.scan(step, (params, tx.init(params)), keys)
        wrong = jnp.argmax(model.apply(params, held_out[0]), axis=-1) != held_out[1]
        losses = [loss_fn(model, p, whole) for p in (start, params)]
        return *losses, wrong.mean()

    cases = np.repeat(rates, len(SEEDS)), np.tile(SEEDS, len(rates))
    told = jax.jit(lambda *cases: jax.lax.map(lambda case: run(*case), cases))(*cases)
    return [np.asarray(x).reshape(len(rates), len(SEEDS)) for x in told]


@pytest.mark.parametrize("name", CASES)
def test_the_rate_is_found_from_far_below_and_far_above(name):
    """Each run within 5 % of the drop of the tuned one, and 2.5 % in the mean."""
    model, muon = CASES[name]
    start, loss, error = ends(model, muon, RATES)
    assert np.mean(start) > 2.0
    mean = np.where(np.isfinite(loss), loss, np.inf).mean(axis=1)
    best = mean.argmin()
    assert 0 < best < len(RATES) - 1
    assert min(mean[0], mean[-1]) > 0.4 * np.mean(start), "the rate has to matter"
    own = ends(model, lambda rate: lo.lalerg(rate, micro=muon(1.0)), STARTS)
    excess = (own[1] - loss[best]) / (start[best] - loss[best])
    assert np.max(excess) < 0.05
    assert np.max(excess.mean(axis=1)) < 0.025
    assert np.max(own[2].mean(axis=1)) < error[best].mean() + 0.05


def test_kernels_of_convolutions_are_matrices_only_if_it_is_told():
    params = {"kernel": jnp.ones((3, 3, 8, 16)), "out": jnp.ones((16, 4))}
    for muon, expected in ((contrib.muon, {"out"}), (OF_KERNELS, {"kernel", "out"})):
        state = lo.lalerg(1e-3, micro=muon(1.0)).init(params)
        inner = optax.tree.get(state, "inner_states")["muon"].inner_state
        found = optax.tree.get(inner, "mu")
        assert {k for k, x in found.items() if hasattr(x, "shape")} == expected
