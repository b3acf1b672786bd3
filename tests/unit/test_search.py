"""The table of phases, driven by audits that the tests make up."""

import numpy as np
import pytest
from helpers.audits import REVERT, Driver

from lalerg_optax._search_rule import MacroScalars, Phase


@pytest.mark.parametrize("growth_factor", [2.0, 4.0])
def test_a_good_audit_makes_the_rate_grow_by_the_power_of_its_alignment(growth_factor):
    driver = Driver(growth_factor=growth_factor)
    driver.window(0.3)
    assert driver.window(0.8) == growth_factor, "c begins anew after the first one"
    factor = driver.window(0.7)
    share = float(driver.state.avg_alignment) / 0.8
    assert 0.875 < share < 1.0, "between the two audits"
    np.testing.assert_allclose(factor, growth_factor**share, rtol=1e-6)
    assert driver.phase is Phase.SEARCH


@pytest.mark.parametrize(("has_failed", "power"), [(False, 2), (True, 4)])
def test_the_first_good_audit_cuts_and_deeper_after_a_restart(has_failed, power):
    driver = Driver(backoff_factor=0.75)
    if has_failed:
        driver.tell()
        driver.tell(verdict=REVERT, harm=True)
        driver.tell(verdict=REVERT)
        np.testing.assert_allclose(driver.rate, 0.75**4, rtol=1e-6)
        assert driver.phase is Phase.RESTARTED
    np.testing.assert_allclose(driver.window(0.5), 0.75**power, rtol=1e-6)
    assert driver.phase is Phase.SEARCH


@pytest.mark.parametrize(("reach", "factor"), [(5.0, 1 / 5000), (2e-3, 0.5**4)])
def test_a_start_that_led_too_far_is_cut_to_a_thousandth_of_the_params(reach, factor):
    driver = Driver()
    driver.tell(verdict=REVERT, harm=True, reach=reach)
    np.testing.assert_allclose(driver.rate, factor, rtol=1e-5)


def test_losses_of_a_start_that_blew_up_are_forgotten():
    driver = Driver()
    driver.window(-0.8, value=1e9, noise=1e9)
    assert driver.phase is Phase.START
    driver.window(0.8, value=2.0, noise=0.1)
    state = driver.state
    assert (state.first_window_mean, state.best_window_mean) == (2.0, 2.0)
    np.testing.assert_allclose(state.loss_variance, 0.04 / 3.0, rtol=1e-4)
    driver.window(0.8, value=1.0)
    assert (driver.state.first_window_mean, driver.state.best_window_mean) == (2.0, 1.0)


def test_an_audit_that_noise_explains_ends_no_search():
    crisp, noisy = Driver(), Driver()
    for driver, error, num_low in ((crisp, 0.0, 3), (noisy, 0.4, 1)):
        for _ in range(12):
            driver.window(0.8, error=error, noise=1.0)
        assert driver.phase is Phase.SEARCH
        for _ in range(num_low):
            driver.window(-0.3, error=error, noise=1.0)
    assert crisp.phase is Phase.STEER
    assert noisy.phase is Phase.SEARCH


def test_noisy_audits_together_end_it():
    driver = Driver()
    for _ in range(12):
        driver.window(0.8, error=0.3)
    for _ in range(12):
        driver.window(-0.3, error=0.3)
    assert driver.phase is Phase.STEER


@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_what_counts_is_the_alignment_relative_to_its_best(scale):
    """Sparse gradients have a best one of a hundredth, dense ones of a half."""
    rates = []
    driver = Driver()
    for alignment in (0.3, 0.8, 0.6, 0.4, -0.1, 0.2, 0.5):
        driver.window(scale * alignment, error=0.05 * scale)
        rates.append(driver.rate)
    alone = Driver()
    expected = []
    for alignment in (0.3, 0.8, 0.6, 0.4, -0.1, 0.2, 0.5):
        alone.window(alignment, error=0.05)
        expected.append(alone.rate)
    np.testing.assert_allclose(rates, expected, rtol=1e-4)


def test_where_nothing_is_known_the_search_leaps_by_half_and_a_bad_audit_cuts_deep():
    driver = Driver()
    for _ in range(5):
        assert driver.window(0.001, error=0.01, noise=0.1, length=1e-3) == 2.0
    assert driver.phase is Phase.SEARCH
    rate = driver.rate
    while driver.phase is Phase.SEARCH:
        rate = driver.rate
        driver.window(-0.05, error=0.01, noise=0.1)
    assert driver.rate == rate / 4.0


def test_an_alignment_clearly_above_half_of_the_best_is_followed_by_leaps_again():
    driver = Driver().end_search(value=5.0)
    assert driver.phase is Phase.STEER
    factors = [driver.window(0.8, value=4.0 - 0.5 * i) for i in range(6)]
    assert factors[-1] > 3.9


def test_where_the_loss_is_at_its_floor_the_search_ends():
    driver = Driver()
    for i in range(6):
        driver.window(0.8, value=5.0 - i)
    assert driver.phase is Phase.SEARCH
    for _ in range(3):
        driver.window(0.8, value=1e-4)
    assert driver.phase is Phase.STEER
    before = driver.rate
    for i in range(20):
        driver.window(0.8, value=1e-4 * 0.9**i)
    assert driver.rate == before, "a higher rate has nothing to gain"


def test_a_search_under_which_half_of_the_progress_is_undone_is_over():
    driver = Driver()
    for i in range(5):
        driver.window(0.8, value=5.0 - i)
    rate = driver.rate
    driver.window(0.1, value=4.0)
    assert driver.phase is Phase.STEER
    assert driver.rate == rate / 2.0
    assert driver.window(0.1, value=4.5) == 0.5, "and so it goes on"
    assert driver.window(0.1, value=4.4) > 0.5, "but not while the loss comes down"


def test_a_search_goes_on_where_the_slope_does_and_the_loss_is_that_of_other_data():
    driver = Driver()
    for i in range(5):
        driver.window(0.8, value=5.0 - i)
    np.testing.assert_allclose(driver.window(0.8, value=4.0), 4.0, rtol=1e-6)
    assert driver.phase is Phase.SEARCH
    assert driver.state.best_window_mean == driver.state.first_window_mean == 4.0


def test_a_search_goes_on_slowly_while_the_mean_is_good_and_not_clearly_so():
    driver = Driver()
    for _ in range(2):
        driver.window(0.8, error=0.5, noise=1.0)
    assert driver.phase is Phase.SEARCH
    factor = driver.window(1e-3, error=0.5, noise=1.0, length=1e-3)
    np.testing.assert_allclose(factor, 2.0, rtol=1e-6)
    assert driver.phase is Phase.SEARCH
    for _ in range(6):
        driver.window(-0.2, error=0.5, noise=1.0, length=10.0)
    assert driver.phase is Phase.STEER


def test_a_search_whose_alignment_is_lost_in_noise_goes_on_while_nothing_rises():
    far, near = Driver(), Driver()
    for driver, length in ((far, 1e-4), (near, 3.0)):
        for _ in range(4):
            driver.window(0.3, error=0.05, noise=1.0, length=length)
        for _ in range(8):
            driver.window(-0.2, error=0.05, noise=1.0, length=length)
    assert far.phase is Phase.SEARCH
    assert far.rate >= 2.0**8
    assert near.phase is Phase.STEER


def test_a_search_that_ends_goes_back_by_as_much_as_the_loss_rises():
    rates = []
    for length in (1.0, 100.0):
        driver = Driver()
        for value in (9.0, 8.0, 7.0):
            driver.window(0.8, value=value, noise=0.1)
        rates.append(driver.window(-0.8, value=6.0, noise=0.1, length=length))
        assert driver.phase is Phase.STEER
    assert rates[0] == 0.5
    assert rates[1] == 1.0 / 16.0


@pytest.mark.parametrize(("alignment", "slope"), [(0.3, -1.0), (-0.8, 0.0)])
def test_the_same_share_of_a_run_changes_the_rate_alike_however_long(alignment, slope):
    factors = []
    for scale in (1, 4):
        driver = Driver(anneal=True)
        for i, a in enumerate((0.8, 0.8, -0.8)):
            driver.window(a, num_steps=8 * scale, value=9.0 - i)
        for _ in range(8):
            driver.window(0.3, num_steps=6 * scale, value=5.0)
        before = driver.rate
        for i in range(1, 4):  # audits of less than 1/16 of the run
            driver.window(alignment, num_steps=4 * scale, value=5.0 + slope * i)
        factors.append(driver.rate / before)
    assert factors[0] > 1.1 if alignment > 0.0 else factors[0] < 0.9
    np.testing.assert_allclose(factors[0], factors[1], rtol=1e-5)


def progressed(**hyperparameters):
    """Returns a level that steers, after a loss that fell from 9 to 1 without noise."""
    driver = Driver(**hyperparameters)
    for alignment, value in ((0.8, 9.0), (0.8, 5.0), (-0.2, 1.0)):
        driver.window(alignment, value=value)
    assert driver.phase is Phase.STEER
    return driver


def factor_at(rise, *, value=1.0, noise=0.01, error=0.0, **hyperparameters):
    """By what an audit that tells such a rise moves the rate of a level that steers."""
    driver = progressed(**hyperparameters)
    for _ in range(12):
        driver.window(0.1, value=value, noise=noise)
    return driver.window(-0.2, value=value, noise=noise, error=error, length=rise / 0.2)


def test_the_rate_is_steered_to_where_the_loss_rises_as_progress_and_noise_allow():
    # 8 of 9 gained, deviation 0.0115 * 8 at least; 4 of 64 steps: averaged by a quarter
    allowed = 0.7 * (4 / 64) ** 0.5 * 8.0 * 0.1
    low, high = factor_at(0.1 * allowed), factor_at(100.0 * allowed)
    assert low > 1.0 > high
    np.testing.assert_allclose(low, 1.5 ** (0.5 * 4 * 4 / 64), rtol=1e-5)
    assert high > 1.5**-4.0


def test_more_noise_allows_more_rise_and_less_progress_less():
    usual = factor_at(2.0)
    assert usual < 1.0
    assert factor_at(2.0, noise=4.0) > usual
    assert factor_at(2.0, value=5.0) < usual


def test_without_a_schedule_less_rise_is_allowed():
    assert factor_at(2.0, anneal=True) < factor_at(2.0)


def test_at_the_floor_of_the_loss_the_rate_does_not_grow():
    driver = progressed()
    for _ in range(8):
        driver.window(0.1, value=1e-6)
    before = driver.rate
    for _ in range(10):
        driver.window(0.1, value=1e-6)
    assert driver.rate == before


def test_without_a_schedule_the_rate_falls_at_the_floor_of_the_loss():
    driver = progressed(anneal=True)
    for _ in range(12):
        driver.window(0.1, value=1e-6, num_steps=4)
    before = driver.rate
    driver.window(0.1, value=1e-6, num_steps=4)
    weight = 4 * 4 / driver.state.num_macro_steps
    assert weight < 1.0
    np.testing.assert_allclose(driver.rate / before, 1.5 ** (-0.5 * weight), rtol=1e-5)


def test_losses_that_come_after_audits_without_one_begin_the_record():
    driver = Driver()
    for alignment in (0.8, 0.8, -0.8, -0.2, -0.2):
        driver.window(alignment, value=None)
    assert driver.phase is Phase.STEER
    assert driver.state.num_windows == 0
    driver.window(-0.2, value=5.0, noise=1.0)
    state = driver.state
    assert (state.first_window_mean, state.best_window_mean) == (5.0, 5.0)
    assert state.avg_loss == 5.0
    for name in MacroScalars._fields:
        assert np.isfinite(getattr(state, name)), name


def test_without_a_loss_the_alignment_alone_steers():
    factors = {}
    for alignment in (-0.5, 0.1):
        driver = Driver()
        for a in (0.8, 0.8, -0.8):
            driver.window(a, value=None)
        assert driver.phase is Phase.STEER
        for _ in range(8):
            driver.window(alignment, value=None)
        factors[alignment] = driver.window(alignment, value=None)
    assert factors[-0.5] < 1.0 < factors[0.1]


def at(phase):
    """Returns a level in that phase."""
    driver = Driver()
    driver.tell()
    if phase is Phase.RESTARTED:
        driver.tell(verdict=REVERT, harm=True)
    if phase >= Phase.SEARCH:
        driver.window(0.8, noise=1.0)
        driver.window(0.8, noise=1.0)
    if phase is Phase.STEER:
        driver.window(-0.8, noise=1.0)
    assert driver.phase is phase
    return driver


# phase, alignment of one audit and its error, what becomes of rate and phase
TABLE = {
    "a start that is good": (Phase.START, 0.5, 0.0, 0.5**2, Phase.SEARCH),
    "a start that is bad": (Phase.START, -0.5, 0.0, 0.5**4, Phase.START),
    "a start that is unclear": (Phase.START, 0.1, 0.2, 4.0**0.5, Phase.SEARCH),
    "a second start that is good": (Phase.RESTARTED, 0.5, 0.0, 0.5**4, Phase.SEARCH),
    "a second that is bad": (Phase.RESTARTED, -0.5, 0.0, 0.5**4, Phase.RESTARTED),
    "a second that is unclear": (Phase.RESTARTED, 0.1, 0.2, 4.0**0.5, Phase.SEARCH),
    "a search that goes on": (Phase.SEARCH, 0.8, 0.0, 4.0, Phase.SEARCH),
    "a search that is over": (Phase.SEARCH, -0.8, 0.0, 0.5, Phase.STEER),
    "params that did not move": (Phase.START, 0.0, 0.0, 4.0, Phase.SEARCH),
}


@pytest.mark.parametrize(
    ("phase", "alignment", "error", "factor", "after"), TABLE.values(), ids=TABLE
)
def test_one_audit_moves_rate_and_phase_as_the_table_says(
    phase, alignment, error, factor, after
):
    driver = at(phase)
    moved = driver.window(alignment, error=error, noise=1.0, length=0.5)
    np.testing.assert_allclose(moved, factor, rtol=1e-5)
    assert driver.phase is after


@pytest.mark.parametrize("alignment", [-0.8, -0.2, 0.05, 0.2])
def test_one_audit_moves_a_rate_that_was_found_by_little(alignment):
    driver = at(Phase.STEER)
    assert 1.5**-4.0 <= driver.window(alignment) <= 1.5**0.5
    assert driver.phase is Phase.STEER


@pytest.mark.parametrize("phase", list(Phase))
def test_between_audits_nothing_moves(phase):
    driver = at(phase)
    rate = driver.rate
    for value in (1.0, 50.0, 0.1):
        driver.tell(value=value)
    assert (driver.rate, driver.phase) == (rate, phase)


@pytest.mark.parametrize("phase", list(Phase))
def test_a_rejected_step_moves_nothing_and_is_counted(phase):
    driver = at(phase)
    before = driver.state
    driver.tell(0.8, value=9.0, verdict=REVERT)
    assert driver.state.num_macro_held == before.num_macro_held + 1
    for name in MacroScalars._fields:
        if name != "num_macro_held":
            assert getattr(driver.state, name) == getattr(before, name), name


@pytest.mark.parametrize("phase", list(Phase))
def test_harm_cuts_the_rate_in_every_phase_and_empties_the_window(phase):
    driver = at(phase)
    before = driver.rate
    driver.tell(value=3.0, harm=True)
    is_begun = phase >= Phase.SEARCH
    assert driver.rate == before * (0.5 if is_begun else 0.5**4)
    assert driver.phase is (phase if is_begun else Phase.RESTARTED)
    assert driver.state.window_count == 1, "the loss of this step alone"
