"""adopt: continues a run in progress with another optimizer."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ._accumulate import AccumulateState
from ._checks import check_transformation
from ._find import find_states
from ._macro import ScaleByMacroRateState, with_rate_found
from ._micro import ScaleByMicroRateState
from ._numbers import UNKNOWN
from ._rate import enclosed, learning_rate
from ._records import RegulatorScalars
from ._regulate import ErrorRegulateState
from ._scalars import pack, unpack

_tree: Any = jax.tree.structure
_COUNT = (jax.tree_util.GetAttrKey("count"),)
# states that may lack a counterpart on the other side: initialized, or dropped
_OPTIONAL = (ErrorRegulateState, ScaleByMacroRateState, optax.ScaleByScheduleState)
_OF_REGULATOR = ("scalars", "history", "anchor", "average")
_ADVICE = (
    "adopt goes between optimizers with the same moments: protect the old one as it "
    "is, error_regulate(old_optimizer), or start again with tx.init(params)."
)


def adopt(
    tx: optax.GradientTransformation, params: optax.Params, opt_state: optax.OptState
) -> optax.OptState:
    r"""Returns a state of ``tx`` that continues where another optimizer is.

    A run of ``optax.adamw`` becomes a protected one, and back::

        opt_state = adopt(lalerg(schedule, search=False), params, adamw_state)
        opt_state = adopt(error_regulate(optax.adamw(schedule)), params, adamw_state)
        adamw_state = adopt(optax.adamw(schedule), params, opt_state)

    Args:
      tx: the optimizer that continues the run.
      params: the current params.
      opt_state: the current state of the previous optimizer; a checkpoint has to be
        restored into its own state first (``optax.adamw(...).init(params)``, say).
        With Flax NNX, put both through ``nnx.as_pure``.

    Returns:
      A state with the tree, shapes and dtypes of ``tx.init(params)``.

    Raises:
      TypeError: if ``tx`` is not a transformation.
      ValueError: if a state of either side has no counterpart on the other (``lalerg``
        has no place for the trace of momentum, say, unless it is its ``micro``), or
        if the shapes are those of other params.

    Example:
      >>> import jax.numpy as jnp, optax, lalerg_optax as lo
      >>> params, grads = jnp.array([1.0, -2.0]), jnp.array([0.3, 0.1])
      >>> adamw = optax.adamw(1e-3, b2=0.999)
      >>> _, state = adamw.update(grads, adamw.init(params), params)
      >>> tx = lo.lalerg(1e-3, b2=0.999, gradient_share=0, search=False)
      >>> protected = lo.adopt(tx, params, state)
      >>> int(optax.tree.get(protected, "micro_count"))
      1
      >>> updates, _ = tx.update(grads, protected, params, value=0.5)
      >>> expected, _ = adamw.update(grads, state, params)
      >>> bool(jnp.allclose(updates, expected, rtol=1e-5))
      True
      >>> int(optax.tree.get(lo.adopt(adamw, params, protected), "count"))
      1

    With :math:`s = tx.init(params)` and the given state :math:`o`, the result is
    :math:`s` with everything that both hold taken from :math:`o`,

    .. math::

        s[\mu, \nu, t, counts, \ldots] \leftarrow o[\mu, \nu, t, counts, \ldots]

    As long as there is nothing to object to, the next step is the one that the old
    optimizer would have taken, if both have the same hyperparameters (``b1``, ``b2``,
    ``eps``, ``weight_decay``; ``gradient_share=0`` where the other is Adam), which the
    state does not hold.
    States are paired in the order of the chains, at any depth of nesting:

    * States of the same type: ``error_regulate(inner)`` takes over any ``inner`` as a
      whole. Between two protected optimizers, history, anchor and rates are kept, too.
    * Moments and count of Adam (``optax.scale_by_adam``) and of
      `scale_by_micro_rate` are the same. Dtypes become those of ``tx``.
    * A new schedule begins at the count of the moments.
    * A new regulator has seen nothing: it judges gradient norms from its second step on
      and losses from the 17th, and its anchor is ``params``. Its first audit counts as
      passed, so no revert goes back to the start of the run, which it does not know,
      and none resets the moments.
    * A new macro level has found its rate, :math:`r = 1`, after :math:`t` steps, and
      its best alignment is taken to be 1. With ``search=True`` it goes on in small
      steps by the loss, and leaps only where the alignment is clearly above a half.
      ``search=False`` leaves the rate alone: use it if the rate was right.
    * `accumulate` and ``optax.MultiSteps`` may come or go. A group of micro-batches
      that is not complete is then lost, and groups are counted from 0.

    On the way back the factors of the learning rate, ``macro_rate`` and
    ``damping_factor`` (`metrics`), are dropped: multiply the learning rate by them.

    Can be jitted. Without ``jit``, the result shares buffers with ``opt_state``.
    """
    check_transformation("tx", tx)
    state = _take_over(tx.init(params), opt_state)
    return _rated(tx.update, jax.tree.map(_with_rate, state, is_leaf=_is_regulator))


def _is_regulator(node: Any) -> bool:
    return isinstance(node, ErrorRegulateState)


def _with_rate(node: Any, rate: Any = UNKNOWN) -> Any:
    """Returns a regulator with the rate of the next step, or another leaf."""
    if not _is_regulator(node):
        return node
    known = unpack(RegulatorScalars, node.scalars)
    return node._replace(scalars=pack(known._replace(base_rate=rate)))


def _rated(update: Any, state: Any) -> Any:
    """Returns a state in which regulators know the rate of the next step."""
    made_of = enclosed(update)
    if _is_regulator(state) and "chained" in made_of:
        return _with_rate(state, learning_rate(made_of["chained"], state.inner_state))
    if "update_fns" in made_of and isinstance(state, tuple) and not _is_state(state):
        return tuple(map(_rated, made_of["update_fns"], state))
    return state


def _take_over(new: Any, old: Any) -> Any:
    """Returns ``new`` with everything that ``old`` has a counterpart of."""
    if _tree(new) == _tree(old):
        return jax.tree.map(_fit, new, old)
    if isinstance(new, dict) and isinstance(old, dict) and new.keys() == old.keys():
        return {name: _take_over(new[name], old[name]) for name in new}
    if _is_wrapper(new) and type(new) is type(old):
        pairs = zip(new._fields, new, old, strict=True)
        return type(new)(
            *(
                _shared(n, o) if "hyper" in name else _take_over(n, o)
                for name, n, o in pairs
            )
        )
    if not (isinstance(new, tuple) and isinstance(old, tuple)):
        return _same(new, old)  # raises: they differ
    parts = _parts(old, wanted=new)
    taken = _fill(new, parts, _num_steps(parts))
    lost = [type(part).__name__ for part in parts if not isinstance(part, _OPTIONAL)]
    if lost:
        raise ValueError(
            f"the new optimizer has no place for {', '.join(lost)}. {_ADVICE}"
        )
    return taken


def _shared(new: dict[str, Any], old: dict[str, Any]) -> dict[str, Any]:
    """Returns hyperparameters of ``inject_hyperparams``; common ones are the old."""
    return {k: _take_over(v, old[k]) if k in old else v for k, v in new.items()}


def _fit(new: Any, old: Any) -> Any:
    """Returns an array of the old state with the dtype and memory of the new."""
    if jnp.shape(new) != jnp.shape(old):
        raise ValueError(
            "opt_state is that of other params, or one of the two optimizers has "
            f"per_tensor: where it has the shape {jnp.shape(old)}, the new one has "
            f"{jnp.shape(new)}."
        )
    dtype = jnp.result_type(new)
    if jnp.iscomplexobj(old) and not jnp.issubdtype(dtype, jnp.complexfloating):
        old = old.real
    if not jnp.issubdtype(dtype, jax.dtypes.prng_key):
        old = jnp.asarray(old, dtype)
    space = jax.typeof(new).memory_space
    is_there = jax.typeof(old).memory_space == space
    return old if is_there else jax.device_put(old, space)


def _is_state(node: Any) -> bool:
    return isinstance(node, tuple) and hasattr(node, "_fields")


def _is_adam(node: Any) -> bool:
    return isinstance(node, optax.ScaleByAdamState | ScaleByMicroRateState)


def _inside(node: Any) -> str | None:
    """Returns the field inside of a state that accumulates micro-batches, or None."""
    if isinstance(node, AccumulateState):
        return "inner_state"
    return "inner_opt_state" if isinstance(node, optax.MultiStepsState) else None


def _is_wrapper(node: Any) -> bool:
    is_own = isinstance(node, ErrorRegulateState) or _is_adam(node)
    return _is_state(node) and not is_own


def _parts(state: Any, wanted: Any) -> list[Any]:
    """Returns the states in a chain, at any depth, in their order.

    One that accumulates is unwrapped, unless there is one of its kind in the other.
    """
    if isinstance(state, ErrorRegulateState):
        return [state, *_parts(state.inner_state, wanted)]
    field = _inside(state)
    if field is not None and not find_states(wanted, type(state)):
        return _parts(getattr(state, field), wanted)
    if isinstance(state, tuple) and not _is_state(state):
        return [part for link in state for part in _parts(link, wanted)]
    return [state] if jax.tree.leaves(state) else []


def _count_name(state: Any) -> str:
    return "micro_count" if isinstance(state, ScaleByMicroRateState) else "count"


def _num_steps(parts: list[Any]) -> jax.Array | None:
    """Returns the count of the moments; without any, the largest one (some restart)."""
    nodes = jax.tree.leaves(parts, is_leaf=_is_adam)
    counts = [getattr(node, _count_name(node)) for node in nodes if _is_adam(node)]
    if counts:
        return counts[0]
    others = [
        leaf
        for path, leaf in jax.tree.leaves_with_path(parts)
        if path[-1:] == _COUNT and jnp.ndim(leaf) == 0
    ]
    return functools.reduce(jnp.maximum, others) if others else None


def _fill(new: Any, parts: list[Any], num_steps: jax.Array | None) -> Any:
    """Returns ``new`` with the parts that belong there, and removes them from parts."""
    if isinstance(new, tuple) and not _is_state(new):
        return tuple(_fill(link, parts, num_steps) for link in new)
    if not jax.tree.leaves(new):
        return new

    def is_counterpart(part: Any) -> bool:
        return type(part) is type(new) or (_is_adam(part) and _is_adam(new))

    index = next((i for i, part in enumerate(parts) if is_counterpart(part)), None)
    part = None if index is None else parts.pop(index)
    if isinstance(new, ErrorRegulateState):
        inner_state = _fill(new.inner_state, parts, num_steps)
        return _regulated(new, part)._replace(inner_state=inner_state)
    field = _inside(new)
    if part is None and field is not None:
        return new._replace(**{field: _fill(getattr(new, field), parts, num_steps)})
    if part is None:
        return _begun(new, num_steps)
    if not _is_adam(new):
        return _take_over(new, part)
    return _same(new, part) if type(part) is type(new) else _moments(new, part)


def _moments(new: Any, old: Any) -> Any:
    count = _fit(getattr(new, _count_name(new)), getattr(old, _count_name(old)))
    return new._replace(
        mu=_same(new.mu, old.mu), nu=_same(new.nu, old.nu), **{_count_name(new): count}
    )


def _same(new: Any, old: Any) -> Any:
    if _tree(new) != _tree(old):
        raise ValueError(
            "opt_state is that of other params: their trees differ. The order is "
            "adopt(tx, params, opt_state). With Flax NNX, put both through nnx.as_pure."
        )
    return jax.tree.map(_fit, new, old)


def _regulated(new: ErrorRegulateState, old: Any) -> ErrorRegulateState:
    """Returns a regulator that does not treat the run as a new one."""
    if old is not None:
        for name in _OF_REGULATOR:
            pair = getattr(new, name), getattr(old, name)
            if not any(part is None for part in pair):
                new = new._replace(**{name: _same(*pair)})
    known = unpack(RegulatorScalars, new.scalars)
    passed = jnp.maximum(known.num_audits_passed, 1)
    return new._replace(scalars=pack(known._replace(num_audits_passed=passed)))


def _begun(new: Any, num_steps: jax.Array | None) -> Any:
    """Returns a state without a counterpart as it is after that many steps."""
    steps = jnp.zeros((), jnp.int32) if num_steps is None else num_steps
    if isinstance(new, ScaleByMacroRateState):
        return with_rate_found(new, steps)
    if isinstance(new, optax.ScaleByScheduleState):
        # a real copy: a buffer that occurs twice in a state cannot be donated
        return new._replace(count=jnp.copy(_fit(new.count, steps)))
    raise ValueError(f"opt_state has nothing for {type(new).__name__}. {_ADVICE}")
