"""The assembled optimizer: a chain, and the regulator around it."""

from collections.abc import Callable
from typing import Any

import jax
import optax

from ._checks import check_range, check_second_level
from ._inner import restart_with_audit
from ._macro import scale_by_macro_rate
from ._micro import Decay, scale_by_micro_rate
from ._regulate import error_regulate


def lalerg(
    learning_rate: optax.ScalarOrSchedule = 1e-3,
    *,
    b1: jax.typing.ArrayLike = 0.9,
    b2: Decay = (0.99, 0.999),
    eps: jax.typing.ArrayLike = 1e-8,
    gradient_share: jax.typing.ArrayLike = 0.4,
    weight_decay: jax.typing.ArrayLike = 1e-4,
    mask: Any | Callable[[optax.Params], Any] | None = None,
    clip_norm: jax.typing.ArrayLike | None = None,
    micro: optax.GradientTransformation | None = None,
    search: bool = True,
    threshold: jax.typing.ArrayLike = 6.0,
    anchor_every: jax.typing.ArrayLike = 32,
    local: bool = False,
    anchor_dtype: jax.typing.DTypeLike | None = None,
    anchor_memory: str = "device",
    axis_name: str | tuple[str, ...] | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Two-Level Adaptive Learning with Error-Regulated Gradient (2LALERG).

    With the gradient :math:`g`, the rates :math:`\eta` (``learning_rate``),
    :math:`r` (macro level), :math:`d` (damping) and the weight decay
    :math:`\lambda`, an accepted step is

    .. math::

        p \leftarrow p - \eta \; r \; d \; (micro(g) + \lambda p)

    A rejected step is dropped, or goes back to an earlier point. The optimizer is

    ::

        error_regulate(
            optax.chain(
                scale_by_micro_rate(b1, b2, eps, gradient_share=...),  # or ``micro``
                optax.add_decayed_weights(weight_decay, mask),
                scale_by_macro_rate(search=search, anneal=not callable(learning_rate)),
                optax.scale_by_learning_rate(learning_rate),
            ),
            audit=search,
        )

    With ``search=False``, ``b2=0.999``, ``gradient_share=0`` and nothing to object to,
    it takes the steps of ``optax.adamw``.

    Args:
      learning_rate: a float, at least 0, or an Optax schedule. With ``search`` it need
        not be right: the macro level multiplies it by a rate that it finds. A
        schedule keeps its shape. With a float, the macro level also lowers the rate
        when the loss stalls (``anneal``).
      b1: decay of the first moment, in [0, 1).
      b2: decay of the second moment, in [0, 1); or a pair of decays, from the first of
        which it grows to the second. See `scale_by_micro_rate`.
      eps: added to the root of the second moment, at least 0.
      gradient_share: weight of the fresh gradient against the first moment, in [0, 1];
        0 is Adam's rule. See `scale_by_micro_rate`.
      weight_decay: decoupled weight decay, at least 0, as in ``optax.adamw``.
      mask: which parameters to decay, as in ``optax.add_decayed_weights``.
      clip_norm: if given, gradients are scaled down to this global norm.
      micro: the second level, any Optax transformation without learning rate and
        sign flip (``optax.scale_by_rss()``, ``optax.scale_by_lion()``, ...); by default
        ``scale_by_micro_rate`` with ``b1``, ``b2``, ``eps`` and ``gradient_share``,
        which are not used otherwise.
      search: whether the macro level searches for the rate, up and down. If False, the
        rate is the user's times the damping of the regulator.
      threshold: see `error_regulate`.
      anchor_every: see `error_regulate`.
      local: see `error_regulate`; True reports the effect of a step on each leaf.
      anchor_dtype: see `error_regulate`; ``"bfloat16"`` halves the anchor.
      anchor_memory: see `error_regulate`.
      axis_name: see `error_regulate`.

    Returns:
      An ``optax.GradientTransformationExtraArgs`` whose ``update`` takes the
      keyword ``value``, the loss at the current params, and needs the params.

    Raises:
      TypeError: if ``micro`` is not a transformation or refuses extra arguments.
      ValueError: for a hyperparameter outside its range, and for a ``micro`` whose
        updates point against the gradient.

    Example:
      >>> import jax, jax.numpy as jnp, optax, lalerg_optax as lo
      >>> tx = lo.lalerg(1e-6)  # far too small, and it does not matter
      >>> params = jnp.array([1.0, -2.0])
      >>> state = tx.init(params)
      >>> @jax.jit
      ... def step(params, state):
      ...     loss, grads = jax.value_and_grad(lambda p: jnp.sum(p**2))(params)
      ...     updates, state = tx.update(grads, state, params, value=loss)
      ...     return optax.apply_updates(params, updates), state
      >>> for _ in range(300):
      ...     params, state = step(params, state)
      >>> bool(jnp.all(jnp.abs(params) < 0.1))
      True

    References:
      The only public description of 2LALERG is prose; the equations are this
      package's own. See `error_regulate`, `scale_by_macro_rate` and
      `scale_by_micro_rate` for their sources.
    """
    if micro is not None:
        check_second_level("micro", micro)
    check_range("weight_decay", weight_decay, 0.0, float("inf"))
    if not callable(learning_rate):
        check_range("learning_rate", learning_rate, 0.0, float("inf"))
    return error_regulate(
        optax.chain(
            scale_by_micro_rate(b1, b2, eps, gradient_share=gradient_share)
            if micro is None
            else restart_with_audit(micro),
            optax.add_decayed_weights(weight_decay, mask),
            scale_by_macro_rate(search=search, anneal=not callable(learning_rate)),
            optax.scale_by_learning_rate(learning_rate),
        ),
        threshold=threshold,
        anchor_every=anchor_every,
        anchor_dtype=anchor_dtype,
        anchor_memory=anchor_memory,
        clip_norm=clip_norm,
        audit=search,
        local=local,
        axis_name=axis_name,
    )
