"""Flax: linen's TrainState that passes the loss to the optimizer.

``flax.nnx.Optimizer`` needs nothing: ``optimizer.update(model, grads, value=loss)``
forwards the loss as it is.

Batch statistics are computed in the forward pass, before the step is judged, and a NaN
in a running average stays there. Where a step was not accepted, keep the old ones. With
linen::

    updated = state.apply_gradients(grads=grads, value=loss, batch_stats=new_stats)
    is_accepted = lo.metrics(updated.opt_state)["verdict"] == lo.Verdict.ACCEPT
    stats = jax.tree.map(
        lambda a, b: jnp.where(is_accepted, a, b), new_stats, state.batch_stats
    )
    state = updated.replace(batch_stats=stats)

and with NNX, ``before`` taken in front of the forward pass::

    before = nnx.as_pure(nnx.state(model, nnx.BatchStat))
    ...
    optimizer.update(model, grads, value=loss)
    is_accepted = lo.metrics(optimizer.opt_state)["verdict"] == lo.Verdict.ACCEPT
    after = nnx.as_pure(nnx.state(model, nnx.BatchStat))
    nnx.update(
        model, jax.tree.map(lambda a, b: jnp.where(is_accepted, a, b), after, before)
    )

A revert takes params to the anchor and leaves the statistics as of the last accepted
step; they adapt within the memory of their average. With `accumulate`, see
docs/accumulate.md.
"""

from typing import Any

from flax.training import train_state

from ._apply import apply_updates


class TrainState(train_state.TrainState):
    """``flax.training.train_state.TrainState`` that passes the loss to the optimizer.

    Example:
      >>> import jax, jax.numpy as jnp, lalerg_optax as lo
      >>> from flax import linen as nn
      >>> from lalerg_optax.flax import TrainState
      >>> model, x = nn.Dense(1), jnp.ones((4, 3))
      >>> state = TrainState.create(
      ...     apply_fn=model.apply,
      ...     params=model.init(jax.random.key(0), x)["params"],
      ...     tx=lo.lalerg(1e-3),
      ... )
      >>> def loss_fn(params):
      ...     return jnp.mean((state.apply_fn({"params": params}, x) - 1.0) ** 2)
      >>> loss, grads = jax.value_and_grad(loss_fn)(state.params)
      >>> state = state.apply_gradients(grads=grads, value=loss)
      >>> int(state.step), int(lo.metrics(state.opt_state)["num_accepted"])
      (1, 1)
    """

    def apply_gradients(  # type: ignore[override]
        self, *, grads: Any, value: Any, extra_args: Any = None, **kwargs: Any
    ) -> "TrainState":
        """Returns the state after one step.

        Args:
          grads: gradients, a tree like ``params``.
          value: the loss at ``params``, a scalar, or None to judge by gradient norm
            alone.
          extra_args: a dict of further keywords for ``tx.update``.
          **kwargs: further fields to replace, such as ``batch_stats``.

        Returns:
          A new state, one step later. On a revert its params are the anchor, bit
          for bit.
        """
        updates, opt_state = self.tx.update(
            grads, self.opt_state, self.params, value=value, **(extra_args or {})
        )
        return self.replace(
            step=self.step + 1,
            params=apply_updates(self.params, updates, opt_state),
            opt_state=opt_state,
            **kwargs,
        )
