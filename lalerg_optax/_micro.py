"""Micro level: a rate for every parameter entry, from its own gradients."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from ._anchor import is_sound
from ._checks import check_growing, check_range, check_state_type, check_updates
from ._gate import open_gate
from ._scalars import count_if
from ._verdict import Audit, Verdict

Decay = jax.typing.ArrayLike | tuple[jax.typing.ArrayLike, jax.typing.ArrayLike]

_PART = 4  # one of so many of all steps so far is remembered, where memory grows
_TOLERANCE = 2.0  # of the bound on an update: for rounding, which is far less
_SMALLEST = 1e-30  # squares of smaller gradients are no float32


class MomentRule(NamedTuple):
    """Numbers of the micro level, which users see and which may be traced.

    Attributes:
      b1: see `scale_by_micro_rate`, as all others.
      b2: the first of a pair.
      last_b2: the second of a pair; the same object as the first if there is none.
      eps: likewise.
      eps_root: likewise.
      gradient_share: likewise.
      bias_correction: likewise.
      initial_scale: likewise.
      per_tensor: likewise.
    """

    b1: Any
    b2: Any
    last_b2: Any
    eps: Any
    eps_root: Any
    gradient_share: Any
    bias_correction: bool
    initial_scale: Any
    per_tensor: bool

    @property
    def is_growing(self) -> bool:
        """Whether the memory of squares grows."""
        return self.last_b2 is not self.b2

    @property
    def may_be_sum(self) -> bool:
        """Whether squares may be summed up, and not averaged."""
        last = self.last_b2
        return not (isinstance(last, int | float) and np.float32(last) < 1)

    @property
    def may_divide_by_zero(self) -> bool:
        """Whether nothing is known to keep the root of the squares above zero."""
        return not any(
            isinstance(e, int | float) and e > 0 for e in (self.eps, self.eps_root)
        )


# What is added to the moments


def _memory(rule: MomentRule, t: jax.Array) -> tuple[Any, Any]:
    """Returns decay and weight of the squares at the step of that number."""
    if rule.is_growing:
        lost = jnp.clip(_PART / t, 1.0 - rule.last_b2, 1.0 - rule.b2)
        decay = 1.0 - lost
    else:
        decay, lost = rule.b2, 1.0 - rule.b2
    if not rule.may_be_sum:
        return decay, lost
    # in the precision of the decay: one that is rounded to 1 decays nothing
    return decay, jnp.where(jnp.asarray(decay, jnp.float32) == 1.0, 1.0, lost)


def _product_of_decays(rule: MomentRule, t: jax.Array) -> jax.Array:
    """Returns the product of the decays of all squares so far."""
    if not rule.is_growing:
        return rule.b2**t
    # it grows between these steps, where factors (j - 4) / j cancel each other
    first, last = _PART / (1.0 - rule.b2), _PART / (1.0 - rule.last_b2)
    steps = jnp.clip(t, first, last)
    growing = math.prod((first - k) / (steps - k) for k in range(_PART))
    before, after = jnp.minimum(t, first), jnp.maximum(t - last, 0.0)
    # one exponential: every power would be a kernel of its own
    return growing * jnp.exp(
        before * jnp.log(jnp.maximum(rule.b2, _SMALLEST))
        + after * jnp.log(jnp.maximum(rule.last_b2, _SMALLEST))
    )


def _square(g: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Returns the squared magnitudes of entries."""
    if jnp.iscomplexobj(g):
        return jnp.square(g.real) + jnp.square(g.imag)
    return jnp.square(g.astype(dtype))


def _square_of(rule: MomentRule, g: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Returns what the second moment of a tensor takes in."""
    square = _square(g, dtype)
    return jnp.sum(square) / max(g.size, 1) if rule.per_tensor else square


# What the moments may be


def _wide(x: jax.Array) -> jnp.dtype:
    """Returns the dtype of moments: a decay of 0.999 is lost in bfloat16."""
    return jnp.promote_types(x.dtype, jnp.float32)


def _is_mean_of_squares(n: jax.Array) -> jax.Array:
    """Returns which entries are neither negative nor infinite nor NaN.

    Taken for integers, the bits of all others are larger. One comparison instead of two
    of floats: a tenth of the whole step on a CPU.
    """
    kind = jnp.dtype(f"uint{8 * n.dtype.itemsize}")
    infinity = np.array(np.inf, n.dtype).view(kind)
    return lax.bitcast_convert_type(n, kind) < infinity


def _largest_update(rule: MomentRule, weight: Any) -> jax.Array:
    """Returns the bound on an update, for one entry in its tensor.

    Args:
      rule: the numbers.
      weight: that of the last square in the second moment.
    """
    ratio = jnp.asarray(rule.b1**2 / jnp.maximum(rule.b2, _SMALLEST), jnp.float32)
    series = jnp.where(ratio < 1.0, 1.0 / jnp.sqrt(1.0 - ratio), jnp.inf)
    share = rule.gradient_share
    bound = (1.0 - share) * (1.0 - rule.b1) * series + share
    return jnp.asarray(bound / jnp.sqrt(weight), jnp.float32)


class ScaleByMicroRateState(NamedTuple):
    """State of `scale_by_micro_rate`.

    Attributes:
      micro_count: number of gradients taken in, int32, shape ``()``.
      num_micro_held: number of steps that left the moments as they were because
        the verdict or a number that is not finite said so, int32, shape ``()``.
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

    With gradient :math:`g_t`, :math:`t` the number of gradients taken in and
    :math:`s` the ``gradient_share``,

    .. math::

        \mu_t &= b_1 \mu_{t-1} + (1 - b_1) g_t \\
        \nu_t &= \beta_t \nu_{t-1} + w_t |g_t|^2,
            \quad w_t = 1 - \beta_t \text{, or } 1 \text{ where } \beta_t = 1 \\
        u_t &= \frac{(1 - s) \, \mu_t / c_1 + s \, g_t}
                    {\sqrt{\nu_t / c_2 + eps_{root}} + eps}, \quad
            c_1 = 1 - b_1^t, \; c_2 = 1 - \prod_{i \le t} \beta_i
            \text{, or } 1 \text{ without bias_correction}

    from :math:`\mu_0 = 0` and :math:`\nu_0` = ``initial_scale``. With a number for
    ``b2``, :math:`\beta_t = b_2`. With a pair :math:`(b_2, b_2')` it grows from one to
    the other, while the squares are averaged over a quarter of all steps so far,

    .. math:: \beta_t = \min(\max(b_2, 1 - 4 / t), b_2')

    because early on old gradients are no guide to the scale of new ones, and later,
    where gradients are noise or come seldom, only many of them are. This
    is Adam's rule with quasi-hyperbolic momentum, and close to NAdam for
    :math:`s = 1 - b_1`. With the right arguments it is Optax's

    ::

        # scale_by_adam(b1, b2, eps, eps_root)
        scale_by_micro_rate(b1, b2, eps, eps_root, gradient_share=0)
        # RMSProp: scale_by_rms(decay, eps); with eps_in_sqrt=False it is eps=eps
        scale_by_micro_rate(b2=decay, eps=0, eps_root=eps, gradient_share=1,
                            bias_correction=False)
        # AdaGrad: scale_by_rss(initial_accumulator_value, eps)
        scale_by_micro_rate(b2=1, eps=0, eps_root=eps, gradient_share=1,
                            bias_correction=False,
                            initial_scale=initial_accumulator_value)

    (an average of the gradient is kept there, too, though it does not count). With
    ``per_tensor`` the square is the mean of those of the whole tensor, so that each
    tensor has one rate, and memory is needed for one moment instead of two. The
    direction within a tensor then is that of the averaged gradient, as in NovoGrad,
    which scales by the norm and before averaging; the size is free of that of the
    gradient, as in LAMB, but not made proportional to that of the params. The mean has
    to be known before the update, for which XLA may store the gradient once more on a
    CPU; where the tensor is sharded, it is one more reduction of a scalar.

    What is added to all this is the gate: a step that is not accepted leaves
    :math:`\mu`, :math:`\nu` and :math:`t` bit for bit as they were and gives a zero
    update. Inside `error_regulate` the regulator's verdict is the gate. Alone, the gate
    is whether the squared global norm of the gradient is finite in float32, so that no
    NaN, infinity or overflow ever gets into the state.

    Moments that no gradients can have made were hit from outside (a flipped bit): a
    :math:`\mu` whose square is not finite in float32, or a :math:`\nu` that is negative
    or not finite, starts anew at its beginning. And an update cannot be larger than
    gradients can make it. By Cauchy and Schwarz, for any gradients and if
    :math:`b_1^2 < b_2`,

    .. math::

        \Big|\sum_i b_1^{t-i} g_i\Big|^2
        \le \sum_i \Big(\frac{b_1^2}{b_2}\Big)^{t-i} \sum_i b_2^{t-i} |g_i|^2
        \le \frac{1 - (b_1^2 / b_2)^t}{1 - b_1^2 / b_2} \; \frac{n \nu_t}{w_t}

    with :math:`n = 1`, or with ``per_tensor`` the number of its entries, of whose
    squares :math:`\nu` is the mean, and :math:`|g_t|^2 \le n \nu_t / w_t` (where
    :math:`\beta` grows, no decay was below :math:`b_2` and no weight below the last,
    so that :math:`\nu` holds more than is counted here). Since
    :math:`c_2 (1 - (b_1^2 / b_2)^t) \le (1 - b_2^t) (1 - (b_1^2 / b_2)^t) \le c_1^2`
    (multiply out), and an initial scale
    only adds to :math:`\nu`, with or without bias correction

    .. math::

        |u_t| \le \sqrt{\frac{n}{w_t}} \left(
            \frac{(1 - s) (1 - b_1)}{\sqrt{1 - b_1^2 / b_2}} + s \right)

    so that an entry whose :math:`u_t` would be more than twice as large (with
    :math:`eps = 0`) stays where it is.

    On a REVERT :math:`\mu` is set to zero, because momentum belongs to the path that
    was left; :math:`\nu` stays, because the scale of the gradients does not. Where
    params go back to the very start (``audit.is_restart``, see `error_regulate`),
    :math:`\nu` and :math:`t` begin anew as well: gradients of a first step that was a
    thousand times too far would hold the rates down for :math:`1 / (1 - \beta_t)`
    steps, and those of a sum for good.

    Args:
      b1: decay of the first moment, in [0, 1).
      b2: decay of the second moment, in [0, 1); or, without bias correction, 1, which
        makes it a sum. A pair of decays below 1, the first at most the second: it
        grows.
      eps: added to the root, at least 0.
      eps_root: added under the root, at least 0.
      gradient_share: weight of the fresh gradient against that of the first moment,
        in [0, 1]. The default is what Ma and Yarats recommend; ``b2`` was chosen with
        it on the tasks that ``benchmarks/tasks.py`` calls DEVELOPMENT and those that
        ``benchmarks/noise.py`` calls CHOOSE.
      bias_correction: whether to divide both moments by what is in them of the weight
        of a whole average.
      initial_scale: the second moment at first, at least 0.
      per_tensor: whether a tensor has one rate for all of its entries.
      mu_dtype: dtype of ``mu``; by default that of the params, but at least float32.
        ``nu`` is real and at least float32.

    Returns:
      An ``optax.GradientTransformationExtraArgs``; ``update`` takes the optional
      extra argument ``verdict``. Updates have the dtype of the gradients.

    Raises:
      ValueError: for a hyperparameter outside of its range, and for a sum with bias
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

    References:
      Kingma and Ba, `Adam <https://arxiv.org/abs/1412.6980>`_, 2014; Ma and Yarats,
      `Quasi-hyperbolic momentum <https://arxiv.org/abs/1810.06801>`_, 2018; Dozat,
      NAdam, 2016. Earlier rules of the kind are AdaGrad (Duchi et al., 2011), RMSProp
      (Tieleman and Hinton, 2012) and AdaDelta (Zeiler, 2012); with a rate for each
      tensor NovoGrad (Ginsburg et al., 2019) and LAMB (You et al., 2019).
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
        like = jnp.zeros((), p.real.dtype) if per_tensor else p.real
        return jnp.full_like(like, initial_scale, _wide(like))

    def init_fn(params: optax.Params) -> ScaleByMicroRateState:
        return ScaleByMicroRateState(
            micro_count=jnp.zeros((), jnp.int32),
            num_micro_held=jnp.zeros((), jnp.int32),
            mu=jax.tree.map(lambda p: jnp.zeros_like(p, mu_dtype or _wide(p)), params),
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
        decay, weight = _memory(rule, t)
        # Decays that become "keep", with a gradient that is zero: selecting the old
        # state afterwards would keep old and new alive, and cost a copy.
        keep1, add1 = jnp.where(is_open, b1, 1.0), jnp.where(is_open, 1.0 - b1, 0.0)
        keep2, add2 = jnp.where(is_open, decay, 1.0), jnp.where(is_open, weight, 0.0)
        if verdict is not None:
            keep1 = jnp.where(verdict == Verdict.REVERT, 0.0, keep1)

        def averaged(g: jax.Array, m: jax.Array) -> jax.Array:
            healed = jnp.where(is_sound(m), m, 0)
            return (add1 * g + keep1 * healed).astype(m.dtype)

        def averaged_square(g: jax.Array, n: jax.Array) -> jax.Array:
            is_kept = _is_mean_of_squares(n)
            if is_restart is not None:
                is_kept &= ~is_restart
            healed = jnp.where(is_kept, n, initial_scale)
            square = _square_of(rule, g, n.dtype)
            if rule.may_be_sum:  # which could overflow; a bound on it would cost a copy
                half = jnp.finfo(n.dtype).max / 2
                healed, square = jnp.minimum(healed, half), jnp.minimum(square, half)
            return (add2 * square + keep2 * healed).astype(n.dtype)

        mu = jax.tree.map(averaged, updates, state.mu)
        nu = jax.tree.map(averaged_square, updates, state.nu)
        content1 = 1.0 - b1**t if bias_correction else 1.0
        content2 = 1.0 - _product_of_decays(rule, t) if bias_correction else 1.0
        gate = jnp.where(is_open, (1.0 - gradient_share) / content1, 0.0)
        debias = 1.0 / content2
        limit = (_TOLERANCE * _largest_update(rule, weight)) ** 2 * debias

        def scaled(g: jax.Array, m: jax.Array, n: jax.Array) -> jax.Array:
            mean = gate * m + gradient_share * g.astype(_wide(g))
            root = jnp.sqrt(debias * n + eps_root) + eps
            u = mean / root
            if rule.may_divide_by_zero:  # an entry without gradients is 0 / 0
                u = jnp.where(root > 0, u, 0)
            # not from u: XLA would store what is used twice and has a division in it
            most = limit * n * max(g.size, 1) if per_tensor else limit * n
            is_impossible = _square(mean, n.dtype) > most + _SMALLEST
            return jnp.where(is_impossible, 0, u).astype(g.dtype)

        return jax.tree.map(scaled, updates, mu, nu), ScaleByMicroRateState(
            micro_count=count,
            num_micro_held=count_if(~is_open, state.num_micro_held),
            mu=mu,
            nu=nu,
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
