"""What a user may write, for type checkers; and what an import brings along."""

import sys
from typing import TYPE_CHECKING, assert_type

import jax
import jax.numpy as jnp
import optax  # type: ignore[import-untyped]  # it has no py.typed

import lalerg_optax as lo

foreign = {"flax", "matplotlib", "numpyro", "sklearn", "chex"} & set(sys.modules)
assert not foreign, foreign

tx = lo.lalerg(1e-3, clip_norm=1.0)
regulated = lo.error_regulate(optax.adamw(1e-3))
params = {"w": jnp.ones(3)}
state = tx.init(params)
updates, state = tx.update(params, state, params, value=jnp.ones(()))
params = lo.apply_updates(params, updates, state)
report = lo.metrics(state)
history = lo.LossHistory.empty().record(1.0)
verdict = lo.Verdict.REVERT
adapted = lo.tracks_params(lo.without_value(tx))
carrier = lo.Carrier(params)

if TYPE_CHECKING:
    assert_type(lo.apply_updates(params, updates, state), dict[str, jax.Array])
    assert_type(lo.apply_updates(jnp.ones(3), updates, state), jax.Array)
    assert_type(lo.healthy_params(params, state), dict[str, jax.Array])
    assert_type(report, dict[str, jax.Array])
    assert_type(history, lo.LossHistory)
    assert_type(history.centre_and_spread(), tuple[jax.Array, jax.Array])
    # A misspelt argument has to be found: an ignore that is not needed is an error.
    lo.lalerg(1e-3, serach=False)  # type: ignore[call-arg]  # pyright: ignore
