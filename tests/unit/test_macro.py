"""The rule of the macro level, driven by audits that the tests make up."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import reference

import lalerg_optax as lo
from lalerg_optax._anchor import look_back
from lalerg_optax._search_rule import Phase
from lalerg_optax._sums import global_norm
from lalerg_optax._verdict import Audit, Verdict

ACCEPT, REVERT = jnp.int32(Verdict.ACCEPT), jnp.int32(Verdict.REVERT)


def make_audit(alignment=None, error=0.0, reach=0.0, is_restart=False):
    return Audit(
        is_taken=jnp.asarray(alignment is not None),
        alignment=jnp.float32(0.0 if alignment is None else alignment),
        alignment_error=jnp.float32(error),
        reach=jnp.float32(reach),
        is_restart=jnp.asarray(is_restart),
    )


class Driver:
    """A macro level and what it is told."""

    def __init__(self, **hyperparameters):
        self.tx = lo.scale_by_macro_rate(**hyperparameters)
        self.state = self.tx.init(jnp.ones(1))
        self._update = jax.jit(self.tx.update)

    @property
    def rate(self):
        return float(self.state.macro_rate)

    @property
    def phase(self):
        return Phase(int(self.state.phase))

    def tell(
        self, alignment=None, value=1.0, error=0.0, verdict=ACCEPT, harm=False, reach=0
    ):
        audit = make_audit(alignment, error, reach, is_restart=harm)
        _, self.state = self._update(
            jnp.ones(1),
            self.state,
            value=value,
            verdict=verdict,
            audit=audit,
            is_harmful=jnp.asarray(harm),
        )

    def window(self, alignment, num_steps=4, value=1.0, noise=0.0, error=0.0):
        """Takes steps, the last of them with an audit; returns the rate's factor."""
        before = self.rate
        for i in range(num_steps):
            is_last = i == num_steps - 1
            swing = noise if i % 2 else -noise
            self.tell(alignment if is_last else None, value + swing, error)
        return self.rate / before

    def end_search(self, value=1.0):
        self.window(0.8, value=value)
        self.window(0.8, value=value)
        self.window(-0.8, value=value)
        assert self.phase is Phase.STEER
        return self


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
            driver.window(0.8, error=error)
        assert driver.phase is Phase.SEARCH
        for _ in range(num_low):
            driver.window(0.1, error=error)
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
        assert driver.window(0.001, error=0.01) == 2.0
    assert driver.phase is Phase.SEARCH
    rate = driver.rate
    while driver.phase is Phase.SEARCH:
        rate = driver.rate
        driver.window(-0.05, error=0.01)
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
        driver.window(0.8, error=0.5)
    assert driver.phase is Phase.SEARCH
    np.testing.assert_allclose(driver.window(1e-3, error=0.5), 2.0, rtol=1e-6)
    assert driver.phase is Phase.SEARCH
    for _ in range(6):
        driver.window(-0.2, error=0.5)
    assert driver.phase is Phase.STEER


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
    assert factors[0] > 1.2 if alignment > 0.0 else factors[0] < 0.9
    np.testing.assert_allclose(factors[0], factors[1], rtol=1e-5)


def progressed(**hyperparameters):
    """Returns a level that steers, after a loss that fell from 9 to 1 without noise."""
    driver = Driver(**hyperparameters)
    for alignment, value in ((0.8, 9.0), (0.8, 5.0), (-0.2, 1.0)):
        driver.window(alignment, value=value)
    assert driver.phase is Phase.STEER
    return driver


def test_without_anneal_the_rate_falls_only_for_a_loss_that_is_worse():
    driver = progressed()
    for _ in range(6):
        np.testing.assert_allclose(driver.window(-0.2, value=1.0), 1.0, rtol=1e-6)
    assert driver.state.avg_alignment < 0.0
    assert driver.window(-0.2, num_steps=8, value=2.0) < 1.0


def test_with_anneal_the_rate_falls_where_the_loss_stalls_and_the_slope_leads_back():
    driver = progressed(anneal=True)
    for _ in range(3):
        driver.window(-0.2)
    assert driver.state.avg_alignment < 0.0
    assert driver.window(-0.2, num_steps=8) < 1.0
    for _ in range(3):
        driver.window(0.3)
    assert driver.state.avg_alignment > 0.0
    np.testing.assert_allclose(driver.window(0.3), 1.0, rtol=1e-6)


def test_steps_beyond_the_bottom_by_more_than_the_best_led_to_it_lower_the_rate():
    driver = progressed()
    for _ in range(4):
        driver.window(-0.9, error=0.01)
    assert driver.window(-0.9, error=0.01) < 1.0


@pytest.mark.parametrize("alignment", [-0.25, -0.4])
def test_noise_as_large_as_all_progress_steers_by_the_alignment_alone(alignment):
    driver = progressed()
    for _ in range(40):
        driver.window(alignment, noise=40.0)
    assert driver.window(alignment, noise=40.0) < 1.0
    for _ in range(20):
        driver.window(1e-3, noise=40.0, error=0.1)
    assert driver.window(1e-3, noise=40.0, error=0.1) > 1.0, "a schedule is to come"


@pytest.mark.parametrize("phase", list(Phase))
def test_harm_cuts_the_rate_in_every_phase_and_empties_the_window(phase):
    driver = Driver()
    driver.tell()
    if phase is Phase.RESTARTED:
        driver.tell(verdict=REVERT, harm=True)
    if phase >= Phase.SEARCH:
        driver.window(0.8)
        driver.window(0.8)
    if phase is Phase.STEER:
        driver.window(-0.8)
    assert driver.phase is phase
    before = driver.rate
    driver.tell(value=3.0, harm=True)
    is_begun = phase >= Phase.SEARCH
    assert driver.rate == before * (0.5 if is_begun else 0.5**4)
    assert driver.phase is (phase if is_begun else Phase.RESTARTED)
    assert driver.state.window_count == 1, "the loss of this step alone"


@pytest.mark.parametrize("anneal", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_made_up_audits_in_every_state_move_the_rate_as_in_the_reference(seed, anneal):
    rng = np.random.default_rng(seed)
    driver, macro = Driver(anneal=anneal), reference.MacroRate(anneal=anneal)
    phases = set()
    level = 8.0
    for step in range(500):
        if step % 125 == 0:  # audits of another kind
            mean, spread, error = rng.choice([-0.3, 0.0, 0.1, 0.5]), 0.2, rng.random()
        has_audit, harm = rng.random() < 0.25, rng.random() < 0.01
        alignment = float(np.float32(np.clip(rng.normal(mean, spread), -1.0, 1.0)))
        noise = float(np.float32(0.2 * error))
        level *= 1.01 if rng.random() < 0.3 else 0.99
        value = float(np.float32(level + rng.normal(0.0, 0.1)))
        driver.tell(alignment if has_audit else None, value, noise, harm=harm)
        audit = reference.Audit(alignment, noise) if has_audit else False
        macro.update(np.ones(1), np.ones(1), value, 0, audit, is_harmful=harm)
        phases.add(driver.phase)
        assert driver.phase == macro.phase, step
        np.testing.assert_allclose(driver.rate, macro.macro_rate, rtol=1e-3)
    assert {Phase.SEARCH, Phase.STEER} <= phases


def regulated():
    return lo.error_regulate(lo.scale_by_macro_rate(), audit=True)


def run_looks(cosines, num_before=5, reach=1e-3):
    """Steps away from the anchor, then looks back with gradients of these cosines."""
    tx = regulated()
    update = jax.jit(tx.update)
    start = jnp.array([1.0, 0.0])
    there = start + jnp.array([0.0, reach])
    state = tx.init(start)
    for _ in range(num_before - 3):
        _, state = update(jnp.array([1.0, 0.0]), state, start, value=1.0)
    for cosine in cosines:
        grads = -jnp.array([np.sqrt(1.0 - cosine**2), cosine], jnp.float32)
        _, state = update(grads, state, there, value=1.0)
    return state


def test_two_looks_say_nothing_yet():
    state = run_looks([0.5, 0.6])
    assert state.num_looks == 2
    assert state.num_audits_passed == 0
    np.testing.assert_array_equal(state.anchor, [1.0, 0.0])


def test_looks_that_agree_move_the_anchor_and_tell_their_mean_and_error():
    state = run_looks([0.5, 0.6, 0.55, 0.45])
    assert state.num_audits_passed == 1
    assert state.num_looks == 0
    # each weighs as much as the steps that it looks back on: 2 to 5
    weights = np.arange(2.0, 6.0) / 14.0
    looks = np.array([0.5, 0.6, 0.55, 0.45])
    mean = weights @ looks
    np.testing.assert_allclose(state.alignment, mean, rtol=1e-5)
    error = np.sqrt(4.0 / 3.0 * np.sum((weights * (looks - mean)) ** 2))
    np.testing.assert_allclose(state.alignment_error, error, rtol=1e-4)
    assert state.inner_state.macro_rate == 0.5**2


def test_looks_that_disagree_go_on_and_the_start_is_taken_in_the_end():
    looks = [0.5, -0.5] * 8
    assert run_looks(looks[:-1]).num_looks == 15
    state = run_looks(looks)
    assert state.num_looks == 0
    assert state.verdict == Verdict.ACCEPT
    assert state.inner_state.phase == Phase.SEARCH, "unclear, and no failure"


def test_looks_that_agree_on_uphill_go_back_to_the_start():
    state = run_looks([-0.5, -0.6, -0.55])
    assert state.verdict == Verdict.REVERT
    assert state.inner_state.macro_rate == 0.5**4
    np.testing.assert_array_equal(state.anchor, [1.0, 0.0])


def test_a_start_that_leads_far_from_the_params_goes_back_whatever_it_saw():
    state = run_looks([0.9], reach=10.0)
    assert state.verdict == Verdict.REVERT
    np.testing.assert_allclose(state.inner_state.macro_rate, 1e-4, rtol=1e-3)


def test_without_a_level_that_lowers_the_rate_a_start_is_not_repeated_for_ever():
    """Around an optimizer that no audit reaches."""
    tx = lo.error_regulate(lo.scale_by_micro_rate(), audit=True)
    params, state, update = jnp.ones(4), tx.init(jnp.ones(4)), jax.jit(tx.update)
    rng = np.random.default_rng(0)
    for _ in range(300):
        grads = jnp.asarray(rng.standard_normal(4), jnp.float32)
        updates, state = update(grads, state, params, value=1.0)
        params = lo.apply_updates(params, updates, state)
    assert state.num_reverted <= 2 * 9
    assert state.num_accepted > 250


def test_a_zero_gradient_tells_nothing():
    tx = regulated()
    state, update = tx.init(jnp.ones(2)), jax.jit(tx.update)
    for _ in range(40):
        _, state = update(jnp.zeros(2), state, jnp.ones(2), value=0.0)
    assert state.num_looks == 0
    assert state.num_audits_passed == 0
    assert state.inner_state.macro_rate == 1.0


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize(("size", "step"), [(1e15, 1e3), (1e-15, 1e-10), (1.0, 1e-3)])
def test_a_look_back_is_exact_for_large_and_small_numbers(size, step, sign):
    grads, anchor = jnp.full(4, sign * size), jnp.full(4, step)
    is_seen, alignment, reach = look_back(
        grads, global_norm(grads), anchor, jnp.zeros(4)
    )
    assert is_seen
    np.testing.assert_allclose(alignment, sign, rtol=1e-5)
    np.testing.assert_allclose(reach, 1.0, rtol=1e-5)
