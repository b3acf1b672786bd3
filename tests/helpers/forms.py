"""The optimizer in the form of a chain, whose last link is the regulator."""

import optax

import lalerg_optax as lo


def flat(learning_rate=0.01, **macro):
    return optax.chain(
        lo.scale_by_micro_rate(),
        lo.scale_by_macro_rate(**macro),
        optax.scale_by_learning_rate(learning_rate),
        lo.error_regulate(),
    )
