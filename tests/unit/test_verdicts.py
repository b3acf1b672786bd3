"""What is accepted, bounded, skipped and reverted."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.spies import spy

import lalerg_optax as lo
from lalerg_optax import Verdict

ACCEPT, SKIP, REVERT, BOUND = (
    Verdict.ACCEPT,
    Verdict.SKIP,
    Verdict.REVERT,
    Verdict.BOUND,
)


@functools.cache
def compiled(tx):
    """Returns a jitted run over losses and gradients, the same for the same tx."""

    def step(carry, inputs):
        params, state = carry
        loss, grad = inputs
        updates, state = tx.update(grad, state, params, value=loss)
        params = lo.apply_updates(params, updates, state)
        return (params, state), (lo.metrics(state), params, state)

    # The programs are small and many: most of the time would go into compiling them.
    options = {"xla_backend_optimization_level": 0}
    scan = functools.partial(jax.lax.scan, step)
    return jax.jit(scan, compiler_options=options)


def drive(tx, params, losses, grads):
    """Feeds losses and gradients; returns params, state and metrics of all steps."""
    carry = params, tx.init(params)
    (params, state), (report, all_params, states) = compiled(tx)(carry, (losses, grads))
    return params, state, report, all_params, states


def noisy(rng, num_steps, level=1.0, noise=0.05):
    """Returns losses of a stationary run and gradients of about equal norm.

    They have a slope in common, or the first steps would seem to lead uphill.
    """
    losses = level * (1.0 + noise * rng.standard_normal(num_steps))
    grads = 1.0 + 0.5 * rng.standard_normal((num_steps, 8))
    return losses.astype(np.float32), grads.astype(np.float32)


REGULATED = lo.error_regulate(optax.sgd(1e-2))
SLOW = lo.error_regulate(optax.sgd(1e-5))  # hardly moves


def judge(losses, grads, tx=None):
    """Returns params before the first and after every step, and what was told."""
    tx = tx or REGULATED
    start = jnp.ones(grads.shape[1])
    _, _, report, all_params, states = drive(tx, start, losses, grads)
    return np.concatenate([start[None], all_params]), report, states


def verdicts_of(losses, grads, tx=None):
    return np.asarray(judge(losses, grads, tx)[1]["verdict"])


def exceptions(verdicts):
    """Returns all verdicts but ACCEPT, by step."""
    return {int(t): Verdict(verdicts[t]) for t in np.flatnonzero(verdicts)}


def make(num_steps=400, seed=0, **kwargs):
    losses, grads = noisy(np.random.default_rng(seed), num_steps, **kwargs)
    return jnp.ones(8), losses, grads


def lengths(all_params):
    """Returns how far params moved in each step."""
    return np.linalg.norm(np.diff(all_params, axis=0), axis=1)


# ---- hard batches -------------------------------------------------------------------


def test_a_hard_batch_is_accepted_bounded():
    _, losses, grads = make()
    losses[200] = 5.0
    grads[200] *= 1000.0
    all_params, report, _ = judge(losses, grads)
    assert exceptions(report["verdict"]) == {200: BOUND}
    assert report["scaled_error"][200] > 1.0
    assert report["num_bounded"][-1] == 1
    assert report["num_accepted"][-1] == 400
    # to 16 times the usual norm, in the direction that the batch has
    usual = np.median(np.linalg.norm(grads[72:200], axis=1))
    np.testing.assert_allclose(lengths(all_params)[200], 0.16 * usual, rtol=0.02)
    moved = all_params[201] - all_params[200]
    cosine = moved @ grads[200] / np.linalg.norm(moved) / np.linalg.norm(grads[200])
    np.testing.assert_allclose(cosine, -1.0, rtol=1e-5)


def test_a_hard_batch_whose_gradient_is_usual_is_taken_in_as_it_is():
    _, losses, grads = make()
    usual = lengths(judge(losses, grads)[0])
    losses[200] = 5.0
    all_params, report, _ = judge(losses, grads)
    assert exceptions(report["verdict"]) == {200: BOUND}
    np.testing.assert_allclose(lengths(all_params), usual, rtol=1e-3)


def test_inner_is_handed_verdicts_and_a_loss_that_is_always_usable():
    params, losses, grads = make(num_steps=60)
    seen = []
    tx = lo.error_regulate(optax.chain(spy(seen), optax.sgd(1e-2)))
    losses[40], losses[50] = 1e6, np.nan
    state = tx.init(params)
    for loss, grad in zip(losses, grads, strict=True):
        _, state = tx.update(grad, state, params, value=loss)
    values = np.array([float(now["value"]) for now in seen])
    assert np.all(np.isfinite(values))
    assert exceptions([int(now["verdict"]) for now in seen]) == {40: BOUND, 50: SKIP}
    assert not any(now["is_harmful"] for now in seen)
    before = np.sort(losses[:40])
    # with the 95th percentile there, 6 spreads would be 1.5 times as wide as they were
    wider = 1.5 * (before[38] - before[19])
    np.testing.assert_allclose(values[40] - before[19], wider, rtol=1e-4)
    assert 0.9 < values[50] < 1.1, "the average"
    is_usual = np.delete(np.arange(60), [40, 50])
    np.testing.assert_array_equal(values[is_usual], losses[is_usual])


def test_inner_is_told_of_harm_once_at_the_step_that_shows_it():
    params, losses, grads = make(num_steps=60)
    seen = []
    tx = lo.error_regulate(optax.chain(spy(seen), optax.sgd(1e-2)))
    losses[40:42] = 9.0
    state = tx.init(params)
    for loss, grad in zip(losses, grads, strict=True):
        _, state = tx.update(grad, state, params, value=loss)
    assert [t for t, now in enumerate(seen) if now["is_harmful"]] == [43]
    assert seen[43]["verdict"] == ACCEPT


def test_two_high_losses_go_back_and_the_anchor_tells_that_it_was_the_updates():
    _, losses, grads = make()
    losses[200:202] = 5.0
    all_params, report, states = judge(losses, grads)
    assert exceptions(report["verdict"]) == {200: BOUND, 201: REVERT, 202: REVERT}
    chex.assert_trees_all_equal(all_params[202], states.anchor[199])
    assert not np.array_equal(all_params[200], all_params[202])
    assert report["num_harmful"][202] == 0
    assert report["num_harmful"][203] == report["num_harmful"][-1] == 1
    assert report["num_trials"][-1] == 1


def test_two_high_losses_that_are_high_at_the_anchor_too_were_no_fault_of_the_updates():
    _, losses, grads = make()
    losses[200:206] = 5.0
    _, report, _ = judge(losses, grads)
    assert exceptions(report["verdict"]) == {
        **{200: BOUND, 201: REVERT, 202: REVERT},
        **{203: BOUND, 204: BOUND, 205: BOUND},
        **{206: REVERT, 207: REVERT},  # what was learnt of them may have been poison
    }
    assert report["num_trials"][-1] == 1
    assert report["num_harmful"][-1] == 0
    assert np.all(report["damping"] == 1.0)


def test_hard_data_of_a_kind_that_was_there_before_are_not_gone_back_for():
    _, losses, grads = make(num_steps=1000)
    for first in range(200, 1000, 100):
        losses[first : first + 6] = 5.0
    _, report, _ = judge(losses, grads)
    verdicts = np.asarray(report["verdict"])
    assert np.sum(verdicts[200:210] == REVERT) == 4
    for first in range(300, 1000, 100):
        assert verdicts[first : first + 6].tolist() == [BOUND] * 6
    assert np.all(verdicts[310:] != REVERT)
    assert np.all(verdicts != SKIP)


@pytest.mark.parametrize("share", [0.01, 0.03, 0.1])
@pytest.mark.parametrize("factor", [1.0, 30.0])
def test_a_rare_domain_of_hard_data_is_hardly_ever_rejected(share, factor):
    _, losses, grads = make(4000)
    hard = np.random.default_rng(1).random(4000) < share
    hard[:200] = False
    losses[hard] += 4.0
    grads[hard] *= factor  # with a gradient that is as odd
    verdicts = verdicts_of(losses, grads, SLOW)
    is_taken = (verdicts == ACCEPT) | (verdicts == BOUND)
    assert np.sum(hard) >= 30
    assert np.sum(~is_taken[hard]) <= 5
    assert np.sum(verdicts == SKIP) <= 5
    assert np.sum(verdicts == REVERT) <= 10


@pytest.mark.parametrize("level", [3.0, 10.0, 100.0])
def test_harder_batches_that_come_to_stay_are_never_skipped_and_soon_ordinary(level):
    _, losses, grads = make(4000)
    harder = np.arange(4000) % 8 == 0
    harder[:200] = False
    losses[harder] *= level
    verdicts = verdicts_of(losses, grads, SLOW)
    assert np.all(verdicts[200:260][harder[200:260]] == BOUND), "not at once"
    assert exceptions(verdicts).keys() <= set(np.flatnonzero(harder))
    assert np.all(verdicts != SKIP)
    assert np.all(verdicts[-1000:] == ACCEPT)


# ---- poison, and levels that are there to stay --------------------------------------


@pytest.mark.parametrize("num_steps", [5, 10, 25])
def test_a_burst_of_poison_is_undone(num_steps):
    _, losses, grads = make()
    end = 200 + num_steps
    losses[200:end] = 5.0
    grads[200:end] *= -50.0  # uphill
    all_params, report, states = judge(losses, grads)
    verdicts = report["verdict"]
    assert np.all(verdicts[203:end] == BOUND)
    assert verdicts[end : end + 2].tolist() == [REVERT, REVERT]
    chex.assert_trees_all_equal(all_params[end + 2], states.anchor[199])
    assert np.all(verdicts[end + 2 :] == ACCEPT)
    clean = judge(*make()[1:])[0]
    lost = np.linalg.norm(all_params[-1] - clean[-1])
    assert lost <= 0.01 * 50 * 5.0, "about as far as the steps since the anchor lead"


@pytest.mark.parametrize("factor", [3.0, 1e2, 1e6])
@pytest.mark.parametrize("patience", [4, 32])
def test_a_new_level_is_accepted_in_time(factor, patience):
    _, losses, grads = make(num_steps=500)
    losses[200:] *= factor
    tx = lo.error_regulate(optax.sgd(1e-2), patience=patience)
    _, report, states = judge(losses, grads, tx)
    verdicts = np.asarray(report["verdict"])
    # trial, patience, trial once more, and the level is accepted
    end = 203 + patience
    assert verdicts[200:203].tolist() == [BOUND, REVERT, REVERT]
    assert verdicts[203:end].tolist() == [BOUND] * patience
    assert verdicts[end : end + 2].tolist() == [REVERT, REVERT]
    assert np.all(verdicts[end + 2 :] == ACCEPT)
    assert report["num_harmful"][-1] == 0
    assert states.history.num_values[end + 2, 0] == 1, "windows start anew"
    np.testing.assert_allclose(
        np.median(states.history.values[-1, 0]), factor, rtol=0.05
    )


def test_steps_that_are_not_finite_make_no_new_level():
    _, losses, grads = make()
    losses[200:300] = np.nan
    _, report, states = judge(losses, grads)
    verdicts = report["verdict"]
    assert verdicts[200:203].tolist() == [SKIP, REVERT, REVERT]
    assert np.all(verdicts[203:300] == SKIP)
    assert np.all(verdicts[300:] == ACCEPT), "nothing was learnt, nothing to undo"
    assert report["num_harmful"][-1] == 0
    assert states.history.num_values[-1, 0] == 128


def test_steps_that_are_not_finite_are_gone_back_for_no_more_than_twice():
    _, losses, grads = make()
    losses[200:202], losses[204] = 5.0, 5.0
    losses[205:300] = np.nan
    verdicts = verdicts_of(losses, grads)
    # once at their start and once when they last
    assert np.sum(verdicts[205:300] == REVERT) == 4
    assert np.all(verdicts[302:] == ACCEPT), "and maybe once when they are over"


def test_two_steps_that_are_not_finite_go_back_however_hard_the_data_were():
    _, losses, grads = make(num_steps=600)
    losses[200:212] = 5.0
    losses[500:502] = np.nan
    _, report, _ = judge(losses, grads)
    assert report["verdict"][498:505].tolist() == [
        *(ACCEPT, ACCEPT, SKIP, REVERT, REVERT, ACCEPT, ACCEPT)
    ]
    assert report["num_harmful"][-1] == 1


# ---- evidence -----------------------------------------------------------------------


def test_many_slightly_high_losses_are_evidence_too():
    _, losses, grads = make()
    losses[200:300] = 1.0 + 0.7 * 6.0 * 0.05
    _, report, _ = judge(losses, grads)
    verdicts = report["verdict"]
    assert np.all(report["scaled_error"] < 1.0)
    assert np.all((verdicts == ACCEPT) | (verdicts == REVERT))
    first = int(np.argmax(verdicts == REVERT))
    assert 202 <= first <= 206


@pytest.mark.parametrize("gap", [7, 12])
def test_high_losses_that_are_apart_are_no_evidence(gap):
    _, losses, grads = make(num_steps=600)
    losses[200:400:gap] = 5.0
    verdicts = verdicts_of(losses, grads)
    assert np.all(verdicts != REVERT)
    assert np.all(verdicts != SKIP)
    assert verdicts[200] == verdicts[200 + gap] == BOUND


def test_slow_rise_that_undoes_the_progress_reverts_without_an_outlier():
    rng = np.random.default_rng(0)
    falling = 2.0 * np.exp(-np.arange(600) / 60) + 0.5
    rising = np.linspace(0.5, 2.0, 400)
    losses = np.concatenate([falling, rising])
    losses += 0.05 * rng.standard_normal(losses.size)
    grads = rng.standard_normal((losses.size, 8)).astype(np.float32)
    all_params, report, states = judge(losses.astype(np.float32), grads)
    verdicts = report["verdict"]
    first = int(np.argmax(verdicts == REVERT))
    assert 600 < first < 1000
    assert losses[first] < 2.0, "before all the progress is lost"
    assert np.all(verdicts[:first] == ACCEPT), "there was no outlier"
    chex.assert_trees_all_equal(all_params[first + 1], states.anchor[first - 1])


def test_anchor_is_refreshed_while_healthy_and_not_while_in_doubt():
    _, losses, grads = make()
    _, report, _ = judge(losses, grads)
    ages = report["anchor_age"]
    assert np.max(ages[:40]) <= 5, "often in the beginning"
    assert np.max(ages) <= 40
    assert np.sum(np.diff(ages[300:]) < 0) >= 2
    losses[300:] += 0.15  # half of what is tolerated
    _, report, states = judge(losses, grads)
    is_suspect = np.asarray(report["conduct"]) > 0
    is_moved = np.any(np.diff(states.anchor, axis=0) != 0.0, axis=1)
    assert np.sum(is_suspect) > 5
    assert not np.any(is_moved & is_suspect[1:])


def test_harm_cuts_the_damping_and_it_recovers_ever_faster():
    _, losses, grads = make(num_steps=500)
    losses[200:202] = 5.0
    damping = judge(losses, grads)[1]["damping"]
    assert np.all(damping[:203] == 1.0)
    assert damping[203] == 0.5
    for n in (1, 16, 32, 48):
        expected = 0.5 * 2.0 ** ((n / 64) ** 2)
        np.testing.assert_allclose(damping[203 + n], expected, rtol=1e-4)
    assert damping[203 + 62] < 1.0
    assert np.all(damping[203 + 65 :] == 1.0)


def test_harm_that_recurs_cuts_again_down_to_a_floor():
    _, losses, grads = make()
    for first in range(200, 300, 6):
        losses[first : first + 2] = np.nan
    damping = judge(losses, grads)[1]["damping"]
    assert np.min(damping) == 2.0**-10
    assert damping[-1] > 2.0**-9


# ---- gradient norms -----------------------------------------------------------------


def test_single_outlier_gradient_norm_is_skipped_and_changes_nothing():
    params, losses, grads = make()
    grads[200] *= 100.0
    _, _, report, all_params, states = drive(
        lo.lalerg(1e-3, search=False), params, losses, grads
    )
    assert exceptions(np.asarray(report["verdict"])) == {200: SKIP}
    assert report["scaled_error"][200] < 1.0 < report["scaled_norm_error"][200]
    assert report["num_skipped"][-1] == 1
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


def test_gradient_norm_is_judged_before_clipping():
    _, losses, grads = make()
    grads[200] *= 100.0
    tx = lo.error_regulate(optax.sgd(0.1), clip_norm=0.5)
    all_params, report, _ = judge(losses, grads, tx)
    assert report["verdict"][200] == SKIP
    assert report["grad_norm"][200] > 50.0
    longest = np.max(lengths(all_params))
    np.testing.assert_allclose(longest, 0.05, rtol=1e-3)  # 0.1 x clip_norm


def test_the_sixth_odd_norm_is_bounded_instead_of_skipped():
    _, losses, grads = make(num_steps=500)
    odd = np.arange(200, 380, 30)
    grads[odd] *= 1000.0
    all_params, report, _ = judge(losses, grads)
    verdicts = [*[SKIP] * 5, BOUND]
    assert exceptions(report["verdict"]) == dict(
        zip(odd.tolist(), verdicts, strict=True)
    )
    # to 4 times the usual norm
    usual = np.median(np.linalg.norm(grads[222:350], axis=1))
    np.testing.assert_allclose(lengths(all_params)[350], 0.04 * usual, rtol=0.05)


def test_a_skip_comes_back_after_so_many_accepted_steps():
    num_steps = 33_500
    rng = np.random.default_rng(0)
    losses = (1.0 + 0.05 * rng.standard_normal(num_steps)).astype(np.float32)
    grads = np.ones((num_steps, 1), np.float32)
    odd = np.array([*range(100, 220, 20), 16_400, 16_700, 16_720, 33_400])
    grads[odd] *= 1e4
    tx = SLOW
    params = jnp.ones(1)

    def step(state, inputs):
        loss, grad = inputs
        _, state = tx.update(grad, state, params, value=loss)
        return state, state.verdict

    run = jax.jit(lambda: jax.lax.scan(step, tx.init(params), (losses, grads))[1])
    seen = np.asarray(run())[odd].tolist()
    assert seen == [*[SKIP] * 5, BOUND, BOUND, SKIP, BOUND, SKIP]


@pytest.mark.parametrize("pattern", ["in a row", "at random", "for good"])
def test_a_norm_outlier_never_reverts_where_the_loss_is_ordinary(pattern):
    _, losses, grads = make(num_steps=600)
    hit = np.zeros(600, bool)
    if pattern == "in a row":
        hit[200:230] = True
    elif pattern == "at random":
        hit[200:] = np.random.default_rng(0).random(400) < 0.2
    else:
        hit[200:] = True
    grads[hit] *= 1e3
    verdicts = verdicts_of(losses, grads, SLOW)
    assert np.all(verdicts != REVERT)
    assert np.sum(verdicts == SKIP) == 5
    assert np.sum(verdicts == BOUND) >= 5
    if pattern == "for good":
        assert np.all(verdicts[-200:] == ACCEPT)


def test_the_norm_of_hard_data_that_did_no_harm_is_tolerated_from_then_on():
    _, losses, grads = make(num_steps=1000)
    for first in (200, 300, 400):  # three kinds of batches, hard but for a while
        losses[first : first + 6] = 5.0
        grads[first : first + 6] *= 10.0
    grads[600] *= 10.0  # as large, and now the loss is ordinary
    verdicts = verdicts_of(losses, grads, SLOW)
    assert verdicts[600] == ACCEPT
    losses[200:500] = losses[500:800]
    grads[200:500] = grads[500:800]
    assert verdicts_of(losses, grads, SLOW)[600] == SKIP


def test_a_hard_batch_without_a_gradient_leaves_the_state_finite():
    _, losses, grads = make()
    losses[200], grads[200] = 5.0, 0.0
    grads[300] *= 100.0
    _, report, states = judge(losses, grads)
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(states))
    assert exceptions(report["verdict"]) == {200: BOUND, 300: SKIP}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("factor", "signal"), [(4.0, "loss"), (1e3, "norm")])
def test_a_burst_of_outliers_does_not_blind_the_judge(seed, factor, signal):
    _, losses, grads = make(seed=seed)[:3]
    hit = np.zeros(400, bool)
    for first in range(200, 260, 12):  # a third of the steps, too few in a row to be
        hit[first : first + 4] = True  # a new level
    hit[300:] = np.random.default_rng(seed).random(100) < 0.08
    if signal == "loss":
        losses[hit] *= factor
    else:
        grads[hit] *= factor
    tx = SLOW
    _, report, _ = judge(losses, grads, tx)
    assert np.all(report["verdict"][hit] != ACCEPT)
    assert np.all(report[f"scaled_{'norm_' * (signal == 'norm')}error"][hit] > 1.0)


def test_a_loss_that_cannot_be_judged_yet_is_not_recorded_where_the_norm_objects():
    _, losses, grads = make(100)
    losses[[2, 9]] = 1e4
    grads[[2, 9]] *= 1e4
    losses[60] = 5.0
    _, report, states = judge(losses, grads, SLOW)
    assert exceptions(report["verdict"]) == {2: SKIP, 9: SKIP, 60: BOUND}
    assert states.history.num_values[20].tolist() == [19, 21]
    assert states.history.values[-1, 0].max() < 2.0


# ---- units and noise ----------------------------------------------------------------


def faulty():
    """Returns losses and gradients with which each verdict comes up."""
    _, losses, grads = make(num_steps=500)
    losses[200], losses[250:252], losses[300:307] = 1.5, 9.0, 9.0
    losses[400:] += 3.0
    grads[350:358] *= 1e3
    return losses, grads


@pytest.mark.parametrize("level", [1e-6, 0.37, 1e6])
def test_verdicts_do_not_depend_on_the_scale_of_the_loss(level):
    losses, grads = faulty()
    reference = verdicts_of(losses, grads)
    assert set(reference.tolist()) == {ACCEPT, SKIP, REVERT, BOUND}
    scaled = (losses * level).astype(np.float32)
    assert verdicts_of(scaled, grads).tolist() == reference.tolist()


@pytest.mark.parametrize("shift", [-1.0, -5.0, 100.0])
def test_verdicts_do_not_depend_on_the_offset_of_the_loss(shift):
    losses, grads = faulty()
    reference = verdicts_of(losses, grads)
    shifted = losses + np.float32(shift)
    assert verdicts_of(shifted, grads).tolist() == reference.tolist()


@pytest.mark.parametrize(
    "loss", [np.zeros(500), np.full(500, 2.3), np.linspace(3, 1, 500)]
)
def test_smooth_losses_are_never_objected_to(loss):
    grads = np.random.default_rng(0).standard_normal((500, 8)).astype(np.float32)
    assert np.all(verdicts_of(loss.astype(np.float32), grads) == ACCEPT)


def test_losses_that_are_zero_at_first_are_no_errors_when_they_begin():
    _, losses, grads = make(num_steps=600)
    losses[:150] = 0.0
    assert np.all(verdicts_of(losses, grads) == ACCEPT)


@pytest.mark.parametrize("spread", [0.002, 0.02])
def test_losses_rounded_to_bfloat16_are_no_errors(spread):
    rng = np.random.default_rng(0)
    losses = 2.3 + spread * rng.standard_normal(5000)  # 2.3 has a resolution of 0.016
    losses = np.asarray(jnp.asarray(losses, jnp.bfloat16), np.float32)
    grads = np.ones((5000, 1), np.float32)
    verdicts = verdicts_of(losses, grads, SLOW)
    assert np.all((verdicts == ACCEPT) | (verdicts == BOUND))
    assert np.sum(verdicts == BOUND) <= 1


@pytest.mark.parametrize(
    "noise",
    [*(pytest.param(x, marks=pytest.mark.slow) for x in (0.01, 0.05)), 0.2],
)
def test_ten_thousand_steps_of_normal_noise_are_accepted(noise):
    _, losses, grads = make(num_steps=10_000, noise=noise, seed=1)
    verdicts = verdicts_of(losses, grads, SLOW)
    assert np.all(verdicts == ACCEPT)


def test_a_huge_first_loss_does_not_blind_the_judge():
    _, losses, grads = make()
    losses[:3] = 1e6, 1e5, 1e3
    losses[300] = 3.0
    assert exceptions(verdicts_of(losses, grads)) == {300: BOUND}


def test_losses_that_are_mostly_zero_are_no_errors():
    losses = np.zeros(600, np.float32)
    losses[::40] = 1.0
    grads = np.where(losses[:, None] > 0, np.ones((600, 8)), 0.0).astype(np.float32)
    losses[0] = 0.0
    assert np.all(verdicts_of(losses, grads) == ACCEPT)


def test_zero_gradients_are_neither_errors_nor_a_reference():
    _, losses, grads = make()
    grads[np.arange(400) % 50 != 0] = 0.0  # a gradient every 50 steps
    assert np.all(verdicts_of(losses, grads) == ACCEPT)


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

    def run(factor, term):
        def loss_fn(params, x, y):
            return factor * (jnp.mean((x @ params - y) ** 2) + term)

        def step(carry, batch):
            params, state = carry
            x, y, scale = batch
            loss, grads = jax.value_and_grad(loss_fn)(params, x, y)
            updates, state = tx.update(scale * grads, state, params, value=loss)
            params = lo.apply_updates(params, updates, state)
            return (params, state), (params, state.verdict, state.damping)

        carry = jnp.zeros(6), tx.init(jnp.zeros(6))
        return jax.lax.scan(step, carry, (inputs, targets, spoilt))[1]

    return jax.jit(run)


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


# ---- without a loss, and flat -------------------------------------------------------


def verdicts_without_value(tx, grads):
    params = jnp.ones(grads.shape[1])

    def step(carry, grad):
        params, state = carry
        updates, state = tx.update(grad, state, params, value=None)
        return (optax.apply_updates(params, updates), state), lo.metrics(state)

    run = jax.jit(lambda p: jax.lax.scan(step, (p, tx.init(p)), grads)[1])
    return np.asarray(run(params)["verdict"])


def test_without_value_the_gradient_norm_decides():
    _, _, grads = make()
    grads[200:202] *= 100.0
    grads[300] *= 100.0
    verdicts = verdicts_without_value(lo.error_regulate(optax.sgd(1e-3)), grads)
    assert exceptions(verdicts) == {200: SKIP, 201: REVERT, 202: REVERT, 300: SKIP}


def test_without_value_large_norms_are_bounded_once_no_skip_is_left():
    _, _, grads = make(num_steps=500)
    odd = np.arange(200, 410, 30)
    grads[odd] *= 100.0
    verdicts = verdicts_without_value(lo.error_regulate(optax.sgd(1e-3)), grads)
    wanted = [*[SKIP] * 5, BOUND, BOUND]
    assert exceptions(verdicts) == dict(zip(odd.tolist(), wanted, strict=True))


def test_flat_form_judges_the_loss_and_follows_a_schedule():
    _, losses, grads = make()
    losses[200] = 4.0
    losses[250:252] = 4.0
    schedule = optax.piecewise_constant_schedule(1e-4, {100: 30.0})
    tx = optax.chain(
        lo.scale_by_micro_rate(),
        optax.scale_by_learning_rate(schedule),
        lo.error_regulate(),
    )
    verdicts = verdicts_of(losses, grads, tx)
    # a leap of the rate is no error
    assert exceptions(verdicts) == {
        **{200: BOUND, 250: BOUND, 251: BOUND},  # one high loss was harmless before
    }


# ---- the search ---------------------------------------------------------------------


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


@pytest.mark.parametrize(
    "search",
    [
        True,
        False,
    ],
)
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
