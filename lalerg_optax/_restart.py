"""Restart: a second level of any kind forgets a start that failed."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from ._anchor import Audit


def restart_with_audit(
    inner: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Gives ``inner`` its initial state back where the regulator restarts the run.

    Moments of a blow-up would make the next start fail as well. The initial state is
    that for params of zeros: a second level scales gradients, and does not remember
    params. `scale_by_micro_rate` does the same by itself.
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
            state = jax.tree.map(
                lambda old, start: jnp.where(audit.is_restart, start, old).astype(
                    jnp.result_type(old)
                ),
                state,
                initial,
            )
        return inner.update(updates, state, params, **extra_args)

    return optax.GradientTransformationExtraArgs(inner.init, update_fn)
