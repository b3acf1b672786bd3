"""Rebase: params, data or loss were changed on purpose, and are looked at anew."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from ._accumulate import AccumulateState
from ._adapters import TracksParamsState
from ._anchor import as_params, is_masked
from ._average import Average
from ._history import LossHistory
from ._local import LocalView, expect_nothing
from ._macro import ScaleByMacroRateState
from ._records import RegulatorScalars
from ._regulate import ErrorRegulateState
from ._scalars import pack, unpack
from ._search_rule import MacroScalars

_OWN = (
    ErrorRegulateState,
    ScaleByMacroRateState,
    TracksParamsState,
    AccumulateState,
)
_KEPT_BY_REGULATOR = (
    *("damping_factor", "num_well", "base_rate", "alignment_scale", "look_variance"),
    *("num_accepted", "num_bounded", "num_skipped", "num_revert_steps", "num_trials"),
    *("num_harmful", "skips_left"),
)
# losses, on the other hand, begin again
_KEPT_BY_MACRO = (
    *("macro_rate", "top_rate", "avg_alignment", "alignment_spread", "phase"),
    *("best_alignment", "avg_rise", "avg_rise_error", "num_audits", "num_macro_held"),
    *("num_macro_steps", "alignment_noise"),
)


def _kept(record: Any, names: tuple[str, ...]) -> Any:
    """Returns a record as at first, but for what is kept of it."""
    return type(record)()._replace(**{name: getattr(record, name) for name in names})


def rebase(params: optax.Params, opt_state: optax.OptState) -> optax.OptState:
    """Returns a state for which what is now is right: params, data and loss.

    Call it after a change on purpose in mid-run: a layer that was reset, a new head,
    pruned weights, other data, another batch size, another weight or scale of the loss.
    Without it the next losses are compared with those before, and params that were
    changed may be taken back to the anchor within a few steps.

    Anchor and average are set to ``params``, losses and gradient norms of before are
    forgotten, and nothing is in doubt. Kept are the rate that was found, the damping,
    all counters, and the state of the inner transformation: reset the moments of a
    layer yourself where that matters (after the scale of the loss has grown, Adam's
    next steps are as much larger). As at the start of a run, norms are judged from the
    second step on and losses from the 17th. A half group of `accumulate` is dropped.
    With Flax NNX::

        params = nnx.state(model, nnx.Param)
        optimizer.opt_state = lo.rebase(params, optimizer.opt_state)

    Args:
      params: the params from now on, a tree like the one that ``opt_state`` was made
        for. For a tree of other shapes call ``init``.
      opt_state: the state of the optimizer. Regulators and macro levels are found in it
        at any depth.

    Returns:
      A state with the tree, shapes and dtypes of ``opt_state``. Can be jitted. Without
      ``jit`` it shares the buffers of the inner state with ``opt_state``.

    Raises:
      ValueError: if the params do not fit, or there is no regulator in the state.

    Example:
      >>> import jax.numpy as jnp, optax, lalerg_optax as lo
      >>> tx, params = lo.error_regulate(optax.sgd(0.1)), {"head": jnp.ones(3)}
      >>> state = tx.init(params)
      >>> params["head"] = jnp.full(3, 9.0)  # a new head
      >>> state = lo.rebase(params, state)
      >>> [float(p) for p in lo.healthy_params(params, state)["head"]]
      [9.0, 9.0, 9.0]
    """
    found = []

    def anew(node: Any) -> Any:
        if isinstance(node, ScaleByMacroRateState):
            known = unpack(MacroScalars, node.scalars)
            return _with(node, scalars=pack(_kept(known, _KEPT_BY_MACRO)))
        if isinstance(node, AccumulateState):  # the present group begins again
            inner = _everywhere(anew, node.inner_state)
            none = jnp.zeros_like(_leaf(node.num_averaged))
            return _with(node, num_averaged=none)._replace(inner_state=inner)
        if isinstance(node, TracksParamsState):
            tracked = _anchored(node.tracked_params, params)
            inner = _everywhere(anew, node.inner_state)
            return node._replace(tracked_params=tracked, inner_state=inner)
        if not isinstance(node, ErrorRegulateState):
            return node
        found.append(node)
        known = unpack(RegulatorScalars, node.scalars)
        fresh = _kept(known, _KEPT_BY_REGULATOR)
        # no revert goes back to the start of the run any more
        passed = jnp.maximum(known.num_audits_passed, 1)
        return _with(
            node,
            scalars=pack(fresh._replace(num_audits_passed=passed)),
            history=LossHistory.empty(shape=(2,)),
            **_local(node),
        )._replace(
            anchor=_anchored(node.anchor, params),
            average=_begun_again(node.average, params),
            inner_state=_everywhere(anew, node.inner_state),
        )

    state = _everywhere(anew, opt_state)
    if not found:
        raise ValueError("opt_state has no state of error_regulate in it.")
    return state


def _local(state: ErrorRegulateState) -> dict[str, LocalView]:
    """Returns the local view, if there is one, which expects no params any more."""
    if state.local is None:
        return {}
    return {"local": expect_nothing(LocalView(*jax.tree.leaves(state.local)))}


def _begun_again(average: Average | None, params: optax.Params) -> Average | None:
    """Returns an average, if there is one, which begins at the params."""
    if average is None:
        return None
    none = jnp.zeros_like(_leaf(average.num_points))
    begun = _with(average, num_points=none)
    return begun._replace(points=_anchored(average.points, params))


def _everywhere(anew: Any, state: Any) -> Any:
    """Applies a function to all states of this package, the outermost first."""
    return jax.tree.map(anew, state, is_leaf=lambda node: isinstance(node, _OWN))


def _leaf(node: Any) -> Any:
    (leaf,) = jax.tree.leaves(node)  # NNX wraps it in a variable
    return leaf


def _with(state: Any, **parts: Any) -> Any:
    """Returns a state with new parts, in the containers of the old ones (NNX's)."""
    kept = {
        name: jax.tree.unflatten(
            jax.tree.structure(getattr(state, name)), jax.tree.leaves(part)
        )
        for name, part in parts.items()
    }
    return state._replace(**kept)


def _anchored(anchor: optax.Params, params: optax.Params) -> optax.Params:
    """Returns copies of the params, with the dtypes and in the memory of the anchor.

    They are in its containers, which are others where Flax NNX keeps the state.
    """

    def copied(a: Any, p: Any) -> Any:
        if is_masked(a):
            return a
        copy = jnp.copy(jnp.asarray(p, a.dtype))
        space = jax.typeof(a).memory_space
        is_there = jax.typeof(copy).memory_space == space
        return copy if is_there else jax.device_put(copy, space)

    copies = jax.tree.map(copied, as_params(anchor, params), params, is_leaf=is_masked)
    return jax.tree.unflatten(jax.tree.structure(anchor), jax.tree.leaves(copies))
