"""The metrics: found at any depth, by name, inside of jit and outside."""

import inspect
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers.judged import NAMES, judge, make

import lalerg_optax as lo


def test_metrics_inside_jit_equal_those_outside():
    tx, params = lo.lalerg(0.01), jnp.ones(2)

    @jax.jit
    def step(state):
        _, state = tx.update(params, state, params, value=1.0)
        return state, lo.metrics(state)

    state, report = step(tx.init(params))
    chex.assert_trees_all_equal(report, lo.metrics(state))
    assert report["num_accepted"] == 1
    assert report["avg_value"] == 1.0
    np.testing.assert_allclose(report["grad_norm"], 2**0.5, rtol=1e-6)


def test_metrics_of_an_nnx_optimizer_are_scalar_arrays():
    model = nnx.Linear(3, 1, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, lo.lalerg(0.01), wrt=nnx.Param)
    grads = nnx.grad(lambda m: jnp.sum(m(jnp.ones((1, 3)))))(model)
    optimizer.update(model, grads, value=jnp.asarray(2.5))
    report = lo.metrics(optimizer.opt_state)
    assert set(report) >= NAMES
    assert report["num_accepted"] == 1
    assert report["avg_value"] == 2.5
    assert all(isinstance(x, jax.Array) for x in report.values())


def test_metrics_of_a_level_that_stands_alone_tell_its_part():
    params = jnp.ones(2)
    assert set(lo.metrics(lo.scale_by_micro_rate().init(params))) == {
        "macro_rate",
        "num_micro_held",
    }
    assert set(lo.metrics(lo.scale_by_macro_rate().init(params))) == {
        "macro_rate",
        "is_searching",
        "num_macro_held",
    }


@pytest.mark.parametrize("state", [optax.adam(0.1).init(jnp.ones(2)), (), None, {}])
def test_metrics_of_a_state_without_our_parts_are_a_value_error(state):
    with pytest.raises(ValueError, match="no state of error_regulate"):
        lo.metrics(state)


def test_the_docstring_of_metrics_names_all_that_is_in_it():
    doc = inspect.cleandoc(lo.metrics.__doc__)  # Python 3.13 has done so already
    table = doc.split("=======\n")[2]
    named = re.findall(r"^(\w+) ", table, flags=re.MULTILINE)
    report = lo.metrics(lo.lalerg().init(jnp.zeros(3)))
    assert set(named) == set(report) - {"damping", "num_reverted"}


def test_former_names_are_deprecated_and_mean_what_they_meant():
    losses, grads = make(210)
    losses[200:202] = 50.0
    _, reports, seen = judge(losses, grads)
    for former, name in (
        ("damping", "damping_factor"),
        ("num_reverted", "num_revert_steps"),
    ):
        np.testing.assert_array_equal(reports[former], reports[name])
        with pytest.warns(DeprecationWarning, match=f"{former} is called {name}"):
            np.testing.assert_array_equal(getattr(seen, former), reports[name])
    assert np.min(reports["damping"]) == 0.5
    assert reports["num_reverted"][-1] == 2
    first = np.argmax(reports["num_reverted"] > 0)
    assert reports["num_reverts"][first - 1 : first + 2].tolist() == [0, 1, 1]


def multi_steps(tx, k=2, **settings):
    tx = optax.MultiSteps(tx, k, **settings)
    return optax.GradientTransformationExtraArgs(tx.init, tx.update)


TX = lo.error_regulate(optax.sgd(0.1))
PARAMS = {"a": jnp.ones(2), "b": jnp.ones(2)}
SKIPS = {"should_skip_update_fn": optax.skip_not_finite}
BY_NAME = {"a": "a", "b": "b"}


@pytest.mark.parametrize(
    ("tx", "keys"),
    [
        (lo.accumulate(TX, 2), [""]),
        (multi_steps(TX), [""]),
        (multi_steps(TX, **SKIPS), [""]),
        (optax.chain(optax.clip(1.0), lo.accumulate(TX, 2)), [""]),
        (lo.accumulate(optax.partition({"a": TX, "b": TX}, BY_NAME), 2), [""]),
        (
            optax.partition({"a": lo.accumulate(TX, 2), "b": multi_steps(TX)}, BY_NAME),
            ["a/", "b/"],
        ),
    ],
    ids=["accumulate", "MultiSteps", "MultiSteps that skip", "chain", "around", "in"],
)
def test_metrics_tell_whether_a_micro_batch_completed_a_step(tx, keys):
    @jax.jit
    def step(state):
        return tx.update(PARAMS, state, PARAMS, value=1.0)[1]

    state, seen = tx.init(PARAMS), []
    for _ in range(5):
        report = lo.metrics(state)
        seen.append([bool(report[f"{key}has_updated"]) for key in keys])
        state = step(state)
    assert [any(x) for x in seen] == [all(x) for x in seen]
    assert [x[0] for x in seen] == [False, False, True, False, True]
    assert lo.metrics(state).keys() == report.keys()


def test_a_micro_batch_that_multi_steps_skip_completes_no_step():
    tx, state = multi_steps(TX, **SKIPS), None
    state = tx.init(PARAMS)
    for scale in (1.0, 1.0, jnp.nan):
        grads = jax.tree.map(lambda p, s=scale: s * p, PARAMS)
        _, state = tx.update(grads, state, PARAMS, value=1.0)
    assert state.mini_step == 0
    assert not lo.metrics(state)["has_updated"]


@pytest.mark.parametrize(
    "tx",
    [
        optax.chain(lo.accumulate(optax.sgd(0.1), 2), lo.error_regulate()),
        lo.error_regulate(multi_steps(optax.sgd(0.1))),
        optax.partition({"a": TX, "b": lo.accumulate(optax.sgd(0.1), 2)}, BY_NAME),
    ],
    ids=["flat", "MultiSteps inside", "another group"],
)
def test_a_regulator_that_nothing_accumulates_for_decides_always(tx):
    assert "has_updated" not in lo.metrics(tx.init(PARAMS))


def test_metrics_of_accumulation_alone_tell_its_part():
    report = lo.metrics(lo.accumulate(optax.sgd(0.1), 2).init(PARAMS))
    names = {"macro_rate", "has_updated", "micro_step", "num_dropped"}
    assert report.keys() == names
    doc = inspect.getdoc(lo.metrics)
    assert all(re.search(rf"^{name} ", doc, re.MULTILINE) for name in names)
