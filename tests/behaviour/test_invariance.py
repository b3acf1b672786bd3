"""Loss + constant and constant * loss change nothing, for the whole optimizer."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.drive import Task, everything, runner, train
from helpers.judged import ACCEPT, BOUND, REVERT, SKIP

import lalerg_optax as lo

NUM_STEPS = 400
RNG = np.random.default_rng(0)
INPUTS = RNG.standard_normal((NUM_STEPS, 16, 6)).astype(np.float32)
TARGETS = np.tanh(INPUTS @ RNG.standard_normal((6, 4))).astype(np.float32)
POISON = slice(200, 204)
OPTIMIZERS = {
    "lalerg": lo.lalerg(1e-4, eps=0.0),
    "lalerg with a schedule": lo.lalerg(
        optax.linear_schedule(1.0, 0.0, NUM_STEPS), eps=0.0
    ),
    "lalerg without search": lo.lalerg(1e-2, search=False, eps=0.0),
    "adamw": lo.error_regulate(optax.adamw(1e-2, eps=0.0)),
}


def loss_fn(params, batch):
    inputs, targets, scale, shift = batch
    out = jnp.tanh(inputs @ params["hidden"]) @ params["out"]
    return scale * jnp.mean(jnp.square(out - targets)) + shift


def told(step):
    report = lo.metrics(step.state)
    return report["verdict"], report["macro_rate"] * report["damping_factor"]


@functools.cache
def run(name, scale=1.0, shift=0.0):
    """Returns verdicts, rates and params of a run with four poisoned batches."""
    targets = TARGETS.copy()
    targets[POISON] += 30.0
    unit = (np.full(NUM_STEPS, x, np.float32) for x in (scale, shift))
    params = {
        "hidden": jnp.asarray(np.random.default_rng(1).normal(0, 0.4, (6, 8)), "f4"),
        "out": jnp.asarray(np.random.default_rng(2).normal(0, 0.3, (8, 4)), "f4"),
    }
    task = Task(params, loss_fn, (INPUTS, targets, *unit))
    params, _, (verdicts, rates) = train(OPTIMIZERS[name], task, see=told)
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


@functools.cache
def whole_run(name):
    """Returns a function of a factor and a term of the loss to a run with faults."""
    tx = {
        "regulated adamw": lambda: lo.error_regulate(optax.adamw(0.03)),
        "lalerg without search": lambda: lo.lalerg(0.03, search=False),
    }[name]()
    rng = np.random.default_rng(0)
    num_steps = 400
    inputs = rng.standard_normal((num_steps, 16, 6)).astype(np.float32)
    targets = inputs @ rng.standard_normal(6).astype(np.float32)
    targets += 0.3 * rng.standard_normal(targets.shape).astype(np.float32)
    targets[200] *= 30.0  # a hard batch
    targets[250:252] *= -50.0
    targets[300:310] *= -50.0  # poison
    inputs[340, 3], inputs[350:352] = np.nan, np.nan
    targets[360:] += 40.0  # a new level
    spoilt = np.ones(num_steps, np.float32)
    spoilt[220:240:8] = 1e3

    def loss_fn(params, batch):
        x, y, _, factor, term = batch
        return factor * (jnp.mean((x @ params - y) ** 2) + term)

    def signals_of(params, batch):
        loss, grads = jax.value_and_grad(loss_fn)(params, batch)
        return loss, batch[2] * grads

    def run(factor, term):
        unit = (np.full(num_steps, x, np.float32) for x in (factor, term))
        carry = jnp.zeros(6), tx.init(jnp.zeros(6))
        scan = runner(tx, signals_of, see=everything)
        seen = scan(carry, (inputs, targets, spoilt, *unit))[1]
        return seen.params, seen.state.verdict, seen.state.damping_factor

    return run


@pytest.mark.parametrize("name", ["regulated adamw", "lalerg without search"])
def test_a_constant_added_to_the_loss_changes_nothing_at_all(name):
    run = whole_run(name)
    usual = run(1.0, 0.0)
    assert set(np.asarray(usual[1]).tolist()) == {ACCEPT, SKIP, REVERT, BOUND}
    for term in (-7.0, 30.0, 1000.0):
        chex.assert_trees_all_equal(run(1.0, term), usual)


@pytest.mark.parametrize("name", ["regulated adamw", "lalerg without search"])
def test_the_unit_of_the_loss_changes_nothing_but_rounding(name):
    run = whole_run(name)
    params, verdicts, damping = run(1.0, 0.0)
    for factor in (2.0**-7, 3.0, 2.0**13):
        scaled, same_verdicts, same_damping = run(factor, 0.0)
        np.testing.assert_array_equal(same_verdicts, verdicts)
        np.testing.assert_array_equal(same_damping, damping)
        np.testing.assert_allclose(scaled, params, rtol=1e-3, atol=1e-4)
