"""Transformations that keep what they are handed."""

import jax.numpy as jnp
import optax


def spy(seen):
    """Returns one that appends the extra arguments of each step to a list."""

    def update(updates, state, params=None, **extra_args):
        del params
        seen.append(extra_args)
        return updates, state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)


def keeps(*names):
    """Returns one whose state is what it was handed last under these names."""

    def update(updates, state, params=None, **extra_args):
        del state, params
        told = {name: jnp.float32(extra_args[name]) for name in names}
        return updates, told

    return optax.GradientTransformationExtraArgs(
        lambda _: dict.fromkeys(names, jnp.zeros(())), update
    )
