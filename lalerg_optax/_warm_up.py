"""Warm-up: a schedule that grows does not raise a rate that was found. Scalars only."""

import jax
import jax.numpy as jnp

from ._numbers import LARGEST
from ._scalars import as_vector
from ._search_rule import MacroScalars, Phase, SearchRule

_MOST = 1e15  # its square is finite in float32


def without_growth(
    state: MacroScalars, base_rate: jax.Array, rule: SearchRule
) -> MacroScalars:
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
      rule: has the bound of the macro rate.
    """
    is_found = state.phase == Phase.STEER
    top = jnp.where(is_found, jnp.maximum(state.top_rate, base_rate), base_rate)
    top = jnp.maximum(top, 0.0)
    is_held = is_found & (state.top_rate > 0.0)
    old, new = (jnp.where(is_held, rate, 1.0) for rate in (state.top_rate, top))
    ratios = as_vector([old, new]) / as_vector([new, old])  # one kernel
    factor, growth = ratios[0], jnp.minimum(ratios[1], _MOST)
    # the rise stays what it was, and is in units of the square of the macro rate
    rise, error = state.avg_rise * growth**2, state.avg_rise_error * growth**2
    return state._replace(
        macro_rate=jnp.maximum(state.macro_rate * factor, 1.0 / rule.max_rate),
        top_rate=top,
        avg_rise=jnp.clip(rise, -LARGEST, LARGEST),
        avg_rise_error=jnp.minimum(error, LARGEST),
    )
