"""Second level: a rule or a whole optimizer, turned so that it points uphill."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ._checks import check_transformation
from ._find import find_states
from ._macro import ScaleByMacroRateState
from ._rate import OWN_RATE
from ._regulate import ErrorRegulateState

WEIGHT_DECAY = 1e-4  # that of optax.adamw
_OWN_RATE = (
    "finds its rate by itself, against which no search can work: protect it as it is, "
    "lalerg_optax.error_regulate(optimizer)."
)
# states of what cannot be a second level, and why
_REFUSED: dict[type, str] = {
    **dict.fromkeys(OWN_RATE, _OWN_RATE),
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


_TRIAL_STEPS = 4


class _Trial(NamedTuple):
    """How a transformation behaves.

    Attributes:
      slopes: sum of products of gradient and update, for each leaf.
      decays: whether params decay without a gradient.
      takes_value: whether updates depend on the loss.
    """

    slopes: Any
    decays: Any
    takes_value: Any = False

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
    """Takes a few steps uphill and downhill, and without a gradient from zero and one.

    A warm-up may begin with a rate of zero, and some of Optax's links wait for others.
    What does not turn with the gradient is no slope: weight decay, and noise, which is
    the same in both directions, because it comes from the key in the state. One step is
    compiled, not all of them.
    """
    init, update = jax.jit(tx.init), jax.jit(tx.update)
    zeros, ones = optax.tree.zeros_like(params), optax.tree.ones_like(params)

    def steps(
        grads: optax.Updates, start: optax.Params, num: int, value: float = 1.0
    ) -> optax.Updates:
        state, total = init(start), zeros
        for _ in range(num):
            updates, state = update(grads, state, start, value=jnp.full((), value))
            total = optax.tree.add(total, updates)
        return total

    opposite = optax.tree.scale(-1, ones)
    up, down = (steps(g, ones, _TRIAL_STEPS) for g in (ones, opposite))
    slopes = [jnp.sum(u).real for u in jax.tree.leaves(optax.tree.sub(up, down))]
    trial = _Trial(jnp.stack(slopes), False)
    idle = (steps(zeros, start, _TRIAL_STEPS) for start in (ones, zeros))
    idle = optax.tree.sub(*idle)
    entries = [u.real for u in jax.tree.leaves(_turned(idle, trial.sign))]
    has_grown = jnp.stack([jnp.any(u < 0.0) for u in entries]).any()
    has_fallen = jnp.stack([jnp.any(u > 0.0) for u in entries]).any()
    of_values = (steps(ones, ones, 1, value) for value in (1.0, 1e-3))
    # a NaN is not equal to itself
    differ = jax.tree.map(
        lambda a, b: jnp.any((a != b) & ~(jnp.isnan(a) & jnp.isnan(b))), *of_values
    )
    differ = jax.tree.leaves(differ)
    return trial._replace(
        decays=has_fallen & ~has_grown, takes_value=jnp.stack(differ).any()
    )


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
            trial = _try_out(tx, params)
            flags = bool(trial.decays), bool(trial.takes_value)
            return _Trial(np.asarray(trial.slopes), *flags)
    except Exception:
        pass
    try:
        return _try_out(tx, params)
    except Exception:
        return None


def _small(params: optax.Params) -> optax.Params:
    """Returns params of the same tree, with at most two entries in each dimension."""

    def shrink(p: Any) -> np.ndarray:
        # of NumPy, because what is made inside of jit has no value
        shape = tuple(min(n, 2) for n in jnp.shape(p))
        return np.ones(shape, jnp.result_type(p))

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
    """Raises a ValueError where what was tried cannot be a second level."""
    if trial is None or not trial.is_known:
        return
    if trial.takes_value:
        raise ValueError(f"micro depends on the loss: it {_OWN_RATE}")
    if not np.any(trial.slopes):
        raise ValueError(
            "micro changes nothing in its first steps, so that it does not show which "
            "way it points. Pass a schedule as learning_rate, and accumulate around "
            "the whole."
        )
    if np.any(trial.slopes < 0.0) and np.any(trial.slopes > 0.0):
        raise ValueError(
            "micro points uphill for some params and downhill for others: a part of it "
            "is a whole optimizer, optax.adam(1.0), and another one a rule, "
            "optax.scale_by_adam(). Write all parts in one of the two ways."
        )


def as_second_level(
    micro: Any,
) -> tuple[optax.GradientTransformationExtraArgs, Callable[[optax.Params], Any]]:
    """Returns ``micro``, pointing uphill, and of params whether it decays them.

    A rule of Optax (``optax.scale_by_lion()``) points uphill, an optimizer
    (``optax.lion(1.0)``) downhill. Which of the two it is shows when it is tried on two
    by two params, or on small ones with the tree of the real ones where that is not
    possible. What cannot be tried at all is taken as a rule without decay.

    Raises:
      TypeError: if ``micro`` is not a transformation or refuses extra arguments.
      ValueError: here or in ``init``, if it cannot work as a second level.
    """
    check_transformation("micro", micro, example="optax.scale_by_lion()")
    tx = optax.with_extra_args_support(micro)
    square = np.ones((2, 2), np.float32)
    _check_states(tx, square)
    known = _trial(tx, square)
    _check_trial(known)
    trials: dict[Any, _Trial] = {}  # of trees, because eager steps come one by one

    def trial_on(params: optax.Params) -> _Trial:
        if known is not None:
            return known
        leaves, structure = jax.tree.flatten(params)
        kinds = ((jnp.shape(p), str(jnp.result_type(p))) for p in leaves)
        key = structure, *kinds
        if key in trials:
            return trials[key]
        trial = _trial(tx, _small(params))
        _check_trial(trial)
        if trial is None:
            trial = _Trial(np.ones(1), False)
        if trial.is_known:  # else it is of this trace only
            trials[key] = trial
        return trial

    def init_fn(params: optax.Params) -> optax.OptState:
        _check_states(tx, params)
        trial_on(params)
        return tx.init(params)

    def update_fn(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        sign = trial_on(params).sign
        updates, state = tx.update(updates, state, params, **extra_args)
        return _turned(updates, sign), state

    turned = optax.GradientTransformationExtraArgs(init_fn, update_fn)
    return turned, lambda params: trial_on(params).decays


def decay_beside(
    weight_decay: Any, mask: Any, decays: Callable[[optax.Params], Any]
) -> optax.GradientTransformation:
    """Returns the weight decay of the chain, where the second level may have its own.

    Args:
      weight_decay: as given; None for the default, unless there is another.
      mask: which params to decay.
      decays: of params, whether the second level decays them.

    Raises:
      ValueError: in ``init``, if params would decay twice.
    """
    is_default = weight_decay is None
    number = WEIGHT_DECAY if is_default else weight_decay

    def link(params: optax.Params) -> optax.GradientTransformation:
        is_own = decays(params)
        rate = number
        if is_default:
            rate = jnp.where(is_own, 0.0, number)
            if isinstance(is_own, bool):
                rate = 0.0 if is_own else number
        elif is_own is True and not isinstance(number, jax.Array) and number != 0.0:
            raise ValueError(
                f"weight_decay = {number} would be added to that of micro, which "
                "decays the params by itself: leave one of the two out, "
                "micro=optax.lion(1.0, weight_decay=0.0), say."
            )
        return optax.add_decayed_weights(rate, mask)

    def init_fn(params: optax.Params) -> optax.OptState:
        return link(params).init(params)

    def update_fn(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
    ) -> tuple[optax.Updates, optax.OptState]:
        return link(params).update(updates, state, params)

    return optax.GradientTransformation(init_fn, update_fn)
