"""What is remembered of a step: damping, skips that are left, what was harmless."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.drive import drive, stay
from helpers.judged import (
    ACCEPT,
    BOUND,
    SKIP,
    SLOW,
    exceptions,
    judge,
    lengths,
    make,
    verdicts_of,
)


@pytest.mark.parametrize("level", [3.0, 10.0, 100.0])
def test_harder_batches_that_come_to_stay_are_never_skipped_and_soon_ordinary(level):
    losses, grads = make(4000)
    harder = np.arange(4000) % 8 == 0
    harder[:200] = False
    losses[harder] *= level
    verdicts = verdicts_of(losses, grads, SLOW)
    assert np.all(verdicts[200:260][harder[200:260]] == BOUND), "not at once"
    assert exceptions(verdicts).keys() <= set(np.flatnonzero(harder))
    assert np.all(verdicts != SKIP)
    assert np.all(verdicts[-1000:] == ACCEPT)


def test_harm_cuts_the_damping_and_it_recovers_ever_faster():
    losses, grads = make(num_steps=500)
    losses[200:202] = 5.0
    damping = judge(losses, grads)[1]["damping_factor"]
    assert np.all(damping[:203] == 1.0)
    assert damping[203] == 0.5
    for n in (1, 16, 32, 48):
        expected = 0.5 * 2.0 ** ((n / 64) ** 2)
        np.testing.assert_allclose(damping[203 + n], expected, rtol=1e-4)
    assert damping[203 + 62] < 1.0
    assert np.all(damping[203 + 65 :] == 1.0)


def test_harm_that_recurs_cuts_again_down_to_a_floor():
    losses, grads = make()
    for first in range(200, 300, 6):
        losses[first : first + 2] = 100.0
    damping = judge(losses, grads)[1]["damping_factor"]
    assert np.min(damping) == 2.0**-10
    assert damping[-1] > 2.0**-9


def test_the_sixth_odd_norm_is_bounded_instead_of_skipped():
    losses, grads = make(num_steps=500)
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
    how = {"see": lambda step: step.state.verdict, "apply_updates": stay}
    verdicts = np.asarray(drive(SLOW, jnp.ones(1), (losses, grads), **how)[2])
    expected = [*[SKIP] * 5, BOUND, BOUND, SKIP, BOUND, SKIP]
    np.testing.assert_array_equal(verdicts[odd], expected)


def test_the_norm_of_hard_data_that_did_no_harm_is_tolerated_from_then_on():
    losses, grads = make(num_steps=1000)
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
    losses, grads = make()
    losses[200], grads[200] = 5.0, 0.0
    grads[300] *= 100.0
    _, report, states = judge(losses, grads)
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(states))
    assert exceptions(report["verdict"]) == {200: BOUND, 300: SKIP}


def test_a_loss_that_cannot_be_judged_yet_is_not_recorded_where_the_norm_objects():
    losses, grads = make(100)
    losses[[2, 9]] = 1e4
    grads[[2, 9]] *= 1e4
    losses[60] = 5.0
    _, report, states = judge(losses, grads, SLOW)
    assert exceptions(report["verdict"]) == {2: SKIP, 9: SKIP, 60: BOUND}
    assert states.history.num_values[20].tolist() == [19, 21]
    assert states.history.values[-1, 0].max() < 2.0
