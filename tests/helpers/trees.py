"""Params of all kinds."""

import jax
import jax.numpy as jnp

TREES = {
    "float32": {"w": jnp.ones((3, 2)), "b": jnp.ones(2)},
    "bfloat16": {"w": jnp.ones((3, 2), jnp.bfloat16)},
    "float16": {"w": jnp.ones((3, 2), jnp.float16)},
    "mixed": [
        jnp.ones(3, jnp.bfloat16),
        jnp.ones(2, jnp.float32),
        (jnp.ones((), jnp.float16), jnp.ones(2, jnp.complex64)),
    ],
    "complex64": jnp.ones(3, jnp.complex64) * (1 + 2j),
    "empty dict": {},
    "empty leaf": {"w": jnp.ones((0, 3)), "b": jnp.ones(2)},
    "scalar": jnp.asarray(2.0, jnp.float32),
    "None leaf": {"w": jnp.ones(3), "frozen": None},
}


def like(params, value):
    return jax.tree.map(lambda p: jnp.full(p.shape, value, p.dtype), params)


def types(tree):
    """Returns the shape, dtype and weak type of every leaf."""
    return jax.tree.map(
        lambda x: (jnp.shape(x), x.dtype, jax.typeof(x).weak_type), tree
    )
