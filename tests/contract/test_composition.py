"""The contract of an Optax transformation: what ours may be combined with, and fed."""

import functools
import inspect

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import drive
from helpers.forms import flat
from helpers.judged import NAMES
from helpers.quick import some
from helpers.trees import TREES, like, types

import lalerg_optax as lo
from lalerg_optax import Verdict

FORMS = {
    "lalerg": lambda: lo.lalerg(0.01),
    "lalerg-clip": lambda: lo.lalerg(0.01, clip_norm=1, weight_decay=0),
    "lalerg-lion": lambda: lo.lalerg(0.01, micro=optax.scale_by_lion(), search=False),
    "regulated-adam": lambda: lo.error_regulate(optax.adam(0.01)),
    "flat-form": flat,
    "flat-regulator": lambda: optax.chain(optax.sgd(0.01), lo.error_regulate()),
    "micro-level": lambda: lo.scale_by_micro_rate(b1=0, b2=0),
    "macro-level": lambda: lo.scale_by_macro_rate(),
}
CONVERGING = {
    "lalerg": lambda: lo.lalerg(0.01),
    "regulated-adam": lambda: lo.error_regulate(optax.adam(0.01)),
    "flat-form": lambda: flat(search=False),
}
all_forms = pytest.mark.parametrize("form", FORMS)
few_forms = pytest.mark.parametrize(
    "form",
    some(FORMS, "lalerg", "regulated-adam", "flat-regulator", "micro-level"),
)

all_trees = pytest.mark.parametrize("tree", TREES)


def square_loss(params, target=0.0):
    return 0.5 * sum(jnp.sum(jnp.square(p - target)) for p in jax.tree.leaves(params))


def train(tx, params, num_steps=100, loss_fn=square_loss):
    """Returns params, state and losses of a run."""
    task = drive.Task(params, lambda p, _: loss_fn(p), jnp.zeros(num_steps))
    return drive.train(tx, task, see=drive.values, apply_updates=drive.plainly)


# ---- extra arguments ----------------------------------------------------------------


@few_forms
def test_unknown_extra_args_are_ignored(form):
    tx, params = FORMS[form](), TREES["float32"]
    state = tx.init(params)
    update = functools.partial(tx.update, params, state, params, value=1.0)
    with_extra_args = jax.jit(functools.partial(update, nobody_asked=7, batch={}))()
    chex.assert_trees_all_equal(with_extra_args, jax.jit(update)())


def test_a_line_searchs_function_beside_the_loss_changes_nothing_for_other_links():
    tx, params = FORMS["lalerg"](), TREES["float32"]
    searched = functools.partial(tx.update, grad=params, value_fn=square_loss)
    alone, _, _ = train(tx, params)
    beside, state, _ = train(tx._replace(update=searched), params)
    assert lo.metrics(state)["num_audits_passed"] > 0
    chex.assert_trees_all_equal(beside, alone)


@pytest.mark.parametrize("form", ["lalerg", "regulated-adam"])
def test_a_verdict_from_outside_is_ignored(form):
    tx, params = FORMS[form](), TREES["float32"]
    state = tx.init(params)
    updates, state = jax.jit(
        functools.partial(tx.update, value=1.0, verdict=Verdict.REVERT, audit="none")
    )(params, state, params)
    assert lo.metrics(state)["verdict"] == Verdict.ACCEPT
    assert np.all(updates["w"] < 0)


# ---- dtypes and shapes --------------------------------------------------------------


@all_trees
@all_forms
def test_updates_have_the_dtypes_of_params(form, tree):
    tx, params = FORMS[form](), TREES[tree]
    updates, _ = jax.eval_shape(
        functools.partial(tx.update, value=1.0), params, tx.init(params), params
    )
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)


@pytest.mark.parametrize(
    "tree", some(TREES, "float32", "mixed", "complex64", "empty leaf", "None leaf")
)
def test_updates_of_any_tree_go_downhill(tree):
    tx, params = FORMS["lalerg"](), TREES[tree]
    updates, _ = jax.jit(functools.partial(tx.update, value=1.0))(
        params, tx.init(params), params
    )
    for u in jax.tree.leaves(updates):
        assert np.all(np.isfinite(u))
        assert np.all(jnp.real(u) < 0)


@pytest.mark.parametrize("form", ["lalerg", "regulated-adam"])
def test_float32_gradients_of_bfloat16_params_give_bfloat16_updates(form):
    tx, params = FORMS[form](), TREES["bfloat16"]
    grads = optax.tree.cast(params, jnp.float32)
    updates, state = jax.jit(functools.partial(tx.update, value=1.0))(
        grads, tx.init(params), params
    )
    chex.assert_trees_all_equal_dtypes(updates, params)
    if form == "lalerg":  # the moments of Optax's Adam take the gradients' dtype
        assert types(state) == types(tx.init(params))


@pytest.mark.parametrize(
    "value",
    [jnp.asarray(1.0), jnp.asarray(1, jnp.bfloat16), np.float64(1.0), 1.0, 1, None],
    ids=["float32", "bfloat16", "numpy", "float", "int", "None"],
)
@all_forms
def test_state_after_update_has_the_types_of_the_state_after_init(form, value):
    tx, params = FORMS[form](), TREES["mixed"]
    state = tx.init(params)
    _, new_state = jax.eval_shape(
        functools.partial(tx.update, value=value), params, state, params
    )
    chex.assert_trees_all_equal_structs(new_state, state)
    as_shape = jax.eval_shape(lambda: state)
    assert types(new_state) == types(as_shape)


@all_trees
@all_forms
def test_state_keeps_its_types_for_every_tree(form, tree):
    tx, params = FORMS[form](), TREES[tree]
    state = jax.eval_shape(lambda: tx.init(params))
    _, new_state = jax.eval_shape(
        functools.partial(tx.update, value=1.0), params, state, params
    )
    assert types(new_state) == types(state)


@all_forms
def test_state_keeps_its_types_with_64_bits(form):
    with jax.enable_x64(True):
        params = {"w": jnp.ones(3, jnp.float64), "b": jnp.ones(2, jnp.float32)}
        tx = FORMS[form]()
        state = jax.eval_shape(lambda: tx.init(params))
        updates, new_state = jax.eval_shape(
            functools.partial(tx.update, value=jnp.ones((), jnp.float64)),
            params,
            state,
            params,
        )
        assert types(new_state) == types(state)
        chex.assert_trees_all_equal_dtypes(updates, params)


@all_forms
def test_state_scalars_are_32_bits_wide_whatever_the_params(form):
    state = FORMS[form]().init(TREES["bfloat16"])
    scalars = [x for x in jax.tree.leaves(state) if x.ndim == 0]
    assert {str(x.dtype) for x in scalars} <= {"float32", "int32", "bool"}


@few_forms
def test_one_trace_for_a_whole_run(form):
    chex.clear_trace_counter()
    tx, params = FORMS[form](), TREES["mixed"]

    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(params, state, value):
        updates, state = tx.update(params, state, params, value=value)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for value in (3.0, 2.0, jnp.nan, jnp.inf, jnp.nan, 1.0, 1e30):
        params, state = step(params, state, jnp.asarray(value))


@few_forms
def test_outside_of_jit_the_results_are_the_same(form):
    tx, params = FORMS[form](), TREES["mixed"]
    grads, state = like(params, 0.5), tx.init(params)
    update = functools.partial(tx.update, value=jnp.asarray(1.0))
    chex.assert_trees_all_close(
        update(grads, state, params), jax.jit(update)(grads, state, params), rtol=1e-2
    )


# ---- unusual params -----------------------------------------------------------------


def test_empty_tree_is_accepted_for_ever():
    params, state, _ = train(lo.lalerg(), {}, loss_fn=lambda p: jnp.asarray(1.0))
    assert params == {}
    assert lo.metrics(state)["num_accepted"] == 100


@pytest.mark.parametrize("form", CONVERGING)
def test_scalar_params_converge(form):
    params, _, _ = train(CONVERGING[form](), jnp.asarray(2.0), num_steps=1000)
    assert abs(params) < 1e-2


@pytest.mark.parametrize("form", CONVERGING)
def test_none_leaves_stay_none_and_the_others_converge(form):
    params, _, _ = train(CONVERGING[form](), TREES["None leaf"], num_steps=1000)
    assert params["frozen"] is None
    assert np.all(np.abs(params["w"]) < 1e-2)


TARGET = jnp.array([1 - 2j, -3 + 0.5j], jnp.complex64)


@pytest.mark.parametrize("form", CONVERGING)
def test_complex_params_converge(form):
    tx, params = CONVERGING[form](), jnp.zeros(2, jnp.complex64)

    def loss_fn(p):
        return jnp.sum(jnp.abs(p - TARGET) ** 2, initial=1e-6)

    downhill = optax.stateless(lambda grads, _: grads.conj())
    params, *_ = train(optax.chain(downhill, tx), params, 1500, loss_fn)
    np.testing.assert_allclose(params, TARGET, atol=2e-2)


def test_norm_of_a_complex_gradient_is_that_of_its_parts():
    tx, params = FORMS["regulated-adam"](), jnp.zeros(2, jnp.complex64)
    grads = jnp.array([3 + 4j, 0 - 12j], jnp.complex64)
    _, state = tx.update(grads, tx.init(params), params, value=1.0)
    np.testing.assert_allclose(lo.metrics(state)["grad_norm"], 13.0, rtol=1e-6)


def test_complex_params_revert_to_their_anchor():
    tx, good = lo.error_regulate(optax.sgd(0.1)), TARGET
    state, params = tx.init(good), 1e3 * good + (2 - 1j)
    for _ in range(3):
        updates, state = tx.update(params, state, params, value=jnp.inf)
        params = optax.apply_updates(params, updates)
    chex.assert_trees_all_equal(params, good)


def test_a_nan_in_an_imaginary_part_is_an_error():
    tx, params = FORMS["lalerg"](), jnp.ones(2, jnp.complex64)
    grads = jnp.array([1.0, complex(0.0, float("nan"))], jnp.complex64)
    updates, state = tx.update(grads, tx.init(params), params, value=1.0)
    assert lo.metrics(state)["verdict"] == Verdict.SKIP
    chex.assert_trees_all_equal(updates, jnp.zeros(2, jnp.complex64))


# ---- Optax's wrappers ---------------------------------------------------------------


def numeric_hyperparams(factory, **more):
    """Returns the defaults of all float and int hyperparameters of a factory."""
    parameters = inspect.signature(factory).parameters.values()
    numbers = {
        p.name: p.default
        for p in parameters
        if isinstance(p.default, int | float) and not isinstance(p.default, bool)
    }
    return {**numbers, **more}


INJECTED = {
    "lalerg": (lo.lalerg, {"clip_norm": 3.0}),
    "error_regulate": (lo.error_regulate, {"inner": optax.sgd(0.1), "clip_norm": 3.0}),
    "micro-level": (lo.scale_by_micro_rate, {}),
    "macro-level": (lo.scale_by_macro_rate, {}),
}


@pytest.mark.parametrize("name", INJECTED)
def test_all_numeric_hyperparams_can_be_injected_at_once(name):
    factory, more = INJECTED[name]
    hyperparams = numeric_hyperparams(factory, **more)
    injected = optax.inject_hyperparams(factory)(**hyperparams)
    params = {"w": jnp.linspace(-2.0, 2.0, 5)}
    one, state, _ = train(injected, params)
    two, plain_state, _ = train(factory(**hyperparams), params)
    assert set(state.hyperparams) == set(hyperparams) - {"inner"}
    chex.assert_trees_all_close(one, two, rtol=1e-4, atol=1e-6)
    chex.assert_trees_all_close(state.inner_state, plain_state, rtol=1e-2, atol=1e-4)


def test_an_injected_schedule_is_followed():
    schedule = optax.linear_schedule(0.02, 0.001, 80)
    injected = optax.inject_hyperparams(lo.lalerg)(learning_rate=schedule, search=False)
    params = {"w": jnp.linspace(-2.0, 2.0, 5)}
    one, state, _ = train(injected, params)
    two, _, _ = train(lo.lalerg(schedule, search=False), params)
    chex.assert_trees_all_close(one, two, rtol=1e-4)
    np.testing.assert_allclose(state.hyperparams["learning_rate"], 0.001, rtol=1e-5)


def test_injected_hyperparams_can_be_set_from_outside():
    tx, params = optax.inject_hyperparams(lo.lalerg)(learning_rate=0.01), jnp.ones(2)
    state = tx.init(params)
    update = jax.jit(functools.partial(tx.update, value=1.0))
    updates, _ = update(params, state, params)
    state.hyperparams["learning_rate"] = jnp.asarray(0.04)
    larger, _ = update(params, state, params)
    np.testing.assert_allclose(larger, 4 * updates, rtol=1e-6)


def test_masked_regulates_its_part_and_leaves_the_rest_alone():
    tx = optax.masked(lo.lalerg(0.01), {"ours": True, "theirs": False})
    params = {"ours": jnp.ones(2), "theirs": jnp.ones(2)}
    grads = {"ours": jnp.ones(2), "theirs": jnp.full(2, 7.0)}
    updates, state = tx.update(grads, tx.init(params), params, value=1.0)
    chex.assert_trees_all_equal(updates["theirs"], grads["theirs"])
    assert np.all(updates["ours"] < 0)
    # a gradient that is not ours is not judged
    grads["theirs"] = jnp.full(2, jnp.nan)
    updates, state = tx.update(grads, state, params, value=1.0)
    assert lo.metrics(state)["verdict"] == Verdict.ACCEPT
    np.testing.assert_allclose(lo.metrics(state)["grad_norm"], 2**0.5, rtol=1e-6)


def test_masked_revert_restores_its_part_only():
    tx = optax.chain(
        optax.masked(lo.error_regulate(optax.sgd(0.1)), {"ours": True, "theirs": False})
    )
    good = {"ours": jnp.array([1.0, 2.0]), "theirs": jnp.zeros(2)}
    state = tx.init(good)
    params = {"ours": jnp.array([jnp.nan, 5.0]), "theirs": jnp.full(2, 3.0)}
    grads = {"ours": jnp.ones(2), "theirs": jnp.zeros(2)}
    for _ in range(2):
        updates, state = tx.update(grads, state, params, value=jnp.nan)
        params = lo.apply_updates(params, updates, state)
    chex.assert_trees_all_equal(params, {**good, "theirs": jnp.full(2, 3.0)})


def test_weight_decay_mask_spares_what_it_excludes():
    tx = lo.lalerg(0.1, weight_decay=0.5, mask={"w": True, "b": False}, search=False)
    params = {"w": jnp.ones(2), "b": jnp.ones(2)}
    grads = like(params, 0.0)
    updates, _ = tx.update(grads, tx.init(params), params, value=1.0)
    np.testing.assert_allclose(updates["w"], -0.05, rtol=1e-6)
    np.testing.assert_array_equal(updates["b"], 0.0)


def two_groups():
    tx = optax.partition(
        {"encoder": lo.lalerg(1e-3), "head": lo.error_regulate(optax.sgd(1e-3))},
        {"a": "encoder", "b": "head"},
    )
    return tx, {"a": jnp.ones(2), "b": jnp.ones(2)}


def test_each_regulator_of_a_partition_decides_for_itself():
    tx, params = two_groups()
    state = tx.init(params)
    update = jax.jit(tx.update)
    for t in range(40):
        grads = like(params, 1.0 + 0.01 * (-1) ** t)
        _, state = update(grads, state, params, value=1.0 + 0.01 * (-1) ** t)
    updates, state = update({**grads, "a": jnp.full(2, 1e6)}, state, params, value=1.0)
    report = lo.metrics(state)
    assert report["encoder/verdict"] == Verdict.SKIP
    assert report["head/verdict"] == Verdict.ACCEPT
    assert report["encoder/num_skipped"] == 1
    assert report["head/num_skipped"] == 0
    np.testing.assert_array_equal(updates["a"], 0.0)
    assert np.all(updates["b"] < 0.0)


def test_metrics_of_a_partition_have_every_name_under_every_label():
    tx, params = two_groups()
    report = lo.metrics(tx.init(params))
    one = lo.metrics(FORMS["regulated-adam"]().init(params))
    for name in set(one) - {"macro_rate"}:
        assert {f"encoder/{name}", f"head/{name}"} <= set(report)
        assert name not in report


def test_macro_rates_of_a_partition_have_their_labels():
    tx = optax.partition({"x": lo.lalerg(), "y": lo.lalerg()}, {"a": "x", "b": "y"})
    report = lo.metrics(tx.init({"a": jnp.ones(2), "b": jnp.ones(2)}))
    assert {"x/macro_rate", "y/macro_rate", "x/num_micro_held"} <= set(report)
    assert "macro_rate" not in report


def test_multi_steps_with_the_mean_loss_follow_the_run_on_whole_batches():
    rng = np.random.default_rng(0)
    features = jnp.asarray(rng.standard_normal((40, 4, 8, 3)), jnp.float32)
    targets = features @ jnp.array([1.0, -2.0, 0.5])

    def loss_fn(w, x, y):
        return jnp.mean(jnp.square(x @ w - y))

    whole, accumulated = lo.lalerg(0.05), optax.MultiSteps(lo.lalerg(0.05), 4)

    def whole_step(carry, batch):
        w, state = carry
        x, y = batch[0].reshape(-1, 3), batch[1].reshape(-1)
        loss, grads = jax.value_and_grad(loss_fn)(w, x, y)
        updates, state = whole.update(grads, state, w, value=loss)
        return (optax.apply_updates(w, updates), state), None

    def mini_step(carry, batch):
        w, state, total = carry
        x, y = batch
        loss, grads = jax.value_and_grad(loss_fn)(w, x, y)
        total = jnp.where(state.mini_step == 0, loss, total + loss)
        mean = total / (state.mini_step + 1)
        updates, state = accumulated.update(grads, state, w, value=mean)
        return (optax.apply_updates(w, updates), state, total), None

    start = jnp.zeros(3)
    (w_whole, state), _ = jax.lax.scan(
        whole_step, (start, whole.init(start)), (features, targets)
    )
    (w_mini, mini_state, _), _ = jax.lax.scan(
        mini_step,
        (start, accumulated.init(start), jnp.zeros(())),
        (features.reshape(-1, 8, 3), targets.reshape(-1, 8)),
    )
    np.testing.assert_allclose(w_mini, w_whole, rtol=1e-3, atol=1e-4)
    report, mini_report = lo.metrics(state), lo.metrics(mini_state)
    assert mini_report["num_accepted"] == report["num_accepted"] == 40
    np.testing.assert_allclose(mini_report["avg_value"], report["avg_value"], rtol=1e-3)


def test_tree_map_params_finds_what_is_like_the_params_and_nothing_else():
    tx, params = lo.lalerg(), {"w": jnp.ones((3, 2)), "b": jnp.ones(2)}
    state = optax.tree.map_params(
        tx, lambda _: "param", tx.init(params), transform_non_params=lambda _: "other"
    )
    marked = {"w": "param", "b": "param"}
    assert state.anchor == marked
    micro = state.inner_state[0]
    assert (micro.mu, micro.nu, micro.micro_count) == (marked, marked, "other")
    assert set(jax.tree.leaves(state.history)) == {"other"}
    assert jax.tree.leaves(state).count("param") == 6


CHAINS = {
    "clip before": lambda tx: optax.chain(optax.clip_by_global_norm(1.0), tx),
    "scale after": lambda tx: optax.chain(tx, optax.scale(0.5)),
    "clip after": lambda tx: optax.chain(tx, optax.clip(0.1)),
    "zero_nans": lambda tx: optax.chain(optax.zero_nans(), tx),
    "ema": lambda tx: optax.chain(optax.ema(0.9), tx),
    "centralize": lambda tx: optax.chain(optax.centralize(), tx),
    "add_noise": lambda tx: optax.chain(optax.add_noise(1e-3, 0.9, 0), tx),
    "plateau": lambda tx: optax.chain(tx, optax.contrib.reduce_on_plateau()),
    "named_chain": lambda tx: optax.named_chain(("ours", tx), ("x", optax.scale(0.5))),
    "nested chain": lambda tx: optax.chain(optax.chain(optax.chain(tx))),
    "twice regulated": lo.error_regulate,
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 5),
    "flatten": optax.flatten,
    "MultiSteps": lambda tx: optax.MultiSteps(tx, 1),
    "mechanize": lambda tx: optax.contrib.mechanize(tx, s_init=1.0),
    "conditionally_transform": lambda tx: optax.conditionally_transform(
        tx, lambda step, **_: step >= 0
    ),
    "conditionally_mask": lambda tx: optax.conditionally_mask(
        tx, lambda step, **_: step >= 0
    ),
    "split_real_and_imaginary of the inner": lambda tx: lo.error_regulate(
        optax.contrib.split_real_and_imaginary(optax.adam(0.01))
    ),
}


@pytest.mark.parametrize(
    "chain",
    some(
        CHAINS,
        *("clip before", "scale after", "add_noise", "plateau", "named_chain"),
        *("twice regulated", "apply_if_finite", "MultiSteps", "mechanize"),
    ),
)
def test_chained_with_anything_the_loss_falls(chain):
    tx = CHAINS[chain](lo.lalerg(0.02, search=False))
    params = {"w": jnp.array([2.0, -1.0])}
    _, state, losses = train(tx, params, num_steps=200)
    assert losses[-1] < 0.5 * losses[0]
    assert lo.metrics(state)["num_accepted"] >= 150


@pytest.mark.parametrize("chain", CHAINS)
def test_metrics_find_their_states_at_any_depth(chain):
    tx, params = CHAINS[chain](lo.lalerg(0.01)), {"w": jnp.array([2.0, -1.0])}
    report = lo.metrics(tx.init(params))
    assert set(report) >= NAMES
    chex.assert_shape(list(report.values()), ())
