"""The learning rate in effect: of any optimizer of Optax, and of what holds some."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.quick import some
from optax import contrib

import lalerg_optax as lo
from lalerg_optax._numbers import UNKNOWN
from lalerg_optax._rate import learning_rate

PARAMS = {"bias": jnp.ones(3), "kernel": jnp.ones((2, 3))}
SCHEDULE = optax.linear_schedule(0.1, 0.0, 10)
RATES = [0.1, 0.09, 0.08]  # of the first steps

OPTIMIZERS = {
    **{
        name: getattr(optax, name)
        for name in (
            *("adabelief", "adadelta", "adagrad", "adam", "adamw", "adamax", "adan"),
            *("amsgrad", "lamb", "lars", "lion", "nadamw", "novograd", "radam"),
            *("rmsprop", "sgd", "sign_sgd", "yogi"),
        )
    },
    "adafactor": functools.partial(optax.adafactor, min_dim_size_to_factor=1),
    "muon": contrib.muon,
    "ademamix": contrib.ademamix,
    "clip and adamw": lambda rate: optax.chain(optax.clip(1.0), optax.adamw(rate)),
    "a chain of parts": lambda rate: optax.chain(
        optax.scale_by_adam(), optax.scale_by_learning_rate(rate)
    ),
    "injected": lambda rate: optax.inject_hyperparams(optax.adamw)(learning_rate=rate),
    "masked": lambda rate: optax.masked(optax.adam(rate), {"bias": 0, "kernel": 1}),
    "apply_if_finite": lambda rate: optax.apply_if_finite(optax.adam(rate), 3),
    "groups with one rate": lambda rate: optax.partition(
        {"a": optax.adam(rate), "b": optax.lion(rate)}, {"bias": "a", "kernel": "b"}
    ),
    "a group that is frozen": lambda rate: optax.partition(
        {"a": optax.adam(rate), "b": optax.set_to_zero()},
        {"bias": "a", "kernel": "b"},
    ),
}
QUICK = ("adamw", "adafactor", "muon", "injected", "groups with one rate")


def rates_of(tx, num_steps=3, **signals):
    """Returns the learning rates that metrics tells of the first steps."""
    state, told = tx.init(PARAMS), []
    update = jax.jit(functools.partial(tx.update, **{"value": 1.0} | signals))
    for _ in range(num_steps):
        _, state = update(PARAMS, state, PARAMS)
        told.append(float(lo.metrics(state)["learning_rate"]))
    return told


@pytest.mark.parametrize("name", some(OPTIMIZERS, *QUICK))
@pytest.mark.parametrize("rate", [SCHEDULE, 0.1], ids=["schedule", "number"])
def test_the_rate_of_an_optimizer_is_told(name, rate):
    tx = optax.with_extra_args_support(OPTIMIZERS[name](rate))
    state, told = tx.init(PARAMS), []
    for _ in range(3):
        told.append(learning_rate(tx, state))
        _, state = tx.update(PARAMS, state, PARAMS)
    expected = RATES if callable(rate) else [0.1] * 3
    np.testing.assert_allclose(told, expected, rtol=1e-5)


def test_metrics_tell_it_of_the_step_that_was_taken():
    for make in (optax.adamw, OPTIMIZERS["injected"]):
        told = rates_of(lo.error_regulate(make(SCHEDULE)))
        np.testing.assert_allclose(told, RATES, rtol=1e-5)


def test_the_rate_before_the_first_step_is_that_of_the_first():
    state = lo.lalerg(SCHEDULE).init(PARAMS)
    assert lo.metrics(state)["learning_rate"] == pytest.approx(0.1)


@pytest.mark.parametrize(
    "inner",
    [
        optax.partition(
            {"a": optax.adam(0.1), "b": optax.adam(0.2)}, {"bias": "a", "kernel": "b"}
        ),
        optax.partition(
            {"a": optax.adam(0.1), "b": optax.scale_by_adam()},
            {"bias": "a", "kernel": "b"},
        ),
        optax.partition(
            {
                "a": optax.chain(
                    optax.adam(0.1),
                    optax.masked(
                        optax.scale(10.0), lambda p: {"bias": True, "kernel": False}
                    ),
                )
            },
            {"bias": "a", "kernel": "a"},
        ),
        optax.scale_by_adam(),
        contrib.prodigy(),
        contrib.schedule_free_adamw(0.1),
        optax.chain(optax.adam(0.1), contrib.reduce_on_plateau()),
        optax.chain(
            optax.masked(optax.adam(0.1), {"bias": True, "kernel": False}),
            optax.masked(optax.adam(0.2), {"bias": False, "kernel": True}),
        ),
        optax.GradientTransformation(
            lambda p: (), functools.partial(lambda u, s, p=None, **_: (u, s))
        ),
    ],
    ids=[
        "groups with two",
        "a group without",
        "masks in a group",
        "no rate",
        "prodigy",
        "schedule-free",
        "plateau",
        "masks",
        "no closure",
    ],
)
def test_a_rate_that_is_not_known_is_not_guessed(inner):
    tx = optax.with_extra_args_support(inner)
    assert learning_rate(tx, tx.init(PARAMS)) == np.float32(UNKNOWN)


@pytest.mark.parametrize(
    "micro",
    [
        contrib.muon(1.0),
        optax.partition(
            {"a": optax.scale_by_lion(), "b": optax.scale_by_adam()},
            {"bias": "a", "kernel": "b"},
        ),
        optax.partition(
            {"a": optax.adam(1.0), "b": optax.set_to_zero()},
            {"bias": "a", "kernel": "b"},
        ),
    ],
    ids=["muon", "rules", "frozen"],
)
def test_groups_with_one_rate_are_multiplied_by_that_of_all(micro):
    tx = lo.lalerg(SCHEDULE, micro=micro, search=False)
    np.testing.assert_allclose(rates_of(tx), RATES, rtol=1e-5)


def test_metrics_say_that_it_is_not_known():
    assert rates_of(lo.error_regulate(optax.scale_by_adam()), 1) == [-1.0]


@pytest.mark.parametrize("search", [True, False])
def test_it_is_the_factor_that_a_step_was_multiplied_by(search):
    micro = optax.sgd(1.0)  # so that the step is rate times gradient
    tx = lo.lalerg(SCHEDULE, micro=micro, weight_decay=0.0, search=search)
    params = jnp.array([1.0, -2.0])
    state = tx.init(params)
    update = jax.jit(tx.update)
    seen = []
    for _ in range(9):
        updates, state = update(params, state, params, value=jnp.sum(params**2) / 2)
        report = lo.metrics(state)
        if report["verdict"] == lo.Verdict.ACCEPT:
            np.testing.assert_allclose(
                -updates, report["learning_rate"] * params, rtol=1e-5
            )
        seen.append(float(report["macro_rate"]))
        params = lo.apply_updates(params, updates, state)
    assert (len(set(seen)) > 1) == search


def test_the_damping_counts():
    tx = lo.error_regulate(optax.sgd(0.1))
    state = tx.init(PARAMS)
    losses = np.full(60, 1.0) + 0.01 * np.sin(np.arange(60.0))
    losses[40:42] = 9.0
    update = jax.jit(tx.update)
    for loss in losses:
        _, state = update(PARAMS, state, PARAMS, value=loss)
    report = lo.metrics(state)
    assert report["damping_factor"] < 0.9
    assert report["learning_rate"] == pytest.approx(0.1 * report["damping_factor"])


def test_groups_tell_their_own():
    tx = optax.partition(
        {"a": lo.lalerg(0.1, search=False), "b": lo.error_regulate(optax.sgd(0.2))},
        {"bias": "a", "kernel": "b"},
    )
    _, state = tx.update(PARAMS, tx.init(PARAMS), PARAMS, value=1.0)
    report = lo.metrics(state)
    assert report["a/learning_rate"] == pytest.approx(0.1)
    assert report["b/learning_rate"] == pytest.approx(0.2)


def test_a_population_has_a_rate_each():
    rates = jnp.array([0.1, 0.2])

    def step(rate):
        tx = lo.lalerg(rate, search=False)
        _, state = tx.update(PARAMS, tx.init(PARAMS), PARAMS, value=1.0)
        return state

    report = lo.metrics(jax.vmap(step)(rates))
    np.testing.assert_allclose(report["learning_rate"], rates, rtol=1e-6)
    assert {x.shape for x in report.values()} == {(2,)}
    tx = lo.error_regulate(optax.sgd(0.1))
    report = lo.metrics(jax.vmap(lambda p: tx.init({"p": p}))(jnp.ones((4, 3))))
    assert {x.shape for x in report.values()} == {(4,)}


def test_a_schedule_for_eager_steps_alone_is_left_alone():
    called = []

    def listed(count):
        called.append(count)
        return [0.1, 0.2, 0.3][int(count)]

    tx = lo.error_regulate(optax.sgd(listed))
    state = tx.init(PARAMS)
    updates, state = tx.update(PARAMS, state, PARAMS, value=1.0)
    np.testing.assert_allclose(updates["bias"], -0.1 * PARAMS["bias"], rtol=1e-6)
    assert lo.metrics(state)["learning_rate"] == pytest.approx(0.1)
