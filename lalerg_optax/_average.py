"""Average: of the params of late, whose span is a share of the run so far."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ._mapped import mapped_axes, spread
from ._numbers import is_representable
from ._records import Conduct, Decision, RegulatorScalars
from ._scalars import count_if
from ._verdict import Verdict

PyTree = Any


class AverageRule(NamedTuple):
    """Numbers of the average.

    Attributes:
      exponent: the weight of a point grows with this power of its number; its own in
        https://arxiv.org/abs/1212.1824 and in DoG, https://arxiv.org/abs/2302.12022.
      every: accepted steps between two points: a step in between costs nothing. Odd,
        so that an oscillation averages out.
    """

    exponent: float = 8.0
    every: int = 5


RULE = AverageRule()


class Average(NamedTuple):
    """Average of params.

    Attributes:
      points: the average, a tree like the params, in float32 or a wider dtype.
      num_points: number of points in it, int32.

    Example:
      >>> import jax.numpy as jnp, optax, lalerg_optax as lo
      >>> tx = lo.error_regulate(optax.sgd(0.1), average=True)
      >>> params = jnp.array([1.0, 2.0])
      >>> state = tx.init(params)
      >>> _, state = tx.update(params, state, params, value=1.0)
      >>> [float(p) for p in state.average.points], int(state.average.num_points)
      ([1.0, 2.0], 1)
    """

    points: PyTree
    num_points: jax.Array


def init_average(params: optax.Params) -> Average:
    """Returns an average of no points; until the first one, it is the params."""

    def copied(p: jax.Array) -> jax.Array:
        # weights fall below the resolution of a narrow dtype
        return jnp.array(p, jnp.promote_types(jnp.result_type(p), jnp.float32))

    none = spread(jnp.zeros((), jnp.int32), mapped_axes(params))
    return Average(jax.tree.map(copied, params), none)


def is_point(last: RegulatorScalars, decision: Decision) -> jax.Array:
    """Returns whether the params of a step are a point: nothing speaks against them."""
    is_sound = (decision.verdict == Verdict.ACCEPT) & (
        decision.conduct == Conduct.HEALTHY
    )
    return is_sound & (last.num_accepted % RULE.every == 0)


def with_point(
    is_taken: jax.typing.ArrayLike, average: Average, params: optax.Params
) -> Average:
    r"""Adds a point to an average, except for entries that are not sound.

    An entry of the average that is not sound begins anew.

    With the exponent :math:`k` and the number of points before, :math:`n`, the average
    :math:`\bar p` and the params :math:`p`

    .. math::

        \bar p \leftarrow \bar p + \frac{k + 1}{n + k + 1} \, (p - \bar p)
    """
    num = average.num_points
    weight = (RULE.exponent + 1.0) / (num.astype(jnp.float32) + RULE.exponent + 1.0)

    def moved(a: jax.Array, p: jax.Array) -> jax.Array:
        is_taken_here = is_taken & is_representable(p)
        p = p.astype(a.dtype)
        sound = jnp.where(is_representable(a), a, p)
        step = weight.astype(jnp.finfo(a.dtype).dtype) * (p - sound)
        return jnp.where(is_taken_here, sound + step, a)

    points = jax.tree.map(moved, average.points, params)
    return Average(points, count_if(jnp.asarray(is_taken), num))
