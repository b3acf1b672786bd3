"""Interventions that pile up are told, and chance alone is not."""

import warnings

import numpy as np
import pytest

import lalerg_optax as lo
from lalerg_optax import Verdict
from lalerg_optax._watch import is_step

ACCEPT, SKIP, REVERT, BOUND = map(int, Verdict)


def told_of(verdicts, fetch_every=100, **others):
    """Returns the warnings of a run with such verdicts."""
    recorder = lo.Recorder(fetch_every=fetch_every)
    verdicts = np.asarray(verdicts)
    stacked = {"verdict": verdicts, **others}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for first in range(0, len(verdicts), 100):
            recorder.extend({k: x[first : first + 100] for k, x in stacked.items()})
        recorder.flush()
    assert all(w.category is lo.InterventionWarning for w in caught)
    return [str(w.message) for w in caught]


def verdicts_with(num_steps, steps, verdict):
    verdicts = np.zeros(num_steps, int)
    verdicts[steps] = verdict
    return verdicts


def test_chance_alone_never_warns():
    """A million steps with the false alarms that the README has, and at three times."""
    rng = np.random.default_rng(0)
    for rate in (3e-4, 9e-4):
        verdicts = np.where(rng.uniform(size=1_000_000) < rate, SKIP, ACCEPT)
        recorder = lo.Recorder()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for part in np.split(verdicts, 1000):
                recorder.extend(verdict=part)
            recorder.flush()


@pytest.mark.parametrize(
    ("num_skips", "num_reverts", "is_many"),
    [(10, 0, False), (11, 0, True), (0, 5, False), (0, 6, True), (10, 5, False)],
)
@pytest.mark.parametrize("start", [0, 730])
def test_the_bounds_are_those_of_the_docstring(num_skips, num_reverts, is_many, start):
    places = start + 10 + 30 * np.arange(16)
    verdicts = verdicts_with(1500, places[:num_skips], SKIP)
    for place in places[num_skips:][:num_reverts]:
        verdicts[place : place + 2] = REVERT
    messages = told_of(verdicts)
    assert len(messages) == is_many
    if is_many:
        assert f"{num_reverts} reverts and {num_skips} skips in " in messages[0]


@pytest.mark.parametrize("fetch_every", [1, 100, 1000])
@pytest.mark.parametrize(
    "steps",
    [range(300, 311), [*range(210, 215), *range(700, 706)]],
    ids=["together", "a window apart"],
)
def test_a_pile_up_is_told_however_many_steps_are_fetched_at_once(steps, fetch_every):
    (message,) = told_of(verdicts_with(2000, steps, SKIP), fetch_every)
    assert f"11 skips in {min(500, steps[-1] + 1)} steps" in message
    assert f"(up to step {steps[-1]})" in message


def test_a_revert_counts_from_its_first_step_on():
    steps = [*range(100, 110), 300]
    assert not told_of(verdicts_with(301, steps[:-1], REVERT))
    (message,) = told_of(verdicts_with(301, steps, REVERT))
    assert "6 reverts and 0 skips in 301 steps" in message


def test_interventions_that_are_spread_out_do_not_warn():
    assert not told_of(verdicts_with(10_000, np.arange(0, 10_000, 50), SKIP))


def test_a_run_that_never_gets_well_warns_once_a_window():
    messages = told_of(verdicts_with(3000, np.arange(0, 3000, 10), SKIP))
    assert 5 <= len(messages) <= 7
    assert "skips in 500 steps" in messages[-1]


def test_a_warning_says_who_objected_and_where():
    steps = np.arange(300, 312)
    verdicts = verdicts_with(600, steps, SKIP)
    error, norm, kernel, head = np.zeros((4, 600))
    error[steps[:7]] = 5.0
    error[100] = 5.0  # accepted, as a new level is in the end
    norm[steps[6:9]] = 2.0
    norm[steps[9:]] = 1e37
    kernel[steps] = 30.0
    kernel[steps[-1]] = 1e37
    head[299] = 0.4
    (message,) = told_of(
        verdicts,
        scaled_error=error,
        scaled_norm_error=norm,
        **{"grad_norm/encoder/kernel": kernel, "grad_norm/head": kernel / 2.0},
        **{
            "predicted_decrease/encoder/kernel": head / 2.0,
            "predicted_decrease/head": head,
        },
    )
    assert "12 skips in " in message
    assert "protection can hide a bug" in message
    assert "the loss (7 steps)" in message
    assert "the gradient norm (3 steps)" in message
    assert "what is not finite (3 steps)" in message
    assert "largest gradient was that of encoder/kernel (one that is not" in message
    assert "the leaf that moved the loss most was head." in message


def test_each_regulator_of_a_partition_is_counted_by_itself():
    recorder = lo.Recorder()
    bad = verdicts_with(100, np.arange(20), SKIP)
    recorder.extend({"encoder/verdict": bad, "head/verdict": 0 * bad})
    with pytest.warns(lo.InterventionWarning, match="of encoder: 0 reverts and 20 s"):
        recorder.flush()


def test_batches_that_are_bounded_are_no_interventions():
    assert not told_of(verdicts_with(1000, np.arange(0, 1000, 3), BOUND))


def test_bounded_batches_are_not_told_as_a_cause_of_skips():
    verdicts = verdicts_with(600, np.arange(300, 312), SKIP)
    verdicts[100:180] = BOUND
    error, norm = np.zeros((2, 600))
    error[100:180], norm[300:312] = 5.0, 5.0
    (message,) = told_of(verdicts, scaled_error=error, scaled_norm_error=norm)
    assert "the gradient norm (12 steps)" in message
    assert "the loss" not in message


def test_a_revert_without_an_outlier_has_its_own_cause():
    verdicts = verdicts_with(100, range(50, 62), REVERT)
    (message,) = told_of(verdicts, damping_factor=np.full(100, 2.0))
    assert "look at the learning rate: the search went back." in message
    assert message.endswith("say so with lalerg_optax.rebase.")


def test_each_regulator_warns_of_its_own_signals_and_leaves():
    bad = verdicts_with(100, np.arange(20), SKIP)
    error, norm = np.full(100, 5.0), np.full(100, 30.0)
    others = {
        "encoder/scaled_error": error,
        "head/scaled_norm_error": error,
        "head/grad_norm/out/kernel": norm,
    }
    recorder = lo.Recorder()
    recorder.extend({"encoder/verdict": bad, "head/verdict": bad, **others})
    with pytest.warns(lo.InterventionWarning) as caught:
        recorder.flush()
    encoder, head = (str(w.message) for w in caught)
    assert encoder.startswith("of encoder: ")
    assert encoder.endswith("look at the loss (20 steps).")
    assert head.startswith("of head: ")
    assert "look at the gradient norm (20 steps)." in head
    assert head.endswith("was that of out/kernel (up to 3.0e+01).")


def test_a_leaf_that_jumped_is_told_once_with_its_step_and_what_to_do():
    head, body = np.zeros((2, 1000))
    head[[420, 430]], body[420] = 3.0, 0.5
    moved = np.ones(1000)
    leaves = {"jump/model/head": head, "jump/body": body}
    leaves |= {"update_ratio/model/head": moved, "update_ratio/body": moved}
    (message,) = told_of(np.zeros(1000, int), **leaves)
    assert message.startswith("params of model/head were not where the last update")
    assert "(at step 420)" in message
    assert "say so with lalerg_optax.rebase" in message
    (message,) = told_of(np.zeros(1000, int), jump=head, update_ratio=moved)
    assert message.startswith("params were not where the last update")
    still = {"jump/head": 0.0 * head, "update_ratio/head": moved}
    assert not told_of(np.zeros(1000, int), **still)


def test_a_users_own_jump_is_no_jump_of_the_params():
    assert not told_of(np.zeros(1000, int), jump=np.ones(1000))


def recurring(**columns):
    """Returns the warnings of a run of 10,000 steps of which all are accepted."""
    recorder = lo.Recorder()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for first in range(0, 10_000, 1000):
            part = {name: x[first : first + 1000] for name, x in columns.items()}
            recorder.extend(verdict=np.zeros(1000, np.int32), **part)
        recorder.flush()
    return [str(w.message) for w in caught]


def test_odd_norms_that_use_up_their_skips_are_told_once_however_far_apart():
    skips_left = np.float32(5 - np.arange(10_000) // 1500)
    (text,) = recurring(skips_left=np.maximum(skips_left, 0.5))
    assert "recur" in text
    assert not recurring(skips_left=np.full(10_000, 1.5, np.float32))


def test_harm_that_recurs_is_told_once_however_far_apart():
    (text,) = recurring(num_harmful=np.arange(10_000) // 600)
    assert text.startswith("updates did harm 1")
    assert not recurring(num_harmful=np.arange(10_000) // 1000)


def repeated(verdicts, k):
    """Returns the verdicts of micro-batches, and which of them completed a step.

    Until the next step the last verdict is held.
    """
    has_updated = np.arange(k * len(verdicts)) % k == k - 1
    held = np.concatenate([np.zeros(k - 1, int), np.repeat(verdicts, k)])
    return held[: k * len(verdicts)], has_updated


@pytest.mark.parametrize("num_skips", [10, 11])
@pytest.mark.parametrize("k", [1, 4, 64])
def test_a_verdict_that_is_held_counts_once(num_skips, k):
    """In a window of 500 steps, however many micro-batches these have."""
    steps = [10, *range(500, 500 + num_skips - 1)]
    held, has_updated = repeated(verdicts_with(1000, steps, SKIP), k)
    messages = told_of(held, has_updated=has_updated)
    assert len(messages) == (num_skips > 10)
    if messages:
        assert "11 skips in 500 steps" in messages[0]


def test_what_never_gets_well_warns_once_in_a_window_of_steps():
    bad = verdicts_with(3000, np.arange(0, 3000, 10), SKIP)
    held, has_updated = repeated(bad, 4)
    messages = told_of(held, has_updated=has_updated)
    assert 5 <= len(messages) <= 7


@pytest.mark.parametrize("name", ["", "a/", "a/b/"])
def test_whatever_is_around_a_group_says_when_it_decides(name):
    block = {"a/b/verdict": np.zeros(3), f"{name}has_updated": np.array([0, 1, np.nan])}
    block["c/has_updated"] = block["a/d/has_updated"] = np.zeros(3)
    assert is_step(block, "a/b/").tolist() == [False, True, True]


def test_the_group_around_a_regulator_says_when_it_decides():
    held, has_updated = repeated(verdicts_with(100, np.arange(8), SKIP), 4)
    recorder = lo.Recorder(fetch_every=1000)
    recorder.extend({"a/verdict": held, "b/verdict": held, "b/has_updated": held < 0})
    recorder.extend({"a/verdict": held, "has_updated": has_updated}, loss=0.0 * held)
    with pytest.warns(lo.InterventionWarning) as caught:
        recorder.flush()
    (message,) = [str(w.message) for w in caught]
    assert "of a: 0 reverts and 40 skips" in message  # 32 alone, and 8 of a group
