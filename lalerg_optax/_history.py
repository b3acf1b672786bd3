"""LossHistory: a fixed-size, pure record of the recent values of a scalar signal."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

WINDOW = 128  # the skip-step rules of MaxText, levanter and OLMo use the same length
NUM_START_VALUES = 16  # an upper quantile of fewer values says nothing

_Z95 = 1.645  # the 95th percentile of a standard normal variable


class LossHistory(NamedTuple):
    """The last values of a scalar signal, and the first one of all.

    The window always holds finite numbers only. Every method is a pure function
    of the record: ``record`` returns a new one and changes nothing.

    Attributes:
      values: ring buffer of the recent values, float32, shape ``(size,)``. Slots
        that were never written hold zero and are not looked at.
      next_index: the slot that the next value goes to, int32, shape ``()``.
      num_values: number of slots in use, at most ``size``, int32, shape ``()``.
      start_value: the smallest of the first 16 values, float32, shape ``()``: where
        the signal started from, told without a huge first value or two.

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
    next_index: jax.Array
    num_values: jax.Array
    start_value: jax.Array

    @classmethod
    def empty(cls, size: int = WINDOW) -> "LossHistory":
        """Returns a record of ``size`` slots with nothing in it."""
        if not isinstance(size, int) or size < 1:
            raise ValueError(f"size must be an int of at least 1, got size = {size}.")
        return cls(
            values=jnp.zeros((size,), jnp.float32),
            next_index=jnp.zeros((), jnp.int32),
            num_values=jnp.zeros((), jnp.int32),
            start_value=jnp.zeros((), jnp.float32),
        )

    def record(self, value: jax.typing.ArrayLike) -> "LossHistory":
        """Returns the record with ``value`` added; NaN and Inf add nothing."""
        value = jnp.asarray(value, jnp.float32)
        finite = jnp.isfinite(value)
        size = self.values.shape[0]
        slot = jnp.where(finite, value, self.values[self.next_index])
        return LossHistory(
            values=self.values.at[self.next_index].set(slot),
            next_index=jnp.where(finite, (self.next_index + 1) % size, self.next_index),
            num_values=jnp.where(
                finite, jnp.minimum(self.num_values + 1, size), self.num_values
            ),
            start_value=jnp.where(
                finite & (self.num_values < min(NUM_START_VALUES, size)),
                jnp.where(
                    self.num_values == 0, value, jnp.minimum(self.start_value, value)
                ),
                self.start_value,
            ),
        )

    def centre_and_spread(self) -> tuple[jax.Array, jax.Array]:
        """Returns the median and the upper spread of the window.

        With the ``n`` recorded values in ascending order ``v[0] ... v[n - 1]``::

            median = v[(n - 1) // 2]
            upper_spread = (v[ceil(0.95 (n - 1))] - median) / 1.645

        The spread looks upwards only because minibatch losses are skewed to the
        right once a model fits; for normal noise it is the standard deviation.
        Both are 0 for an empty record.
        """
        size = self.values.shape[0]
        used = jnp.arange(size) < self.num_values
        ascending = jnp.sort(jnp.where(used, self.values, jnp.inf))
        last = jnp.maximum(self.num_values - 1, 0)
        median = ascending[last // 2]
        upper = ascending[(19 * last + 19) // 20]  # ceil(0.95 last), in integers
        empty = self.num_values == 0
        zero = jnp.zeros((), jnp.float32)
        return (
            jnp.where(empty, zero, median),
            jnp.where(empty, zero, (upper - median) / _Z95),
        )
