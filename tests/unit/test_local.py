"""The local view: what a step did to each leaf of the params, and that off is free."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx, serialization
from helpers.compiled import SIDE, compiled_step, make_params, num_copies
from helpers.digits_run import (
    ALONE,
    BURST,
    batches,
    init_params,
    loss_fn,
    make_mesh,
    make_run,
    put,
    run_digits,
    train_sharded,
)
from helpers.drive import Task, train
from helpers.quick import some
from jax.sharding import PartitionSpec

import lalerg_optax as lo
from lalerg_optax import Verdict, _act, _regulate

NAMES = ("grad_norm", "effective_rate", "update_ratio", "predicted_decrease")
OPTIMIZERS = {
    "lalerg": functools.cache(lambda local: lo.lalerg(1e-3, local=local)),
    "clipped": lambda local: lo.lalerg(1e-3, clip_norm=0.1, local=local),
    "regulated Adam": lambda local: lo.error_regulate(optax.adam(1e-3), local=local),
}
all_optimizers = pytest.mark.parametrize(
    "name",
    ["lalerg", "regulated Adam", pytest.param("clipped", marks=pytest.mark.slow)],
)


def seen_of(step):
    return step.grads, step.before, step.updates, lo.metrics(step.state)


def tell_all(tx, params, data, loss_fn=loss_fn):
    """Returns what is compared of all steps."""
    return train(tx, Task(params, loss_fn, data), see=seen_of)[2]


# ---- what it tells ------------------------------------------------------------------


@all_optimizers
def test_each_leaf_is_told_as_the_docstring_says(name):
    tx = OPTIMIZERS[name](True)
    grads, params, updates, report = tell_all(tx, init_params(), batches())
    accepted = np.isin(report["verdict"], (Verdict.ACCEPT, Verdict.BOUND))
    assert 0 < accepted.sum() < len(accepted)

    def norm(tree, leaf):
        return np.sqrt(np.square(np.asarray(tree[leaf], np.float64)).sum((1, 2)))

    for leaf in ("hidden", "out"):
        g, u, p = (norm(tree, leaf) for tree in (grads, updates, params))
        inner = (np.asarray(grads[leaf], np.float64) * updates[leaf]).sum((1, 2))
        expected = (g, u / g, u / p, -inner)
        for key, wanted in zip(NAMES, expected, strict=True):
            told = np.asarray(report[f"{key}/{leaf}"])
            np.testing.assert_allclose(
                told[accepted], wanted[accepted], rtol=1e-4, atol=1e-9
            )
            if key != "grad_norm":
                assert not told[~accepted].any()
    total = report["grad_norm/hidden"] ** 2 + report["grad_norm/out"] ** 2
    np.testing.assert_allclose(
        total[accepted], report["grad_norm"][accepted] ** 2, rtol=1e-4
    )


def test_the_leaf_whose_gradient_is_not_finite_is_named_and_all_else_stays_finite():
    tx = lo.error_regulate(optax.sgd(0.1), local=True)
    params = {"good": jnp.ones(3), "bad": jnp.ones(2)}
    state = tx.init(params)
    for bad in (jnp.nan, jnp.inf, 1e30):
        grads = params | {"bad": jnp.array([1.0, bad])}
        _, state = jax.jit(tx.update)(grads, state, params, value=1.0)
        assert state.verdict != Verdict.ACCEPT
        report = lo.metrics(state)
        np.testing.assert_allclose(report["grad_norm/bad"], 1e37)
        np.testing.assert_allclose(report["grad_norm/good"], 3**0.5, rtol=1e-6)
        assert not any(
            report[f"{name}/{leaf}"] for name in NAMES[1:] for leaf in params
        )
        chex.assert_tree_all_finite(report)


@pytest.mark.parametrize("grad", [0.0, 1e-30, 1e18])
@pytest.mark.parametrize("param", [0.0, 1e-30, 1e30])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_any_size_of_gradient_and_params_is_told_in_finite_numbers(grad, param, dtype):
    tx = lo.error_regulate(optax.sgd(0.1), local=True)
    params = {"w": jnp.full(4, param, dtype), "none": jnp.zeros((0, 2), dtype)}
    grads = {"w": jnp.full(4, grad, dtype), "none": jnp.zeros((0, 2), dtype)}
    state = tx.init(params)
    _, new = jax.jit(tx.update)(grads, state, params, value=1.0)
    chex.assert_tree_all_finite(new.local)
    chex.assert_trees_all_equal_shapes_and_dtypes(new.local, state.local)
    assert {x.dtype for x in new.local} == {jnp.dtype("float32")}


def test_narrow_leaves_are_summed_in_float32():
    params = {"w": jnp.full(4096, 1.0, "bfloat16")}
    tx = lo.error_regulate(optax.sgd(0.5), local=True)
    _, state = jax.jit(tx.update)(params, tx.init(params), params, value=1.0)
    told = {name: float(x[0]) for name, x in state.local._asdict().items()}
    assert told == {
        "leaf_grad_norm": 64.0,
        "effective_rate": 0.5,
        "update_ratio": 0.5,
        "predicted_decrease": 2048.0,
        "jump": 0.0,
        "leaf_param_norm": 64.0,
        "leaf_step_norm": 32.0,
    }


def test_predicted_decrease_is_what_the_loss_falls_by_on_a_slope():
    slope = {"a": jnp.array([3.0, -1.0]), "b": jnp.array([0.5])}

    def linear(p, _):
        return optax.tree.vdot(slope, p)

    start = jax.tree.map(jnp.ones_like, slope)
    tx = lo.error_regulate(optax.adam(1e-2), local=True)
    _, params, _, report = tell_all(tx, start, jnp.zeros(10), linear)
    losses = jax.vmap(lambda p: linear(p, None))(params)
    told = report["predicted_decrease/a"] + report["predicted_decrease/b"]
    np.testing.assert_allclose(told[:-1], -np.diff(losses), rtol=1e-3)


def test_a_leaf_that_climbs_has_a_negative_predicted_decrease():
    tx = lo.error_regulate(optax.sgd(0.1, momentum=0.5), local=True)
    params = {"a": jnp.ones(1), "b": jnp.ones(1)}
    state = tx.init(params)
    for climbing in (1.0, -0.25):  # the momentum of the first step wins
        grads = {"a": jnp.full(1, climbing), "b": jnp.ones(1)}
        _, state = tx.update(grads, state, params, value=1.0)
    report = lo.metrics(state)
    np.testing.assert_allclose(report["predicted_decrease/a"], -0.25 * 0.025, rtol=1e-5)
    np.testing.assert_allclose(report["predicted_decrease/b"], 0.15, rtol=1e-5)


# ---- params that are not where the update sent them ----------------------------------

START = {"body": jnp.array([3.0, 4.0]), "head": jnp.array([1.0, 1.0])}


def jumps(apply, change=None, dtype=jnp.float32, tx=None, at=20):
    """Returns jumps and verdicts of a run of which batches 30 and 31 are bad."""
    tx = lo.error_regulate(optax.adam(0.01), local=True) if tx is None else tx
    params = jax.tree.map(lambda p: p.astype(dtype), START)
    state, jumped, verdicts = tx.init(params), [], []

    @jax.jit
    def step(params, state, shift):
        updates, state = tx.update(params, state, params, value=1.0 + shift)
        return apply(params, updates, state), state, lo.metrics(state)

    for i in range(40):
        if change and i == at:
            params, state = change(params, state)
        shift = 50.0 if i in (30, 31) else 0.01 * (i % 3)
        params, state, report = step(params, state, shift)
        jumped.append([float(report["jump/body"]), float(report["jump/head"])])
        verdicts.append(int(report["verdict"]))
    return np.array(jumped), np.array(verdicts)


def add(params, updates, _):
    return optax.apply_updates(params, updates)


def reset_head(params, state):
    return params | {"head": jnp.array([3.0, 0.0])}, state


@pytest.mark.parametrize(
    ("apply", "dtype"),
    [(add, "bfloat16"), (lo.apply_updates, "float32")],
    ids=["Optax's", "own"],
)
def test_updates_and_reverts_are_no_jumps(apply, dtype):
    jumped, verdicts = jumps(apply, dtype=dtype)
    assert np.sum(verdicts == Verdict.REVERT) == 2
    assert not jumped.any()


def test_a_layer_that_was_reset_has_jumped_by_the_norm_it_gained():
    jumped, _ = jumps(lo.apply_updates, reset_head)
    assert np.argwhere(jumped).tolist() == [[20, 1]]
    # Adam's steps of 0.01 lead each entry from 1 to 0.8
    np.testing.assert_allclose(jumped[20, 1], 3.0 / (0.8 * 2**0.5) - 1.0, rtol=0.05)


def test_where_it_was_said_there_is_no_jump():
    def told(params, state):
        params, state = reset_head(params, state)
        return params, lo.rebase(params, state)

    assert not jumps(lo.apply_updates, told)[0].any()


def test_a_revert_that_something_multiplies_has_not_led_home():
    def halved(params, updates, _):
        return optax.apply_updates(params, jax.tree.map(lambda u: 0.5 * u, updates))

    jumped, verdicts = jumps(halved)
    first, second = np.flatnonzero(verdicts == Verdict.REVERT)
    assert second == first + 1
    assert np.flatnonzero(jumped.any(axis=1)).tolist() == [second]
    assert jumped[second].min() > 1e-3
    home, _ = jumps(add)
    assert not home[second].any()


def test_params_that_were_corrupted_have_jumped():
    def flip(params, state):
        return params | {"head": params["head"].at[0].set(jnp.inf)}, state

    jumped, _ = jumps(lo.apply_updates, flip)
    assert np.argwhere(jumped).tolist() == [[20, 1]]
    assert jumped[20, 1] == np.float32(1e37)


# ---- free when off, cheap when on ---------------------------------------------------


def test_when_off_nothing_of_it_is_traced(monkeypatch):
    def fail(*args, **kwargs):
        raise AssertionError

    monkeypatch.setattr(_regulate, "leaf_squares", fail)
    monkeypatch.setattr(_act, "act_in_turn", fail)
    params = jnp.ones(3)
    for tx in (lo.lalerg(), lo.error_regulate(optax.sgd(0.1))):
        state = tx.init(params)
        assert state.local is None
        assert not any("/" in name for name in lo.metrics(state))
        jax.jit(tx.update).lower(params, state, params, value=1.0)
    on = lo.lalerg(local=True)
    state = on.init(params)
    with pytest.raises(AssertionError):
        on.update(params, state, params, value=1.0)


def test_when_on_seven_vectors_are_all_that_a_step_has_more_of():
    params = make_params(num_leaves=3)
    off, on = (jax.eval_shape(lo.lalerg(local=x).init, params) for x in (False, True))
    extra = jax.tree.leaves(on.local)
    assert [x.shape for x in extra] == [(3,)] * 7
    assert len(jax.tree.leaves(on)) == len(jax.tree.leaves(off)) + 7


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_when_on_no_param_is_copied_and_an_eighth_of_the_step_is_stored(dtype):
    params = make_params(dtype, num_leaves=16)
    for make in (
        lambda local: lo.lalerg(local=local),
        lambda local: lo.error_regulate(optax.sgd(1e-3, momentum=0.9), local=local),
    ):
        off, on = (compiled_step(make(local), params) for local in (False, True))
        assert num_copies(on) == num_copies(off)
        extra = (
            on.memory_analysis().temp_size_in_bytes
            - off.memory_analysis().temp_size_in_bytes
        )
        leaf = params["w0"].nbytes
        rounded = leaf if dtype == "bfloat16" else 0  # with JAX 0.12
        assert extra <= len(params) * leaf / 8 + rounded + 0.01 * SIDE**2


@pytest.mark.parametrize("name", some(OPTIMIZERS, "lalerg"))
def test_looking_does_not_change_the_run(name):
    ends = []
    for local in (False, True):
        tx = OPTIMIZERS[name](local)
        params, _, told = run_digits(tx)
        ends.append((told[1], params))
    np.testing.assert_array_equal(ends[0][0], ends[1][0])
    assert ends[0][0][ALONE] == Verdict.SKIP
    assert ends[0][0][BURST] == Verdict.BOUND
    assert ends[0][0][BURST + 1] == Verdict.REVERT
    chex.assert_trees_all_close(ends[0][1], ends[1][1], rtol=1e-4, atol=1e-6)


# ---- wherever a regulator may be ----------------------------------------------------


def local_of(tx, data=None):
    return run_digits(tx, data)[1].local


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param("data parallel", marks=pytest.mark.slow),
        pytest.param("fully sharded", marks=pytest.mark.slow),
        "tensor sharded",
    ],
)
def test_sharded_leaves_are_told_as_on_one_device(layout):
    tx = OPTIMIZERS["lalerg"](True)
    _, state, _ = train_sharded(tx, layout)
    for name, told, wanted in zip(
        state.local._fields, state.local, local_of(tx), strict=True
    ):
        assert np.all((np.asarray(wanted) == 0.0) == (name == "jump"))
        np.testing.assert_allclose(told, wanted, rtol=1e-3)


def test_under_shard_map_all_devices_tell_the_view_of_the_mean_gradient():
    tx = lo.lalerg(1e-3, local=True, axis_name="d")
    mesh, params = make_mesh(), init_params()
    rows = PartitionSpec(None, "d")
    run = make_run(
        tx, axis_name="d", reduce_grads=lambda grads: jax.lax.pmean(grads, "d")
    )
    sharded = jax.shard_map(
        run,
        mesh=mesh,
        in_specs=(PartitionSpec(), PartitionSpec(), rows),
        out_specs=PartitionSpec(),
        check_vma=False,
    )
    state = tx.init(params)
    _, state, _ = jax.jit(sharded)(params, state, put(batches(), mesh, rows))
    wanted = local_of(OPTIMIZERS["lalerg"](True))
    for told, expected in zip(state.local, wanted, strict=True):
        np.testing.assert_allclose(told, expected, rtol=1e-3)


def test_devices_that_pass_their_own_gradients_tell_the_same_view():
    tx = lo.error_regulate(optax.sgd(0.1), local=True, axis_name="d")
    params, grads = jnp.ones(1), jnp.array([[1.0], [7.0]])
    state = tx.init(params)

    def step(grads):
        return tx.update(grads, state, params, value=1.0)[1].local

    local = jax.vmap(step, axis_name="d")(grads)
    told = {name: x[:, 0].tolist() for name, x in local._asdict().items()}
    wanted = {  # from the means of squares over devices
        "leaf_grad_norm": 5.0,
        "effective_rate": 0.1,
        "update_ratio": 0.5,
        "predicted_decrease": 2.5,
        "jump": 0.0,
        "leaf_param_norm": 1.0,
        "leaf_step_norm": 0.5,
    }
    chex.assert_trees_all_close(told, {k: [x, x] for k, x in wanted.items()}, rtol=1e-6)


def test_under_vmap_every_run_has_its_own_view():
    tx = lo.error_regulate(optax.sgd(0.1), local=True)
    params = {"a": jnp.arange(1.0, 7.0).reshape(3, 2), "b": jnp.ones((3, 1))}
    state = jax.vmap(tx.init)(params)
    _, state = jax.vmap(lambda p, s: tx.update(p, s, p, value=1.0))(params, state)
    norms = lo.metrics(state)["grad_norm/a"]
    np.testing.assert_allclose(norms, np.linalg.norm(params["a"], axis=1), rtol=1e-6)


def test_groups_lead_the_names_and_hold_their_own_leaves_only():
    params = {"a": jnp.ones(2), "b": {"c": jnp.ones(3)}}
    tx = optax.partition(
        {
            "x": lo.lalerg(local=True),
            "y": lo.error_regulate(optax.sgd(0.1), local=True),
        },
        {"a": "x", "b": {"c": "y"}},
    )
    _, state = tx.update(params, tx.init(params), params, value=1.0)
    report = lo.metrics(state)
    found = {name for name in report if "update_ratio" in name}
    assert found == {"x/update_ratio/a", "y/update_ratio/b/c"}
    np.testing.assert_allclose(report["y/update_ratio/b/c"], 0.1, rtol=1e-6)


def test_masked_leaves_are_left_out():
    params = {"a": jnp.ones(2), "b": jnp.ones(3)}
    tx = optax.masked(lo.lalerg(local=True), {"a": True, "b": False})
    report = lo.metrics(tx.init(params))
    assert "update_ratio/a" in report
    assert "update_ratio/b" not in report


@pytest.mark.parametrize(
    "wrap",
    [
        lambda tx: optax.MultiSteps(tx, 1),
        lambda tx: optax.chain(optax.clip(1.0), tx),
        lambda tx: optax.inject_hyperparams(lambda clip_norm: tx)(clip_norm=1.0),
        optax.apply_if_finite,
    ],
    ids=["MultiSteps", "chain", "inject_hyperparams", "apply_if_finite"],
)
def test_wrapped_it_tells_the_same(wrap, request):
    args = (5,) if "apply_if_finite" in request.node.name else ()
    tx = wrap(lo.error_regulate(optax.sgd(0.1), local=True), *args)
    params = {"a": jnp.ones(2)}
    _, state = jax.jit(tx.update)(params, tx.init(params), params, value=1.0)
    report = lo.metrics(state)
    np.testing.assert_allclose(report["update_ratio/a"], 0.1, rtol=1e-6)
    np.testing.assert_allclose(report["predicted_decrease/a"], 0.2, rtol=1e-6)


def test_nnx_leaves_are_named_as_in_the_model():
    model = nnx.Sequential(nnx.Linear(3, 2, rngs=nnx.Rngs(0)))
    optimizer = nnx.Optimizer(model, lo.lalerg(1e-3, local=True), wrt=nnx.Param)
    grads = nnx.grad(lambda m: jnp.sum(m(jnp.ones((1, 3)))))(model)
    optimizer.update(model, grads, value=jnp.asarray(2.5))
    report = lo.metrics(optimizer.opt_state)
    found = {name for name in report if name.startswith("update_ratio")}
    assert found == {"update_ratio/layers/0/bias", "update_ratio/layers/0/kernel"}
    assert report["update_ratio/layers/0/kernel"] > 0.0
    assert all(isinstance(x, jax.Array) for x in report.values())


def test_params_that_are_one_array_have_no_leaf_to_name():
    tx = lo.lalerg(local=True)
    report = lo.metrics(tx.init(jnp.ones(3)))
    assert {"update_ratio", "effective_rate"} <= set(report)
    assert not any(name.endswith("/") for name in report)


# ---- kept, and taken over -----------------------------------------------------------


def test_flax_bytes_keep_the_view():
    tx = OPTIMIZERS["lalerg"](True)
    params = init_params()
    _, state, _ = run_digits(tx)
    restored = serialization.from_bytes(tx.init(params), serialization.to_bytes(state))
    chex.assert_trees_all_equal(restored, state)


@pytest.mark.parametrize(
    ("before", "after"),
    [(False, True), pytest.param(True, False, marks=pytest.mark.slow)],
)
def test_the_view_can_be_switched_in_mid_run(before, after):
    old, new = (OPTIMIZERS["lalerg"](local) for local in (before, after))
    params, state, _ = run_digits(old)
    taken = lo.adopt(new, params, state)
    assert (taken.local is not None) == after
    chex.assert_trees_all_equal(
        taken._replace(local=None, scalars=None),
        state._replace(local=None, scalars=None),
    )
    new.update(params, taken, params, value=1.0)


def test_a_state_without_the_view_is_refused_where_it_is_asked_for():
    params = jnp.ones(2)
    state = lo.lalerg().init(params)
    with pytest.raises(ValueError, match=r"there is no leaf .local.leaf_grad_norm"):
        lo.lalerg(local=True).update(params, state, params, value=1.0)


def test_map_params_does_not_take_the_view_for_params():
    tx, params = lo.lalerg(local=True), {"w": jnp.ones((3, 2)), "b": jnp.ones(2)}
    state = optax.tree.map_params(
        tx, lambda _: "param", tx.init(params), transform_non_params=lambda _: "other"
    )
    assert set(state.local) == {"other"}


def test_the_flat_form_has_no_gradient_to_look_at():
    with pytest.raises(ValueError, match="local needs the gradient"):
        lo.error_regulate(local=True)
