"""Inner: passes a foreign transformation what it accepts, and keeps it finite."""

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ._checks import check_transformation
from ._micro import ScaleByMicroRateState
from ._records import Assessment, Decision, Look, RegulatorScalars
from ._verdict import Audit, Verdict, is_applied

_OWN_EXTRA_ARGS = ("verdict", "audit", "is_harmful")


def as_inner(inner: optax.GradientTransformation) -> Any:
    """Returns a transformation that accepts all arguments of the regulator.

    These are gradients like the params, ``value`` and our own extra arguments. Some of
    Optax's transformations need more: a line search takes the gradient a second time
    and forwards all other arguments to its function; ``optax.lookahead`` takes only the
    gradient of its fast params. A scalar of the state that would not be finite keeps
    its last value.

    Raises:
      TypeError: if ``inner`` is not a transformation or refuses extra arguments.
      ValueError: in ``init``, where ``optax.lookahead`` is a part of ``inner``.
    """
    check_transformation("inner", inner)
    tx = optax.with_extra_args_support(inner)

    def init_fn(params: optax.Params) -> optax.OptState:
        state = tx.init(params)
        _check_lookahead(state, params)
        return state

    def update_fn(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        if "grad" in extra_args:
            extra_args["grad"] = updates
        if "value_fn" in extra_args:
            extra_args["value_fn"] = _with_own_args(extra_args["value_fn"])
        if _is_lookahead(state):
            updates = updates.fast  # the slow params have none
        updates, new_state = tx.update(updates, state, params, **extra_args)
        return updates, jax.tree.map(_keep_finite, new_state, state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _with_own_args(value_fn: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a line search's function, to which our own arguments may be passed.

    Optax forwards an extra argument whose name is in the signature, and raises an error
    for one that is not.
    """

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return value_fn(
            *args, **{k: v for k, v in kwargs.items() if k not in _OWN_EXTRA_ARGS}
        )

    theirs = inspect.signature(value_fn)
    ours = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY)
        for name in _OWN_EXTRA_ARGS
        if name not in theirs.parameters
    ]
    parameters = [*theirs.parameters.values(), *ours]
    parameters.sort(key=lambda parameter: parameter.kind)  # **kwargs comes last
    vars(wrapped)["__signature__"] = theirs.replace(parameters=parameters)
    return wrapped


def _is_lookahead(node: Any) -> bool:
    return isinstance(node, optax.LookaheadState)


def _check_lookahead(state: optax.OptState, params: optax.Params) -> None:
    """Raises a ValueError where ``optax.lookahead`` is not all that is wrapped."""
    if not any(map(_is_lookahead, jax.tree.leaves(state, is_leaf=_is_lookahead))):
        return
    if not _is_lookahead(state):
        raise ValueError(
            "optax.lookahead can be no part of a chain, nor a second level, because "
            "its updates must be applied as they are: wrap it as a whole, "
            "error_regulate(optax.lookahead(optimizer, ...))."
        )
    if not isinstance(params, optax.LookaheadParams):
        raise ValueError(
            "optax.lookahead has fast and slow params, and both can go back: train "
            "params = optax.LookaheadParams.init_synced(params) with the gradient "
            "jax.grad(lambda params: loss(params.fast))(params)."
        )


def _keep_finite(new: jax.Array, old: jax.Array) -> jax.Array:
    """Returns a scalar of the inner state; the old one if the new is not finite.

    An estimate like the distance of Prodigy is 0 / 0 when the first gradient is
    zero, and would stay so. For whole arrays this would cost a copy.
    """
    dtype = jnp.result_type(new)
    is_scalar_float = jnp.ndim(new) == 0 and jnp.issubdtype(dtype, jnp.inexact)
    return jnp.where(jnp.isfinite(new), new, old) if is_scalar_float else new


def _restarts_by_itself(state: Any) -> bool:
    return isinstance(state, ScaleByMicroRateState)


def restart_with_audit(
    inner: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Resets ``inner`` to its initial state where the regulator restarts the run.

    Moments of a blow-up would make the next start fail as well. The initial state is
    that for params of zeros: a second level scales gradients, and does not remember
    params. `scale_by_micro_rate` resets itself, also as a part of ``inner``, and keeps
    the count of the steps that it held.
    """
    tx = optax.with_extra_args_support(inner)

    def update_fn(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        *,
        audit: Audit | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        if audit is not None:
            # Before the update, not after: then only one version of it is alive. The
            # gradient of such a step is zero, as on every rejected step.
            initial = tx.init(optax.tree.zeros_like(params))

            def restarted(old: Any, start: Any) -> Any:
                if _restarts_by_itself(old):
                    return old
                chosen = jnp.where(audit.is_restart, start, old)
                return chosen.astype(jnp.result_type(old))

            state = jax.tree.map(restarted, state, initial, is_leaf=_restarts_by_itself)
            extra_args["audit"] = audit
        return tx.update(updates, state, params, **extra_args)

    return optax.GradientTransformationExtraArgs(tx.init, update_fn)


def loss_seen(seen: Assessment, verdict: jax.Array, avg_value: jax.Array) -> jax.Array:
    """Returns the loss that ``inner`` sees: the average one on a rejected batch."""
    is_bounded = verdict == Verdict.BOUND
    loss = jnp.where(is_bounded, seen.recorded[0], seen.signals[0])
    return jnp.where(is_applied(verdict), loss, avg_value)


def report_of(
    last: RegulatorScalars,
    decision: Decision,
    look: Look,
    verdict: jax.Array,
    is_started: jax.Array,
    *,
    audit: bool,
) -> dict[str, Any]:
    """Returns the report of a step to links of this package, as extra arguments."""
    taken = Audit(
        is_taken=look.is_taken,
        alignment=look.alignment,
        alignment_error=look.alignment_error,
        rise=look.rise,
        rise_error=look.rise_error,
        reach=look.reach,
        is_restart=decision.is_new_revert & ~is_started,
        base_rate=last.base_rate,
    )
    return {
        "verdict": verdict,
        # non-finite steps alone say nothing about a rate that did well
        "is_harmful": decision.is_harmful & ((last.peak_doubt > 0.0) | ~is_started),
        "audit": taken if audit else None,
    }
