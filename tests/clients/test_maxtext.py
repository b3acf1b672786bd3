"""MaxText's contract, restated: it is heavy to install.

Its state is made from boxed params under ``eval_shape``: the logical axes of the state
are read off what ``init`` makes of the boxes, and the state is sharded by them. The
step passes ``loss`` and ``grad_norm`` if ``skip_step_on_spikes`` is set, otherwise no
loss. Params that are not trained are in a group of their own.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax.training import train_state
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import lalerg_optax as lo
from lalerg_optax import Verdict

RULES = (("embed", None), ("mlp", "model"))
OPTIMIZERS = {
    "lalerg": lambda: lo.lalerg(1e-3),
    "error_regulate": lambda: lo.error_regulate(optax.adamw(1e-3)),
}
all_optimizers = pytest.mark.parametrize("name", OPTIMIZERS)


class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
        init = nn.initializers.lecun_normal()
        up = nn.with_logical_partitioning(init, ("embed", "mlp"))
        down = nn.with_logical_partitioning(init, ("mlp", "embed"))
        x = nn.relu(nn.Dense(16, kernel_init=up, use_bias=False, name="up")(x))
        return nn.Dense(8, kernel_init=down, use_bias=False, name="down")(x)


def make_state(tx):
    params = Model().init(jax.random.key(0), jnp.ones((2, 8)))
    return train_state.TrainState.create(apply_fn=Model().apply, params=params, tx=tx)


def is_box(node):
    return isinstance(node, nn.LogicallyPartitioned)


def unboxed(tree):
    return jax.tree.map(lambda x: x.unbox() if is_box(x) else x, tree, is_leaf=is_box)


def sharded_state(tx):
    """Returns a state that is sharded as its logical axes say, and its shardings."""
    mesh = jax.make_mesh((8,), ("model",), axis_types=(AxisType.Auto,))
    make = functools.partial(make_state, tx)
    logical = nn.get_partition_spec(jax.eval_shape(make))
    shardings = nn.logical_to_mesh_sharding(logical, mesh, RULES)
    return unboxed(jax.jit(make, out_shardings=shardings)()), shardings


@functools.partial(jax.jit, static_argnames="passes_loss")
def train_step(state, x, passes_loss=True):
    def loss_fn(params):
        return jnp.mean((state.apply_fn(params, x) - x) ** 2)

    loss, grads = jax.value_and_grad(loss_fn)(state.params)
    told = {}
    if passes_loss:
        told = {"loss": loss, "grad_norm": optax.tree.norm(grads)}
    updates, opt_state = state.tx.update(grads, state.opt_state, state.params, **told)
    params = optax.apply_updates(state.params, updates)
    return state.replace(params=params, opt_state=opt_state), loss


def batches(num_steps):
    return np.random.default_rng(0).normal(size=(num_steps, 32, 8)).astype(np.float32)


@all_optimizers
def test_a_sharded_run_with_a_nan_goes_on_and_stays_sharded(name):
    state, shardings = sharded_state(OPTIMIZERS[name]())
    xs = batches(60)
    xs[40, 3, 3] = np.nan
    losses = []
    for x in xs:
        state, loss = train_step(state, x)
        losses.append(float(loss))  # one program of many devices at a time
    assert np.isnan(losses).nonzero()[0].tolist() == [40]
    assert losses[-1] < 0.9 * losses[0]
    assert lo.metrics(state.opt_state)["num_skipped"] == 1
    anchor = state.opt_state.anchor["params"]
    assert anchor["up"]["kernel"].sharding.spec == P(None, "model")
    for x, s in zip(*map(jax.tree.leaves, (state, shardings)), strict=True):
        assert x.sharding.is_equivalent_to(s, x.ndim)


@all_optimizers
def test_without_a_loss_the_adapter_is_named(name):
    state = unboxed(make_state(OPTIMIZERS[name]()))
    (x,) = batches(1)
    with pytest.raises(TypeError, match="without_value"):
        train_step(state, x, passes_loss=False)
    state = unboxed(make_state(lo.without_value(OPTIMIZERS[name]())))
    for t in range(21):
        state, _ = train_step(state, jnp.nan * x if t == 20 else x, passes_loss=False)
    assert lo.metrics(state.opt_state)["verdict"] == Verdict.SKIP


def test_frozen_params_have_no_anchor_and_stay():
    def labels(params):
        def label(path, _):
            keys = jax.tree_util.keystr(path)
            return "trainable" if "up" in keys else "frozen"

        return jax.tree_util.tree_map_with_path(label, params)

    groups = {"trainable": lo.lalerg(1e-3), "frozen": optax.set_to_zero()}
    before = state = unboxed(make_state(optax.partition(groups, labels)))
    for x in batches(5):
        state, _ = train_step(state, x)
    old, new = before.params["params"], state.params["params"]
    np.testing.assert_array_equal(new["down"]["kernel"], old["down"]["kernel"])
    assert jnp.any(new["up"]["kernel"] != old["up"]["kernel"])
    (regulator,) = [
        s.inner_state
        for s in state.opt_state.inner_states.values()
        if jax.tree.leaves(s)
    ]
    assert len(jax.tree.leaves(regulator.anchor)) == 1
