"""Verdict and audit: what the regulator passes to its links."""

import enum
from typing import NamedTuple

import jax
import numpy as np


class Verdict(enum.IntEnum):
    """What becomes of a step.

    ======  ======================  ================================================
    number  verdict                 the batch and the update
    ======  ======================  ================================================
    0       ACCEPT                  nothing to object to: the update is applied
    3       BOUND                   the loss is high, perhaps due to a hard batch: the
                                    update is applied, from a gradient that is
                                    scaled down to what is tolerated
    1       SKIP                    not usable: not finite, or a gradient that is
                                    too large for an ordinary loss: params and rates
                                    stay as they are
    2       REVERT                  the params may be damaged: they go back to the
                                    anchor
    ======  ======================  ================================================

    Attributes:
      ACCEPT: 0, the update is applied.
      SKIP: 1, the batch is dropped.
      REVERT: 2, params go back to the anchor.
      BOUND: 3, the update is applied, from a gradient of bounded norm.

    Example:
      >>> import jax.numpy as jnp, lalerg_optax as lo
      >>> verdict = jnp.array(2, jnp.int32)  # as `metrics` has it
      >>> lo.Verdict(int(verdict)).name
      'REVERT'
      >>> bool(verdict == lo.Verdict.ACCEPT)
      False
    """

    ACCEPT = 0
    SKIP = 1
    REVERT = 2
    BOUND = 3

    @classmethod
    def _missing_(cls, value: object) -> "Verdict | None":
        # Python 3.13 looks no member up by what has no hash
        if isinstance(value, jax.Array | np.ndarray):
            return cls(value.item())
        return None


def is_applied(verdict: jax.Array) -> jax.Array:
    """Returns whether the update of a step is applied."""
    return (verdict == Verdict.ACCEPT) | (verdict == Verdict.BOUND)


class Audit(NamedTuple):
    """Result of the looks back from the current params to the anchor.

    Attributes:
      is_taken: whether looks were summed up at this step, bool scalar.
      alignment: of fresh gradients with the way back to the anchor,
        float32 scalar in [-1, 1]. Positive: judged by batches that they have not
        seen, the steps since the anchor led downhill, and the slope continues.
        Exactly 0: params did not move at all, or no audit was taken.
      alignment_error: standard error of that mean, from the differences between the
        looks, float32 scalar.
      rise: of the loss on the way from the anchor to the params, to first order: the
        product of gradient and way, mean over the looks, in units of the loss, float32
        scalar.
      rise_error: its standard error, likewise.
      reach: how far params are from the anchor, in units of its norm, where an audit
        sends them back to the start of the run; otherwise 0, float32 scalar.
      is_restart: whether params go back to where the run began because no audit was
        good yet, bool scalar: everything learnt on the way is void.
      base_rate: learning rate of this step without macro rate and damping, which a
        schedule changes; negative where it is not known, float32 scalar.
    """

    is_taken: jax.Array
    alignment: jax.Array
    alignment_error: jax.Array
    rise: jax.Array
    rise_error: jax.Array
    reach: jax.Array
    is_restart: jax.Array
    base_rate: jax.Array
