"""Micro level: a rate for every parameter entry, from its own gradients."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ._anchor import Audit, is_sound
from ._checks import check_range, check_state_type, check_updates
from ._gate import count_if, open_gate
from ._judge import Verdict

_TOLERANCE = 2.0  # of the bound on an update: for rounding, which is far less
_SMALLEST = 1e-30  # squares of smaller gradients are no float32


class ScaleByMicroRateState(NamedTuple):
    """State of `scale_by_micro_rate`.

    Attributes:
      micro_count: number of gradients taken in, int32, shape ``()``.
      num_micro_held: number of steps that left the moments as they were because
        the verdict or a number that is not finite said so, int32, shape ``()``.
      mu: exponential average of the gradients, a tree like the params.
      nu: exponential average of their squared magnitudes, likewise; real.

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
    b2: jax.typing.ArrayLike = 0.99,
    eps: jax.typing.ArrayLike = 1e-8,
    eps_root: jax.typing.ArrayLike = 0.0,
    *,
    gradient_share: jax.typing.ArrayLike = 0.4,
    mu_dtype: jax.typing.DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Scales every entry of the gradient by a rate of its own (second level).

    With gradient :math:`g_t`, :math:`t` the number of gradients taken in and
    :math:`s` the ``gradient_share``,

    .. math::

        \mu_t &= b_1 \mu_{t-1} + (1 - b_1) g_t \\
        \nu_t &= b_2 \nu_{t-1} + (1 - b_2) |g_t|^2 \\
        u_t &= \frac{(1 - s) \, \mu_t / (1 - b_1^t) + s \, g_t}
                    {\sqrt{\nu_t / (1 - b_2^t) + eps_{root}} + eps}

    which is Adam's rule with quasi-hyperbolic momentum: Adam itself for :math:`s = 0`,
    close to NAdam for :math:`s = 1 - b_1`, and RMSProp with bias correction for
    :math:`s = 1`. What is added to it is the gate: a step that is not accepted leaves
    :math:`\mu`, :math:`\nu` and :math:`t` bit for bit as they were and gives a zero
    update. Inside `error_regulate` the regulator's verdict is the gate. Alone, the gate
    is whether the squared global norm of the gradient is finite in float32, so that no
    NaN, infinity or overflow ever gets into the state.

    Moments that no gradients can have made were hit from outside (a flipped bit): a
    :math:`\mu` whose square is not finite in float32, or a :math:`\nu` that is negative
    or not finite, starts anew at zero. And by Cauchy and Schwarz, for any gradients and
    if :math:`b_1^2 < b_2`,

    .. math::

        |u_t| \le \frac{(1 - s) (1 - b_1)}{\sqrt{(1 - b_2) (1 - b_1^2 / b_2)}}
        + \frac{s}{\sqrt{1 - b_2}}

    so that an entry whose :math:`u_t` would be more than twice as large (with
    :math:`eps = 0`) stays where it is.

    On a REVERT :math:`\mu` is set to zero, because momentum belongs to the path that
    was left; :math:`\nu` stays, because the scale of the gradients does not. Where
    params go back to the very start (``audit.is_restart``, see `error_regulate`),
    :math:`\nu` and :math:`t` are set to zero as well: gradients of a first step that
    was a thousand times too far would hold the rates down for :math:`1 / (1 - b_2)`
    steps.

    Args:
      b1: decay of the first moment, in [0, 1).
      b2: decay of the second moment, in [0, 1).
      eps: added to the root, at least 0.
      eps_root: added under the root, at least 0.
      gradient_share: weight of the fresh gradient against that of the first moment,
        in [0, 1]. The default is what Ma and Yarats recommend; ``b2`` was chosen with
        it on the tasks that ``benchmarks/tasks.py`` calls DEVELOPMENT.
      mu_dtype: dtype of ``mu``; by default that of the params, but at least float32.
        ``nu`` is real and at least float32.

    Returns:
      An ``optax.GradientTransformationExtraArgs``; ``update`` takes the optional
      extra argument ``verdict``. Updates have the dtype of the gradients.

    Raises:
      ValueError: for a hyperparameter outside of its range.

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

    References:
      Kingma and Ba, `Adam <https://arxiv.org/abs/1412.6980>`_, 2014; Ma and Yarats,
      `Quasi-hyperbolic momentum <https://arxiv.org/abs/1810.06801>`_, 2018; Dozat,
      NAdam, 2016. Earlier rules of the kind are AdaGrad (Duchi et al., 2011), RMSProp
      (Tieleman and Hinton, 2012) and AdaDelta (Zeiler, 2012).
    """
    check_range("b1", b1, 0.0, 1.0, high_open=True)
    check_range("b2", b2, 0.0, 1.0, high_open=True)
    check_range("gradient_share", gradient_share, 0.0, 1.0)
    check_range("eps", eps, 0.0, float("inf"))
    check_range("eps_root", eps_root, 0.0, float("inf"))

    may_be_zero = not (isinstance(eps, int | float) and eps > 0)

    def largest() -> jax.Array:
        """Returns the bound on an update; see above."""
        ratio = jnp.asarray(b1**2 / jnp.maximum(b2, _SMALLEST), jnp.float32)
        series = jnp.where(ratio < 1.0, 1.0 / jnp.sqrt(1.0 - ratio), jnp.inf)
        bound = (1.0 - gradient_share) * (1.0 - b1) * series + gradient_share
        return jnp.asarray(bound / jnp.sqrt(1.0 - b2), jnp.float32)

    def wide(x: jax.Array) -> jnp.dtype:
        # a decay of 0.999 is lost in bfloat16, and a square overflows float16
        return jnp.promote_types(x.dtype, jnp.float32)

    def squared(g: jax.Array, dtype: jnp.dtype) -> jax.Array:
        if jnp.iscomplexobj(g):
            return jnp.square(g.real) + jnp.square(g.imag)
        return jnp.square(g.astype(dtype))

    def init_fn(params: optax.Params) -> ScaleByMicroRateState:
        return ScaleByMicroRateState(
            micro_count=jnp.zeros((), jnp.int32),
            num_micro_held=jnp.zeros((), jnp.int32),
            mu=jax.tree.map(lambda p: jnp.zeros_like(p, mu_dtype or wide(p)), params),
            nu=jax.tree.map(lambda p: jnp.zeros_like(p.real, wide(p.real)), params),
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
        # Decays that become "keep", with a gradient that is zero: selecting the old
        # state afterwards would keep old and new alive, and cost a copy.
        keep1, add1 = jnp.where(is_open, b1, 1.0), jnp.where(is_open, 1.0 - b1, 0.0)
        keep2, add2 = jnp.where(is_open, b2, 1.0), jnp.where(is_open, 1.0 - b2, 0.0)
        count = count_if(is_open, state.micro_count)
        if verdict is not None:
            keep1 = jnp.where(verdict == Verdict.REVERT, 0.0, keep1)
        if audit is not None:
            keep2 = jnp.where(audit.is_restart, 0.0, keep2)
            count = jnp.where(audit.is_restart, 0, count)

        def averaged(g: jax.Array, m: jax.Array) -> jax.Array:
            healed = jnp.where(is_sound(m), m, 0)
            return (add1 * g + keep1 * healed).astype(m.dtype)

        def averaged_square(g: jax.Array, n: jax.Array) -> jax.Array:
            healed = jnp.where((n >= 0) & (n < jnp.inf), n, 0)
            return (add2 * squared(g, n.dtype) + keep2 * healed).astype(n.dtype)

        mu = jax.tree.map(averaged, updates, state.mu)
        nu = jax.tree.map(averaged_square, updates, state.nu)
        t = jnp.maximum(count, 1).astype(jnp.float32)
        gate = jnp.where(is_open, (1.0 - gradient_share) / (1.0 - b1**t), 0.0)
        debias = 1.0 / (1.0 - b2**t)
        limit = (_TOLERANCE * largest()) ** 2 * debias

        def scaled(g: jax.Array, m: jax.Array, n: jax.Array) -> jax.Array:
            mean = gate * m + gradient_share * g.astype(wide(g))
            root = jnp.sqrt(debias * n + eps_root) + eps
            u = mean / root
            if may_be_zero:  # an entry without gradients is 0 / 0
                u = jnp.where(root > 0, u, 0)
            # not from u: XLA would store what is used twice and has a division in it
            is_impossible = squared(mean, n.dtype) > limit * n + _SMALLEST
            return jnp.where(is_impossible, 0, u).astype(g.dtype)

        return jax.tree.map(scaled, updates, mu, nu), ScaleByMicroRateState(
            micro_count=count,
            num_micro_held=count_if(~is_open, state.num_micro_held),
            mu=mu,
            nu=nu,
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
