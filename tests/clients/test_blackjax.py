"""BlackJAX' variational inference passes params but no loss."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from client_packages import diabetes, import_client

import lalerg_optax as lo
from lalerg_optax import Verdict

blackjax = import_client("blackjax")
vi = blackjax.vi.meanfield_vi

NUM_STEPS, BAD_STEP = 1000, 100


def decay(rate):
    return optax.cosine_decay_schedule(rate, NUM_STEPS)


OPTIMIZERS = {
    "lalerg": lambda: lo.without_value(lo.lalerg(decay(1e-3), weight_decay=0.0)),
    "error_regulate": lambda: lo.without_value(
        lo.error_regulate(optax.adam(decay(3e-2)))
    ),
    "adam": lambda: optax.adam(decay(3e-2)),
}
OURS = [name for name in OPTIMIZERS if name != "adam"]


def logdensity_fn(position):
    """Returns the log density of a linear regression, up to a constant."""
    x, y = diabetes()
    prior = -0.5 * jnp.sum(position["w"] ** 2)
    return prior - 0.5 * jnp.sum((y - x @ position["w"]) ** 2)


@functools.cache
def fit(name, bad_step=BAD_STEP):
    """Returns the end of a run with a fault in one step, all losses, and verdicts."""
    tx = OPTIMIZERS[name]()

    def step(state, inputs):
        t, key = inputs
        fault = jnp.where(t == bad_step, jnp.nan, 0.0)

        def density(position):
            return logdensity_fn(position) + fault * jnp.sum(position["w"])

        state, info = vi.step(key, state, density, tx, num_samples=10)
        is_ours = name in OURS
        verdict = lo.metrics(state.opt_state)["verdict"] if is_ours else jnp.zeros(())
        return state, (info.elbo, verdict)

    keys = jax.random.split(jax.random.key(0), NUM_STEPS)
    run = jax.jit(lambda *args: jax.lax.scan(step, *args))
    state, told = run(vi.init({"w": jnp.zeros(10)}, tx), (jnp.arange(NUM_STEPS), keys))
    return state, *map(np.asarray, told)


def exact_posterior():
    """Returns mean and standard deviations of the weights, from normal equations."""
    x, y = (a.astype(np.float64) for a in diabetes())
    precision = x.T @ x + np.eye(10)
    return np.linalg.solve(precision, x.T @ y), np.diag(precision) ** -0.5


def errors(state):
    """Returns how far off the posterior is, in its own standard deviations."""
    mean, scale = exact_posterior()
    off = np.abs(state.mu["w"] - mean) / scale
    return off.mean(), np.abs(state.rho["w"] - np.log(scale)).mean()


@pytest.mark.parametrize("name", OURS)
def test_the_posterior_is_as_right_as_with_adam_in_spite_of_a_fault(name):
    state, losses, verdicts = fit(name)
    assert np.isnan(losses).nonzero()[0].tolist() == [BAD_STEP]
    assert verdicts[BAD_STEP] == Verdict.SKIP
    bare, _, _ = fit("adam", bad_step=-1)
    assert np.all(np.subtract(errors(state), errors(bare)) < 0.05)


@pytest.mark.parametrize("name", OURS)
def test_noise_of_the_samples_is_no_alarm(name):
    _, _, verdicts = fit(name)
    assert np.bincount(verdicts).tolist() == [NUM_STEPS - 1, 1]


def test_without_protection_the_fault_is_fatal():
    _, losses, _ = fit("adam")
    assert np.all(np.isnan(losses[BAD_STEP:]))


def test_what_blackjax_leaves_out_is_told_with_the_adapter_for_it():
    tx = lo.lalerg()
    state = vi.init({"w": jnp.zeros(10)}, tx)
    with pytest.raises(TypeError, match="without_value"):
        vi.step(jax.random.key(0), state, logdensity_fn, tx)
