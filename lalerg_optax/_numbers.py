"""Numbers: which are too large, too small, or not fit to compute with."""

import jax
import jax.numpy as jnp
from jax import lax

LARGEST = 1e37  # larger magnitudes are treated as this one: sums must not overflow
UNKNOWN = -LARGEST  # a rate that nobody knows: numbers in a state are finite
SMALLEST = 1e-30  # added to divisors and bounds, or their lower limit


def wide(x: jax.Array | jnp.finfo) -> jnp.dtype:
    """Returns the dtype to compute in: a decay of 0.999 is lost in bfloat16."""
    return jnp.promote_types(x.dtype, jnp.float32)


def is_representable(param: jax.Array) -> jax.Array:
    """Returns which entries have a square that is finite in float32."""
    return jnp.isfinite(lax.square(param.astype(wide(param))))


def root(square: jax.Array) -> jax.Array:
    """Returns the square root, whose derivative at 0 is 0 instead of infinity."""
    is_zero = square == 0.0
    return jnp.where(is_zero, 0.0, jnp.sqrt(jnp.where(is_zero, 1.0, square)))


def ratio(x: jax.typing.ArrayLike, y: jax.Array) -> jax.Array:
    """Returns x / y, and 0 where y is 0; so does its derivative."""
    is_zero = y == 0.0
    return jnp.where(is_zero, 0.0, x / jnp.where(is_zero, 1.0, y))


def log(x: jax.Array) -> jax.Array:
    """Returns the logarithm, minus infinity at 0, with a derivative of 0 there."""
    is_zero = x == 0.0
    return jnp.where(is_zero, -jnp.inf, jnp.log(jnp.where(is_zero, 1.0, x)))
