"""Bad use is refused where a step is traced, with what is wrong and what to do."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.drive import descend

import lalerg_optax as lo

PARAMS = {"bias": jnp.zeros(()), "weights": jnp.ones((2, 3))}
ADAMW = optax.adamw(1e-3)
REGULATORS = {
    "lalerg": lo.lalerg(),
    "lalerg with lion": lo.lalerg(micro=optax.scale_by_lion()),
    "error_regulate(adamw)": lo.error_regulate(ADAMW),
    "error_regulate()": lo.error_regulate(),
}
LINKS = REGULATORS | {
    "scale_by_micro_rate": lo.scale_by_micro_rate(),
    "scale_by_macro_rate": lo.scale_by_macro_rate(),
}
links = pytest.mark.parametrize("name", LINKS)
regulators = pytest.mark.parametrize("name", REGULATORS)


def reason(error):
    """Returns the message without its line breaks."""
    return " ".join(str(error.value).split())


def update(tx, grads=PARAMS, state=None, params=PARAMS, value=1.0):
    state = tx.init(PARAMS) if state is None else state
    return tx.update(grads, state, params, value=value)


@pytest.mark.parametrize("name", [*REGULATORS, "scale_by_micro_rate"])
@pytest.mark.parametrize(
    ("grads", "wrong"),
    [
        ({"bias": jnp.ones(())}, "there is no leaf ['weights']"),
        (PARAMS | {"weights": None}, "there is no leaf ['weights']"),
        (PARAMS | {"more": jnp.ones(2)}, "leaf ['more'] is one too many"),
        (
            PARAMS | {"weights": jnp.ones((3, 2))},
            "leaf ['weights'] has shape (3, 2) instead of (2, 3)",
        ),
        (  # one for each example
            jax.tree.map(lambda p: jnp.ones((8, *p.shape)), PARAMS),
            "leaf ['bias'] has shape (8,) instead of ()",
        ),
        (  # which would be broadcast
            PARAMS | {"weights": jnp.ones(3)},
            "leaf ['weights'] has shape (3,) instead of (2, 3)",
        ),
        (tuple(PARAMS.values()), "there is no leaf ['bias']"),
        (jnp.ones(7), "there is no leaf ['bias']"),
    ],
)
def test_gradients_that_are_not_like_the_params_are_a_value_error(name, grads, wrong):
    tx = LINKS[name]
    for step in (update, jax.jit(update, static_argnums=0)):
        with pytest.raises(ValueError, match="not like the params: ") as error:
            step(tx, grads)
        assert wrong in reason(error)
        assert "Pass the gradient of the mean loss" in reason(error)


def test_containers_of_another_type_are_a_value_error():
    params = [jnp.ones(2), jnp.ones(3)]
    tx = lo.error_regulate(optax.sgd(0.1))
    with pytest.raises(ValueError, match="the containers are of other types"):
        tx.update(tuple(params), tx.init(params), params, value=1.0)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *((name, "ErrorRegulateState") for name in REGULATORS),
        ("scale_by_micro_rate", "ScaleByMicroRateState"),
        ("scale_by_macro_rate", "ScaleByMacroRateState"),
    ],
)
@pytest.mark.parametrize(
    "state",
    [ADAMW.init(PARAMS), PARAMS, (), optax.EmptyState(), lo.LossHistory.empty()],
    ids=["adamw", "params", "tuple", "empty", "history"],
)
def test_a_state_of_another_transformation_is_a_type_error(name, kind, state):
    with pytest.raises(TypeError, match=rf"needs a state of type {kind}, got") as error:
        update(LINKS[name], state=state)
    assert f"type {type(state).__name__}." in reason(error)
    assert "init(params) of the same optimizer" in reason(error)


@regulators
@pytest.mark.parametrize(
    ("params", "wrong"),
    [
        ({"bias": jnp.ones(())}, "there is no leaf .anchor['weights']"),
        (PARAMS | {"more": jnp.ones(2)}, "leaf .anchor['more'] is one too many"),
        (
            PARAMS | {"weights": jnp.ones((3, 2))},
            "leaf .anchor['weights'] has shape (3, 2) instead of (2, 3)",
        ),
        (  # which would be broadcast
            PARAMS | {"weights": jnp.ones((1, 3))},
            "leaf .anchor['weights'] has shape (1, 3) instead of (2, 3)",
        ),
        (
            PARAMS | {"weights": jnp.ones((2, 3), jnp.bfloat16)},
            "the anchor is bfloat16 instead of float32",
        ),
    ],
)
def test_a_state_of_other_params_is_a_value_error(name, params, wrong):
    tx = REGULATORS[name]
    with pytest.raises(ValueError, match="or of other params: in the state") as error:
        update(tx, state=tx.init(params))
    assert wrong in reason(error)
    assert "or init(params) for a new one" in reason(error)


ANOTHER_CONFIGURATION = {
    "micro": (
        lo.lalerg(micro=optax.scale_by_lion()),
        lo.lalerg(),
        "there is no leaf .inner_state[0].micro_count",
    ),
    "micro, the other way": (
        lo.lalerg(),
        lo.lalerg(micro=optax.scale_by_lion()),
        "there is no leaf .inner_state[0].count",
    ),
    "schedule": (
        lo.lalerg(optax.constant_schedule(0.1)),
        lo.lalerg(0.1),
        "leaf .inner_state[3].count is one too many",
    ),
    "schedule, the other way": (
        lo.lalerg(0.1),
        lo.lalerg(optax.constant_schedule(0.1)),
        "there is no leaf .inner_state[3].count",
    ),
    "anchor_dtype": (
        lo.lalerg(anchor_dtype="bfloat16"),
        lo.lalerg(),
        "the anchor is bfloat16 instead of float32",
    ),
    "anchor_dtype, the other way": (
        lo.lalerg(),
        lo.lalerg(anchor_dtype="bfloat16"),
        "the anchor is float32 instead of bfloat16",
    ),
    "inner": (
        lo.error_regulate(optax.sgd(0.1)),
        lo.error_regulate(ADAMW),
        "there is no leaf .inner_state[0].count",
    ),
    "form": (
        lo.error_regulate(ADAMW),
        lo.error_regulate(),
        "leaf .inner_state[0].count is one too many",
    ),
    "mask": (
        optax.masked(lo.error_regulate(ADAMW), {"bias": False, "weights": True}),
        optax.masked(lo.error_regulate(ADAMW), True),
        "there is no leaf .anchor['bias']",
    ),
}


@pytest.mark.parametrize(
    ("before", "after", "wrong"),
    ANOTHER_CONFIGURATION.values(),
    ids=ANOTHER_CONFIGURATION,
)
def test_a_state_of_another_configuration_is_a_value_error(before, after, wrong):
    with pytest.raises(ValueError, match="of another configuration") as error:
        update(after, state=before.init(PARAMS))
    assert wrong in reason(error)


@pytest.mark.parametrize("name", [n for n in LINKS if n != "scale_by_micro_rate"])
@pytest.mark.parametrize(
    ("value", "message"),
    [
        ((jnp.ones(()), {"accuracy": 0.5}), "got a tuple of 2. With has_aux=True"),
        ([1.0, 2.0], "got a list of 2"),
        ("1.0", "must be a real number"),
        (1j, "must be a real number"),
        (jnp.complex64(1j), "must be a real number"),
        (lambda params: 1.0, "must be a real number"),
        ({"loss": 1.0}, "must be a real number"),
    ],
    ids=["aux", "list", "string", "complex", "complex array", "function", "dict"],
)
def test_a_value_that_is_no_real_number_is_a_type_error(name, value, message):
    with pytest.raises(TypeError, match=re.escape(message)) as error:
        update(LINKS[name], value=value)
    assert "the mean loss of the batch" in reason(error)


@pytest.mark.parametrize("value", [1, np.float64(1.0), np.ones(()), jnp.bfloat16(1.0)])
@links
def test_every_kind_of_real_number_is_a_value(name, value):
    updates, _ = update(LINKS[name], value=value)
    assert all(jnp.all(jnp.isfinite(u)) for u in jax.tree.leaves(updates))


@pytest.mark.parametrize("bad", ["adam", 1e-3, optax.adam, PARAMS])
def test_an_inner_that_is_no_transformation_is_a_type_error(bad):
    for factory, name in ((lo.error_regulate, "inner"), (lo.lalerg, "micro")):
        with pytest.raises(TypeError, match="must be an Optax gradient") as error:
            factory(**{name: bad})
        assert f"got {name} = " in reason(error)


def test_a_search_that_is_switched_off_in_mid_run_forgets_its_rate():
    on, off = lo.lalerg(1e-4), lo.lalerg(1e-4, search=False)
    params = jnp.array([3.0, -2.0])
    params, state = descend(on, params, 60)
    assert lo.metrics(state)["macro_rate"] > 2.0
    before = params
    params, state = descend(off, params, 1, state)
    report = lo.metrics(state)
    assert report["macro_rate"] == 1.0
    assert not report["is_searching"]
    assert report["num_accepted"] == 61
    np.testing.assert_array_less(jnp.abs(params - before), 1.1e-4)


def test_a_search_that_is_switched_on_in_mid_run_begins():
    on, off = lo.lalerg(1e-5), lo.lalerg(1e-5, search=False)
    params = jnp.array([3.0, -2.0])
    params, state = descend(off, params, 60)
    assert lo.metrics(state)["macro_rate"] == 1.0
    params, state = descend(on, params, 10, state)
    assert lo.metrics(state)["is_searching"]
    params, state = descend(on, params, 300, state)
    assert lo.metrics(state)["macro_rate"] > 1e3
    assert jnp.sum(params**2) < 0.1
