"""A run down the square of the params, for tests of what happens in mid-run."""

import jax
import jax.numpy as jnp

import lalerg_optax as lo


def run(tx, params, state, num_steps):
    """Follows the gradient of |p|^2; returns params and state."""

    def step(carry, _):
        params, state = carry
        loss, grads = jax.value_and_grad(lambda p: jnp.sum(p**2))(params)
        updates, state = tx.update(grads, state, params, value=loss)
        return (lo.apply_updates(params, updates, state), state), None

    return jax.lax.scan(step, (params, state), length=num_steps)[0]
