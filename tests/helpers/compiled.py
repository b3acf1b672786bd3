"""What XLA says of a compiled step."""

import re

import jax
import jax.numpy as jnp
import optax

SIDE = 512  # of the square leaves of `make_params`


def make_params(dtype="float32", num_leaves=4):
    return {f"w{i}": jnp.ones((SIDE, SIDE), dtype) for i in range(num_leaves)}


def compiled_step(tx, params):
    tx = optax.with_extra_args_support(tx)

    def step(params, state, grads, value):
        updates, state = tx.update(grads, state, params, value=value)
        return optax.apply_updates(params, updates), state

    args = (params, jax.jit(tx.init)(params), params, jnp.float32(1.0))
    return jax.jit(step, donate_argnums=(0, 1)).lower(*args).compile()


def num_copies(compiled):
    """Returns how many leaves of `make_params` are copied."""
    return len(re.findall(rf"\[{SIDE},{SIDE}\]\S* copy\(", compiled.as_text()))
