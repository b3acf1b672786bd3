"""The copy of the params: what a look back at it sees, in any dtype."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.buffers import shared_buffers

from lalerg_optax._anchor import copy_params, fetched, look_back, move
from lalerg_optax._sums import global_norm


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize(("size", "step"), [(1e15, 1e3), (1e-15, 1e-10), (1.0, 1e-3)])
def test_a_look_back_is_exact_for_large_and_small_numbers(size, step, sign):
    grads, anchor = jnp.full(4, sign * size), jnp.full(4, step)
    is_seen, alignment, length, reach = look_back(
        grads, global_norm(grads), anchor, jnp.zeros(4)
    )
    assert is_seen
    np.testing.assert_allclose(alignment, sign, rtol=1e-5)
    np.testing.assert_allclose(length, 4.0 * size * step, rtol=1e-5)
    np.testing.assert_allclose(reach, 1.0, rtol=1e-5)


@pytest.mark.parametrize("length", [1e-7, 1e-6, 1e-5, 1e-3])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_look_back_at_a_narrow_anchor_tells_up_from_down(length, sign):
    """Steps of less than its resolution are lost in what rounding did to the anchor."""
    rng = np.random.default_rng(2)
    start, grads = (
        {"w": jnp.asarray(rng.standard_normal((1000, 1000)), jnp.float32)}
        for _ in range(2)
    )
    params = jax.tree.map(lambda p, g: p - sign * length * g, start, grads)
    anchor = copy_params(start, "bfloat16")
    is_seen, alignment, *_ = look_back(grads, global_norm(grads), anchor, params)
    assert is_seen
    assert sign * alignment > 3e-3, "three times what chance would give"


# ---- copied, moved, fetched ----------------------------------------------------------

PARAMS = {"w": jnp.array([1.0, -2.5]), "z": jnp.array([1.0 + 2.0j]), "n": jnp.arange(3)}


@pytest.mark.parametrize("dtype", [None, "bfloat16", "float32"])
@pytest.mark.parametrize("memory", ["device", "pinned_host"])
def test_a_copy_is_no_alias_and_only_real_floats_are_cast(dtype, memory):
    copies = copy_params(PARAMS, dtype, memory)
    assert shared_buffers((PARAMS, copies)) == []
    assert copies["w"].dtype == (dtype or "float32")
    assert (copies["z"].dtype, copies["n"].dtype) == ("complex64", "int32")
    for name, copy in copies.items():
        assert copy.sharding.memory_kind == memory
        np.testing.assert_array_equal(
            np.asarray(copy, PARAMS[name].dtype), PARAMS[name]
        )


@pytest.mark.parametrize("memory", ["device", "pinned_host"])
def test_an_anchor_moves_all_but_what_is_not_sound_and_stays_in_its_memory(memory):
    anchor = copy_params({"w": jnp.array([1.0, 2.0, 3.0])}, "bfloat16", memory)
    params = {"w": jnp.array([5.0, jnp.nan, 3e37])}
    moved = jax.jit(move)(True, anchor, params)
    assert np.asarray(moved["w"], np.float32).tolist() == [5.0, 2.0, 3.0]
    assert (moved["w"].dtype, moved["w"].sharding.memory_kind) == ("bfloat16", memory)
    stayed = jax.jit(move)(False, anchor, params)
    np.testing.assert_array_equal(np.asarray(stayed["w"]), np.asarray(anchor["w"]))


@pytest.mark.parametrize("is_needed", [True, False])
def test_an_anchor_in_host_memory_is_fetched_where_it_is_needed_alone(is_needed):
    params = {"w": jnp.array([5.0, 6.0])}
    home = {"w": jnp.array([1.0, 2.0])}
    anchor = copy_params(home, "bfloat16", "pinned_host")
    found = jax.jit(fetched)(is_needed, anchor, params)
    np.testing.assert_array_equal(found["w"], (home if is_needed else params)["w"])
    assert found["w"].dtype == jnp.float32


def test_a_look_back_without_a_way_or_a_gradient_sees_nothing():
    here, there = jnp.ones(3), jnp.zeros(3)
    for grads, params, wanted in (
        (jnp.zeros(3), there, (False, 0.0, 0.0, 1.0)),
        (jnp.array([1.0, jnp.inf, 0.0]), there, (False, 0.0, 0.0, 1.0)),
        (here, here, (True, 0.0, 0.0, 0.0)),
        (here, there, (True, 1.0, 3.0, 1.0)),
    ):
        seen = look_back(grads, global_norm(grads), here, params)
        np.testing.assert_allclose([float(x) for x in seen], wanted, atol=1e-6)
