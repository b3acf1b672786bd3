"""A macro level that is told audits which the tests make up."""

import functools

import jax
import jax.numpy as jnp

import lalerg_optax as lo
from lalerg_optax._search_rule import Phase
from lalerg_optax._verdict import Audit, Verdict

ACCEPT, REVERT = jnp.int32(Verdict.ACCEPT), jnp.int32(Verdict.REVERT)


def make_audit(
    alignment=None,
    error=0.0,
    reach=0.0,
    is_restart=False,
    rise=0.0,
    rise_error=0.0,
    base_rate=1.0,
):
    return Audit(
        is_taken=jnp.asarray(alignment is not None),
        alignment=jnp.float32(0.0 if alignment is None else alignment),
        alignment_error=jnp.float32(error),
        rise=jnp.float32(rise),
        rise_error=jnp.float32(rise_error),
        reach=jnp.float32(reach),
        is_restart=jnp.asarray(is_restart),
        base_rate=jnp.float32(base_rate),
    )


@functools.cache
def _level(**hyperparameters):
    init, update = lo.scale_by_macro_rate(**hyperparameters)
    return init, jax.jit(update)


class Driver:
    """A macro level and what it is told."""

    def __init__(self, **hyperparameters):
        init, self._update = _level(**hyperparameters)
        self.state = init(jnp.ones(1))
        self.base_rate = 1.0  # of the schedule

    @property
    def rate(self):
        return float(self.state.macro_rate)

    @property
    def phase(self):
        return Phase(int(self.state.phase))

    def tell(
        self,
        alignment=None,
        value=1.0,
        error=0.0,
        verdict=ACCEPT,
        harm=False,
        reach=0,
        length=1.0,
    ):
        rise = 0.0 if alignment is None else -length * alignment
        noise = length * error
        audit = make_audit(
            alignment, error, reach, harm, rise, noise, base_rate=self.base_rate
        )
        _, self.state = self._update(
            jnp.ones(1),
            self.state,
            value=value,
            verdict=verdict,
            audit=audit,
            is_harmful=jnp.asarray(harm),
        )

    def tell_alone(self, value):
        """A step without a regulator."""
        _, self.state = self._update(jnp.ones(1), self.state, value=value)

    def window(
        self, alignment, num_steps=4, value=1.0, noise=0.0, error=0.0, length=1.0
    ):
        """Takes steps, the last of them with an audit; returns the rate's factor.

        The loss rises on the way by the alignment times ``length``.
        """
        before = self.rate
        for i in range(num_steps):
            is_last = i == num_steps - 1
            swing = noise if i % 2 else -noise
            loss = None if value is None else value + swing
            self.tell(alignment if is_last else None, loss, error, length=length)
        return self.rate / before

    def end_search(self, value=1.0):
        self.window(0.8, value=value)
        self.window(0.8, value=value)
        self.window(-0.8, value=value)
        assert self.phase is Phase.STEER
        return self
