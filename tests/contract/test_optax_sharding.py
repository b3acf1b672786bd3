"""What Optax asks of a state on many devices, asked of our transformations.

The wheel's ``optax/_src/sharding_test.py`` runs its tests on a table of optimizers and
on a mesh of eight devices with Explicit axes: a state can be made of shapes alone, and
``init`` and ``update``, under ``jax.jit`` or not, give it the same types, which tell
how a leaf is sharded. Here the module is loaded with a table of ours. Where axes are
Auto, types do not tell it; there the shardings themselves are looked at.
"""

import functools
import importlib.util
import os
import types
import warnings
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl.testing import parameterized
from helpers.quick import some
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lalerg_optax as lo


def told(tx):
    """Returns an optimizer that is told the same loss at every step."""
    update = functools.partial(optax.with_extra_args_support(tx).update, value=1.0)
    return optax.GradientTransformationExtraArgs(tx.init, update)


QUICK = {
    "micro_rate": told(lo.scale_by_micro_rate()),
    "macro_rate": told(lo.scale_by_macro_rate(search=False)),
}
OTHERS = {
    "micro_rate_of_tensors": told(lo.scale_by_micro_rate(per_tensor=True)),
    "macro_rate_with_search": told(lo.scale_by_macro_rate()),
    "lalerg": told(lo.lalerg(1.0)),
    "lalerg_clipped_without_search": told(lo.lalerg(1.0, search=False, clip_norm=1.0)),
    "lalerg_local": told(lo.lalerg(1.0, local=True)),
    "lalerg_with_muon": told(lo.lalerg(1.0, micro=optax.contrib.muon(1.0))),
    "lalerg_with_a_narrow_anchor": told(lo.lalerg(1.0, anchor_dtype="bfloat16")),
    "error_regulate": told(lo.error_regulate(optax.adamw(1.0))),
    "accumulate": told(lo.accumulate(lo.lalerg(1.0), 2)),
}


def sharding_tests(optimizers):
    """Returns Optax's test class with these optimizers in its table."""

    def named_parameters(*rows):
        is_table = len(rows) == 1 and dict(rows[0]).keys() >= {"adamw", "sgd"}
        if is_table:
            return original(optimizers.items())
        return lambda test: None  # a test of a function of Optax's own

    original = parameterized.named_parameters
    spec = importlib.util.find_spec("optax._src.sharding_test")
    module = importlib.util.module_from_spec(spec)
    with (
        mock.patch.object(parameterized, "named_parameters", named_parameters),
        mock.patch.dict(os.environ),  # it sets flags that are set already
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")  # of Optax's own table
        spec.loader.exec_module(module)
    # it compares versions as strings, by which 0.12 is too old
    module.jax = types.SimpleNamespace(**vars(jax) | {"__version__": "1"})
    return module.ShardingTest


class TestQuick(sharding_tests(QUICK)):
    pass


@pytest.mark.slow
class TestOthers(sharding_tests(OTHERS)):
    pass


SHAPE, SPEC = (2, 8, 4), P(None, "d")


@pytest.mark.parametrize("kind", [AxisType.Explicit, AxisType.Auto], ids=str)
@pytest.mark.parametrize("name", some(QUICK | OTHERS, "lalerg", "error_regulate"))
def test_state_and_updates_are_sharded_like_the_params_from_step_to_step(name, kind):
    tx = (QUICK | OTHERS)[name]
    mesh = jax.make_mesh((8,), ("d",), axis_types=(kind,))
    with jax.set_mesh(mesh):
        sharding = NamedSharding(mesh, SPEC)
        params = jax.device_put(jnp.full(SHAPE, 0.5, jnp.float16), sharding)
        states = [tx.init(params)]
        for _ in range(3):
            updates, state = jax.jit(tx.update)(params, states[-1], params)
            states.append(state)
    for tree in (updates, *states):
        leaves = [x for x in jax.tree.leaves(tree) if x.shape == SHAPE]
        assert all(x.sharding.is_equivalent_to(sharding, x.ndim) for x in leaves)
    kinds = [jax.tree.map(jax.typeof, state) for state in states]
    assert kinds[0] == kinds[1] == kinds[2] == kinds[3]
    alone = jnp.full(SHAPE, 0.5, jnp.float16)
    expected, state = None, tx.init(alone)
    for _ in range(3):
        expected, state = jax.jit(tx.update)(alone, state, alone)
    np.testing.assert_allclose(updates, expected, rtol=1e-3)
