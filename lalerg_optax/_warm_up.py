"""Warm-up: a schedule that grows does not raise a rate that was found. Scalars only."""

import jax
import jax.numpy as jnp

from ._numbers import LARGEST, ratio
from ._search_rule import MacroScalars, Phase

_LEAST = 1e-15  # its square is not zero in float32


def without_growth(state: MacroScalars, base_rate: jax.Array) -> MacroScalars:
    r"""Returns the state with a macro rate that makes up for a schedule's growth.

    With :math:`\eta_t` the rate of the schedule at this step, and :math:`\hat\eta` the
    highest one since the search ended,

    .. math::

        r \leftarrow r \, \frac{\hat\eta}{\max(\hat\eta, \eta_t)}, \qquad
        \hat\eta \leftarrow \max(\hat\eta, \eta_t)

    What was found is the product of both. A warm-up that goes on would multiply it,
    often tenfold. Where the schedule decays, or returns to where it was, nothing
    changes; and nothing where its rate is not known.

    Args:
      state: what is known before this step.
      base_rate: the rate of the schedule at this step; negative if it is not known.
    """
    is_found = state.phase == Phase.STEER
    top = jnp.where(is_found, jnp.maximum(state.top_rate, base_rate), base_rate)
    top = jnp.maximum(top, 0.0)
    is_held = is_found & (state.top_rate > 0.0)
    factor = jnp.where(is_held, ratio(state.top_rate, top), 1.0)
    # the rise stays what it was, and is in units of the square of the macro rate
    unit = jnp.maximum(factor, _LEAST) ** 2
    return state._replace(
        macro_rate=state.macro_rate * factor,
        top_rate=top,
        avg_rise=jnp.clip(state.avg_rise / unit, -LARGEST, LARGEST),
        avg_rise_error=jnp.minimum(state.avg_rise_error / unit, LARGEST),
    )
