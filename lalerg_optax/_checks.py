"""Checks of what users hand in: hyperparameters at construction, losses later."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def check_range(
    name: str,
    value: Any,
    low: float,
    high: float,
    *,
    low_open: bool = False,
    high_open: bool = False,
) -> None:
    """Raises a ValueError unless ``value`` lies between ``low`` and ``high``.

    An array or a tracer passes: that is how ``optax.inject_hyperparams`` hands a
    hyperparameter in, and it may have no value yet.
    """
    if isinstance(value, jax.Array):
        return
    if not isinstance(value, int | float | np.number | np.ndarray):
        raise ValueError(f"{name} must be a number, got {name} = {value!r}.")
    high_open = high_open or math.isinf(high)
    above = value > low if low_open else value >= low
    below = value < high if high_open else value <= high
    if not (above and below):  # a NaN is neither
        left, right = "(" if low_open else "[", ")" if high_open else "]"
        raise ValueError(
            f"{name} must be in the range {left}{low}, {high}{right}, got "
            f"{name} = {value}."
        )


def as_loss(value: jax.typing.ArrayLike | None) -> jax.Array | None:
    """Returns ``value`` as a float32 scalar; None stays None."""
    if value is None:
        return None
    if jnp.shape(value):
        raise ValueError(
            "value must be a scalar, the mean loss of the batch, got shape "
            f"{jnp.shape(value)}."
        )
    return jnp.asarray(value, jnp.float32)
