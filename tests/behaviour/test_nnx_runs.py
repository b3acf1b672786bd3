"""Flax NNX: a run that is saved and resumed, and an average of its params."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx

import lalerg_optax as lo
from lalerg_optax import Verdict

OPTIMIZERS = {
    "lalerg": lambda: lo.lalerg(1e-2),
    "error_regulate": lambda: lo.error_regulate(optax.adam(1e-2), anchor_every=4),
}
all_optimizers = pytest.mark.parametrize(
    "name", ["error_regulate", pytest.param("lalerg", marks=pytest.mark.slow)]
)
BAD_STEP, SPIKE, DECAY = 24, 30, 0.9


class Model(nnx.Module):
    def __init__(self, rngs):
        self.hidden = nnx.Linear(3, 8, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)
        self.out = nnx.Linear(8, 1, rngs=rngs)

    def __call__(self, x):
        return self.out(self.dropout(jnp.tanh(self.hidden(x))))


def make(name):
    model = Model(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, OPTIMIZERS[name](), wrt=nnx.Param)
    return model, optimizer, nnx.EMA(model, decay=DECAY, only=nnx.Param)


@nnx.jit
def step(model, optimizer, ema, x):
    def loss_fn(model):
        return jnp.mean((model(x)[:, 0] - x.sum(axis=1)) ** 2)

    loss, grads = nnx.value_and_grad(loss_fn)(model)
    optimizer.update(model, grads, value=loss)
    params = nnx.state(model, nnx.Param)
    ema.update(lo.healthy_params(params, optimizer.opt_state))
    return lo.metrics(optimizer.opt_state)["verdict"]


def batches(num_steps):
    xs = np.random.default_rng(0).normal(size=(num_steps, 16, 3)).astype(np.float32)
    xs[BAD_STEP] = np.nan
    return xs


def pure(*nodes):
    return jax.tree.map(jnp.copy, nnx.as_pure(nnx.state(nodes)))


def bits(tree):
    def of_leaf(x):
        is_key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
        return jax.random.key_data(x) if is_key else x

    return jax.tree.map(of_leaf, tree)


@all_optimizers
def test_a_run_resumed_with_orbax_is_the_one_that_went_on(name, tmp_path):
    nodes, xs = make(name), batches(40)
    for x in xs[: BAD_STEP + 1]:
        verdict = step(*nodes, x)
    assert verdict == Verdict.SKIP
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "run", nnx.state(nodes))
    for x in xs[BAD_STEP + 1 :]:
        step(*nodes, x)
    resumed = make(name)
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(tmp_path / "run", nnx.state(resumed))
    nnx.update(resumed, restored)
    assert lo.metrics(resumed[1].opt_state)["num_skipped"] == 1
    for x in xs[BAD_STEP + 1 :]:
        step(*resumed, x)
    chex.assert_trees_all_equal(bits(pure(*resumed)), bits(pure(*nodes)))


@all_optimizers
def test_healthy_params_are_those_of_the_anchor_in_the_variables_of_the_model(name):
    model, optimizer, ema = make(name)
    for x in batches(28):
        step(model, optimizer, ema, x)
    params = nnx.state(model, nnx.Param)
    healthy = lo.healthy_params(params, optimizer.opt_state)
    assert jax.tree.structure(healthy) == jax.tree.structure(params)
    anchor = nnx.as_pure(optimizer.opt_state.anchor)
    chex.assert_trees_all_equal(nnx.as_pure(healthy), anchor)
    assert lo.metrics(optimizer.opt_state)["anchor_age"] > 0
    with pytest.raises(AssertionError):
        chex.assert_trees_all_equal(nnx.as_pure(params), anchor)
    nothing = jax.tree.map(jnp.zeros_like, params)
    same = lo.apply_updates(params, nothing, optimizer.opt_state)
    chex.assert_trees_all_equal(nnx.as_pure(same), nnx.as_pure(params))


def test_an_average_of_healthy_params_holds_nothing_that_was_taken_back():
    """The model is damaged from outside, and its loss leads back to the anchor."""
    model, optimizer, ema = make("error_regulate")
    verdicts = []
    for t, x in enumerate(batches(SPIKE + 8)):
        if t == SPIKE:
            before = pure(ema)
            plain = nnx.EMA(model, decay=DECAY, only=nnx.Param)
            model.out.kernel[...] *= 1e4
            plain.update(model)
        verdicts.append(int(step(model, optimizer, ema, x)))
    assert Verdict.REVERT in verdicts[SPIKE:]

    def farthest(average):
        now = jax.tree.leaves(pure(average))
        far = [jnp.max(jnp.abs(a - b)) for a, b in zip(now, old, strict=True)]
        return float(max(far))

    old = jax.tree.leaves(before)
    assert farthest(ema) < 0.2
    assert farthest(plain) > 100.0
