"""Moments: the rule of the micro level, and what its moments may be."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ._numbers import SMALLEST

# a memory that grows spans one in so many of all steps so far
_STEPS_PER_REMEMBERED = 2


class MomentRule(NamedTuple):
    """Numbers of the micro level, which users set and which may be traced.

    Attributes:
      b1: see `scale_by_micro_rate`, as all others.
      b2: the first of a pair.
      last_b2: the second of a pair; the same object as the first if there is none.
      eps: likewise.
      eps_root: likewise.
      gradient_share: likewise.
      bias_correction: likewise.
      initial_scale: likewise.
      per_tensor: likewise.
    """

    b1: Any
    b2: Any
    last_b2: Any
    eps: Any
    eps_root: Any
    gradient_share: Any
    bias_correction: bool
    initial_scale: Any
    per_tensor: bool

    @property
    def is_growing(self) -> bool:
        """Whether the memory of squares grows."""
        return self.last_b2 is not self.b2

    @property
    def may_be_sum(self) -> bool:
        """Whether squares may be summed up instead of averaged."""
        last = self.last_b2
        return not (isinstance(last, int | float) and np.float32(last) < 1)

    @property
    def may_divide_by_zero(self) -> bool:
        """Whether nothing is known to keep the root of the squares above zero."""
        return not any(
            isinstance(e, int | float) and e > 0 for e in (self.eps, self.eps_root)
        )


# What is added to the moments


def memory(rule: MomentRule, t: jax.Array) -> tuple[Any, Any]:
    r"""Returns decay and weight of the squares at step ``t``.

    A memory that grows is half as long as the run so far, within its limits:

    .. math::

        \beta_t = \min(\max(b_{2, first},\; 1 - 2 / t),\; b_{2, last})
    """
    if rule.is_growing:
        lost = jnp.clip(_STEPS_PER_REMEMBERED / t, 1.0 - rule.last_b2, 1.0 - rule.b2)
        decay = 1.0 - lost
    else:
        decay, lost = rule.b2, 1.0 - rule.b2
    if not rule.may_be_sum:
        return decay, lost
    # in the precision of the decay: a decay that is rounded to 1 does not decay
    return decay, jnp.where(jnp.asarray(decay, jnp.float32) == 1.0, 1.0, lost)


def product_of_decays(rule: MomentRule, t: jax.Array) -> jax.Array:
    """Returns the product of the decays of all squares so far."""
    if not rule.is_growing:
        return rule.b2**t
    # it grows between these steps, where factors (j - 2) / j cancel each other
    first = jnp.floor(_STEPS_PER_REMEMBERED / (1.0 - rule.b2))
    last = jnp.floor(_STEPS_PER_REMEMBERED / (1.0 - rule.last_b2))
    steps = jnp.clip(t, first, last)
    growing = math.prod((first - k) / (steps - k) for k in range(_STEPS_PER_REMEMBERED))
    before, after = jnp.minimum(t, first), jnp.maximum(t - last, 0.0)
    # one exponential: every power would be a kernel of its own
    return growing * jnp.exp(
        before * jnp.log(jnp.maximum(rule.b2, SMALLEST))
        + after * jnp.log(jnp.maximum(rule.last_b2, SMALLEST))
    )


def square(g: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Returns the squared magnitudes of entries."""
    if jnp.iscomplexobj(g):
        return jnp.square(g.real) + jnp.square(g.imag)
    return jnp.square(g.astype(dtype))


def square_of(rule: MomentRule, g: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Returns the squares that the second moment of a tensor takes in."""
    squares = square(g, dtype)
    return jnp.sum(squares) / max(g.size, 1) if rule.per_tensor else squares


# What the moments may be


def is_mean_of_squares(n: jax.Array) -> jax.Array:
    """Returns which entries are neither negative nor infinite nor NaN.

    Read as integers, the bits of all others are larger. One comparison instead of two
    of floats saves a tenth of the whole step on a CPU.
    """
    kind = jnp.dtype(f"uint{8 * n.dtype.itemsize}")
    infinity = np.array(np.inf, n.dtype).view(kind)
    return lax.bitcast_convert_type(n, kind) < infinity


def largest_update(rule: MomentRule, weight: Any) -> jax.Array:
    r"""Returns the bound on an update :math:`u_t`, for :math:`n = 1`.

    By the Cauchy-Schwarz inequality, with :math:`g_i` the gradients, :math:`n` the
    number of entries that share a rate, :math:`w_t` the weight of the last square,
    :math:`s` the share of the fresh gradient and :math:`b_2` the first decay,

    .. math::

        \Big|\sum_i b_1^{t-i} g_i\Big|^2
        \le \sum_i \Big(\frac{b_1^2}{b_2}\Big)^{t-i} \sum_i b_2^{t-i} |g_i|^2
        \le \frac{1 - (b_1^2 / b_2)^t}{1 - b_1^2 / b_2} \; \frac{n \nu_t}{w_t}

    if :math:`b_1^2 < b_2`, and so (``docs/algorithm.md`` has the steps)

    .. math::

        |u_t| \le \sqrt{\frac{n}{w_t}} \left(
            \frac{(1 - s) (1 - b_1)}{\sqrt{1 - b_1^2 / b_2}} + s \right)

    Args:
      rule: the numbers.
      weight: weight of the last square in the second moment.
    """
    ratio = jnp.asarray(rule.b1**2 / jnp.maximum(rule.b2, SMALLEST), jnp.float32)
    series = jnp.where(ratio < 1.0, 1.0 / jnp.sqrt(1.0 - ratio), jnp.inf)
    share = rule.gradient_share
    bound = (1.0 - share) * (1.0 - rule.b1) * series + share
    return jnp.asarray(bound / jnp.sqrt(weight), jnp.float32)
