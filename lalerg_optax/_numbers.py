"""Numbers: which are too large, too small, or not fit to compute with."""

import jax
import jax.numpy as jnp
from jax import lax

LARGEST = 1e37  # larger magnitudes are treated as this one: sums must not overflow
UNKNOWN = -LARGEST  # a rate that nobody knows: numbers in a state are finite
SMALLEST = 1e-30  # added to divisors and bounds, or their lower limit


def wide(x: jax.Array) -> jnp.dtype:
    """Returns the dtype to compute in: a decay of 0.999 is lost in bfloat16."""
    return jnp.promote_types(x.dtype, jnp.float32)


def is_representable(param: jax.Array) -> jax.Array:
    """Returns which entries have a square that is finite in float32."""
    return jnp.isfinite(lax.square(param.astype(wide(param))))
