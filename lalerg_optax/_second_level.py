"""Second level: a rule or a whole optimizer, turned so that it points uphill."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ._checks import check_transformation
from ._find import find_states
from ._macro import ScaleByMacroRateState
from ._regulate import ErrorRegulateState

_OWN_RATE = (
    "finds its rate by itself, against which no search can work: protect it as it is, "
    "lalerg_optax.error_regulate(optimizer)."
)
# states of what cannot be a second level, and why
_REFUSED: dict[type, str] = {
    **{
        getattr(optax.contrib, name): _OWN_RATE
        for name in (
            *("COCOBState", "DAdaptAdamWState", "DoGState", "DoWGState"),
            *("MechanicState", "MomoAdamState", "MomoState", "ProdigyState"),
            "ReduceLROnPlateauState",
        )
    },
    optax.ScaleByBacktrackingLinesearchState: _OWN_RATE,
    optax.ScaleByZoomLinesearchState: _OWN_RATE,
    optax.contrib.ScheduleFreeState: (
        "keeps params of its own, which a rate from outside would tear apart: protect "
        "it as it is, lalerg_optax.error_regulate(optimizer)."
    ),
    optax.LookaheadState: (
        "can be no part of a chain, nor a second level, because its updates must be "
        "applied as they are: wrap it as a whole, "
        "error_regulate(optax.lookahead(optimizer, ...))."
    ),
    optax.MultiStepsState: (
        "has steps that change nothing, from which the search would learn nothing: "
        "accumulate around the whole, optax.MultiSteps(lalerg(...), k)."
    ),
    ErrorRegulateState: (
        "is protected already: pass the optimizer that is inside of error_regulate."
    ),
    ScaleByMacroRateState: (
        "has a first level already: pass the part that scales the gradient."
    ),
}


class _Trial(NamedTuple):
    """How a transformation behaves.

    Attributes:
      slopes: sum of products of gradient and update, for each leaf.
      decays: whether params decay without a gradient.
    """

    slopes: Any
    decays: Any

    @property
    def sign(self) -> Any:
        """1 if updates point uphill, -1 if they point downhill; a float if known."""
        if self.is_known:
            return -1.0 if self.slopes.sum() < 0.0 else 1.0
        return jnp.where(jnp.sum(self.slopes) < 0.0, -1.0, 1.0)

    @property
    def is_known(self) -> bool:
        """Whether all numbers have a value already."""
        return isinstance(self.slopes, np.ndarray)


def _try_out(tx: Any, params: optax.Params) -> _Trial:
    """Takes two steps uphill from zero; none from zero, and from one, for decay."""
    zeros, ones = optax.tree.zeros_like(params), optax.tree.ones_like(params)
    state = tx.init(zeros)
    slopes = jnp.zeros(len(jax.tree.leaves(params)))
    for _ in range(2):  # a warm-up may begin with a rate of zero
        updates, state = tx.update(ones, state, zeros, value=jnp.ones(()))
        slopes += jnp.stack([jnp.sum(u).real for u in jax.tree.leaves(updates)])
    idle = [
        tx.update(zeros, tx.init(p), p, value=jnp.ones(()))[0] for p in (zeros, ones)
    ]
    decay = _turned(optax.tree.sub(*reversed(idle)), _Trial(slopes, False).sign)
    entries = [u.real for u in jax.tree.leaves(decay)]
    has_grown = jnp.stack([jnp.any(u < 0.0) for u in entries]).any()
    has_fallen = jnp.stack([jnp.any(u > 0.0) for u in entries]).any()
    return _Trial(slopes, has_fallen & ~has_grown)


def _turned(updates: optax.Updates, sign: Any) -> optax.Updates:
    if isinstance(sign, float) and sign == 1.0:
        return updates
    return jax.tree.map(lambda u: (sign * u).astype(u.dtype), updates)


def _trial(tx: Any, params: optax.Params) -> _Trial | None:
    """Returns how ``tx`` behaves; None where it cannot be tried on such params.

    The numbers are concrete, unless hyperparameters of ``tx`` have no value yet.
    """
    try:
        with jax.ensure_compile_time_eval():
            trial = jax.jit(_try_out, static_argnums=0)(tx, params)
            return _Trial(np.asarray(trial.slopes), bool(trial.decays))
    except Exception:
        pass
    try:
        return _try_out(tx, params)
    except Exception:
        return None


def _small(params: optax.Params) -> optax.Params:
    """Returns params of the same tree, with at most two entries in each dimension."""

    def shrink(p: Any) -> jax.Array:
        shape = tuple(min(n, 2) for n in jnp.shape(p))
        return jnp.ones(shape, jnp.result_type(p))

    return jax.tree.map(shrink, params)


def _check_states(tx: Any, params: optax.Params) -> None:
    """Raises a ValueError where a part of ``tx`` cannot be in a second level."""
    try:
        state = jax.eval_shape(tx.init, params)
    except Exception:  # not made for such params; `init` will tell of the real ones
        return
    for kind, reason in _REFUSED.items():
        if find_states(state, kind):
            name = kind.__name__.removesuffix("State")
            raise ValueError(f"micro has a part ({name}) that {reason}")


def _check_trial(trial: _Trial | None) -> None:
    """Raises a ValueError where leaves point in different directions."""
    if trial is None or not trial.is_known:
        return
    if np.any(trial.slopes < 0.0) and np.any(trial.slopes > 0.0):
        raise ValueError(
            "micro points uphill for some params and downhill for others: a part of it "
            "is a whole optimizer, optax.adam(1.0), and another one a rule, "
            "optax.scale_by_adam(). Write all parts in one of the two ways."
        )


def as_second_level(
    micro: Any,
) -> tuple[optax.GradientTransformationExtraArgs, Any]:
    """Returns ``micro``, pointing uphill, and whether it decays params by itself.

    A rule of Optax (``optax.scale_by_lion()``) points uphill, an optimizer
    (``optax.lion(1.0)``) downhill. Which of the two it is shows when it is tried on two
    by two params, or on small ones with the tree of the real ones where that is not
    possible. What cannot be tried at all is taken as a rule.

    Raises:
      TypeError: if ``micro`` is not a transformation or refuses extra arguments.
      ValueError: here or in ``init``, if it cannot work as a second level.
    """
    check_transformation("micro", micro, example="optax.scale_by_lion()")
    tx = optax.with_extra_args_support(micro)
    square = jnp.ones((2, 2))
    _check_states(tx, square)
    known = _trial(tx, square)
    _check_trial(known)
    trials: dict[Any, Any] = {}  # of trees, because eager steps come one by one

    def sign_for(params: optax.Params) -> Any:
        if known is not None:
            return known.sign
        leaves, structure = jax.tree.flatten(params)
        key = structure, *((jnp.shape(p)[:2], str(jnp.result_type(p))) for p in leaves)
        if key not in trials:
            trial = _trial(tx, _small(params))
            _check_trial(trial)
            if trial is not None and not trial.is_known:
                return trial.sign  # of this trace only
            trials[key] = 1.0 if trial is None else trial.sign
        return trials[key]

    def init_fn(params: optax.Params) -> optax.OptState:
        _check_states(tx, params)
        sign_for(params)
        return tx.init(params)

    def update_fn(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        sign = sign_for(params)
        updates, state = tx.update(updates, state, params, **extra_args)
        return _turned(updates, sign), state

    decays = False if known is None else known.decays
    return optax.GradientTransformationExtraArgs(init_fn, update_fn), decays
