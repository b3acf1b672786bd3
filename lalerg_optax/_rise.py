"""Rise: how much the loss rises from the anchor to the params, and how much it may."""

import jax
import jax.numpy as jnp

from ._numbers import LARGEST
from ._scalars import as_vector
from ._search_rule import MacroScalars, Phase, SearchRule
from ._verdict import Audit
from ._windows import share, weight


def averaged(state: MacroScalars, audit: Audit, rule: SearchRule) -> MacroScalars:
    """Returns the averages of rise and loss after one more audit.

    A rise grows with the square of the rate, and is averaged in units of that. While
    the rate leaps, only the last audit counts.
    """
    new = jnp.where(state.phase == Phase.STEER, weight(state, rule), 1.0)
    is_first = state.num_windows == 0  # losses may come later than audits
    new_loss = jnp.where(is_first, 1.0, new)
    unit = state.macro_rate**2
    rises = as_vector([audit.rise, audit.rise_error]) / unit  # one kernel
    rise, error = jnp.clip(rises, -LARGEST, LARGEST)
    return state._replace(
        avg_rise=state.avg_rise + new * (rise - state.avg_rise),
        avg_rise_error=jnp.hypot((1.0 - new) * state.avg_rise_error, new * error),
        avg_loss=state.avg_loss + new_loss * (state.window_mean - state.avg_loss),
    )


def room_left(state: MacroScalars, rule: SearchRule) -> jax.Array:
    r"""Returns by how many octaves the rate is too low, by the rise of the loss.

    With :math:`\delta` the rise and :math:`\sigma_\delta` its standard error,
    :math:`n` of all :math:`t` steps since the last audit, :math:`\Delta` the progress
    and :math:`s` the deviation of a loss, at least :math:`\Delta / 100` and at most
    :math:`3 \Delta`, with a schedule (``docs/algorithm.md`` has the other case)

    .. math::

        \delta^* = 0.7 \sqrt{n / t} \, \sqrt{\Delta \, s}, \qquad
        room = \tfrac{1}{2} \log_2
            \frac{\delta^*}{\max(\delta, 0) + \sigma_\delta / 2},
        \qquad -4 \le room \le 2

    At a rate that is too high, params are beyond the lowest point of their way: the
    loss rises, by the cost of gradient noise. Some of this rise is acceptable, because
    a schedule removes it later. In units of the loss, one bound fits all tasks: a share
    of the geometric mean of progress and noise.
    """
    span = jnp.maximum(rule.share * state.num_macro_steps, state.window_count)
    error = jnp.sqrt(state.loss_variance / jnp.maximum(span, 1.0))
    first = jnp.maximum(state.first_window_mean, state.start_loss)
    gained = jnp.maximum(first - state.avg_loss, error)
    part = share(state)
    waste = jnp.where(
        rule.anneal, rule.annealed_waste * part, rule.waste * jnp.sqrt(part)
    )
    noise = jnp.sqrt(state.loss_variance)
    deviation = jnp.clip(noise, rule.least_noise * gained, rule.most_noise * gained)
    # roots one by one: the product may overflow float32
    mean = jnp.sqrt(gained) * jnp.sqrt(deviation)
    # without noise, and without a schedule, no rise is acceptable for long
    calm = noise / jnp.sqrt(jnp.asarray(rule.least_noise, jnp.float32))
    allowed = waste * jnp.where(rule.anneal, jnp.minimum(mean, calm), mean)
    is_downhill = state.avg_rise < -rule.clear_errors * state.avg_rise_error
    rise = jnp.maximum(state.avg_rise, 0.0) + rule.rise_errors * state.avg_rise_error
    rise *= state.macro_rate**2
    octaves = -0.5 * jnp.log2(jnp.maximum(rise, 1e-33) / jnp.maximum(allowed, 1e-30))
    octaves = jnp.where(is_downhill, jnp.maximum(octaves, rule.downhill_room), octaves)
    most = jnp.log2(jnp.asarray(rule.growth_factor, jnp.float32))
    return jnp.clip(octaves, -2.0 * most, most)
