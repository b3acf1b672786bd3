"""What is added to the moments, what they may be, and how far they can lead."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.drive import descend, drive, stay, updates_of
from helpers.moments import NUM_STEPS, SUM, all_updates, assert_close, gradients

import lalerg_optax as lo
from lalerg_optax._moments import (
    MomentRule,
    is_mean_of_squares,
    memory,
    product_of_decays,
    square,
    square_of,
)


@pytest.mark.parametrize("search", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("moment", "hit"),
    [
        ("mu", np.nan),
        ("nu", np.nan),
        ("nu", -1.0),
        pytest.param("mu", -np.inf, marks=pytest.mark.slow),
        pytest.param("nu", np.inf, marks=pytest.mark.slow),
    ],
)
def test_a_moment_that_no_gradient_can_have_made_starts_anew(moment, hit, search):
    tx, params = lo.lalerg(1e-2, search=search), jnp.array([1.0, -2.0, 3.0])
    state = tx.init(params)

    params, state = descend(tx, params, 20, state)
    micro, *rest = state.inner_state
    damaged = getattr(micro, moment).at[1].set(hit)
    state = state._replace(inner_state=(micro._replace(**{moment: damaged}), *rest))
    before = params[1]
    params, state = descend(tx, params, 2, state)
    assert np.all(np.isfinite(params))
    assert np.all(np.isfinite(state.inner_state[0].mu))
    assert np.all(state.inner_state[0].nu >= 0.0)
    assert params[1] != before
    params, _ = descend(tx, params, 800, state)
    assert abs(params[1]) < 0.05


@pytest.mark.parametrize(
    ("b1", "b2"),
    [
        (0.9, 0.999),
        (0.9, 0.99),
        (0.9, 0.81),
        (0.95, 0.5),
        (0.0, 0.99),
        (0, 0),
    ],
)
def test_no_gradient_makes_moments_that_are_taken_for_a_hit(b1, b2):
    rng = np.random.default_rng(0)
    grads = rng.standard_t(1, size=(400, 64)) * (rng.random((400, 64)) < 0.1)
    grads[:, :8] = 10.0 ** rng.uniform(-20, 10, size=(400, 8))
    grads[:, 8] = np.where(np.arange(400) < 200, 0.0, 1e9)
    grads = jnp.asarray(grads, jnp.float32)
    ours = lo.scale_by_micro_rate(b1, b2, gradient_share=0.0)
    plain = optax.scale_by_adam(b1, b2)

    seen, expected = (
        drive(tx, grads[0], (None, grads), see=updates_of, apply_updates=stay)[2]
        for tx in (ours, plain)
    )
    np.testing.assert_allclose(seen, expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("moment", ["mu", "nu"])
def test_a_moment_hit_in_a_rare_row_moves_its_params_by_little(moment):
    tx = lo.scale_by_micro_rate()
    params = jnp.zeros(2)
    state = tx.init(params)
    for _ in range(30):
        _, state = tx.update(jnp.array([1.0, 0.5]), state)
    hit = {"mu": 3e38, "nu": -state.nu[0]}[moment]
    state = state._replace(**{moment: getattr(state, moment).at[0].set(hit)})
    moved = jnp.zeros(2)
    for _ in range(200):  # no gradient comes by any more
        updates, state = tx.update(jnp.array([0.0, 0.5]), state)
        moved += jnp.abs(updates)
    assert moved[0] < 20.0
    assert moved[1] > 100.0
    updates, _ = tx.update(jnp.array([1.0, 0.5]), state)
    assert 0.0 < updates[0] < 20.0


@pytest.mark.parametrize("per_tensor", [False, True])
def test_a_sum_cannot_grow_beyond_what_float32_holds(per_tensor):
    tx = lo.scale_by_micro_rate(**SUM, gradient_share=1, per_tensor=per_tensor)
    grads = jnp.full((20, 1), 1.5e19)
    _, state = all_updates(tx, grads)
    assert np.all(np.isfinite(state.nu))
    assert np.all(state.nu > 3e38)


def test_a_decay_that_is_1_in_float32_makes_a_sum():
    tx = lo.scale_by_micro_rate(b2=1.0 - 1e-9, bias_correction=False)
    grads = jnp.array([1.0, 3.0])
    _, state = tx.update(grads, tx.init(grads))
    np.testing.assert_array_equal(state.nu, grads**2)


@pytest.mark.parametrize("bad", [-1.0, jnp.nan, jnp.inf])
def test_a_second_moment_that_was_hit_starts_anew_at_its_initial_value(bad):
    tx = lo.scale_by_micro_rate(**SUM, gradient_share=1, initial_scale=0.25)
    params = jnp.ones(2)
    state = tx.init(params)._replace(nu=jnp.array([bad, 4.0]))
    _, state = tx.update(jnp.array([1.0, 1.0]), state)
    np.testing.assert_allclose(state.nu, [1.25, 5.0], rtol=1e-6)


def largest(chosen, size=1):
    """Returns the bound of the docstring."""
    b1, b2 = chosen.get("b1", 0.9), chosen.get("b2", 0.99)
    share = chosen.get("gradient_share", 0.4)
    b2, last = b2 if isinstance(b2, tuple) else (b2, b2)
    weight = 1.0 if b2 == 1 else 1.0 - min(max(b2, 1.0 - 2.0 / NUM_STEPS), last)
    mean = (1.0 - share) * (1.0 - b1) / np.sqrt(1.0 - b1**2 / b2)
    return np.sqrt(size / weight) * (mean + share)


BOUNDED = {
    "sum": SUM,
    "sum from 0.1": SUM | {"initial_scale": 0.1, "b1": 0.5},
    "biased": {"bias_correction": False},
    "unbiased": {},
    "growing memory": {"b1": 0.5, "b2": (0.7, 0.9)},
    "grown memory": {"b1": 0.3, "b2": (0.5, 0.8)},
    "short memory": {"b1": 0.3, "b2": 0.2, "gradient_share": 0.0},
    "per tensor": {"per_tensor": True},
    "per tensor, sum": SUM | {"per_tensor": True},
}


@pytest.mark.parametrize("chosen", BOUNDED.values(), ids=BOUNDED)
def test_no_gradients_make_an_update_larger_than_the_bound(chosen):
    """The worst ones grow as the proof says: equality in Cauchy and Schwarz."""
    size = 64 if "per_tensor" in chosen else 1
    b1, b2 = chosen.get("b1", 0.9), chosen.get("b2", 0.99)
    b2 = b2[0] if isinstance(b2, tuple) else b2
    share = chosen.get("gradient_share", 0.4)
    tx = lo.scale_by_micro_rate(**chosen, eps=0.0)
    grads = np.zeros((NUM_STEPS, 3, size), np.float32)
    grads[:, 0, 0] = (b1 / b2) ** (NUM_STEPS - 1.0 - np.arange(NUM_STEPS))
    grads[-1, 1, 0] = 1e4  # all of it in one step
    grads[:, 2] = np.random.default_rng(1).standard_t(1.2, (NUM_STEPS, size))
    bound = largest(chosen, size)
    shares = []
    for sequence in np.swapaxes(grads, 0, 1):
        updates, _ = all_updates(tx, jnp.asarray(sequence))
        shares.append(float(jnp.max(jnp.abs(updates))) / bound)
    assert max(shares) <= 1.0 + 1e-5
    # and it is no idle bound: where one of its two terms is all, it is reached
    expected = 0.99 if share in (0.0, 1.0) else 0.4
    assert max(shares) > expected * (0.3 if chosen.get("initial_scale") else 1.0)


@pytest.mark.parametrize("chosen", BOUNDED.values(), ids=BOUNDED)
def test_a_first_moment_that_no_gradients_can_have_made_moves_nothing(chosen):
    tx = lo.scale_by_micro_rate(**chosen)
    grads = jnp.asarray(np.random.default_rng(2).standard_normal((30, 4)), jnp.float32)
    updates, state = all_updates(tx, grads)
    assert np.all(updates[-1] != 0.0)
    hit = state._replace(mu=state.mu.at[1].set(1e6))
    after, _ = tx.update(grads[0], hit)
    assert after[1] == 0.0
    assert np.all(after[jnp.array([0, 2, 3])] != 0.0)


def test_a_pair_of_decays_averages_squares_over_half_of_all_steps():
    grads = gradients()
    tx = lo.scale_by_micro_rate(b2=(0.5, 0.9), eps=1e-6, gradient_share=1.0)
    updates, state = all_updates(tx, grads)
    g = np.asarray(grads["rows"], float)
    nu, product = np.zeros(g.shape[1:]), 1.0
    for t in range(1, NUM_STEPS + 1):
        decay = min(max(0.5, 1.0 - 2.0 / t), 0.9)  # until t = 4, and from t = 20 on
        product *= decay
        nu = decay * nu + (1.0 - decay) * g[t - 1] ** 2
        expected = g[t - 1] / (np.sqrt(nu / (1.0 - product)) + 1e-6)
        np.testing.assert_allclose(updates["rows"][t - 1], expected, rtol=2e-5)
    np.testing.assert_allclose(state.nu["rows"], nu, rtol=1e-5)


def test_a_pair_of_equal_decays_is_one_decay():
    expected, _ = all_updates(lo.scale_by_micro_rate(b2=0.9), gradients())
    found, _ = all_updates(lo.scale_by_micro_rate(b2=(0.9, 0.9)), gradients())
    assert_close(found, expected)


@pytest.mark.parametrize("b2", [(0.99, 0.999), (0.0, 0.9999), (0.9, 0.95)])
def test_the_bias_of_a_memory_that_grows_is_corrected(b2):
    """Of equal gradients, the mean of squares is what the square is."""
    tx = lo.scale_by_micro_rate(b1=0.0, b2=b2, eps=0.0)
    grads = jnp.ones((2000, 1))
    updates, _ = all_updates(tx, grads)
    np.testing.assert_allclose(updates, 1.0, rtol=1e-5)


def test_a_memory_does_not_grow_while_steps_are_held():
    tx = lo.scale_by_micro_rate(b2=(0.5, 0.9))
    grads = jnp.ones(2)
    state = tx.init(grads)._replace(micro_count=jnp.int32(15), nu=jnp.ones(2))
    _, held = tx.update(grads * jnp.nan, state)
    _, taken = tx.update(0.0 * grads, held)
    np.testing.assert_allclose(taken.nu, 1.0 - 2.0 / 16.0, rtol=1e-6)


def test_decays_of_a_pair_may_be_traced():
    def nu_after(last):
        tx = lo.scale_by_micro_rate(b2=(0.5, last))
        return all_updates(tx, gradients())[1].nu["bias"]

    expected = nu_after(0.8)
    np.testing.assert_allclose(jax.jit(nu_after)(0.8), expected, rtol=1e-5)


# ---- the numbers by themselves -------------------------------------------------------


def rule(b2, last_b2=None, **chosen):
    usual = dict.fromkeys(MomentRule._fields, 0.0) | {"b1": 0.9, "per_tensor": False}
    last = b2 if last_b2 is None else last_b2
    return MomentRule(**usual | {"b2": b2, "last_b2": last} | chosen)


@pytest.mark.parametrize("pair", [(0.5, 0.9), (0.0, 0.75), (0.99, 0.999), (0.9, 0.91)])
def test_the_product_of_growing_decays_is_that_of_all_of_them(pair):
    numbers = rule(*pair)
    steps = np.arange(1.0, 4000.0)
    decays = [memory(numbers, jnp.float32(t))[0] for t in (1, 10, 100, 5000)]
    assert decays == sorted(decays)
    np.testing.assert_allclose([decays[0], decays[-1]], pair, rtol=1e-6)
    wanted = np.cumprod(np.clip(1.0 - 2.0 / steps, *pair))
    found = jax.vmap(lambda t: product_of_decays(numbers, t))(jnp.float32(steps))
    np.testing.assert_allclose(1.0 - found, 1.0 - wanted, rtol=1e-5)


@pytest.mark.parametrize(("b2", "wanted"), [(0.9, (0.9, 0.1)), (1, (1, 1.0))])
def test_a_decay_of_1_adds_squares_up(b2, wanted):
    np.testing.assert_allclose(memory(rule(b2), jnp.float32(7.0)), wanted, rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_mean_of_squares_is_neither_negative_nor_infinite_nor_nan(dtype):
    entries = jnp.array(
        [0.0, 1e-7, 5e4, -1e-7, -1.0, jnp.inf, -jnp.inf, jnp.nan], dtype
    )
    assert is_mean_of_squares(entries).tolist() == [True] * 3 + [False] * 5


def test_a_square_is_that_of_the_magnitude_and_wide_enough():
    assert square(jnp.array(3.0 - 4.0j), jnp.float32) == 25.0
    assert square(jnp.array(1e3, jnp.float16), jnp.float32) == 1e6
    tensor = jnp.array([1.0, 3.0])
    assert square_of(rule(0.9, per_tensor=True), tensor, jnp.float32) == 5.0
    empty = square_of(rule(0.9, per_tensor=True), jnp.zeros((0, 2)), jnp.float32)
    assert empty == 0.0
