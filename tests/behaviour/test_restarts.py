"""A run that is saved with Orbax at any step goes on as if nothing had been."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from helpers.digits_run import (
    ALONE,
    BURST,
    SHARDINGS,
    batches,
    init_params,
    make_run,
    put,
)
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lalerg_optax as lo
from lalerg_optax import Verdict

TX = lo.lalerg(1.0)
NUM_STEPS, NUM_RESUMED = 84, 10
SAVED = {  # number of steps taken, and what the last one was
    "at the start": (0, Verdict.ACCEPT),
    "when the search goes back": (4, Verdict.REVERT),
    "in the middle of a skip": (ALONE + 1, Verdict.SKIP),
    "between high losses": (BURST + 1, Verdict.BOUND),
    "in the middle of a revert": (BURST + 2, Verdict.REVERT),
    "just after a revert": (BURST + 3, Verdict.REVERT),
    "in an episode of hard data": (BURST + 5, Verdict.BOUND),
}


def make_mesh(num_devices):
    return jax.make_mesh(
        (num_devices,),
        ("d",),
        axis_types=(AxisType.Auto,),
        devices=jax.devices()[:num_devices],
    )


@functools.cache
def data():
    """Returns batches with one that is bad, and a level of the loss that stays."""
    xs, ys = (x.copy() for x in batches(None))
    xs[ALONE] = np.nan
    xs[BURST:] *= -300.0
    return xs, ys


@functools.cache
def shardings(num_devices):
    """Returns those of params and state: tensor sharded, scalars replicated."""
    params, mesh = init_params(), make_mesh(num_devices)
    specs = {p.shape: SHARDINGS["tensor sharded"][key] for key, p in params.items()}

    def sharding(x):
        return NamedSharding(mesh, specs.get(x.shape, P()))

    return jax.tree.map(sharding, jax.eval_shape(lambda p: (p, TX.init(p)), params))


@functools.cache
def step_on(num_devices):
    params, state = shardings(num_devices)
    out = params, state, NamedSharding(make_mesh(num_devices), P())
    return jax.jit(make_run(TX), out_shardings=out)


def go_on(num_devices, carry, first, last):
    """Returns params and state after each step, and what was told."""
    mesh, carries, told = make_mesh(num_devices), [carry], []
    for t in range(first, last):
        batch = put([x[t : t + 1] for x in data()], mesh, P(None, "d"))
        *carry, report = step_on(num_devices)(*carry, tuple(batch))
        carries.append(tuple(carry))
        told.append(np.asarray(report)[:, 0])
    return carries, np.array(told).T


@functools.cache
def run_on(num_devices):
    """Returns the run that is never interrupted."""
    params = init_params()
    carry = jax.device_put((params, TX.init(params)), shardings(num_devices))
    return go_on(num_devices, carry, 0, NUM_STEPS)


def through_checkpoint(carry, path, num_devices):
    """Saves params and state, and restores them, maybe onto other devices."""
    target = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        carry,
        shardings(num_devices),
    )
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, carry)
        checkpointer.wait_until_finished()
        return checkpointer.restore(path, target)


def assert_same_bits(tree, other):
    chex.assert_trees_all_equal_structs(tree, other)
    chex.assert_trees_all_equal_shapes_and_dtypes(tree, other)
    for x, y in zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


@pytest.mark.parametrize("num_devices", [1, 8])
@pytest.mark.parametrize(("step", "verdict"), SAVED.values(), ids=SAVED)
def test_a_resumed_run_is_the_one_that_went_on_bit_for_bit(
    step, verdict, num_devices, tmp_path
):
    carries, told = run_on(num_devices)
    params, state = carries[step]
    assert state.verdict == verdict
    restored = through_checkpoint((params, state), tmp_path / "run", num_devices)
    assert_same_bits(restored, (params, state))
    last = min(step + NUM_RESUMED, NUM_STEPS)
    resumed, told_again = go_on(num_devices, restored, step, last)
    np.testing.assert_array_equal(told_again, told[:, step:last])
    assert_same_bits(resumed[-1], carries[last])


def test_a_run_is_resumed_on_fewer_and_fewer_devices(tmp_path):
    """From 8 to 4 in the middle of a revert, and from 4 to 1 in an episode."""
    carries, told = run_on(8)
    carry, first = carries[BURST + 2], BURST + 2
    for num_devices, last in ((4, BURST + 5), (1, NUM_STEPS)):
        restored = through_checkpoint(carry, tmp_path / str(num_devices), num_devices)
        assert_same_bits(restored, carry)
        for leaf in jax.tree.leaves(restored):
            assert len(leaf.sharding.device_set) == num_devices
        (*_, carry), told_again = go_on(num_devices, restored, first, last)
        np.testing.assert_array_equal(told_again[1], told[1, first:last])
        np.testing.assert_allclose(told_again, told[:, first:last], rtol=1e-4)
        first = last
    chex.assert_trees_all_close(carry, carries[-1], rtol=1e-3, atol=1e-5)


def test_a_checkpoint_of_adamw_becomes_a_protected_run(tmp_path):
    params, plain = init_params(), optax.adamw(1e-3)
    fresh = plain.init(params)
    state = jax.tree.map(lambda x: x + jnp.asarray(3, x.dtype), fresh)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "adamw", state)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "adamw", fresh)
    adopted = lo.adopt(lo.lalerg(1e-3, search=False), params, restored)
    assert adopted.inner_state[0].micro_count == 3
    assert_same_bits(adopted.inner_state[0].nu, state[0].nu)
    assert_same_bits(lo.adopt(plain, params, adopted), state)
