"""The assembled optimizer: a chain, and the regulator around it."""

from collections.abc import Callable
from typing import Any

import jax
import optax

from ._checks import check_range
from ._inner import restart_with_audit
from ._macro import scale_by_macro_rate
from ._micro import Decay, scale_by_micro_rate
from ._regulate import error_regulate
from ._second_level import WEIGHT_DECAY, as_second_level, decay_beside


def lalerg(
    learning_rate: optax.ScalarOrSchedule = 1e-3,
    *,
    b1: jax.typing.ArrayLike = 0.9,
    b2: Decay = (0.99, 0.999),
    eps: jax.typing.ArrayLike = 1e-8,
    gradient_share: jax.typing.ArrayLike = 0.4,
    weight_decay: jax.typing.ArrayLike | None = None,
    mask: Any | Callable[[optax.Params], Any] | None = None,
    clip_norm: jax.typing.ArrayLike | None = None,
    micro: optax.GradientTransformation | None = None,
    search: bool = True,
    threshold: jax.typing.ArrayLike = 6.0,
    anchor_every: jax.typing.ArrayLike = 32,
    average: bool = False,
    local: bool = False,
    anchor_dtype: jax.typing.DTypeLike | None = None,
    anchor_memory: str = "device",
    axis_name: str | tuple[str, ...] | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Two-Level Adaptive Learning with Error-Regulated Gradient (2LALERG).

    Args:
      learning_rate: a float, at least 0, or an Optax schedule. With ``search`` it need
        not be right: it is multiplied by what is found, and does not grow from then on.
      b1: decay of the first moment, in [0, 1).
      b2: decay of the second moment, in [0, 1), or a pair: see `scale_by_micro_rate`.
      eps: added to the root of the second moment, at least 0.
      gradient_share: weight of the fresh gradient, in [0, 1]; 0 is Adam's rule.
      weight_decay: decoupled weight decay, at least 0, as in ``optax.adamw``: 1e-4 if
        None, unless ``micro`` decays the params by itself.
      mask: which parameters to decay, as in ``optax.add_decayed_weights``.
      clip_norm: if given, gradients are scaled down to this global norm.
      micro: another second level in place of ``b1`` to ``gradient_share``: an
        optimizer at the rate 1, ``optax.contrib.muon(1.0)``, or a rule,
        ``optax.scale_by_lion()``. Whichever it is, it points downhill.
      search: whether to search for the rate, up and down; if False, it is the user's.
      threshold: see `error_regulate`, as all that follow.
      anchor_every: accepted steps between two anchors.
      average: whether to keep an average of the params, for `eval_params`.
      local: whether `metrics` reports the effect of a step on each leaf.
      anchor_dtype: of the copy of the params; ``"bfloat16"`` halves it.
      anchor_memory: where the copy is, ``"device"`` or ``"pinned_host"``.
      axis_name: mapped axes to average over.

    Returns:
      An ``optax.GradientTransformationExtraArgs`` whose ``update`` takes the
      keyword ``value``, the loss at the current params, and needs the params.

    Raises:
      TypeError: if ``micro`` is not a transformation or refuses extra arguments.
      ValueError: for a hyperparameter outside its range, a ``micro`` that cannot be a
        second level, or weight decay both here and there.

    Example:
      >>> import jax, jax.numpy as jnp, lalerg_optax as lo
      >>> tx = lo.lalerg(1e-6)  # far too small, and it does not matter
      >>> params = jnp.array([1.0, -2.0])
      >>> state, update = tx.init(params), jax.jit(tx.update)
      >>> for _ in range(300):
      ...     loss, grads = jax.value_and_grad(lambda p: jnp.sum(p**2))(params)
      ...     updates, state = update(grads, state, params, value=loss)
      ...     params = lo.apply_updates(params, updates, state)
      >>> bool(jnp.all(jnp.abs(params) < 0.1))
      True

    With the gradient :math:`g`, the rates :math:`\eta` (``learning_rate``), :math:`r`
    (macro level), :math:`d` (damping) and the weight decay :math:`\lambda`, an accepted
    step is as below; a rejected one is dropped, or goes back to an earlier point.

    .. math::

        p \leftarrow p - \eta \; r \; d \; (micro(g) + \lambda p)

    It is `error_regulate` with ``audit=search`` around the chain of
    `scale_by_micro_rate`, ``optax.add_decayed_weights``, `scale_by_macro_rate` and
    ``optax.scale_by_learning_rate``. Without a schedule, :math:`r` keeps falling
    (``anneal``). With ``search=False``, ``b2=0.999``, ``gradient_share=0`` and nothing
    to object to, it takes the steps of ``optax.adamw``. All equations are our own.
    """
    if weight_decay is not None:
        check_range("weight_decay", weight_decay, 0.0, float("inf"))
    if not callable(learning_rate):
        check_range("learning_rate", learning_rate, 0.0, float("inf"))
    if micro is None:
        second_level = scale_by_micro_rate(b1, b2, eps, gradient_share=gradient_share)
        rate = WEIGHT_DECAY if weight_decay is None else weight_decay
        decay = optax.add_decayed_weights(rate, mask)
    else:
        turned, decays = as_second_level(micro)
        second_level = restart_with_audit(turned)
        decay = decay_beside(weight_decay, mask, decays)
    return error_regulate(
        optax.chain(
            second_level,
            decay,
            scale_by_macro_rate(search=search, anneal=not callable(learning_rate)),
            optax.scale_by_learning_rate(learning_rate),
        ),
        threshold=threshold,
        anchor_every=anchor_every,
        anchor_dtype=anchor_dtype,
        anchor_memory=anchor_memory,
        clip_norm=clip_norm,
        audit=search,
        average=average,
        local=local,
        axis_name=axis_name,
    )
