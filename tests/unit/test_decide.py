"""What is accepted, bounded, skipped and reverted."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.judged import (
    ACCEPT,
    BOUND,
    REGULATED,
    REVERT,
    SKIP,
    SLOW,
    exceptions,
    judge,
    lengths,
    make,
    verdicts_of,
)

import lalerg_optax as lo
from lalerg_optax._decide import _is_lost, _log_share_lost
from lalerg_optax._judge_rule import JudgeRule
from lalerg_optax._records import RegulatorScalars
from lalerg_optax._scalars import pack, unpack
from lalerg_optax._search_rule import MacroScalars


def test_a_hard_batch_is_accepted_bounded():
    losses, grads = make()
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
    losses, grads = make()
    usual = lengths(judge(losses, grads)[0])
    losses[200] = 5.0
    all_params, report, _ = judge(losses, grads)
    assert exceptions(report["verdict"]) == {200: BOUND}
    np.testing.assert_allclose(lengths(all_params), usual, rtol=1e-3)


def test_two_high_losses_go_back_and_the_anchor_tells_that_it_was_the_updates():
    losses, grads = make()
    losses[200:202] = 5.0
    all_params, report, states = judge(losses, grads)
    assert exceptions(report["verdict"]) == {200: BOUND, 201: REVERT, 202: REVERT}
    chex.assert_trees_all_equal(all_params[202], states.anchor[199])
    assert not np.array_equal(all_params[200], all_params[202])
    assert report["num_harmful"][202] == 0
    assert report["num_harmful"][203] == report["num_harmful"][-1] == 1
    assert report["num_trials"][-1] == 1


def test_two_high_losses_that_are_high_at_the_anchor_too_were_no_fault_of_the_updates():
    losses, grads = make()
    losses[200:206] = 5.0
    _, report, _ = judge(losses, grads)
    assert exceptions(report["verdict"]) == {
        **{200: BOUND, 201: REVERT, 202: REVERT},
        **{203: BOUND, 204: BOUND, 205: BOUND},
        **{206: REVERT, 207: REVERT},  # what was learnt of them may have been poison
    }
    assert report["num_trials"][-1] == 1
    assert report["num_harmful"][-1] == 0
    assert np.all(report["damping_factor"] == 1.0)


def test_hard_data_of_a_kind_that_was_there_before_are_not_gone_back_for():
    losses, grads = make(num_steps=1000)
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
    losses, grads = make(4000)
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


@pytest.mark.parametrize("num_steps", [5, 10, 25])
def test_a_burst_of_poison_is_undone(num_steps):
    losses, grads = make()
    end = 200 + num_steps
    losses[200:end] = 5.0
    grads[200:end] *= -50.0  # uphill
    all_params, report, states = judge(losses, grads)
    verdicts = report["verdict"]
    assert np.all(verdicts[203:end] == BOUND)
    assert verdicts[end : end + 2].tolist() == [REVERT, REVERT]
    chex.assert_trees_all_equal(all_params[end + 2], states.anchor[199])
    assert np.all(verdicts[end + 2 :] == ACCEPT)
    clean = judge(*make())[0]
    lost = np.linalg.norm(all_params[-1] - clean[-1])
    assert lost <= 0.01 * 50 * 5.0, "about as far as the steps since the anchor lead"


@pytest.mark.parametrize("factor", [3.0, 1e2, 1e6])
@pytest.mark.parametrize("patience", [4, 32])
def test_a_new_level_is_accepted_in_time(factor, patience):
    losses, grads = make(num_steps=500)
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
    losses, grads = make()
    losses[200:300] = np.nan
    _, report, states = judge(losses, grads)
    verdicts = report["verdict"]
    assert verdicts[200:203].tolist() == [SKIP, REVERT, REVERT]
    assert np.all(verdicts[203:300] == SKIP)
    assert np.all(verdicts[300:] == ACCEPT), "nothing was learnt, nothing to undo"
    assert report["num_harmful"][-1] == 0
    assert states.history.num_values[-1, 0] == 128


def test_steps_that_are_not_finite_are_gone_back_for_no_more_than_twice():
    losses, grads = make()
    losses[200:202], losses[204] = 5.0, 5.0
    losses[205:300] = np.nan
    verdicts = verdicts_of(losses, grads)
    # once at their start and once when they last
    assert np.sum(verdicts[205:300] == REVERT) == 4
    assert np.all(verdicts[302:] == ACCEPT), "and maybe once when they are over"


def test_two_steps_that_are_not_finite_go_back_however_hard_the_data_were():
    losses, grads = make(num_steps=600)
    losses[200:212] = 5.0
    losses[500:502] = np.nan
    _, report, _ = judge(losses, grads)
    assert report["verdict"][498:505].tolist() == [
        *(ACCEPT, ACCEPT, SKIP, REVERT, REVERT, ACCEPT, ACCEPT)
    ]
    assert report["num_harmful"][-1] == 1


@pytest.mark.parametrize("share", [1 / 16, 1 / 8, 1 / 4, 1 / 2])
def test_data_that_are_often_not_finite_do_not_speak_against_the_params(share):
    """As where one example in some hundreds holds a NaN: in half of 64 batches, say."""
    losses, grads = make(num_steps=4000)
    losses[np.random.default_rng(1).random(len(losses)) < share] = np.nan
    losses[:10] = 1.0  # until it is known how often that happens
    _, report, _ = judge(losses, grads)
    is_lost = np.isnan(losses)
    verdicts = np.asarray(report["verdict"])
    assert np.all(verdicts[is_lost] != ACCEPT)
    # of 4,000 steps, none of which is skipped but those that have to be
    assert report["num_revert_steps"][-1] <= 6
    assert report["damping_factor"][-1] == 1.0
    assert np.all(verdicts[~is_lost] != SKIP)


@pytest.mark.parametrize(("share", "row"), [(0.0, 2), (1 / 8, 5), (1 / 2, 14)])
def test_params_that_are_lost_are_gone_back_for_all_the_same(share, row):
    """log(1e-4) / log(share) steps in a row are no chance."""
    losses, grads = make(num_steps=4000)
    losses[np.random.default_rng(1).random(len(losses)) < share] = np.nan
    losses[:10] = losses[3900:3902] = 1.0
    losses[3902:] = np.nan
    verdicts = verdicts_of(losses, grads)
    first = 3902 + int(np.flatnonzero(verdicts[3902:] == REVERT)[0])
    assert first == 3902 + row - 1


def test_a_step_that_is_skipped_for_its_norm_is_none_of_a_row_that_is_not_finite():
    losses, grads = make()
    grads[200] *= 1e6
    losses[201] = np.nan
    assert exceptions(verdicts_of(losses, grads)) == {200: SKIP, 201: SKIP}


def test_a_share_of_skips_is_right_where_counters_are_full():
    """An eighth of all steps so far: of a row the second one says nothing."""
    full = np.iinfo(np.int32).max
    last = RegulatorScalars(num_accepted=full, num_lost=full // 7, num_skips_in_a_row=1)
    second = unpack(RegulatorScalars, pack(last))
    fifth = unpack(RegulatorScalars, pack(last._replace(num_skips_in_a_row=4)))
    share = _log_share_lost(second, JudgeRule())
    np.testing.assert_allclose(share, np.log(1 / 8), rtol=1e-5)
    assert not _is_lost(second, share, JudgeRule())
    assert _is_lost(fifth, share, JudgeRule())


@pytest.mark.parametrize("num_lost", [1, 2, 3, 10])
@pytest.mark.parametrize("tx", [REGULATED, lo.lalerg()], ids=["given", "searched"])
def test_first_steps_that_are_not_finite_are_no_harm(tx, num_lost):
    """As where the scale of a float16 loss begins too high: no update was made."""
    losses, grads = make(num_steps=16)
    losses[:num_lost] = np.nan
    _, report, _ = judge(losses, grads, tx)
    assert report["num_harmful"][num_lost] == 0
    assert np.all(report["damping_factor"] == 1.0)
    assert np.all(report["macro_rate"][: num_lost + 2] == 1.0)


def test_many_slightly_high_losses_are_evidence_too():
    losses, grads = make()
    losses[200:300] = 1.0 + 0.7 * 6.0 * 0.05
    _, report, _ = judge(losses, grads)
    verdicts = report["verdict"]
    assert np.all(report["scaled_error"] < 1.0)
    assert np.all((verdicts == ACCEPT) | (verdicts == REVERT))
    first = int(np.argmax(verdicts == REVERT))
    assert 202 <= first <= 206


@pytest.mark.parametrize("gap", [7, 12])
def test_high_losses_that_are_apart_are_no_evidence(gap):
    losses, grads = make(num_steps=600)
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


def test_single_outlier_gradient_norm_is_skipped_and_changes_nothing():
    losses, grads = make()
    grads[200] *= 100.0
    tx = lo.lalerg(1e-3, search=False)
    all_params, report, states = judge(losses, grads, tx)
    assert exceptions(report["verdict"]) == {200: SKIP}
    assert report["scaled_error"][200] < 1.0 < report["scaled_norm_error"][200]
    assert report["num_skipped"][-1] == 1

    def at(tree, t):
        return jax.tree.map(lambda x: x[t], tree)

    chex.assert_trees_all_equal(all_params[201], all_params[200])
    # our own links keep their state bit for bit: only their counters of it move
    micro, _, macro, _ = states.inner_state
    for t in (199, 200):
        assert micro.num_micro_held[t] == macro.num_macro_held[t] == t - 199
    micro = micro._replace(num_micro_held=jnp.zeros(len(losses)))
    chex.assert_trees_all_equal(at(micro, 199), at(micro, 200))
    macro = unpack(MacroScalars, macro.scalars)._replace(
        num_macro_held=jnp.zeros(len(losses))
    )
    chex.assert_trees_all_equal(at(macro, 199), at(macro, 200))


@pytest.mark.parametrize("pattern", ["in a row", "at random", "for good"])
def test_a_norm_outlier_never_reverts_where_the_loss_is_ordinary(pattern):
    losses, grads = make(num_steps=600)
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
