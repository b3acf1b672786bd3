"""What loss and gradient norm are compared with: their scale, noise and kind."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.judged import (
    ACCEPT,
    BOUND,
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
from lalerg_optax._judge_rule import JudgeRule


def test_gradient_norm_is_judged_before_clipping():
    losses, grads = make()
    grads[200] *= 100.0
    tx = lo.error_regulate(optax.sgd(0.1), clip_norm=0.5)
    all_params, report, _ = judge(losses, grads, tx)
    assert report["verdict"][200] == SKIP
    assert report["grad_norm"][200] > 50.0
    longest = np.max(lengths(all_params))
    np.testing.assert_allclose(longest, 0.05, rtol=1e-3)  # 0.1 x clip_norm


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("factor", "signal"), [(4.0, "loss"), (1e3, "norm")])
def test_a_burst_of_outliers_does_not_blind_the_judge(seed, factor, signal):
    losses, grads = make(seed=seed)
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


def faulty():
    """Returns losses and gradients with which each verdict comes up."""
    losses, grads = make(num_steps=500)
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
    losses, grads = make(num_steps=600)
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
    losses, grads = make(num_steps=10_000, noise=noise, seed=1)
    verdicts = verdicts_of(losses, grads, SLOW)
    assert np.all(verdicts == ACCEPT)


def test_a_huge_first_loss_does_not_blind_the_judge():
    losses, grads = make()
    losses[:3] = 1e6, 1e5, 1e3
    losses[300] = 3.0
    assert exceptions(verdicts_of(losses, grads)) == {300: BOUND}


@pytest.mark.parametrize(("share", "verdict"), [(0.8, ACCEPT), (1.2, BOUND)])
def test_what_is_little_of_the_progress_so_far_is_no_error(share, verdict):
    losses, grads = make(300, noise=1e-4)  # with hardly any noise
    losses[:20] += 9.0
    fraction = JudgeRule().progress_fraction
    losses[280] = np.median(losses[200:]) + share * fraction * (losses[:16].min() - 1.0)
    assert verdicts_of(losses, grads, SLOW)[280] == verdict


def test_losses_near_the_end_of_float32_leave_every_number_finite():
    losses, grads = make(40)
    losses[:] = np.where(np.arange(40) % 2, 3.3e38, -3.3e38)
    _, report, states = judge(losses, grads)
    assert np.all(np.isfinite(states.scalars.floats))
    assert np.all(np.isfinite(states.history.values))
    assert report["avg_value"][0] == np.float32(-1e37)


def test_losses_that_are_mostly_zero_are_no_errors():
    losses = np.zeros(600, np.float32)
    losses[::40] = 1.0
    grads = np.where(losses[:, None] > 0, np.ones((600, 8)), 0.0).astype(np.float32)
    losses[0] = 0.0
    assert np.all(verdicts_of(losses, grads) == ACCEPT)


def test_zero_gradients_are_neither_errors_nor_a_reference():
    losses, grads = make()
    grads[np.arange(400) % 50 != 0] = 0.0  # a gradient every 50 steps
    assert np.all(verdicts_of(losses, grads) == ACCEPT)


def test_without_value_the_gradient_norm_decides():
    _, grads = make()
    grads[200:202] *= 100.0
    grads[300] *= 100.0
    verdicts = verdicts_of(None, grads, lo.error_regulate(optax.sgd(1e-3)))
    assert exceptions(verdicts) == {200: SKIP, 201: REVERT, 202: REVERT, 300: SKIP}


def test_without_value_large_norms_are_bounded_once_no_skip_is_left():
    _, grads = make(num_steps=500)
    odd = np.arange(200, 410, 30)
    grads[odd] *= 100.0
    verdicts = verdicts_of(None, grads, lo.error_regulate(optax.sgd(1e-3)))
    wanted = [*[SKIP] * 5, BOUND, BOUND]
    assert exceptions(verdicts) == dict(zip(odd.tolist(), wanted, strict=True))
