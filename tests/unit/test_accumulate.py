"""Micro-batches: their means make one step, and what is not finite is dropped alone."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx, serialization
from helpers.buffers import shared_buffers
from helpers.drive import drive, plainly
from helpers.judged import BAD
from helpers.spies import keeps, spy
from helpers.trees import TREES, like, types

import lalerg_optax as lo
from lalerg_optax import Verdict
from lalerg_optax.flax import TrainState

REGULATED = lo.error_regulate(optax.adam(1e-2))


def make_signals(num_steps, num_bad=0, seed=0, size=3):
    """Returns losses and gradients, some of them not finite in one or the other."""
    rng = np.random.default_rng(seed)
    losses = 1.0 + 0.05 * rng.standard_normal(num_steps)
    grads = 1.0 + 0.5 * rng.standard_normal((num_steps, size))
    for i, t in enumerate(rng.permutation(num_steps)[:num_bad]):
        signal = (losses, grads[:, i % size])[i % 2]
        signal[t] = BAD[i % len(BAD)]
    return losses.astype(np.float32), grads.astype(np.float32)


def plain(tx):
    """Returns MultiSteps as a transformation."""
    return optax.GradientTransformationExtraArgs(tx.init, tx.update)


# ---- Means ---------------------------------------------------------------------------


def sizes(num_groups):
    return 1 + num_groups % 3


def steps_of(losses, grads, every_k, is_last):
    """Returns at which micro-batches a step is taken, and its means, in plain loops."""
    steps, group, num_seen, num_groups = {}, [], 0, 0
    for t, (loss, grad) in enumerate(zip(losses, grads, strict=True)):
        num_seen += 1
        if np.isfinite(loss) and np.isfinite(grad).all():
            group.append((loss, grad))
        k = every_k(num_groups) if callable(every_k) else every_k
        if num_seen >= k or is_last[t]:
            if group:
                steps[t] = tuple(
                    np.mean(np.array(x, float), 0) for x in zip(*group, strict=True)
                )
            group, num_seen, num_groups = [], 0, num_groups + 1
    return steps, num_groups


@pytest.mark.parametrize("every_k", [1, 4, sizes], ids=["one", "four", "a schedule"])
@pytest.mark.parametrize("num_lasts", [0, 9])
def test_a_step_sees_the_means_of_what_is_finite(every_k, num_lasts):
    losses, grads = make_signals(80, num_bad=30)
    is_last = np.zeros(80, bool)
    is_last[np.random.default_rng(1).permutation(80)[:num_lasts]] = True
    steps, num_groups = steps_of(losses, grads, every_k, is_last)
    if every_k != 4 or num_lasts:
        assert 5 < len(steps) < num_groups, "some groups are dropped as a whole"
    tx = lo.accumulate(keeps("value"), every_k)
    signals = losses, grads, {"is_last": is_last}
    _, state, seen = drive(tx, jnp.zeros(3), signals, apply_updates=plainly)
    expected = np.zeros((80, 3))
    for t, (loss, grad) in steps.items():
        expected[t] = grad
        np.testing.assert_allclose(seen.state.inner_state["value"][t], loss, 1e-6)
    np.testing.assert_allclose(seen.updates, expected, rtol=1e-6)
    assert not np.any(np.asarray(seen.updates)[np.all(expected == 0.0, axis=1)])
    assert state.num_groups == num_groups
    assert state.num_dropped == 30


def loss_fn(w, x, y):
    return jnp.mean(jnp.square(x @ w - y))


TASK = (
    jnp.asarray(np.random.default_rng(0).standard_normal((60, 32, 3)), jnp.float32),
    jnp.asarray(np.random.default_rng(1).standard_normal((60, 32)), jnp.float32),
)
OPTIMIZERS = {
    "adamw": optax.adamw(0.05),
    "error_regulate": lo.error_regulate(optax.adamw(0.05)),
    "lalerg": lo.lalerg(0.05, search=False),
    "the flat form": optax.chain(
        lo.scale_by_micro_rate(), optax.scale(-0.05), lo.error_regulate()
    ),
    "chained": optax.chain(
        optax.clip_by_global_norm(1.0), lo.error_regulate(optax.sgd(0.1))
    ),
}


def train(tx, num_micro_batches):
    """Trains on the same data in batches, or in so many pieces of each."""

    def step(carry, batch):
        w, state = carry
        loss, grads = jax.value_and_grad(loss_fn)(w, *batch)
        updates, state = tx.update(grads, state, w, value=loss)
        w = optax.apply_updates(w, updates)
        return (w, state), w

    x = TASK[0].reshape(60 * num_micro_batches, -1, 3)
    data = x, TASK[1].reshape(60 * num_micro_batches, -1)
    tx = optax.with_extra_args_support(tx)
    run = jax.jit(functools.partial(jax.lax.scan, step))
    (_, state), params = run((jnp.zeros(3), tx.init(jnp.zeros(3))), data)
    return params, state


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_micro_batches_take_the_steps_of_whole_batches(name):
    tx = OPTIMIZERS[name]
    expected, whole = train(tx, 1)
    params, state = train(lo.accumulate(tx, 4), 4)
    np.testing.assert_allclose(params[3::4], expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(params[2::4][1:], params[3::4][:-1])
    chex.assert_trees_all_close(state.inner_state, whole, rtol=1e-4, atol=1e-5)


def test_the_means_of_bfloat16_are_kept_in_float32():
    grads = np.zeros((400, 2))
    grads[0], grads[1:] = 1.0, 2.0**-6  # lost in sums beside 400 * 2^-6
    tx = lo.accumulate(optax.identity(), 400)
    signals = np.zeros(400), jnp.asarray(grads, jnp.bfloat16)
    params = jnp.zeros(2, jnp.bfloat16)
    _, state, seen = drive(tx, params, signals, apply_updates=plainly)
    assert state.mean_grads.dtype == jnp.float32
    assert seen.updates.dtype == jnp.bfloat16
    expected = jnp.asarray(grads.mean(axis=0), jnp.bfloat16)
    np.testing.assert_array_equal(seen.updates[-1], expected)


@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("tx", [optax.sgd(0.1), lo.lalerg()], ids=["sgd", "lalerg"])
def test_state_and_updates_keep_their_types(tree, tx):
    tx, params = lo.accumulate(tx, 2), TREES[tree]
    state = tx.init(params)
    assert not shared_buffers(state)
    for _ in range(2):
        updates, new_state = tx.update(like(params, 0.5), state, params, value=1.0)
        assert types(updates) == types(params)
        assert types(new_state) == types(state)
        state = new_state


def test_an_optimizer_that_would_change_its_types_is_kept_to_them():
    tx, params = lo.accumulate(optax.adam(0.1), 2), jnp.ones(2, jnp.bfloat16)
    grads = jnp.ones(2, jnp.float32)  # Adam's moments would become float32
    state, update = tx.init(params), jax.jit(tx.update)
    for _ in range(2):
        updates, new_state = update(grads, state, params, value=1.0)
        assert types(new_state) == types(state)
        state = new_state
    assert updates.dtype == jnp.bfloat16


# ---- Silent steps --------------------------------------------------------------------


def counted(calls):
    """Returns a transformation that counts how often it runs."""

    def update(updates, state, params=None):
        del params
        jax.debug.callback(lambda: calls.append(1))
        return updates, state + 1

    return optax.GradientTransformation(lambda _: jnp.zeros((), jnp.int32), update)


@pytest.mark.parametrize("is_jitted", [True, False], ids=["jit", "eager"])
def test_the_optimizer_runs_once_a_group(is_jitted):
    calls = []
    tx, params = lo.accumulate(counted(calls), 3), jnp.ones(2)
    update = jax.jit(tx.update) if is_jitted else tx.update
    state = tx.init(params)
    for t in range(7):
        updates, state = update(params, state, params, value=1.0)
        jax.effects_barrier()
        assert len(calls) == state.inner_state == (t + 1) // 3
        assert bool(jnp.any(updates != 0.0)) == (t % 3 == 2)


def test_a_silent_step_changes_nothing_inside():
    losses, grads = make_signals(21)
    tx = lo.accumulate(lo.lalerg(), 5)
    _, _, seen = drive(tx, jnp.ones(3), (losses, grads))
    inner = seen.state.inner_state
    for t in range(1, 21):
        if t % 5 != 4:
            now, before = (jax.tree.map(lambda x, i=i: x[i], inner) for i in (t, t - 1))
            chex.assert_trees_all_equal(now, before)


def test_other_arguments_are_those_of_the_last_micro_batch():
    tx = lo.accumulate(keeps("value", "temperature"), 2)
    signals = np.ones(4), np.ones((4, 3)), {"temperature": np.arange(4.0)}
    _, _, seen = drive(tx, jnp.zeros(3), signals, apply_updates=plainly)
    assert seen.state.inner_state["temperature"].tolist() == [0.0, 1.0, 1.0, 3.0]


def test_a_line_search_gets_the_mean_gradient():
    seen, params = [], jnp.zeros(3)
    tx = lo.accumulate(spy(seen), 2)
    state = tx.init(params)
    for x in (1.0, 2.0):
        grad = jnp.full(3, x)
        _, state = tx.update(grad, state, params, value=x, grad=grad)
    (told,) = seen
    assert told["grad"].tolist() == [1.5] * 3
    assert told["value"] == 1.5
    assert "is_last" not in told


# ---- What is not finite --------------------------------------------------------------

SPOILT = {
    "a NaN loss": (jnp.nan, 1.0),
    "an infinite loss": (-jnp.inf, 1.0),
    "a NaN gradient": (1.0, jnp.nan),
    "an infinite gradient": (1.0, jnp.inf),
    "an infinite square": (1.0, 1e20),
}


@pytest.mark.parametrize("kind", SPOILT)
@pytest.mark.parametrize("place", [0, 1, 3])
def test_a_micro_batch_that_is_not_finite_is_dropped_alone(kind, place):
    losses, grads = make_signals(40)
    spoilt = losses.copy(), grads.copy()
    spoilt[0][20 + place], spoilt[1][20 + place, 1] = SPOILT[kind]
    tx = lo.accumulate(REGULATED, 4)
    _, state, seen = drive(tx, jnp.ones(3), spoilt)
    report = lo.metrics(state)
    assert (report["num_dropped"], report["num_accepted"]) == (1, 10)
    others = [20 + i for i in range(4) if i != place]
    np.testing.assert_allclose(seen.state.mean_value[23], losses[others].mean(), 1e-6)
    mean = grads[others].mean(axis=0)
    norms = lo.metrics(seen.state)["grad_norm"]
    np.testing.assert_allclose(norms[23], np.linalg.norm(mean), rtol=1e-6)
    assert np.isfinite(seen.params).all()


@pytest.mark.parametrize("has_value", [True, False])
def test_a_group_without_anything_finite_is_one_skipped_step(has_value):
    losses, grads = make_signals(60)
    grads[20:24] = np.nan
    values = losses if has_value else None
    tx = lo.accumulate(REGULATED, 4)
    _, state, seen = drive(tx, jnp.ones(3), (values, grads))
    report = lo.metrics(state)
    assert (report["num_skipped"], report["num_accepted"]) == (1, 14)
    assert report["num_dropped"] == 4
    verdicts = np.asarray(lo.metrics(seen.state)["verdict"])
    assert set(np.flatnonzero(verdicts).tolist()) == {23, 24, 25, 26}  # held
    assert np.isfinite(seen.params).all()


def test_moments_of_the_flat_form_are_not_spoilt_by_such_a_group():
    losses, grads = make_signals(60)
    grads[20:24] = np.nan
    tx = lo.accumulate(optax.chain(optax.adam(1e-2), lo.error_regulate()), 4)
    _, state, _ = drive(tx, jnp.ones(3), (losses, grads))
    report = lo.metrics(state)
    assert (report["num_skipped"], report["num_accepted"]) == (1, 14)
    assert jnp.isfinite(optax.tree.get(state, "mu")).all()


def test_without_a_regulator_such_a_group_takes_no_step():
    losses, grads = make_signals(16)
    grads[4:8] = np.nan
    tx = lo.accumulate(optax.adam(1e-2), 4)
    params, state, seen = drive(tx, jnp.ones(3), (losses, grads))
    assert optax.tree.get(state, "count") == 3
    assert state.num_groups == 4
    np.testing.assert_array_equal(seen.params[7], seen.params[3])
    assert jnp.any(params != seen.params[7])


@pytest.mark.parametrize("k", [1, 4])
@pytest.mark.parametrize(
    ("damage", "apply_updates"),
    [
        (np.nan, lo.apply_updates),  # which no addition can heal
        (1e30, lo.apply_updates),
        (1e12, lo.apply_updates),
        (1e30, plainly),
        (1e12, plainly),
    ],
)
def test_damaged_params_go_back_to_the_anchor(k, damage, apply_updates):
    tx = lo.accumulate(REGULATED, k)
    losses, grads = make_signals(40 * k)
    params, state, _ = drive(tx, jnp.ones(3), (losses, grads))
    anchor = state.inner_state.anchor
    params = params.at[1].set(damage)
    verdicts = []
    for _ in range(4 * k):
        is_spoilt = ~(jnp.max(jnp.abs(params)) < 1e3)
        value = jnp.where(is_spoilt, jnp.inf, 1.0)
        updates, state = tx.update(jnp.ones(3), state, params, value=value)
        params = apply_updates(params, updates, state)
        verdicts.append(int(state.inner_state.verdict))
    if damage == 1e12 or apply_updates is plainly:  # else it heals at once
        assert verdicts[k - 1 :: k][:2] == [Verdict.SKIP, Verdict.REVERT]
    assert verdicts[-1] == Verdict.ACCEPT
    assert jnp.max(jnp.abs(params - anchor)) < 0.1
    assert jnp.max(jnp.abs(lo.healthy_params(params, state) - anchor)) < 0.1


def test_a_held_revert_is_applied_once():
    tx = lo.accumulate(REGULATED, 3)
    params, state, _ = drive(tx, jnp.ones(3), make_signals(60))
    for t in range(9):
        updates, state = tx.update(jnp.ones(3), state, params, value=jnp.nan)
        params = lo.apply_updates(params, updates, state)
        if t >= 5:
            assert state.inner_state.verdict == Verdict.REVERT
            np.testing.assert_array_equal(params, state.inner_state.anchor)
    for _ in range(2):  # of the next group: the verdict is held
        updates, state = tx.update(jnp.ones(3), state, params, value=1.0)
        assert state.inner_state.verdict == Verdict.REVERT
        assert not jnp.any(updates)
        params = lo.apply_updates(params, updates, state)
    np.testing.assert_array_equal(params, state.inner_state.anchor)


# ---- Ways to run ---------------------------------------------------------------------


@pytest.mark.parametrize("stop", [21, 23])
def test_a_run_resumes_inside_of_a_group(stop):
    losses, grads = make_signals(40, num_bad=5)
    tx = lo.accumulate(REGULATED, 4)
    params, state, _ = drive(tx, jnp.ones(3), (losses, grads))
    half, saved, _ = drive(tx, jnp.ones(3), (losses[:stop], grads[:stop]))
    saved = serialization.to_bytes(saved)
    saved = serialization.from_bytes(tx.init(jnp.ones(3)), saved)
    rest = losses[stop:], grads[stop:]
    resumed, end, _ = drive(tx, half, rest, jax.tree.map(jnp.asarray, saved))
    np.testing.assert_array_equal(resumed, params)
    chex.assert_trees_all_equal(end, state)


def test_under_vmap_each_run_drops_and_steps_for_itself():
    tx = lo.accumulate(lo.lalerg(search=False), sizes)
    runs = [make_signals(40, num_bad=8 * seed, seed=seed) for seed in range(3)]

    def run(losses, grads):
        params, state, _ = drive(tx, jnp.ones(3), (losses, grads))
        return params, lo.metrics(state)

    stacked = jax.vmap(run)(*map(np.stack, zip(*runs, strict=True)))
    for i, signals in enumerate(runs):
        one = jax.tree.map(lambda x, i=i: x[i], stacked)
        chex.assert_trees_all_close(one, run(*signals), rtol=1e-5)
    assert stacked[1]["num_dropped"].tolist() == [0, 8, 16]


def test_outside_of_jit_it_is_the_same():
    losses, grads = make_signals(14, num_bad=3)
    tx = lo.accumulate(REGULATED, 3)
    expected, end, _ = drive(tx, jnp.ones(3), (losses, grads))
    params, state = jnp.ones(3), tx.init(jnp.ones(3))
    for loss, grad in zip(losses, grads, strict=True):
        updates, state = tx.update(jnp.asarray(grad), state, params, value=loss)
        params = lo.apply_updates(params, updates, state)
    chex.assert_trees_all_close((params, state), (expected, end), rtol=1e-5)


def test_a_last_group_may_be_incomplete():
    losses, grads = make_signals(10)
    tx = lo.accumulate(keeps("value"), 4)
    is_last = np.arange(10) == 9
    signals = losses, grads, {"is_last": is_last}
    _, state, seen = drive(tx, jnp.zeros(3), signals, apply_updates=plainly)
    np.testing.assert_allclose(seen.updates[9], grads[8:].mean(axis=0), rtol=1e-6)
    assert (state.num_groups, state.micro_step) == (3, 0)


def test_flax_passes_everything_on():
    model = nnx.Linear(3, 1, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, lo.accumulate(lo.lalerg(), 4), wrt=nnx.Param)
    grads = nnx.grad(lambda m: jnp.sum(m(jnp.ones((1, 3)))))(model)
    optimizer.update(model, grads, value=1.0)
    optimizer.update(model, grads, value=4.0, is_last=True)
    optimizer.update(model, grads, value=jnp.nan)
    report = lo.metrics(optimizer.opt_state)
    assert (report["num_accepted"], report["avg_value"]) == (1, 2.5)
    assert (report["micro_step"], report["num_dropped"]) == (1, 1)
    assert not report["has_updated"]

    state = TrainState.create(
        apply_fn=None, params=jnp.ones(2), tx=lo.accumulate(lo.lalerg(), 4)
    )
    state = state.apply_gradients(grads=jnp.ones(2), value=1.0)
    last = {"is_last": True}
    state = state.apply_gradients(grads=jnp.ones(2), value=4.0, extra_args=last)
    report = lo.metrics(state.opt_state)
    assert (report["num_accepted"], report["avg_value"]) == (1, 2.5)
    assert report["has_updated"]


def test_adapters_may_be_outside_or_inside():
    params, grads = jnp.array([1.0, -2.0]), jnp.array([2.0, -4.0])
    carrier, carried = lo.Carrier(params), lo.Carrier(grads, slot=jnp.float32(5.0))
    tx = lo.value_from_gradient(lo.accumulate(REGULATED, 2))
    inside = lo.accumulate(lo.value_from_gradient(REGULATED), 2)
    for each in (tx, inside):
        state = each.init(carrier)
        for slot in (4.0, 6.0):
            grads = carried._replace(slot=jnp.float32(slot))
            _, state = each.update(grads, state, carrier)
        assert lo.metrics(state)["avg_value"] == 5.0
    tx = lo.tracks_params(lo.accumulate(lo.without_value(REGULATED), 2))
    state = tx.init(params)
    for _ in range(4):
        _, state = tx.update(params, state)
    assert lo.metrics(state)["num_accepted"] == 2


# ---- Misuse --------------------------------------------------------------------------


@pytest.mark.parametrize("every_k", [0, -1, 2.5, np.nan, "4", None])
def test_a_number_of_micro_batches_is_a_whole_number_from_one(every_k):
    with pytest.raises(ValueError, match="every_k"):
        lo.accumulate(optax.sgd(0.1), every_k)


def test_what_is_wrong_is_told_as_elsewhere():
    params = jnp.ones(2)
    with pytest.raises(TypeError, match="tx must be an Optax gradient transf"):
        lo.accumulate(3.0, 4)
    tx = lo.accumulate(REGULATED, 2)
    state, update = tx.init(params), jax.jit(tx.update)
    with pytest.raises(TypeError, match="update needs the keyword 'value'"):
        update(params, state, params)
    with pytest.raises(ValueError, match="value must be a scalar"):
        tx.update(params, state, params, value=params)
    with pytest.raises(ValueError, match="error_regulate needs the params"):
        update(params, state, value=1.0)
    with pytest.raises(ValueError, match="accumulate got gradients"):
        tx.update(jnp.ones(3), state, params, value=1.0)
    with pytest.raises(TypeError, match="a state of type AccumulateState"):
        tx.update(params, REGULATED.init(params), params, value=1.0)
    wrong = lo.error_regulate(lo.accumulate(optax.sgd(0.1), 2))
    with pytest.raises(ValueError, match="accumulate belongs outside"):
        wrong.update(params, wrong.init(params), params, value=1.0)


def test_an_optimizer_that_needs_no_loss_needs_none_here():
    tx, params = lo.accumulate(optax.sgd(0.1), 2), jnp.ones(2)
    state = tx.init(params)
    for x in (1.0, 3.0):
        updates, state = tx.update(jnp.full(2, x), state)
    assert [round(float(u), 6) for u in updates] == [-0.2, -0.2]


# ---- What is told --------------------------------------------------------------------


@pytest.mark.parametrize("every_k", [2, 4])
def test_a_recorder_counts_steps_and_not_micro_batches(every_k):
    """Ten groups are dropped: within the limit, though each verdict is held k times."""
    losses, grads = make_signals(100 * every_k)
    for group in range(20, 100, 8):
        losses[every_k * group : every_k * (group + 1)] = np.nan
    recorder = lo.Recorder()
    tx = lo.accumulate(REGULATED, every_k)
    _, _, report = drive(
        tx, jnp.ones(3), (losses, grads), see=lambda step: lo.metrics(step.state)
    )
    assert np.sum(report["verdict"] == Verdict.SKIP) == 10 * every_k
    recorder.extend(report)
    recorder.flush()  # warnings are errors


# ---- MultiSteps, as docs/accumulate.md has it ----------------------------------------


def train_with_multi_steps(losses, grads, **settings):
    """Trains with the mean loss of the micro-batches that were not dropped."""
    tx = plain(optax.MultiSteps(REGULATED, 4, **settings))

    def step(carry, signal):
        params, state, mean = carry
        loss, grad = signal
        before = jnp.where(state.mini_step == 0, 0.0, mean)
        value = before + (loss - before) / (state.mini_step + 1)
        updates, new_state = tx.update(grad, state, params, value=value)
        is_skipped = new_state.skip_state["should_skip"] if settings else False
        mean = jnp.where(is_skipped, mean, value)
        params = lo.apply_updates(params, updates, new_state)
        return (params, new_state, mean), lo.metrics(new_state)

    start = jnp.ones(3), tx.init(jnp.ones(3)), jnp.zeros(())
    return jax.lax.scan(step, start, (losses, grads))


def test_multi_steps_with_its_defaults_skips_for_ever_after_one_nan():
    losses, grads = make_signals(80)
    grads[21] = np.nan
    (_, state, _), report = train_with_multi_steps(losses, grads)
    assert report["num_accepted"][-1] == 5, "all before it, and none after"
    assert jnp.isnan(state.acc_grads).all()


def test_multi_steps_that_skip_what_is_not_finite_lose_one_micro_batch():
    losses, grads = make_signals(81)
    grads[21], losses[21] = np.nan, np.nan
    settings = {"should_skip_update_fn": optax.skip_not_finite}
    (_, _, _), report = train_with_multi_steps(losses, grads, **settings)
    assert report["num_accepted"][-1] == 20
    kept = np.delete(losses, 21).reshape(20, 4).mean(axis=1)
    is_step = np.asarray(report["has_updated"])
    assert np.flatnonzero(is_step).tolist()[4:7] == [19, 24, 28]
    assert is_step.sum() == 20
    averages = np.asarray(report["avg_value"])[is_step]
    assert averages[0] == pytest.approx(kept[0], rel=1e-6)
    assert averages[-1] == pytest.approx(1.0, abs=0.05)


def test_multi_steps_that_skip_never_undo_damage_of_which_nothing_is_finite():
    grads = np.full((80, 3), np.nan, np.float32)
    signals = np.ones(80, np.float32), grads
    settings = {"should_skip_update_fn": optax.skip_not_finite}
    (_, _, _), report = train_with_multi_steps(*signals, **settings)
    assert report["num_skipped"][-1] == report["num_revert_steps"][-1] == 0
    _, state, _ = drive(lo.accumulate(REGULATED, 4), jnp.ones(3), signals)
    assert lo.metrics(state)["num_revert_steps"] >= 2
