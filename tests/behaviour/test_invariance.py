"""Loss + constant and constant * loss change nothing, for the whole optimizer."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lalerg_optax as lo

NUM_STEPS = 400
RNG = np.random.default_rng(0)
INPUTS = RNG.standard_normal((NUM_STEPS, 16, 6)).astype(np.float32)
TARGETS = np.tanh(INPUTS @ RNG.standard_normal((6, 4))).astype(np.float32)
POISON = slice(200, 204)
OPTIMIZERS = {
    "lalerg": lambda: lo.lalerg(1e-4, eps=0.0),
    "lalerg with a schedule": lambda: lo.lalerg(
        optax.linear_schedule(1.0, 0.0, NUM_STEPS), eps=0.0
    ),
    "lalerg without search": lambda: lo.lalerg(1e-2, search=False, eps=0.0),
    "adamw": lambda: lo.error_regulate(optax.adamw(1e-2, eps=0.0)),
}


@functools.cache
def run(name, scale=1.0, shift=0.0):
    """Returns verdicts, rates and params of a run with four poisoned batches."""
    tx = optax.with_extra_args_support(OPTIMIZERS[name]())
    targets = TARGETS.copy()
    targets[POISON] += 30.0

    def loss_fn(params, inputs, targets):
        out = jnp.tanh(inputs @ params["hidden"]) @ params["out"]
        return scale * jnp.mean(jnp.square(out - targets)) + shift

    def step(carry, batch):
        params, state = carry
        loss, grads = jax.value_and_grad(loss_fn)(params, *batch)
        updates, state = tx.update(grads, state, params, value=loss)
        report = lo.metrics(state)
        told = report["verdict"], report["macro_rate"] * report["damping"]
        return (lo.apply_updates(params, updates, state), state), told

    params = {
        "hidden": jnp.asarray(np.random.default_rng(1).normal(0, 0.4, (6, 8)), "f4"),
        "out": jnp.asarray(np.random.default_rng(2).normal(0, 0.3, (8, 4)), "f4"),
    }
    (params, _), (verdicts, rates) = jax.jit(
        lambda: jax.lax.scan(step, (params, tx.init(params)), (INPUTS, targets))
    )()
    return np.asarray(verdicts), np.asarray(rates), jax.tree.map(np.asarray, params)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize(
    ("scale", "shift"),
    [
        (2.0**10, 0.0),
        pytest.param(2.0**-6, 0.0, marks=pytest.mark.slow),
        (1.0, 4.0),
        pytest.param(1.0, -4.0, marks=pytest.mark.slow),
    ],
)
def test_units_and_level_of_the_loss_change_nothing(name, scale, shift):
    verdicts, rates, params = run(name)
    assert {lo.Verdict.BOUND, lo.Verdict.REVERT} <= set(verdicts.tolist())
    others = run(name, scale, shift)
    np.testing.assert_array_equal(others[0], verdicts)
    np.testing.assert_allclose(others[1], rates, rtol=5e-3)
    for key, p in params.items():
        np.testing.assert_allclose(others[2][key], p, rtol=2e-2, atol=2e-3)
