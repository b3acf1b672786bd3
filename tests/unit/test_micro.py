"""The micro level is AdaGrad, RMSProp or Adam, or one rate a tensor, as told."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.drive import runner
from helpers.moments import NUM_STEPS, SUM, all_updates, assert_close, gradients

import lalerg_optax as lo

ONE_MOMENT = {"eps": 0, "gradient_share": 1}  # with eps under the root
RMS = ONE_MOMENT | {"bias_correction": False}

# name: arguments of the micro level, the rule of Optax that they make
RULES = {
    "AdaGrad": (
        SUM | ONE_MOMENT | {"eps_root": 1e-7, "initial_scale": 0.1},
        optax.scale_by_rss(),
    ),
    "AdaGrad from 0": (
        SUM | ONE_MOMENT | {"eps_root": 1e-4},
        optax.scale_by_rss(initial_accumulator_value=0.0, eps=1e-4),
    ),
    "AdaGrad from 0 without eps": (
        SUM | ONE_MOMENT,
        optax.scale_by_rss(initial_accumulator_value=0.0, eps=0.0),
    ),
    "RMSProp": (RMS | {"b2": 0.9, "eps_root": 1e-8}, optax.scale_by_rms()),
    "RMSProp from 1": (
        RMS | {"b2": 0.95, "eps_root": 1e-4, "initial_scale": 1.0},
        optax.scale_by_rms(0.95, 1e-4, initial_scale=1.0),
    ),
    "RMSProp, eps outside": (
        RMS | {"b2": 0.9, "eps": 1e-8},
        optax.scale_by_rms(eps_in_sqrt=False),
    ),
    "RMSProp, unbiased": (
        ONE_MOMENT | {"b2": 0.9, "eps_root": 1e-8},
        optax.scale_by_rms(bias_correction=True),
    ),
    "RMSProp, unbiased, eps outside": (
        {"b2": 0.9, "eps": 1e-3, "gradient_share": 1},
        optax.scale_by_rms(eps=1e-3, eps_in_sqrt=False, bias_correction=True),
    ),
    "RMSProp, unbiased, from 1": (
        {"b2": 0.9, "gradient_share": 1, "initial_scale": 1.0},
        optax.scale_by_rms(initial_scale=1.0, eps_in_sqrt=False, bias_correction=True),
    ),
    "Adam": ({"b2": 0.999, "gradient_share": 0}, optax.scale_by_adam()),
    "Adam, odd": (
        {"b1": 0.5, "b2": 0.8, "eps": 1e-2, "eps_root": 1e-3, "gradient_share": 0},
        optax.scale_by_adam(0.5, 0.8, 1e-2, 1e-3),
    ),
}
all_rules = pytest.mark.parametrize(("chosen", "rule"), RULES.values(), ids=RULES)


@all_rules
@pytest.mark.parametrize("is_complex", [False, True], ids=["real", "complex"])
def test_with_the_right_arguments_it_is_the_rule_of_optax(chosen, rule, is_complex):
    grads = gradients(is_complex)
    found, state = all_updates(lo.scale_by_micro_rate(**chosen), grads)
    expected, _ = all_updates(rule, grads)
    assert_close(found, expected, 5e-6 if is_complex else 2e-6)
    assert state.micro_count == NUM_STEPS
    assert state.num_micro_held == 0
    assert np.all(found["rows"][:, 0] == 0.0)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            name, marks=[] if name in ("AdaGrad", "Adam, odd") else pytest.mark.slow
        )
        for name in RULES
    ],
)
def test_injected_arguments_make_the_same_rule(name):
    chosen, rule = RULES[name]
    injected = optax.inject_hyperparams(lo.scale_by_micro_rate)(**chosen)
    found, state = all_updates(injected, gradients())
    assert "b2" in state.hyperparams
    expected, _ = all_updates(rule, gradients())
    assert_close(found, expected, rtol=1e-4)


@pytest.mark.parametrize("name", ["AdaGrad", "RMSProp from 1"])
def test_a_held_step_keeps_a_second_moment_of_any_kind(name):
    tx, grads = lo.scale_by_micro_rate(**RULES[name][0]), gradients()
    state = tx.init(jax.tree.map(lambda g: g[0], grads))
    _, state = tx.update(jax.tree.map(lambda g: g[0], grads), state)
    updates, held = tx.update(jax.tree.map(lambda g: g[1] * jnp.nan, grads), state)
    assert all(np.all(u == 0.0) for u in jax.tree.leaves(updates))
    jax.tree.map(np.testing.assert_array_equal, held.nu, state.nu)
    assert held.num_micro_held == 1


@pytest.mark.parametrize("mu_dtype", ["bfloat16", "float16"])
def test_the_first_moment_alone_is_kept_in_its_own_dtype(mu_dtype):
    chosen = {"b2": 0.999, "gradient_share": 0}
    expected, _ = all_updates(lo.scale_by_micro_rate(**chosen), gradients())
    tx = lo.scale_by_micro_rate(**chosen, mu_dtype=mu_dtype)
    found, state = all_updates(tx, gradients())
    assert {x.dtype for x in jax.tree.leaves(state.mu)} == {jnp.dtype(mu_dtype)}
    assert {x.dtype for x in jax.tree.leaves(state.nu)} == {jnp.dtype("float32")}
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert x.dtype == jnp.float32
        np.testing.assert_allclose(x, y, atol=0.03)


# ---- One rate a tensor ---------------------------------------------------------------


def test_per_tensor_is_the_mean_of_squares_of_a_tensor():
    grads = gradients()
    found, state = all_updates(
        lo.scale_by_micro_rate(b2=0.9, gradient_share=1, eps=0, per_tensor=True), grads
    )
    for name, leaf in grads.items():
        g = np.asarray(leaf, np.float64)
        squares = np.mean(g.reshape(NUM_STEPS, -1) ** 2, axis=1)
        nu, root = 0.0, []
        for t, square in enumerate(squares, 1):
            nu = 0.9 * nu + 0.1 * square
            root.append(np.sqrt(nu / (1 - 0.9**t)))
        expected = g / np.reshape(root, (-1,) + (1,) * (g.ndim - 1))
        np.testing.assert_allclose(found[name], expected, rtol=1e-5, atol=1e-7)
        assert state.nu[name].shape == ()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "complex64"])
def test_per_tensor_second_moments_are_real_scalars_of_full_width(dtype):
    params = {"w": jnp.ones((3, 2), dtype), "none": jnp.ones((0, 4), dtype)}
    tx = lo.scale_by_micro_rate(per_tensor=True, initial_scale=0.5)
    state = tx.init(params)
    for _ in range(2):
        for nu in jax.tree.leaves(state.nu):
            assert (nu.shape, nu.dtype) == ((), jnp.float32)
            assert np.isfinite(nu)
        updates, state = tx.update(params, state)
        assert jax.tree.map(jnp.result_type, updates) == jax.tree.map(
            jnp.result_type, params
        )
        assert np.all(np.isfinite(updates["w"].astype(jnp.complex64)))


@pytest.mark.parametrize(("b2", "expected"), [(0.9, 0.95), (1, 5.5)])
def test_per_tensor_second_moments_begin_at_the_initial_scale(b2, expected):
    tx = lo.scale_by_micro_rate(
        b2=b2, bias_correction=False, initial_scale=0.5, per_tensor=True
    )
    grads = jnp.array([1.0, 3.0])
    state = tx.init(grads)
    assert state.nu == 0.5
    _, state = tx.update(grads, state)
    np.testing.assert_allclose(state.nu, expected, rtol=1e-6)


def test_per_tensor_keeps_the_direction_within_a_tensor():
    grads = jnp.array([3.0, -4.0, 12.0, 0.0])
    tx = lo.scale_by_micro_rate(per_tensor=True)
    updates, _ = tx.update(grads, tx.init(grads))
    np.testing.assert_allclose(updates / updates[0], grads / grads[0], rtol=1e-6)
    np.testing.assert_allclose(jnp.mean(updates**2), 1.0, rtol=1e-5)


# ---- As a part of lalerg -------------------------------------------------------------


def noisy_square(tx, num_steps=80, bad=(30, 50, 51, 52)):
    """Follows a noisy loss from a rate that is far too high, with faults."""
    rng = np.random.default_rng(3)
    shift = jnp.asarray(rng.normal(0.0, 0.1, (num_steps, 6)), jnp.float32)
    factor = np.ones(num_steps, np.float32)
    factor[list(bad)] = [np.nan, np.nan, np.nan, 1e6]

    def signals_of(params, batch):
        shift, factor = batch
        loss, grads = jax.value_and_grad(lambda p: jnp.mean((p - shift) ** 2))(params)
        return loss, factor * grads

    def told(step):
        count = optax.tree.get(step.state, "micro_count")
        return step.value, step.state.verdict, count

    start = jnp.linspace(-1.0, 1.0, 6)
    run = runner(tx, signals_of, told)
    (params, state), seen = run((start, tx.init(start)), (shift, jnp.asarray(factor)))
    return params, state, seen


@pytest.mark.parametrize("learning_rate", [0.1, 1e4], ids=["good", "too high"])
def test_as_micro_of_lalerg_it_is_the_one_that_lalerg_has(learning_rate):
    own = noisy_square(lo.lalerg(learning_rate))
    given = noisy_square(lo.lalerg(learning_rate, micro=lo.scale_by_micro_rate()))
    jax.tree.map(np.testing.assert_array_equal, given, own)
    assert set(own[2][1].tolist()) >= {0, 1, 2}


@pytest.mark.parametrize("wrap", [lambda micro: micro, lambda m: optax.chain(m)])
def test_a_restart_sets_a_sum_of_squares_back_to_where_it_began(wrap):
    adagrad = lo.scale_by_micro_rate(**RULES["AdaGrad"][0])
    tx = lo.lalerg(1e4, micro=wrap(adagrad), anchor_every=5)
    params, state, (_, verdicts, counts) = noisy_square(tx)
    assert np.all(np.isfinite(params))
    restarts = np.flatnonzero(np.diff(counts) < 0)
    assert len(restarts) > 0, "the start has to have failed"
    assert np.all(counts[restarts + 1] == 0)
    assert np.all(verdicts[restarts + 1] == lo.Verdict.REVERT)
    held = optax.tree.get(state, "num_micro_held")
    assert held == np.sum(np.isin(verdicts, (lo.Verdict.SKIP, lo.Verdict.REVERT)))
    (nu,) = (x.nu for x in jax.tree.leaves(state, is_leaf=is_micro) if is_micro(x))
    assert np.all(nu < 1e4), "not one that the failed start has left"


def is_micro(x):
    return isinstance(x, lo.ScaleByMicroRateState)


def test_a_sum_with_bias_correction_is_a_value_error_that_says_what_to_do():
    with pytest.raises(ValueError, match=r"a sum .* no bias: give bias_correction=Fal"):
        lo.scale_by_micro_rate(b2=1)


def test_a_half_precision_gradient_does_not_overflow_the_moments():
    tx = lo.scale_by_micro_rate()
    state = tx.init(jnp.ones(3, jnp.float16))
    grads = jnp.array([1000.0, 1.0, 1.0], jnp.float16)
    updates, state = tx.update(grads, state)
    assert updates.dtype == jnp.float16
    assert state.nu.dtype == jnp.float32
    np.testing.assert_allclose(updates, 1.0, rtol=1e-2)
