"""How a gradient is let in, and which step params take."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lalerg_optax as lo
from lalerg_optax import Verdict
from lalerg_optax._act import act, admitted
from lalerg_optax._records import RegulatorScalars


@pytest.mark.parametrize("clip_norm", [0.5, 1e3])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_gradient_of_any_dtype_is_scaled_down_to_the_limit_or_not_at_all(
    dtype, clip_norm
):
    grads = jnp.asarray(np.random.default_rng(0).standard_normal(300), dtype)
    tx = lo.error_regulate(optax.identity(), clip_norm=clip_norm)
    updates, _ = tx.update(grads, tx.init(grads), grads, value=1.0)
    assert updates.dtype == grads.dtype
    norm = float(jnp.linalg.norm(updates.astype(jnp.float32)))
    if clip_norm > 100.0:
        np.testing.assert_array_equal(updates, grads)
    else:
        assert 0.99 * clip_norm < norm < 1.001 * clip_norm


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "complex64"])
@pytest.mark.parametrize("verdict", list(Verdict))
def test_a_rejected_gradient_is_zero_and_any_other_is_let_in(dtype, verdict):
    grads = {"w": jnp.array([1.0, -2.0], dtype), "bad": jnp.full(2, jnp.nan, dtype)}
    found = admitted(grads, jnp.int32(verdict), jnp.float32(0.5))
    assert {g.dtype for g in found.values()} == {jnp.dtype(dtype)}
    if verdict in (Verdict.ACCEPT, Verdict.BOUND):
        np.testing.assert_array_equal(found["w"], jnp.array([0.5, -1.0], dtype))
    else:
        assert not any(np.any(g) for g in found.values())


def step_taken(verdict, updates, params=(1.0, 2.0, 3.0)):
    params, home = jnp.array(params), jnp.array([0.0, 5.0, 3.0])
    verdict, damping = jnp.int32(verdict), jnp.float32(0.5)
    updates = jnp.asarray(updates)
    last = RegulatorScalars()
    return act(verdict, damping, params, updates, home, params, None, last, None, None)[
        0
    ]


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, 3.4e38])
def test_a_step_is_damped_none_or_the_way_home_as_the_verdict_says(bad):
    updates = [0.2, bad, -4.0]
    last = 1.7e38 if bad == 3.4e38 else 0.0  # damped it is finite
    for verdict in (Verdict.ACCEPT, Verdict.BOUND):
        wanted = jnp.array([0.1, last, -2.0])
        np.testing.assert_allclose(step_taken(verdict, updates), wanted, rtol=1e-6)
    assert not np.any(step_taken(Verdict.SKIP, updates))
    home = step_taken(Verdict.REVERT, updates)
    np.testing.assert_array_equal(home, [-1.0, 3.0, 0.0])


def test_a_step_that_would_leave_float32_is_not_taken():
    taken = step_taken(Verdict.ACCEPT, [2e38, 1.0, 1.0], params=(3e38, 2.0, 3.0))
    np.testing.assert_array_equal(taken, [0.0, 0.5, 0.5])
