"""The rule of the macro level, driven by audits that the tests make up."""

import jax.numpy as jnp
import numpy as np
import pytest

import lalerg_optax as lo
from lalerg_optax._anchor import Audit, global_norm, look_back
from lalerg_optax._judge import Verdict

ACCEPT, REVERT = jnp.int32(Verdict.ACCEPT), jnp.int32(Verdict.REVERT)


def make_audit(alignment=None, is_restart=False):
    return Audit(
        is_taken=jnp.asarray(alignment is not None),
        alignment=jnp.float32(0.0 if alignment is None else alignment),
        is_restart=jnp.asarray(is_restart),
    )


class Driver:
    """A macro level and what it is told."""

    def __init__(self, **hyperparameters):
        self.tx = lo.scale_by_macro_rate(**hyperparameters)
        self.state = self.tx.init(jnp.ones(1))

    @property
    def rate(self):
        return float(self.state.macro_rate)

    def tell(self, alignment=None, value=1.0, verdict=ACCEPT):
        audit = make_audit(alignment, is_restart=bool(verdict == REVERT))
        _, self.state = self.tx.update(
            jnp.ones(1), self.state, value=value, verdict=verdict, audit=audit
        )

    def window(self, alignment, num_steps=4, value=1.0, noise=0.0):
        """Takes steps, the last of them with an audit; returns the rate's factor."""
        before = self.rate
        for i in range(num_steps):
            is_last = i == num_steps - 1
            swing = noise if i % 2 else -noise
            self.tell(alignment if is_last else None, value + swing)
        return self.rate / before

    def end_search(self, value=1.0):
        self.window(0.8, value=value)
        self.window(0.8, value=value)
        self.window(-0.8, value=value)
        assert not self.state.is_searching
        return self


@pytest.mark.parametrize("growth_factor", [2.0, 4.0])
def test_a_good_audit_makes_the_rate_grow_by_the_power_of_its_alignment(growth_factor):
    driver = Driver(growth_factor=growth_factor)
    driver.window(0.3)
    assert driver.window(0.8) == growth_factor, "c begins anew after the first one"
    average = 0.5 * 0.8 + 0.5 * 0.4
    np.testing.assert_allclose(
        driver.window(0.4), growth_factor ** (average / 0.8), rtol=1e-6
    )
    assert driver.state.is_searching


@pytest.mark.parametrize(("has_failed", "power"), [(False, 2), (True, 4)])
def test_the_first_good_audit_cuts_and_deeper_after_a_restart(has_failed, power):
    driver = Driver(backoff_factor=0.75)
    if has_failed:
        driver.tell(verdict=REVERT)
        driver.tell(verdict=REVERT)
        np.testing.assert_allclose(driver.rate, 0.75**4, rtol=1e-6)
    np.testing.assert_allclose(driver.window(0.5), 0.75**power, rtol=1e-6)
    assert driver.state.is_searching
    assert driver.state.has_improved


@pytest.mark.parametrize(("alignment", "slope"), [(0.8, -1.0), (-0.8, 0.0)])
def test_the_same_share_of_a_run_changes_the_rate_alike_however_long(alignment, slope):
    factors = []
    for scale in (1, 4):
        driver = Driver(anneal=True)
        for a in (0.8, 0.8, -0.8):
            driver.window(a, num_steps=8 * scale, value=5.0)
        for _ in range(8):
            driver.window(0.8, num_steps=6 * scale, value=5.0)
        before = driver.rate
        for i in range(1, 4):  # audits of less than 1/16 of the run
            driver.window(alignment, num_steps=4 * scale, value=5.0 + slope * i)
        factors.append(driver.rate / before)
    assert factors[0] > 1.5 if alignment > 0.0 else factors[0] < 0.9
    np.testing.assert_allclose(factors[0], factors[1], rtol=1e-5)


@pytest.mark.parametrize("alignment", [-0.8, 0.8])
def test_without_anneal_the_rate_falls_only_for_a_loss_that_is_worse(alignment):
    driver = Driver().end_search(value=1.0)
    for _ in range(6):
        assert driver.window(alignment, value=1.0) == 1.0
    assert driver.window(-0.8, num_steps=8, value=1.1, noise=0.5) == 1.0, "noise"
    driver.window(-0.8)
    assert driver.state.avg_alignment < 0.0
    assert driver.window(-0.8, num_steps=8, value=2.0, noise=0.1) < 1.0


def test_with_anneal_the_rate_falls_where_the_loss_stalls_and_the_slope_leads_back():
    driver = Driver(anneal=True).end_search()
    driver.window(-0.8)
    assert driver.state.avg_alignment < 0.0
    np.testing.assert_allclose(driver.window(-0.8, num_steps=8), 1 / 1.5, rtol=1e-6)
    driver.window(0.8)
    driver.window(0.8)
    assert driver.state.avg_alignment > 0.0
    assert driver.window(0.8) == 1.0, "no new best: no reason to grow"


@pytest.mark.parametrize("anneal", [False, True])
def test_negative_alignments_never_make_the_rate_grow_by_much(anneal):
    driver = Driver(anneal=anneal).end_search(value=10.0)
    rng = np.random.default_rng(0)
    driver.window(-0.8, value=9.9)
    assert driver.state.avg_alignment <= 0.0
    for i in range(40):  # the loss falls and falls
        factor = driver.window(-rng.uniform(0.01, 1.0), value=9.0 - 0.2 * i)
        assert factor <= 1.5**0.5 * (1.0 + 1e-6)


def regulated():
    return lo.error_regulate(lo.scale_by_macro_rate(), audit=True)


def run_looks(products_of_looks, num_before=5):
    """Steps from 0 to 1 in all entries, then looks back with these gradients."""
    tx = regulated()
    start, there = jnp.zeros(4), jnp.ones(4)
    state = tx.init(start)
    for _ in range(num_before):
        grads = jnp.ones(4)
        _, state = tx.update(grads, state, start, value=1.0)
    for products in products_of_looks:  # of gradient and way back
        grads = -jnp.asarray(products, jnp.float32)
        _, state = tx.update(grads, state, there, value=1.0)
    return state


UNCLEAR, CLEAR = [1.0, -1.0, 1.0, -0.9], [1.0, 1.0, 1.0, 0.5]


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_first_look_that_says_nothing_keeps_anchor_and_rate(sign):
    state = run_looks([sign * np.array(UNCLEAR)])
    assert state.verdict == Verdict.ACCEPT
    assert state.num_looks == 1
    assert state.num_audits_passed == 0
    assert state.inner_state.macro_rate == 1.0
    np.testing.assert_array_equal(state.anchor, np.zeros(4))


def test_a_first_look_that_is_clearly_negative_reverts():
    state = run_looks([-np.array(CLEAR)])
    assert state.verdict == Verdict.REVERT
    assert state.inner_state.macro_rate == 0.5**4
    np.testing.assert_array_equal(state.anchor, np.zeros(4))


@pytest.mark.parametrize("num_unclear", [0, 1, 2])
def test_a_look_that_is_clearly_positive_moves_the_anchor(num_unclear):
    state = run_looks([np.array(UNCLEAR)] * num_unclear + [np.array(CLEAR)])
    assert state.num_audits_passed == 1
    assert state.num_looks == 0
    assert state.inner_state.macro_rate == 0.5**2
    np.testing.assert_array_equal(state.anchor, np.ones(4))


def test_many_looks_that_say_little_alone_say_it_together():
    """Each tells 0.7 standard errors, and so do not two of them, but three."""
    look = [1.0, 1.0, -1.0, 0.2]
    significance = np.sum(look) / np.linalg.norm(look)
    assert 2 * significance < 0.99 * 2**0.5 < 0.99 * 3**0.5 < 3 * significance
    assert run_looks([look] * 2).num_looks == 2
    assert run_looks([look] * 3).num_audits_passed == 1


def test_a_zero_gradient_before_the_first_good_audit_does_not_move_the_anchor():
    state = run_looks([np.zeros(4)])
    assert state.verdict == Verdict.ACCEPT
    assert state.num_audits_passed == 0
    np.testing.assert_array_equal(state.anchor, np.zeros(4))


def test_a_zero_gradient_between_two_looks_takes_nothing_from_what_they_say():
    look = [1.0, 1.0, -1.0, 0.2]
    assert run_looks([look, np.zeros(4), look]).num_looks == 2
    assert run_looks([look, np.zeros(4), look, look]).num_audits_passed == 1


def test_a_revert_forgets_what_looks_from_elsewhere_said():
    tx = regulated()
    state = tx.init(jnp.zeros(4))
    for _ in range(5):
        _, state = tx.update(jnp.ones(4), state, jnp.zeros(4), value=1.0)
    unclear = -jnp.asarray(UNCLEAR, jnp.float32)
    _, state = tx.update(unclear, state, jnp.ones(4), value=1.0)
    assert state.num_looks == 1
    for _ in range(2):  # outliers
        _, state = tx.update(1e6 * jnp.ones(4), state, jnp.ones(4), value=1.0)
    assert state.verdict == Verdict.REVERT
    assert state.num_looks == 0
    assert state.evidence == 0.0


def test_the_search_goes_on_until_a_good_alignment_is_known():
    """Else the first one of all, however small, would count as the best."""
    driver = Driver()
    driver.window(0.8)  # the first good audit: what is good is learnt anew
    assert driver.window(-0.8) == 0.5
    assert driver.state.is_searching
    driver.window(0.8)
    driver.window(0.8)
    driver.window(-0.8)
    assert not driver.state.is_searching
    assert driver.window(0.001, value=0.5) <= 1.5**0.5 * 1.01


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize(("size", "step"), [(1e15, 1e6), (1e-15, 1e-10), (1.0, 1e-3)])
def test_a_look_back_is_significant_though_its_squares_are_no_float32(size, step, sign):
    grads, anchor = jnp.full(4, sign * size), jnp.full(4, step)
    seen = look_back(grads, global_norm(grads), anchor, jnp.zeros(4))
    is_seen, alignment, significance = map(float, seen)
    assert is_seen
    np.testing.assert_allclose(alignment, sign, rtol=1e-5)
    assert np.isfinite(significance)
    assert sign * significance > 1.9
