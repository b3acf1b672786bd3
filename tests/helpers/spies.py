"""A transformation that writes down what it is handed."""

import optax


def spy(seen):
    """Returns one that appends the extra arguments of each step to a list."""

    def update(updates, state, params=None, **extra_args):
        del params
        seen.append(extra_args)
        return updates, state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)
