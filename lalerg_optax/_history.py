"""LossHistory: a fixed-size, pure record of the recent values of a scalar signal."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

WINDOW = 128  # the skip-step rules of MaxText, levanter and OLMo use the same length
NUM_START_VALUES = 16  # an upper quantile of fewer values is meaningless

Z95 = 1.645  # the 95th percentile of a standard normal variable


class LossHistory(NamedTuple):
    """The last values of a scalar signal, and its value at the start.

    The window always holds finite numbers only. Every method is a pure function
    of the record: ``record`` returns a new one and changes nothing. Several signals
    can share one record, with leading axes.

    Attributes:
      values: the recent values, newest last, float32, shape ``(..., size)``. Unused
        slots in front are ignored.
      num_values: number of slots in use, at most ``size``, int32, shape ``(...)``.
      start_value: the smallest of the first 16 values, float32, shape ``(...)``: where
        the signal started, even if the first value or two are huge.

    Example:
      >>> import lalerg_optax as lo
      >>> history = lo.LossHistory.empty(size=4)
      >>> for loss in (4.0, 3.0, float("nan"), 2.0):
      ...     history = history.record(loss)
      >>> int(history.num_values), float(history.start_value)
      (3, 2.0)
      >>> median, upper_spread = history.centre_and_spread()
      >>> float(median)
      3.0
    """

    values: jax.Array
    num_values: jax.Array
    start_value: jax.Array

    def _whole(self) -> "LossHistory":
        """Returns the record in one piece, where a mesh has ``Explicit`` axes.

        A rule that shards every leaf of a state shards the window as well.
        """

        def whole(x: jax.Array) -> jax.Array:
            spec = jax.typeof(x).sharding.spec
            if all(part is None for part in spec):
                return x
            return jax.sharding.reshard(x, jax.sharding.PartitionSpec())

        return LossHistory(*map(whole, map(jnp.asarray, self)))

    @classmethod
    def empty(cls, size: int = WINDOW, shape: tuple[int, ...] = ()) -> "LossHistory":
        """Returns a record of ``size`` slots with nothing in it.

        Args:
          size: length of the window, at least 1.
          shape: leading axes, one entry for each signal; by default there is one.
        """
        if not isinstance(size, int) or size < 1:
            raise ValueError(f"size must be an int of at least 1, got size = {size}.")
        return cls(
            values=jnp.zeros((*shape, size), jnp.float32),
            num_values=jnp.zeros(shape, jnp.int32),
            start_value=jnp.zeros(shape, jnp.float32),
        )

    def record(self, value: jax.typing.ArrayLike) -> "LossHistory":
        """Returns the record with ``value`` added; NaN and Inf add nothing."""
        self = self._whole()
        value = jnp.asarray(value, jnp.float32)
        finite = jnp.isfinite(value)
        size = self.values.shape[-1]
        slot = lax.broadcasted_iota(jnp.int32, self.values.shape, self.values.ndim - 1)
        shift = [(0, 0, 0)] * (self.values.ndim - 1) + [(-1, 1, 0)]
        shifted = lax.pad(self.values, jnp.zeros((), jnp.float32), shift)
        shifted = jnp.where(slot == size - 1, value[..., None], shifted)
        is_first = finite & (self.num_values == 0)
        is_early = finite & (self.num_values < min(NUM_START_VALUES, size))
        lower = jnp.minimum(self.start_value, value)
        return LossHistory(
            values=jnp.where(finite[..., None], shifted, self.values),
            num_values=jnp.minimum(self.num_values + finite, size),
            start_value=jnp.where(
                is_first, value, jnp.where(is_early, lower, self.start_value)
            ),
        )

    def centre_and_spread(self) -> tuple[jax.Array, jax.Array]:
        r"""Returns the median and the upper spread of the window.

        With the recorded values in ascending order, :math:`v_0 \ldots v_{n-1}`,

        .. math::

            m = v_{\lfloor (n-1)/2 \rfloor}, \qquad
            s = \frac{v_{\lceil 0.95 (n-1) \rceil} - m}{1.645}

        The spread is that of the upper side, because minibatch losses are skewed to
        the right once a model fits. For normal noise it is the standard deviation.
        Both are 0 for an empty record.
        """
        self = self._whole()
        size = self.values.shape[-1]
        num_values = self.num_values[..., None]
        slot = lax.broadcasted_iota(jnp.int32, self.values.shape, self.values.ndim - 1)
        is_used = slot >= size - num_values
        ascending = jnp.sort(jnp.where(is_used, self.values, jnp.inf), axis=-1)
        last = jnp.maximum(num_values - 1, 0)
        index = jnp.concatenate(
            [last // 2, (19 * last + 19) // 20],  # ceil(0.95 last), in integers
            axis=-1,
        )
        picked = jnp.take_along_axis(ascending, index, axis=-1)
        picked = jnp.where(num_values > 0, picked, 0.0)
        median, upper = picked[..., 0], picked[..., 1]
        return median, (upper - median) / Z95
