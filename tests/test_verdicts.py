"""What is accepted, skipped and reverted."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lalerg_optax as lo
from lalerg_optax import Verdict

ACCEPT, SKIP, REVERT = Verdict.ACCEPT, Verdict.SKIP, Verdict.REVERT


def drive(tx, params, losses, grads):
    """Feeds losses and gradients; returns params, state and metrics of all steps."""

    def step(carry, inputs):
        params, state = carry
        loss, grad = inputs
        updates, state = tx.update(grad, state, params, value=loss)
        params = lo.apply_updates(params, updates, state)
        return (params, state), (lo.metrics(state), params, state)

    (params, state), (report, all_params, states) = jax.jit(
        lambda p, s: jax.lax.scan(step, (p, s), (losses, grads))
    )(params, tx.init(params))
    return params, state, report, all_params, states


def noisy(rng, num_steps, level=1.0, noise=0.05):
    """Returns losses of a stationary run and gradients of about equal norm.

    They have a slope in common, or the first steps would seem to lead uphill.
    """
    losses = level * (1.0 + noise * rng.standard_normal(num_steps))
    grads = 1.0 + 0.5 * rng.standard_normal((num_steps, 8))
    return losses.astype(np.float32), grads.astype(np.float32)


def make(num_steps=300, seed=0, **kwargs):
    losses, grads = noisy(np.random.default_rng(seed), num_steps, **kwargs)
    return jnp.ones(8), losses, grads


def test_single_outlier_loss_is_skipped_and_changes_nothing():
    params, losses, grads = make()
    losses[200] = 3.0
    _, _, report, all_params, states = drive(lo.lalerg(1e-3), params, losses, grads)
    verdicts = report["verdict"]
    assert verdicts[200] == SKIP
    assert jnp.sum(verdicts != ACCEPT) == 1
    assert report["num_skipped"][-1] == 1
    assert report["scaled_error"][200] > 1.0
    at = lambda tree, t: jax.tree.map(lambda x: x[t], tree)  # noqa: E731
    chex.assert_trees_all_equal(at(all_params, 200), at(all_params, 199))
    # our own links keep their state bit for bit: only their counters of it move
    micro, _, macro, _ = states.inner_state
    for t in (199, 200):
        assert micro.num_micro_held[t] == macro.num_macro_held[t] == t - 199
    micro = micro._replace(num_micro_held=jnp.zeros(len(losses)))
    chex.assert_trees_all_equal(at(micro, 199), at(micro, 200))
    chex.assert_trees_all_equal(
        at(macro.scalars.floats, 199), at(macro.scalars.floats, 200)
    )
    for name in ("window_count", "num_windows"):
        assert getattr(macro, name)[199] == getattr(macro, name)[200]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("factor", "signal"), [(4.0, "loss"), (1e3, "norm")])
def test_a_burst_of_outliers_does_not_blind_the_judge(seed, factor, signal):
    params, losses, grads = make(400, seed)
    hit = np.zeros(400, bool)
    for first in range(200, 260, 12):  # a third of the steps, too few in a row to be
        hit[first : first + 4] = True  # a new level
    hit[300:] = np.random.default_rng(seed).random(100) < 0.08
    if signal == "loss":
        losses[hit] *= factor
    else:
        grads[hit] *= factor
    *_, report, _, _ = drive(lo.error_regulate(optax.sgd(1e-4)), params, losses, grads)
    assert jnp.all(report["verdict"][hit] != ACCEPT)
    assert jnp.all(report[f"scaled_{'norm_' * (signal == 'norm')}error"][hit] > 1.0)


def test_a_loss_that_cannot_be_judged_yet_is_not_recorded_where_the_norm_objects():
    params, losses, grads = make(100)
    losses[[2, 9]] = 1e4
    grads[[2, 9]] *= 1e4
    losses[60] = 5.0
    *_, report, _, states = drive(
        lo.error_regulate(optax.sgd(1e-4)), params, losses, grads
    )
    assert jnp.flatnonzero(report["verdict"]).tolist() == [2, 9, 60]
    assert states.judge_state.history.num_values[20].tolist() == [19, 21]
    assert states.judge_state.history.values[-1, 0].max() < 2.0


@pytest.mark.parametrize("level", [3.0, 10.0, 100.0])
def test_harder_batches_that_come_to_stay_are_accepted_in_time(level):
    params, losses, grads = make(4000)
    harder = np.arange(4000) % 8 == 0
    harder[:200] = False
    losses[harder] *= level
    *_, report, _, _ = drive(lo.error_regulate(optax.sgd(1e-4)), params, losses, grads)
    verdicts = report["verdict"]
    assert jnp.all(verdicts[200:260][harder[200:260]] == SKIP), "not at once"
    assert jnp.all(verdicts[-1000:] == ACCEPT)


def test_single_outlier_gradient_norm_is_skipped_though_the_loss_is_fine():
    params, losses, grads = make()
    grads[200] *= 100.0
    *_, report, all_params, _ = drive(lo.lalerg(1e-3), params, losses, grads)
    assert report["verdict"][200] == SKIP
    assert report["scaled_error"][200] < 1.0 < report["scaled_norm_error"][200]
    assert jnp.sum(report["verdict"] != ACCEPT) == 1
    chex.assert_trees_all_equal(all_params[200], all_params[199])


def test_gradient_norm_is_judged_before_clipping():
    params, losses, grads = make()
    grads[200] *= 100.0
    tx = lo.error_regulate(optax.sgd(0.1), clip_norm=0.5)
    *_, report, all_params, _ = drive(tx, params, losses, grads)
    assert report["verdict"][200] == SKIP
    assert report["grad_norm"][200] > 50.0
    moved = jnp.linalg.norm(jnp.diff(all_params, axis=0), axis=1)
    np.testing.assert_allclose(jnp.max(moved), 0.05, rtol=1e-3)  # 0.1 x clip_norm


def test_persistent_outlier_reverts_to_the_anchor_and_damps_and_recovers():
    params, losses, grads = make(num_steps=400)
    losses[200:203] = 5.0
    *_, report, all_params, states = drive(
        lo.error_regulate(optax.sgd(1e-2)), params, losses, grads
    )
    assert report["verdict"][199:205].tolist() == [
        ACCEPT,
        SKIP,
        REVERT,
        REVERT,
        ACCEPT,
        ACCEPT,
    ]
    chex.assert_trees_all_equal(all_params[201], states.anchor[199])
    assert not jnp.array_equal(all_params[199], all_params[201])
    damping = report["damping"]
    assert damping[200] == 1.0
    assert damping[201] == damping[202] == 0.5
    assert jnp.all(jnp.diff(damping[202:]) >= 0.0)
    assert damping[202 + 32] < 1.0
    assert damping[202 + 65] == 1.0


def test_outliers_after_a_revert_are_skipped_at_the_anchor():
    params, losses, grads = make()
    losses[200:210] = 5.0
    *_, report, all_params, states = drive(
        lo.error_regulate(optax.sgd(1e-2)), params, losses, grads
    )
    assert report["verdict"][203:210].tolist() == [SKIP] * 7
    assert report["verdict"][210] == ACCEPT
    for t in range(203, 210):
        chex.assert_trees_all_equal(all_params[t], states.anchor[199])


def test_slow_rise_that_undoes_the_progress_reverts_without_an_outlier():
    rng = np.random.default_rng(0)
    falling = 2.0 * np.exp(-np.arange(600) / 60) + 0.5
    rising = np.linspace(0.5, 2.0, 400)
    losses = np.concatenate([falling, rising])
    losses += 0.05 * rng.standard_normal(losses.size)
    grads = rng.standard_normal((losses.size, 8)).astype(np.float32)
    *_, report, all_params, states = drive(
        lo.error_regulate(optax.sgd(1e-2)),
        jnp.ones(8),
        losses.astype(np.float32),
        grads,
    )
    verdicts = report["verdict"]
    first = int(jnp.argmax(verdicts == REVERT))
    assert 600 < first < 1000
    assert losses[first] < 2.0, "before all the progress is lost"
    assert jnp.all(verdicts[:first] == ACCEPT), "there was no outlier"
    assert report["scaled_drift"][first] > 1.0
    # it goes back to where the loss was low, not to the step before
    age = int(report["anchor_age"][first - 1])
    assert losses[first - 1 - age] < 1.0
    chex.assert_trees_all_equal(all_params[first], states.anchor[first - 1])


def test_anchor_is_refreshed_while_healthy_and_not_while_in_doubt():
    params, losses, grads = make(num_steps=400)
    *_, report, _, _ = drive(lo.error_regulate(optax.sgd(1e-2)), params, losses, grads)
    ages = report["anchor_age"]
    assert jnp.max(ages[:40]) <= 5, "often in the beginning"
    assert jnp.max(ages) <= 40
    assert jnp.sum(jnp.diff(ages[300:]) < 0) >= 2


@pytest.mark.parametrize("level", [1.0, 1e-6, 1e6])
def test_verdicts_do_not_depend_on_the_scale_of_the_loss(level):
    params, losses, grads = make(num_steps=400)
    losses[200], losses[300:303] = 1.5, 9.0
    reference = drive(lo.error_regulate(optax.sgd(1e-2)), params, losses, grads)[2]
    report = drive(
        lo.error_regulate(optax.sgd(1e-2)),
        params,
        (losses * level).astype(np.float32),
        grads,
    )[2]
    assert reference["verdict"][200] == SKIP
    assert report["verdict"].tolist() == reference["verdict"].tolist()


@pytest.mark.parametrize("shift", [-1.0, -5.0, 100.0])
def test_verdicts_do_not_depend_on_the_offset_of_the_loss(shift):
    params, losses, grads = make(num_steps=400)
    losses[200], losses[300:303] = 1.5, 9.0
    reference = drive(lo.error_regulate(optax.sgd(1e-2)), params, losses, grads)[2]
    report = drive(
        lo.error_regulate(optax.sgd(1e-2)), params, losses + np.float32(shift), grads
    )[2]
    assert report["verdict"].tolist() == reference["verdict"].tolist()


@pytest.mark.parametrize(
    "loss", [np.zeros(500), np.full(500, 2.3), np.linspace(3, 1, 500)]
)
def test_smooth_losses_are_never_objected_to(loss):
    grads = np.random.default_rng(0).standard_normal((500, 8)).astype(np.float32)
    *_, report, _, _ = drive(
        lo.error_regulate(optax.sgd(1e-3)), jnp.ones(8), loss.astype(np.float32), grads
    )
    assert jnp.all(report["verdict"] == ACCEPT)


@pytest.mark.parametrize(
    "noise",
    [*(pytest.param(x, marks=pytest.mark.slow) for x in (0.01, 0.05)), 0.2],
)
def test_ten_thousand_steps_of_normal_noise_are_accepted(noise):
    params, losses, grads = make(num_steps=10_000, noise=noise, seed=1)
    *_, report, _, _ = drive(lo.error_regulate(optax.sgd(1e-5)), params, losses, grads)
    assert report["num_skipped"][-1] <= 1
    assert report["num_reverted"][-1] == 0


def test_zero_gradients_are_neither_errors_nor_a_reference():
    params, losses, grads = make(num_steps=400)
    grads[np.arange(400) % 50 != 0] = 0.0  # a gradient every 50 steps
    *_, report, _, _ = drive(lo.error_regulate(optax.sgd(1e-3)), params, losses, grads)
    assert jnp.all(report["verdict"] == ACCEPT)


def test_without_value_the_gradient_norm_decides():
    params, _, grads = make()
    grads[200] *= 100.0
    tx = lo.lalerg(1e-3)
    state = tx.init(params)
    update = jax.jit(lambda g, s, p: tx.update(g, s, p, value=None))
    verdicts = []
    for grad in grads:
        updates, state = update(grad, state, params)
        params = optax.apply_updates(params, updates)
        verdicts.append(int(state.verdict))
    assert verdicts[200] == SKIP
    assert sum(v != ACCEPT for v in verdicts) == 1


def test_flat_form_judges_the_loss_and_follows_a_schedule():
    params, losses, grads = make()
    losses[200] = 4.0
    schedule = optax.piecewise_constant_schedule(1e-4, {100: 30.0})
    tx = optax.chain(
        lo.scale_by_micro_rate(),
        lo.scale_by_macro_rate(),
        optax.scale_by_learning_rate(schedule),
        lo.error_regulate(),
    )
    *_, report, _, _ = drive(tx, params, losses, grads)
    assert report["verdict"][200] == SKIP
    assert jnp.sum(report["verdict"] != ACCEPT) == 1, "a leap of the rate is no error"


def test_failing_first_steps_revert_and_lower_the_rate():
    # the gradient of |p|^2 at a rate that overshoots from the first step on
    tx = lo.lalerg(10.0)
    params = jnp.array([0.3, -0.2, 0.1])
    state, start = tx.init(params), params
    reverts, rates = [], []
    for _ in range(60):
        loss, grad = jax.value_and_grad(lambda p: jnp.sum(p**2))(params)
        updates, state = tx.update(grad, state, params, value=loss)
        params = lo.apply_updates(params, updates, state)
        report = lo.metrics(state)
        if report["verdict"] == REVERT:
            reverts.append(params)
        rates.append(float(report["macro_rate"]))
    assert len(reverts) >= 2
    chex.assert_trees_all_equal(reverts[0], start)
    assert rates[-1] < 1.0 / 16.0
    assert jnp.sum(params**2) < jnp.sum(start**2)


def test_search_raises_a_rate_that_is_too_small_and_only_if_asked_to():
    def final_rate(search):
        tx = lo.lalerg(1e-6, search=search)
        params = jnp.array([3.0, -2.0, 1.0])
        state = tx.init(params)

        def step(carry, _):
            params, state = carry
            loss, grad = jax.value_and_grad(lambda p: jnp.sum(p**2))(params)
            updates, state = tx.update(grad, state, params, value=loss)
            return (optax.apply_updates(params, updates), state), loss

        (params, state), losses = jax.lax.scan(step, (params, state), length=300)
        return lo.metrics(state)["macro_rate"], losses[-1]

    rate, loss = final_rate(search=True)
    assert rate > 1e3
    assert loss < 0.1
    rate, loss = final_rate(search=False)
    assert rate == 1.0
    assert loss > 10.0


def bowl(tx, num_steps, spoil=lambda t, loss, grad: (loss, grad), size=20):
    """Trains on a noisy, narrow bowl; returns the metrics of every step."""
    curvature = jnp.logspace(-1.0, 0.5, size)

    def step(carry, t):
        params, state = carry
        noise = 0.1 * jax.random.normal(jax.random.key(t), (size,))
        loss, grad = jax.value_and_grad(
            lambda p: jnp.sum(curvature * (p - noise) ** 2)
        )(params)
        loss, grad = spoil(t, loss, grad)
        updates, state = tx.update(grad, state, params, value=loss)
        return (lo.apply_updates(params, updates, state), state), (
            lo.metrics(state) | {"loss": loss}
        )

    params = jnp.ones(size)
    carry = (params, tx.init(params))
    return jax.jit(lambda c: jax.lax.scan(step, c, jnp.arange(num_steps)))(carry)[1]


@pytest.mark.parametrize("search", [True, False])
def test_many_reverts_do_not_freeze_the_run(search):
    def spoil(t, loss, grad):  # two NaN batches in every 250
        return jnp.where((t % 250 > 247) & (t > 200), jnp.nan, loss), grad

    report = bowl(lo.lalerg(1e-3, search=search), 5000, spoil)
    assert report["num_reverted"][-1] >= 2 * 19
    if search:
        clean = bowl(lo.lalerg(1e-3), 5000)["macro_rate"][-1]
        assert report["macro_rate"][-1] > clean / 32
    else:
        assert report["macro_rate"][-1] == 1.0
    assert jnp.max(report["damping"][-100:]) == 1.0


@pytest.mark.parametrize("bad_steps", [(4,), (1, 2), (20, 21)])
def test_bad_batches_early_on_do_not_end_the_search(bad_steps):
    def spoil(t, loss, grad):
        is_bad = jnp.isin(t, jnp.array(bad_steps))
        return jnp.where(is_bad, jnp.nan, loss), grad

    clean = bowl(lo.lalerg(1e-6), 600)
    spoilt = bowl(lo.lalerg(1e-6), 600, spoil)
    assert clean["macro_rate"][-1] > 1e3
    assert spoilt["macro_rate"][-1] > clean["macro_rate"][-1] / 16


@pytest.mark.parametrize(
    "micro",
    [optax.scale_by_lion(), optax.trace(0.9), optax.scale_by_adam()],
    ids=["lion", "momentum", "adam"],
)
def test_any_second_level_trains_on_after_a_failed_start(micro):
    report = bowl(lo.lalerg(1e3, micro=micro), 1500)
    assert report["num_reverted"][-1] >= 2
    assert report["macro_rate"][-1] > 1e-9
    assert jnp.mean(report["loss"][-50:]) < 0.5 * report["loss"][0]


def test_params_that_do_not_move_mean_that_the_rate_is_too_small():
    report = bowl(lo.lalerg(1e-9), 400)  # below the resolution of params near 1
    assert report["macro_rate"][-1] > 1e3


def test_a_huge_first_loss_does_not_blind_the_judge():
    params, losses, grads = make(num_steps=400)
    losses[:3] = 1e6, 1e5, 1e3
    losses[300] = 3.0
    *_, report, _, _ = drive(lo.error_regulate(optax.sgd(1e-3)), params, losses, grads)
    assert report["verdict"][300] == SKIP


def test_losses_that_are_mostly_zero_are_no_errors():
    losses = np.zeros(600, np.float32)
    losses[::40] = 1.0
    grads = np.where(losses[:, None] > 0, np.ones((600, 8)), 0.0).astype(np.float32)
    losses[0] = 0.0
    *_, report, _, _ = drive(
        lo.error_regulate(optax.sgd(1e-3)), jnp.ones(8), losses, grads
    )
    assert jnp.all(report["verdict"] == ACCEPT)


def test_a_half_precision_gradient_does_not_overflow_the_moments():
    tx = lo.scale_by_micro_rate()
    state = tx.init(jnp.ones(3, jnp.float16))
    grads = jnp.array([1000.0, 1.0, 1.0], jnp.float16)
    updates, state = tx.update(grads, state)
    assert updates.dtype == jnp.float16
    assert state.nu.dtype == jnp.float32
    np.testing.assert_allclose(updates, 1.0, rtol=1e-2)


@pytest.mark.parametrize(
    "micro", [optax.scale_by_lion(), optax.trace(0.9), optax.scale_by_adam(), None]
)
def test_a_failed_start_leaves_nothing_in_the_moments(micro):
    tx = lo.lalerg(1e3, micro=micro)
    params = jnp.array([0.3, -0.2, 0.1])
    state = tx.init(params)
    update = jax.jit(lambda g, s, p, v: tx.update(g, s, p, value=v))
    had_moments = False
    for _ in range(10):
        loss, grad = jax.value_and_grad(lambda p: jnp.sum(p**2))(params)
        updates, state = update(grad, state, params, loss)
        params = lo.apply_updates(params, updates, state)
        moments = [x for x in jax.tree.leaves(state.inner_state[0]) if x.shape == (3,)]
        if state.verdict == REVERT:
            break
        had_moments = had_moments or any(jnp.any(x != 0.0) for x in moments)
    assert state.verdict == REVERT
    assert had_moments
    chex.assert_trees_all_equal(moments, [jnp.zeros(3)] * len(moments))
