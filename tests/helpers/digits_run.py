"""A short run on real digits, for tests that compare ways to run it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from sklearn.datasets import load_digits

import lalerg_optax as lo

NUM_STEPS, BATCH = 100, 64
ALONE = 40  # a step at which one row in 64 is NaN
BURST = 70  # the first of three steps with inputs that are far too large
SHARDINGS = {
    "data parallel": {"hidden": PartitionSpec(), "out": PartitionSpec()},
    "fully sharded": {"hidden": PartitionSpec("d"), "out": PartitionSpec("d")},
    "tensor sharded": {
        "hidden": PartitionSpec(None, "d"),
        "out": PartitionSpec("d", None),
    },
}


@functools.cache
def batches(bad_row=BATCH - 1):
    """Returns the minibatches of all steps, with faults; for None, no row is bad."""
    data = load_digits()
    rows = np.random.default_rng(0).integers(0, len(data.target), (NUM_STEPS, BATCH))
    xs = (data.data[rows] / 16.0).astype(np.float32)
    if bad_row is not None:
        xs[ALONE, bad_row] = np.nan
    xs[BURST : BURST + 3] *= -300.0
    return xs, data.target[rows].astype(np.int32)


def init_params():
    """Returns the params of a small perceptron, the same ones always."""
    rng = np.random.default_rng(1)
    return {
        "hidden": rng.standard_normal((64, 32)).astype(np.float32) / 8.0,
        "out": rng.standard_normal((32, 16)).astype(np.float32) / 6.0,
    }


def loss_fn(params, batch):
    x, y = batch
    h = jax.nn.relu(x @ params["hidden"])
    return optax.losses.softmax_cross_entropy_with_integer_labels(
        h @ params["out"], y
    ).mean()


def make_run(tx, axis_name=None, reduce_grads=None, loss_fn=loss_fn):
    """Returns a run over batches that also tells loss, verdict and rate of all steps.

    With a mapped axis every device judges the loss of its own rows; their mean is told.
    """

    def step(carry, batch):
        params, state = carry
        value, grads = jax.value_and_grad(loss_fn)(params, batch)
        if reduce_grads is not None:
            grads = reduce_grads(grads)
        updates, state = tx.update(grads, state, params, value=value)
        params = lo.apply_updates(params, updates, state)
        if axis_name is not None:
            value = jax.lax.pmean(value, axis_name)
        report = lo.metrics(state)
        told = value, report["verdict"].astype(float), report["macro_rate"]
        return (params, state), jnp.stack(told)

    def run(params, state, data):
        (params, state), told = jax.lax.scan(step, (params, state), data)
        return params, state, told.T

    return run


@functools.cache
def jitted_run(tx, loss_fn=loss_fn):
    """Returns `make_run`, compiled once for the same optimizer."""
    return jax.jit(make_run(tx, loss_fn=loss_fn))


def run_digits(tx, data=None, params=None):
    """Returns params, state and what was told of a run on one device."""
    params = init_params() if params is None else params
    return jitted_run(tx)(params, tx.init(params), data or batches())


def make_mesh():
    return jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))


def put(tree, mesh, specs):
    """Shards arrays that every process has; each keeps what its devices need."""

    def shard(x, spec):
        sharding = NamedSharding(mesh, spec)
        return jax.make_array_from_callback(x.shape, sharding, lambda i: x[i])

    if isinstance(specs, PartitionSpec):
        specs = jax.tree.map(lambda _: specs, tree)
    return jax.tree.map(shard, tree, specs)


def train_sharded(tx, layout, data=None):
    """Trains on 8 devices, of whatever processes, with params sharded somehow."""
    mesh = make_mesh()
    params = put(init_params(), mesh, SHARDINGS[layout])
    data = put(data or batches(), mesh, PartitionSpec(None, "d"))
    run = jax.jit(make_run(tx), donate_argnums=(0, 1))
    return run(params, tx.init(params), data)
