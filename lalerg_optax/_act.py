"""Act: the gradient that ``inner`` sees, and the step of the params. Trees only."""

import functools

import jax
import jax.numpy as jnp
import optax
from jax import lax

from ._anchor import fetched
from ._local import LeafSquares, LocalView, act_in_turn
from ._records import Assessment, RegulatorScalars
from ._verdict import Verdict, is_applied


def scale_of(
    seen: Assessment,
    verdict: jax.Array,
    grad_norm: jax.Array,
    clip_norm: jax.typing.ArrayLike | None,
) -> jax.Array:
    """Returns the factor that bounds or clips a gradient."""
    limit = jnp.where(verdict == Verdict.BOUND, jnp.exp(seen.log_limit), jnp.inf)
    if clip_norm is not None:
        limit = jnp.minimum(limit, clip_norm)
    is_long = grad_norm > limit
    return jnp.where(is_long, limit / jnp.where(is_long, grad_norm, 1.0), 1.0)


def _scaled(g: jax.Array, scale: jax.Array) -> jax.Array:
    """Returns a gradient times a scale of at most 1.

    XLA would store a product rounded to bfloat16 for several uses; to truncate is free.
    """
    if g.dtype != jnp.bfloat16:
        return scale.astype(g.dtype) * g
    wide = lax.bitcast_convert_type(scale * g.astype(jnp.float32), jnp.uint32)
    return lax.bitcast_convert_type((wide >> 16).astype(jnp.uint16), jnp.bfloat16)


def admitted(
    grads: optax.Updates, verdict: jax.Array, scale: jax.Array
) -> optax.Updates:
    """Returns the gradient that ``inner`` sees: zero on a rejected batch."""
    is_open = is_applied(verdict)

    def admit(g: jax.Array) -> jax.Array:
        return _scaled(jnp.where(is_open, g, 0).astype(g.dtype), scale)

    return jax.tree.map(admit, grads)


def act(
    verdict: jax.Array,
    damping: jax.Array,
    params: optax.Params,
    inner_updates: optax.Updates,
    anchor: optax.Params,
    grads: optax.Updates,
    squares: LeafSquares | None,
    last: RegulatorScalars,
    view: LocalView | None,
    axis_name: str | tuple[str, ...] | None,
) -> tuple[optax.Updates, LocalView | None]:
    """Returns the step that params take, and its local view if the last one is given.

    Args:
      verdict: of this step.
      damping: factor of the update.
      params: the params.
      inner_updates: what the inner transformation returned.
      anchor: the anchor.
      grads: the gradient before clipping.
      squares: those of the leaves, for the view.
      last: what was known before this step.
      view: of the step before; None without one.
      axis_name: mapped axes to average over.
    """
    is_reverted = verdict == Verdict.REVERT
    gate = jnp.where(verdict == Verdict.SKIP, 0.0, damping)
    home = fetched(is_reverted, anchor, params)

    def step_of(gate: jax.Array, p: jax.Array, u: jax.Array, a: jax.Array) -> jax.Array:
        damped = (gate * u).astype(p.dtype)
        step = jnp.where(is_reverted, a.astype(p.dtype) - p, damped)
        is_safe = jnp.isfinite(p + step)  # also for 0 * nan
        return jnp.where(is_safe, step, jnp.zeros((), p.dtype))

    if squares is None or view is None:
        act_on_leaf = functools.partial(step_of, gate)
        return jax.tree.map(act_on_leaf, params, inner_updates, home), None
    return act_in_turn(
        step_of,
        gate,
        (params, inner_updates, home),
        grads,
        squares,
        view,
        is_home=is_reverted & last.is_pending,
        is_accepted=is_applied(verdict),
        axis_name=axis_name,
    )
