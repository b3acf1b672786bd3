"""Rules of others that the benchmarks restate do what their papers say."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.benchmarks import benchmark

START = np.array([1.0, -2.0])
CURVATURE = np.array([1.0, 4.0])
SETTINGS = {
    "as it is": {},
    "everything": {
        "anneal_steps": 3,
        "start_steps": 1,
        "power": 2.0,
        "norm_decay": 0.5,
        "weight_decay": 20.0,
        "multiplier": 0.1,
    },
}


def quadratic(params):
    """Returns a loss with the least value 0, and its gradient."""
    return 0.5 * (CURVATURE * params**2).sum(), CURVATURE * params


def run(tx, num_steps, params=START):
    """Returns the params after every step on the quadratic, and the last state."""
    params, seen = jnp.asarray(params, jnp.float32), []
    tx = optax.with_extra_args_support(tx)
    state = tx.init(params)
    for _ in range(num_steps):
        value, grad = quadratic(params)
        updates, state = tx.update(grad, state, params, value=value)
        params = optax.apply_updates(params, updates)
        seen.append(np.asarray(params))
    return seen, state


def test_the_first_step_of_schedule_free_plus_is_polyaks():
    tx = benchmark("rate_free").schedule_free_plus()
    (y,), state = run(tx, 1)
    rate = 8.5 / (np.sqrt(np.pi / 2) * 9)  # the loss, over the L1 norm of (1, -8)
    np.testing.assert_allclose(y, [1 - rate, -2 + rate], rtol=1e-5)
    np.testing.assert_allclose(state.x, y, rtol=1e-6)


def plus(
    num_steps,
    multiplier=1.0,
    anneal_steps=0,
    start_steps=0,
    power=0.0,
    norm_decay=0.0,
    weight_decay=0.0,
):
    """Returns y after each step of ScheduleFree+, and the last x: in 64 bits."""
    x, y, z = START, START, START
    mean, square, norm, largest, total, seen = 0.0, 0.0, 0.0, 1e-8, 0.0, []
    for k in range(num_steps):
        value, g = quadratic(y)
        done = min(k / anneal_steps, 1.0) if anneal_steps else 0.0
        beta = 1 - np.exp((1 - done) * np.log(0.1) + done * np.log(0.035))
        norm = norm_decay * norm + (1 - norm_decay) * np.abs(g).sum()
        unbiased = np.sqrt(np.pi / 2) * norm / (1 - norm_decay ** (k + 1))
        rate = multiplier * max(0.0, value + beta * g @ (z - x)) / unbiased
        mean, square = 0.9 * mean + 0.1 * g, 0.95 * square + 0.05 * g**2
        direction = mean / (1 - 0.9 ** (k + 1))
        direction /= np.sqrt(square / (1 - 0.95 ** (k + 1))) + 1e-8
        z = z - rate**2 * weight_decay * y - rate * direction
        largest = max(largest, rate)
        share = 1.0
        if k >= start_steps:
            weight = (k + 1) ** power * largest**2
            total += weight
            share = weight / total
        x = (1 - share) * x + share * z
        y = beta * x + (1 - beta) * z
        seen.append(y)
    return seen, x


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
def test_schedule_free_plus_is_its_rule(setting):
    found, state = run(benchmark("rate_free").schedule_free_plus(**setting), 5)
    expected, x = plus(5, **setting)
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(state.x, x, rtol=2e-5, atol=1e-6)


def test_schedule_free_plus_stays_where_there_is_no_gradient():
    tx = benchmark("rate_free").schedule_free_plus()
    params = jnp.ones(2)
    updates, state = tx.update(jnp.zeros(2), tx.init(params), params, value=3.0)
    np.testing.assert_array_equal(updates, 0.0)
    np.testing.assert_array_equal(state.x, 1.0)


def test_zclip_is_its_rule():
    tx = benchmark("peers").zclip(alpha=0.9, threshold=2.5, warmup=4)
    state = tx.init(jnp.ones(2))
    direction = jnp.array([0.6, -0.8])
    for norm in (1.0, 2.0, 3.0, 2.0):
        updates, state = tx.update(norm * direction, state)
        np.testing.assert_allclose(updates, norm * direction, rtol=1e-5)
    np.testing.assert_allclose(state.mean, 2.0, rtol=1e-5)
    np.testing.assert_allclose(state.variance, 0.5, rtol=1e-5)
    updates, state = tx.update(10.0 * direction, state)
    clipped = 2.0 + 2.5 * 0.5**0.5 / (8.0 / 0.5**0.5 / 2.5)  # 2.39
    np.testing.assert_allclose(updates, clipped * direction, rtol=1e-4)
    np.testing.assert_allclose(state.mean, 0.9 * 2.0 + 0.1 * clipped, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "limit"),
    [
        ("skip_step", 2.0 + 6.0 * (2.0 / 3.0) ** 0.5),
        ("mad_step", 2.0 + 6.0 * 1.4826 * 0.5),
    ],
)
def test_a_rule_that_skips_has_its_limit(name, limit):
    tx = getattr(benchmark("peers"), name)(optax.sgd(1.0), window=4)
    state, grad = tx.init(jnp.ones(2)), jnp.array([0.6, -0.8])
    for value in (3.0, 2.0, 1.0, 2.0):
        updates, state = tx.update(grad, state, value=value)
        np.testing.assert_allclose(updates, -grad)
    below, _ = tx.update(grad, state, value=limit - 0.01)
    above, _ = tx.update(grad, state, value=limit + 0.01)
    np.testing.assert_allclose(below, -grad)
    np.testing.assert_allclose(above, 0.0)


def test_a_step_that_is_skipped_leaves_the_moments_as_they_were():
    tx = benchmark("peers").skip_step(optax.adam(0.1), window=4)
    state, grad = tx.init(jnp.ones(2)), jnp.array([0.6, -0.8])
    for value in (3.0, 2.0, 1.0, 2.0):
        _, state = tx.update(grad, state, value=value)
    before = state[2]
    updates, state = tx.update(jnp.nan * grad, state, value=2.0)
    np.testing.assert_array_equal(updates, 0.0)
    chex.assert_trees_all_equal(state[2], before)
    for _ in range(4):  # until the window has forgotten it
        updates, state = tx.update(grad, state, value=2.0)
        np.testing.assert_array_equal(updates, 0.0)
    updates, _ = tx.update(grad, state, value=2.0)
    assert jnp.all(updates != 0.0)


def test_the_average_of_dog_is_polynomial():
    tx = benchmark("rate_free").averaged(optax.sgd(0.1))
    (first, second, third), state = run(tx, 3)
    # weights 9 / (k + 8): 1, 9/10, 9/11
    expected = (2 / 11) * (0.1 * first + 0.9 * second) + (9 / 11) * third
    np.testing.assert_allclose(state.average, expected, rtol=1e-5)


def test_the_memory_of_ademamix_grows_linearly():
    decay = benchmark("peers").slow_decay(0.9, 0.999, 100)
    half_life = [np.log(0.5) / np.log(float(decay(k))) for k in (0, 25, 100, 200)]
    ends = np.log(0.5) / np.log([0.9, 0.999])
    expected = [ends[0], 0.75 * ends[0] + 0.25 * ends[1], ends[1], ends[1]]
    np.testing.assert_allclose(half_life, expected, rtol=1e-3)


def test_muon_takes_the_heads_of_attention_as_one_axis():
    params = {
        "embedding": jnp.ones((5, 4)),
        "attention": {
            "query": {"kernel": jnp.ones((4, 2, 3)), "bias": jnp.ones((2, 3))},
            "out": {"kernel": jnp.ones((2, 3, 4)), "bias": jnp.ones(4)},
        },
    }
    axes = benchmark("peers").matrices_of(params)
    assert tuple(axes["embedding"]) == (0, 1)
    assert tuple(axes["attention"]["query"]["kernel"]) == (0, (1, 2))
    assert tuple(axes["attention"]["out"]["kernel"]) == ((0, 1), 2)
    assert axes["attention"]["query"]["bias"] is None
    assert axes["attention"]["out"]["bias"] is None


def test_muon_moves_every_matrix_by_the_scale_of_adam():
    params = {"out": {"kernel": jnp.ones((2, 3, 6))}, "scale": jnp.ones(4)}
    grads = jax.tree.map(
        lambda p: jax.random.normal(jax.random.key(0), p.shape), params
    )
    tx = benchmark("peers").MUON.make(1.0, 10)
    updates, _ = tx.update(grads, tx.init(params), params)
    sizes = jax.tree.map(lambda u: float(jnp.sqrt(jnp.mean(u**2))), updates)
    # 6 singular values near 1 (Newton and Schulz leave them at 0.7 to 1.2), each
    # times 0.2 sqrt(6), among 36 entries
    assert sizes["out"]["kernel"] == pytest.approx(0.2, rel=0.3)
    nesterov = 0.9 * 0.1 / (1 - 0.9**2) + 1.0  # of Adam, at the first step
    assert sizes["scale"] == pytest.approx(nesterov, rel=1e-3)


def test_nadamw_has_the_setting_of_algoperf():
    peers = benchmark("peers")
    tx = peers.ALGOPERF.at(peers.ALGOPERF_RATE, 100)
    moved, _ = run(tx, 3)
    rates = peers.ALGOPERF_RATE * np.array([0.0, 0.5, 1.0])  # warm-up of two steps
    b1, b2 = 1.0 - 0.06733926164, 0.9955159689799007
    y, m, v = START, 0.0, 0.0
    for k, rate in enumerate(rates):
        _, g = quadratic(y)
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        ahead = b1 * m / (1 - b1 ** (k + 2)) + (1 - b1) * g / (1 - b1 ** (k + 1))
        step = ahead / (np.sqrt(v / (1 - b2 ** (k + 1))) + 1e-8)
        y = y - rate * (step + 0.08121616522670176 * y)
        np.testing.assert_allclose(moved[k], y, rtol=1e-6)


def test_a_peer_whose_package_is_missing_is_left_out():
    peers = benchmark("peers")
    assert peers.ADAMW.is_there
    assert peers.AURA._replace(package="optax").is_there
    assert not peers.AURA._replace(package="no_such_package").is_there
