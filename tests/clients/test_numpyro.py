"""NumPyro passes the loss by itself: an ELBO of one sample, noisy and negative."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from client_packages import diabetes, import_client

import lalerg_optax as lo
from lalerg_optax import Verdict

numpyro = import_client("numpyro")
infer, optim = numpyro.infer, numpyro.optim

NOISE = 0.1
NUM_STEPS = 2000


def decay(rate):
    return optax.cosine_decay_schedule(rate, NUM_STEPS)


# The search goes by the alignment of gradients, of which one sample tells nothing.
CONFIGURATIONS = {  # name: optimizer, samples a step
    "lalerg": (lambda: lo.lalerg(decay(1e-3), weight_decay=0.0), 10),
    "lalerg, no search": (
        lambda: lo.lalerg(decay(1e-2), search=False, weight_decay=0.0),
        1,
    ),
    "error_regulate": (lambda: lo.error_regulate(optax.adam(decay(1e-2))), 1),
    "adam": (lambda: optax.adam(decay(1e-2)), 1),
}
OURS = [name for name in CONFIGURATIONS if name != "adam"]


def model(x, y):
    w = numpyro.sample(
        "w", numpyro.distributions.Normal(jnp.zeros(10), 1.0).to_event(1)
    )
    numpyro.sample("y", numpyro.distributions.Normal(x @ w, NOISE), obs=y)


def data():
    """Returns features and targets so small that densities are above 1."""
    x, y = diabetes()
    return x, 1.5 * NOISE * y


def exact_posterior():
    """Returns mean and standard deviations of the weights, from normal equations."""
    x, y = (a.astype(np.float64) for a in data())
    precision = x.T @ x / NOISE**2 + np.eye(10)
    # a mean-field posterior has the diagonal of the precision
    return np.linalg.solve(precision, x.T @ y / NOISE**2), np.diag(precision) ** -0.5


def make_svi(name):
    start = infer.init_to_value(values={"w": jnp.zeros(10)})
    guide = infer.autoguide.AutoNormal(model, init_loc_fn=start, init_scale=0.05)
    make_optimizer, num_particles = CONFIGURATIONS[name]
    optimizer = optim.optax_to_numpyro(make_optimizer())
    return infer.SVI(model, guide, optimizer, infer.Trace_ELBO(num_particles))


@functools.cache
def fit(name):
    return make_svi(name).run(jax.random.key(0), NUM_STEPS, *data(), progress_bar=False)


def errors(name):
    """Returns how far off the posterior is, in its own standard deviations."""
    params = fit(name).params
    mean, scale = params["w_auto_loc"], params["w_auto_scale"]
    exact_mean, exact_scale = exact_posterior()
    off = np.abs(mean - exact_mean) / exact_scale
    return off.mean(), np.abs(np.log(scale / exact_scale)).mean()


def report_of(svi_state):
    _, (_, opt_state) = svi_state.optim_state
    return lo.metrics(opt_state)


@pytest.mark.parametrize("name", OURS)
def test_the_posterior_is_as_right_as_with_adam(name):
    run = fit(name)
    assert run.losses[0] > 0.0 > run.losses[-1]
    assert np.all(np.subtract(errors(name), errors("adam")) < 0.05)


@pytest.mark.parametrize("name", OURS)
def test_a_noisy_elbo_is_hardly_ever_an_alarm(name):
    report = report_of(fit(name).state)
    assert report["num_skipped"] <= 1
    assert report["num_revert_steps"] <= (2 if name == "lalerg" else 0)


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_a_nan_in_the_data_of_one_step_is_survived(name):
    svi = make_svi(name)
    x, y = data()
    state = svi.init(jax.random.key(0), x, y)
    update = jax.jit(svi.update)
    for _ in range(3):
        state, _ = update(state, x, y)
    spoilt = y.copy()
    spoilt[7] = np.nan
    state, loss = update(state, x, spoilt)
    assert not jnp.isfinite(loss)  # SVI makes an infinity of a NaN
    if name in OURS:
        assert report_of(state)["verdict"] == Verdict.SKIP
    _, loss = update(state, x, y)
    assert jnp.isfinite(loss) == (name in OURS)
