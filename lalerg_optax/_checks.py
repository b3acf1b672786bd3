"""Range checks of hyperparameters, for numbers that are known at construction."""

import math
from typing import Any


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

    Only Python numbers are checked: an array or a tracer is how
    ``optax.inject_hyperparams`` hands a hyperparameter in, and has no value yet.
    """
    if not isinstance(value, int | float):
        return
    above = value > low if low_open else value >= low
    below = value < high if high_open else value <= high
    if not (above and below):  # a NaN is neither
        left = "(" if low_open or math.isinf(low) else "["
        right = ")" if high_open or math.isinf(high) else "]"
        raise ValueError(
            f"{name} must be in the range {left}{low}, {high}{right}, got "
            f"{name} = {value}."
        )
