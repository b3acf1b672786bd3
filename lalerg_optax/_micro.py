"""Micro level: a rate for every parameter entry, from its own gradients."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ._checks import check_growing, check_range, check_state_type, check_updates
from ._gate import open_gate
from ._mapped import mapped_axes, spread
from ._moments import (
    MomentRule,
    is_mean_of_squares,
    largest_update,
    memory,
    product_of_decays,
    square,
    square_of,
)
from ._numbers import SMALLEST, is_representable, wide
from ._scalars import count_if
from ._verdict import Audit, Verdict

_TOLERANCE = 2.0  # of the bound on an update: for rounding, which is far less

Decay = jax.typing.ArrayLike | tuple[jax.typing.ArrayLike, jax.typing.ArrayLike]


class ScaleByMicroRateState(NamedTuple):
    """State of `scale_by_micro_rate`.

    Attributes:
      micro_count: number of gradients taken in, int32, shape ``()``.
      num_micro_held: number of steps that left the moments unchanged, because of the
        verdict or of a number that is not finite, int32, shape ``()``.
      mu: exponential average of the gradients, a tree like the params.
      nu: exponential average, or sum, of their squared magnitudes, likewise; real. With
        ``per_tensor`` its leaves are scalars.

    Example:
      >>> import jax.numpy as jnp, lalerg_optax as lo
      >>> params = jnp.zeros(3, jnp.bfloat16)
      >>> state = lo.scale_by_micro_rate().init(params)
      >>> state.mu.shape, str(state.mu.dtype)
      ((3,), 'float32')
    """

    micro_count: jax.Array
    num_micro_held: jax.Array
    mu: optax.Updates
    nu: optax.Updates


def scale_by_micro_rate(
    b1: jax.typing.ArrayLike = 0.9,
    b2: Decay = (0.99, 0.999),
    eps: jax.typing.ArrayLike = 1e-8,
    eps_root: jax.typing.ArrayLike = 0.0,
    *,
    gradient_share: jax.typing.ArrayLike = 0.4,
    bias_correction: bool = True,
    initial_scale: jax.typing.ArrayLike = 0.0,
    per_tensor: bool = False,
    mu_dtype: jax.typing.DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Scales every entry of the gradient by a rate of its own (second level).

    Args:
      b1: decay of the first moment, in [0, 1).
      b2: decay of the second moment, in [0, 1), or 1 without bias correction; or a pair
        of decays below 1, the first at most the second, between which it grows.
      eps: added to the root, at least 0.
      eps_root: added under the root, at least 0.
      gradient_share: weight of the fresh gradient against the first moment, in [0, 1].
      bias_correction: whether to divide moments by the sum of their weights.
      initial_scale: the second moment at the start, at least 0.
      per_tensor: whether a tensor has one rate, from the mean of its squares.
      mu_dtype: dtype of ``mu``; by default that of the params, but at least float32.

    Returns:
      An ``optax.GradientTransformationExtraArgs``; ``update`` takes the optional
      extra argument ``verdict``. Updates have the dtype of the gradients.

    Raises:
      ValueError: for a hyperparameter outside its range, and for a sum with bias
        correction.

    Example:
      >>> import jax.numpy as jnp, lalerg_optax as lo
      >>> tx = lo.scale_by_micro_rate()
      >>> params = jnp.array([1.0, 2.0])
      >>> state = tx.init(params)
      >>> updates, state = tx.update(jnp.array([0.5, -3.0]), state)
      >>> [round(float(u), 3) for u in updates]
      [1.0, -1.0]
      >>> updates, state = tx.update(jnp.array([jnp.nan, 1.0]), state)
      >>> bool(jnp.all(updates == 0.0)), int(state.num_micro_held)
      (True, 1)

    Adam's rule with quasi-hyperbolic momentum: with :math:`g_t` the gradient, :math:`s`
    the ``gradient_share`` and :math:`\gamma_i` the correction of the bias,

    .. math::

        \mu_t = b_1 \mu_{t-1} + (1 - b_1) g_t, \quad
        \nu_t = b_2 \nu_{t-1} + (1 - b_2) |g_t|^2, \quad
        u_t = \frac{(1 - s) \, \mu_t / \gamma_1 + s \, g_t}
                   {\sqrt{\nu_t / \gamma_2 + eps_{root}} + eps}

    A pair for ``b2`` makes the memory grow, and ``b2=1`` gives a sum. A step that is
    not accepted leaves the moments unchanged, except that a revert resets the first
    one. An update that no gradients can have made (a flipped bit) is dropped. All
    equations: ``docs/algorithm.md``. It equals

    ::

        scale_by_adam(b1, b2)      # with gradient_share=0
        scale_by_rms(decay, eps)   # b2=decay, eps=0, eps_root=eps, gradient_share=1,
                                   # bias_correction=False
        scale_by_rss(initial, eps) # the same with b2=1, initial_scale=initial
    """
    check_range("b1", b1, 0.0, 1.0, high_open=True)
    if bias_correction and isinstance(b2, int | float) and b2 == 1:
        raise ValueError(
            "b2 must be in the range [0.0, 1.0) with bias correction, because a sum of "
            "squares has no bias: give bias_correction=False, or another b2; got "
            f"b2 = {b2}."
        )
    decays = check_growing("b2", b2, 0.0, 1.0, high_open=bias_correction)
    check_range("gradient_share", gradient_share, 0.0, 1.0)
    check_range("eps", eps, 0.0, float("inf"))
    check_range("eps_root", eps_root, 0.0, float("inf"))
    check_range("initial_scale", initial_scale, 0.0, float("inf"))
    rule = MomentRule(
        b1,
        *decays,
        eps,
        eps_root,
        gradient_share,
        bias_correction,
        initial_scale,
        per_tensor,
    )

    def initial(p: jax.Array) -> jax.Array:
        dtype = wide(jnp.finfo(p.dtype))  # a real one
        if per_tensor:
            return jnp.full((), initial_scale, dtype)
        return jnp.full_like(p, initial_scale, dtype)

    def init_fn(params: optax.Params) -> ScaleByMicroRateState:
        return ScaleByMicroRateState(
            micro_count=spread(jnp.zeros((), jnp.int32), mapped_axes(params)),
            num_micro_held=spread(jnp.zeros((), jnp.int32), mapped_axes(params)),
            mu=jax.tree.map(lambda p: jnp.zeros_like(p, mu_dtype or wide(p)), params),
            nu=jax.tree.map(initial, params),
        )

    def update_fn(
        updates: optax.Updates,
        state: ScaleByMicroRateState,
        params: optax.Params | None = None,
        *,
        verdict: jax.Array | None = None,
        audit: Audit | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, ScaleByMicroRateState]:
        del params, extra_args
        check_state_type("scale_by_micro_rate", state, ScaleByMicroRateState)
        check_updates("scale_by_micro_rate", updates, state.mu)
        is_open, updates = open_gate(updates, verdict)
        is_restart = None if audit is None else audit.is_restart
        count = count_if(is_open, state.micro_count)
        if is_restart is not None:
            count = jnp.where(is_restart, 0, count)
        t = jnp.maximum(count, 1).astype(jnp.float32)
        decay, weight = memory(rule, t)
        # A held step has decays of 1 and weights of 0: selecting the old state
        # afterwards would keep old and new alive, and cost a copy.
        keep1, add1 = jnp.where(is_open, b1, 1.0), jnp.where(is_open, 1.0 - b1, 0.0)
        keep2, add2 = jnp.where(is_open, decay, 1.0), jnp.where(is_open, weight, 0.0)
        if verdict is not None:
            keep1 = jnp.where(verdict == Verdict.REVERT, 0.0, keep1)

        def averaged(g: jax.Array, m: jax.Array) -> jax.Array:
            healed = jnp.where(is_representable(m), m, 0)
            return (add1 * g + keep1 * healed).astype(m.dtype)

        def averaged_square(g: jax.Array, n: jax.Array) -> jax.Array:
            is_kept = is_mean_of_squares(n)
            if is_restart is not None:
                is_kept &= ~is_restart
            before = jnp.where(is_kept, n, initial_scale)
            taken_in = square_of(rule, g, n.dtype)
            if rule.may_be_sum:  # which could overflow; a bound on it would cost a copy
                half = jnp.finfo(n.dtype).max / 2
                before = jnp.minimum(before, half)
                taken_in = jnp.minimum(taken_in, half)
            return (add2 * taken_in + keep2 * before).astype(n.dtype)

        mu = jax.tree.map(averaged, updates, state.mu)
        nu = jax.tree.map(averaged_square, updates, state.nu)
        correction1 = 1.0 - b1**t if bias_correction else 1.0
        correction2 = 1.0 - product_of_decays(rule, t) if bias_correction else 1.0
        gate = jnp.where(is_open, (1.0 - gradient_share) / correction1, 0.0)
        debias = 1.0 / correction2
        limit = (_TOLERANCE * largest_update(rule, weight)) ** 2 * debias

        def scaled(g: jax.Array, m: jax.Array, n: jax.Array) -> jax.Array:
            mean = gate * m + gradient_share * g.astype(wide(g))
            root = jnp.sqrt(debias * n + eps_root) + eps
            u = mean / root
            if rule.may_divide_by_zero:  # an entry without gradients is 0 / 0
                u = jnp.where(root > 0, u, 0)
            # not from u: XLA would store a quotient that is used twice
            most = limit * n * max(g.size, 1) if per_tensor else limit * n
            is_impossible = square(mean, n.dtype) > most + SMALLEST
            return jnp.where(is_impossible, 0, u).astype(g.dtype)

        return jax.tree.map(scaled, updates, mu, nu), ScaleByMicroRateState(
            micro_count=count,
            num_micro_held=count_if(~is_open, state.num_micro_held),
            mu=mu,
            nu=nu,
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
