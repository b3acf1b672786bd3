"""Bad use is refused where a step is traced, with what is wrong and what to do."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.drive import descend
from helpers.quick import some

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


# ---- The loss by another name, and what is no parameter ------------------------------


@pytest.mark.parametrize("name", [*REGULATORS, "scale_by_macro_rate", "accumulate"])
def test_loss_is_understood_as_value(name):
    tx = (LINKS | {"accumulate": lo.accumulate(lo.lalerg(), 1)})[name]
    state = tx.init(PARAMS)
    by_value = tx.update(PARAMS, state, PARAMS, value=jnp.float32(0.5))
    by_loss = tx.update(PARAMS, state, PARAMS, loss=jnp.float32(0.5))
    jax.tree.map(np.testing.assert_array_equal, by_value, by_loss)
    with pytest.raises(TypeError, match="two names of one argument"):
        tx.update(PARAMS, state, PARAMS, value=0.5, loss=0.5)


@pytest.mark.parametrize("name", [*REGULATORS, "scale_by_macro_rate"])
def test_a_positional_loss_is_told_its_name(name):
    tx = LINKS[name]
    with pytest.raises(TypeError, match="the loss is given by name"):
        tx.update(PARAMS, tx.init(PARAMS), PARAMS, 0.5)


@regulators
@pytest.mark.parametrize(
    ("leaf", "wrong"),
    [
        (jnp.arange(3), "leaf ['more'] of the params is of int32"),
        (np.zeros(3, bool), "leaf ['more'] of the params is of bool"),
        (jax.nn.relu, "leaf ['more'] of the params is no array"),
        ("tanh", "leaf ['more'] of the params is no array"),
    ],
    ids=["int", "bool", "a function", "a name"],
)
def test_what_is_no_parameter_is_named(name, leaf, wrong):
    with pytest.raises(TypeError, match=r"equinox\.filter") as error:
        REGULATORS[name].init(PARAMS | {"more": leaf})
    assert wrong in reason(error)


@regulators
def test_python_numbers_are_params(name):
    tx, params = REGULATORS[name], {"a": 2.0, "b": 1.0}
    state = tx.init(params)
    for _ in range(2):
        updates, state = tx.update({"a": 0.5, "b": 0.0}, state, params, value=1.0)
    assert updates["a"].dtype == jnp.float32


@regulators
def test_abstract_params_are_enough_for_a_state(name):
    tx = REGULATORS[name]
    abstract = jax.eval_shape(lambda: PARAMS)
    state, expected = tx.init(abstract), tx.init(PARAMS)
    jax.tree.map(
        lambda a, b: np.testing.assert_equal(a.shape, b.shape), state, expected
    )
    _, state = tx.update(PARAMS, state, PARAMS, value=1.0)


def test_hyperparameters_in_bfloat16_are_refused():
    params = jnp.ones(3, jnp.bfloat16)
    tx = optax.inject_hyperparams(lo.lalerg)(learning_rate=1e-3)
    with pytest.raises(ValueError, match=r"hyperparam_dtype=jnp\.float32"):
        tx.init(params)
    tx = optax.inject_hyperparams(lo.lalerg, hyperparam_dtype=jnp.float32)(1e-3)
    updates, _ = tx.update(params, tx.init(params), params, value=1.0)
    assert jnp.all(updates < 0.0)


def test_linens_own_train_state_is_told_of_ours():
    train_state = pytest.importorskip("flax.training.train_state")
    state = train_state.TrainState.create(
        apply_fn=None, params=dict(PARAMS), tx=lo.lalerg()
    )
    with pytest.raises(TypeError, match=r"lalerg_optax\.flax\.TrainState"):
        state.apply_gradients(grads=dict(PARAMS), value=1.0)


# ---- Derivatives, and the search for NaNs --------------------------------------------


@pytest.mark.parametrize("clip_norm", some([None, 1.0], 1.0))
def test_a_gradient_of_zero_has_a_derivative(clip_norm):
    tx = lo.error_regulate(optax.sgd(0.1), clip_norm=clip_norm)
    start = jnp.ones(4)

    @jax.jit
    def end_loss(params):
        def step(carry, scale):
            params, state = carry
            loss = jnp.sum(params**2)
            updates, state = tx.update(scale * params, state, params, value=loss)
            return (optax.apply_updates(params, updates), state), None

        scales = jnp.array([0.0, 1.0, 0.0, 1.0])
        (params, _), _ = jax.lax.scan(step, (params, tx.init(params)), scales)
        return jnp.sum(params**2)

    _, forward = jax.jvp(end_loss, (start,), (start,))
    backward = jnp.vdot(jax.grad(end_loss)(start), start)
    assert jnp.isfinite(forward)
    np.testing.assert_allclose(forward, backward, rtol=1e-5)


@pytest.mark.parametrize("name", some(["lalerg", "error_regulate(adamw)"], "lalerg"))
def test_a_healthy_run_makes_no_nan(name):
    tx, params = REGULATORS[name], jnp.array([1.0, -2.0])
    state = tx.init(params)
    with jax.debug_nans(True):
        for i in range(20):
            grads = params * (i % 7 != 0)  # and none at all now and then
            updates, state = tx.update(grads, state, params, value=jnp.sum(params**2))
            params = lo.apply_updates(params, updates, state)
        lo.metrics(state)
