"""The same decisions under jit, scan, vmap, donation, checkpoint and sharding."""

import copy
import functools
import pickle

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import serialization
from helpers.buffers import shared_buffers
from helpers.digits_run import SHARDINGS
from helpers.forms import flat
from jax.sharding import NamedSharding, PartitionSpec
from sklearn.datasets import load_digits

import lalerg_optax as lo
from lalerg_optax import Verdict

NUM_STEPS = 120
NUM_FEATURES, NUM_CLASSES, BATCH = 64, 10, 32


@functools.cache
def digits():
    data = load_digits()
    return (data.data / 16.0).astype(np.float32), data.target.astype(np.int32)


def batches(seed, faults=True):
    """Returns real minibatches, some of them spoilt in mid-run."""
    x, y = digits()
    rng = np.random.default_rng(seed)
    rows = rng.integers(0, len(x), (NUM_STEPS, BATCH))
    xs, ys = x[rows].copy(), y[rows]
    if faults:
        xs[60] = np.nan
        xs[80:83] *= -300.0 * (1 + seed)
    return xs, ys


def init_params(seed=0):
    keys = jax.random.split(jax.random.key(seed))
    return {
        "hidden": jax.random.normal(keys[0], (NUM_FEATURES, 32)) / 8.0,
        "out": jax.random.normal(keys[1], (32, NUM_CLASSES)) / 6.0,
    }


def loss_fn(params, batch, remat=False):
    x, y = batch

    def hidden(x):
        return jax.nn.relu(x @ params["hidden"])

    h = (jax.checkpoint(hidden) if remat else hidden)(x)
    return optax.losses.softmax_cross_entropy_with_integer_labels(
        h @ params["out"], y
    ).mean()


def make_step(tx, loss=loss_fn):
    def step(params, state, batch):
        value, grads = jax.value_and_grad(loss)(params, batch)
        updates, state = tx.update(grads, state, params, value=value)
        return lo.apply_updates(params, updates, state), state

    return step


def train(step, params, state, data):
    """Trains in a Python loop; returns params, state and verdicts."""
    verdicts = []
    for t in range(NUM_STEPS):
        params, state = step(params, state, jax.tree.map(lambda x, t=t: x[t], data))
        verdicts.append(int(state.verdict))
    return params, state, verdicts


def scan(tx, params, data):
    step = make_step(tx)

    def body(carry, batch):
        carry = step(*carry, batch)
        return carry, lo.metrics(carry[1])["verdict"]

    (params, state), verdicts = jax.lax.scan(body, (params, tx.init(params)), data)
    return params, state, verdicts


TX = lo.lalerg(1e-3, search=False)  # the search would amplify rounding
SEARCHING = lo.lalerg(1e-3)


@functools.cache
def reference():
    params = init_params()
    return train(jax.jit(make_step(TX)), params, TX.init(params), batches(0))


def assert_same_run(run, rtol=1e-4):
    params, state, verdicts = reference()
    assert list(map(int, run[2])) == verdicts
    chex.assert_trees_all_close(run[0], params, rtol=rtol, atol=rtol)
    chex.assert_trees_all_close(
        lo.metrics(run[1]), lo.metrics(state), rtol=rtol, atol=rtol
    )


def test_the_run_contains_every_verdict():
    counts = np.bincount(reference()[2], minlength=4)
    assert counts[Verdict.ACCEPT] > 100
    assert counts[Verdict.SKIP] >= 1
    assert counts[Verdict.BOUND] >= 1
    assert counts[Verdict.REVERT] >= 2


def test_scan_equals_a_loop_of_steps():
    assert_same_run(jax.jit(functools.partial(scan, TX))(init_params(), batches(0)))


def test_one_trace_serves_a_whole_run():
    chex.clear_trace_counter()
    step = jax.jit(chex.assert_max_traces(make_step(TX), n=1))
    params = init_params()
    assert_same_run(train(step, params, TX.init(params), batches(0)))


def test_donated_buffers():
    params = init_params()
    step = jax.jit(make_step(TX), donate_argnums=(0, 1))
    assert_same_run(train(step, params, TX.init(params), batches(0)))


SCHEDULE = optax.linear_schedule(1e-3, 0.0, NUM_STEPS)
DONATED = {
    "lalerg": lo.lalerg(SCHEDULE),
    "local view": lo.lalerg(1e-3, local=True),
    "clipped, narrow anchor": lo.lalerg(1e-3, clip_norm=1.0, anchor_dtype="bfloat16"),
    "one rate a tensor": lo.lalerg(1e-3, micro=lo.scale_by_micro_rate(per_tensor=True)),
    "around adamw": lo.error_regulate(optax.adamw(SCHEDULE), local=True),
    "flat": flat(SCHEDULE),
    "tracked params": lo.tracks_params(lo.lalerg(SCHEDULE)),
    "injected": optax.inject_hyperparams(lo.lalerg)(learning_rate=1e-3),
}


@pytest.mark.parametrize("tx", DONATED.values(), ids=DONATED)
def test_no_buffer_is_in_a_state_twice(tx):
    params = init_params()
    grads = jax.tree.map(jnp.ones_like, params)
    state = tx.init(params)
    assert shared_buffers((params, state)) == []
    updates, state = tx.update(grads, state, params, value=1.0)
    assert shared_buffers((lo.apply_updates(params, updates, state), state)) == []


def test_params_and_state_can_be_donated_from_the_first_step_on():
    tx, params = DONATED["local view"], init_params()
    state = tx.init(params)
    batch = jax.tree.map(lambda x: x[0], batches(0))
    donating = jax.jit(make_step(tx), donate_argnums=(0, 1))
    _, after = donating(params, state, batch)
    assert all(x.is_deleted() for x in jax.tree.leaves(params))
    assert lo.metrics(after)["verdict"] == Verdict.ACCEPT


def test_state_survives_pickle_deepcopy_and_flax_bytes():
    state = SEARCHING.init(init_params())
    copies = (
        pickle.loads(pickle.dumps(state)),
        copy.deepcopy(state),
        serialization.from_bytes(state, serialization.to_bytes(state)),
    )
    for other in copies:
        chex.assert_trees_all_equal(other, state)
        chex.assert_trees_all_equal_structs(other, state)
        assert lo.metrics(other).keys() == lo.metrics(state).keys()
        assert (other.verdict, other.damping_factor) == (0, 1.0)
    with pytest.raises(AttributeError, match="no field 'speed'"):
        _ = state.speed


def test_rematerialised_model():
    params = init_params()
    step = jax.jit(make_step(TX, functools.partial(loss_fn, remat=True)))
    assert_same_run(train(step, params, TX.init(params), batches(0)))


def test_each_vmapped_run_decides_for_itself():
    params = jax.tree.map(lambda x: jnp.stack([x] * 3), init_params())
    healthy = batches(0, faults=False)
    data = jax.tree.map(lambda *x: jnp.stack(x), batches(0), healthy, batches(1))
    together = jax.jit(jax.vmap(functools.partial(scan, TX)))(params, data)
    assert jnp.all(together[2][1] == Verdict.ACCEPT)
    for i, one in enumerate((batches(0), healthy, batches(1))):
        alone = jax.jit(functools.partial(scan, TX))(init_params(), one)
        assert together[2][i].tolist() == alone[2].tolist()
        chex.assert_trees_all_close(
            jax.tree.map(lambda x, i=i: x[i], together[0]),
            alone[0],
            rtol=1e-4,
            atol=1e-4,
        )


def test_decisions_about_whole_trees_are_conditionals_and_not_selects():
    params = init_params()
    batch = jax.tree.map(lambda x: x[0], batches(0))
    lowered = jax.jit(make_step(SEARCHING)).lower(params, SEARCHING.init(params), batch)
    # audit and anchor share one: no param is read or written for them at other steps
    assert lowered.as_text().count('"stablehlo.case"') == 1


def test_donated_shards_keep_their_shardings_and_decide_like_one_device():
    """How many devices take the run of one in every layout: test_devices.py."""
    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    named = {k: NamedSharding(mesh, p) for k, p in SHARDINGS["fully sharded"].items()}
    params = jax.device_put(init_params(), named)
    state = TX.init(params)
    rows = NamedSharding(mesh, PartitionSpec(None, "d"))
    step = jax.jit(make_step(TX), donate_argnums=(0, 1))
    run = train(step, params, state, jax.device_put(batches(0), rows))
    assert_same_run(run, rtol=2e-3)
    regulator = run[1]
    micro = regulator.inner_state[0]
    for tree in (run[0], regulator.anchor, micro.mu, micro.nu):
        for key, leaf in tree.items():
            assert leaf.sharding.is_equivalent_to(named[key], leaf.ndim), key


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
def test_the_whole_step_lowers_for_hardware_that_is_not_here(platform):
    params = init_params()
    batch = jax.tree.map(lambda x: x[0], batches(0))
    exported = jax.export.export(jax.jit(make_step(SEARCHING)), platforms=[platform])(
        params, SEARCHING.init(params), batch
    )
    assert exported.platforms == (platform,)
    assert "stablehlo.case" in exported.mlir_module()
