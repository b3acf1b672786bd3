"""Gradients of many sizes, and what becomes of them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from .drive import drive, stay, updates_of

NUM_STEPS = 60
SUM = {"b2": 1, "bias_correction": False}  # of squares


@functools.cache
def gradients(is_complex=False):
    """Returns gradients of many sizes; those of one row are rare, of another none."""
    rng = np.random.default_rng(0)
    shapes = {"rows": (5, 3), "bias": (4,), "scalar": ()}
    tree = {}
    for name, shape in shapes.items():
        g = rng.standard_normal((NUM_STEPS, *shape))
        if is_complex:
            g = g + 1j * rng.standard_normal((NUM_STEPS, *shape))
        tree[name] = g * rng.lognormal(0.0, 2.0, shape)
    tree["rows"][:, 0] = 0.0
    tree["rows"][np.arange(NUM_STEPS) % 17 != 5, 1] = 0.0
    dtype = jnp.complex64 if is_complex else jnp.float32
    return jax.tree.map(lambda g: jnp.asarray(g, dtype), tree)


def all_updates(tx, grads):
    """Returns the updates of all steps, and the last state."""
    params = jax.tree.map(lambda g: jnp.ones_like(g[0]), grads)
    _, state, updates = drive(
        tx, params, (None, grads), see=updates_of, apply_updates=stay
    )
    return updates, state


def assert_close(found, expected, rtol=2e-6):
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=rtol, atol=1e-7)
