"""Restart: a second level of any kind forgets a start that failed."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from ._micro import ScaleByMicroRateState
from ._verdict import Audit


def _starts_anew_by_itself(state: Any) -> bool:
    return isinstance(state, ScaleByMicroRateState)


def restart_with_audit(
    inner: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Gives ``inner`` its initial state back where the regulator restarts the run.

    Moments of a blow-up would make the next start fail as well. The initial state is
    that for params of zeros: a second level scales gradients, and does not remember
    params. `scale_by_micro_rate` does the same by itself, also as a part of ``inner``,
    and goes on counting the steps that it held.
    """
    inner = optax.with_extra_args_support(inner)

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
            # gradient of such a step is zero, as that of every rejected one.
            initial = inner.init(optax.tree.zeros_like(params))

            def restarted(old: Any, start: Any) -> Any:
                if _starts_anew_by_itself(old):
                    return old
                chosen = jnp.where(audit.is_restart, start, old)
                return chosen.astype(jnp.result_type(old))

            state = jax.tree.map(
                restarted, state, initial, is_leaf=_starts_anew_by_itself
            )
            extra_args["audit"] = audit
        return inner.update(updates, state, params, **extra_args)

    return optax.GradientTransformationExtraArgs(inner.init, update_fn)
