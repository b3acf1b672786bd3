"""Gate: whether a link of the chain may use a step."""

import jax
import jax.numpy as jnp
import optax

from ._sums import global_norm
from ._verdict import is_applied


def open_gate(
    updates: optax.Updates,
    verdict: jax.Array | None,
    value: jax.Array | None = None,
) -> tuple[jax.Array, optax.Updates]:
    """Returns whether the step may be used, and updates that are safe to use.

    Inside `error_regulate` its verdict decides; it has set the gradient of a rejected
    step to zero, and drops the resulting update. A link that works alone uses a step
    when ``value``, where there is one, and the squared norm of the updates are finite.
    """
    if verdict is not None:
        return is_applied(verdict), updates
    is_open = jnp.isfinite(global_norm(updates))
    if value is not None:
        is_open &= jnp.isfinite(value)
    return is_open, jax.tree.map(lambda u: jnp.where(is_open, u, 0), updates)
