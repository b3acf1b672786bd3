"""Monitoring: what was decided, and why, read from the optimizer's state."""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from ._accumulate import AccumulateState, has_regulator
from ._checks import FORMER_NAMES, check_range
from ._find import find_states
from ._local import INTERNAL, LocalView
from ._macro import ScaleByMacroRateState
from ._micro import ScaleByMicroRateState
from ._records import LOOKS, RegulatorScalars
from ._regulate import ErrorRegulateState

_INTERNAL = (
    "base_rate",
    "num_averaged",
    "ceiling",
    "ceiling_in_doubt",
    "doubt",
    "peak_doubt",
    "harmless_doubt",
    "num_well",
    "alignment_scale",
    "look_variance",
    *LOOKS,
    "num_skips_in_a_row",
    "num_lost",
)
_REGULATOR_FIELDS = tuple(
    name for name in RegulatorScalars._fields if name not in _INTERNAL
)
_VARIABLE = (jax.tree_util.GetAttrKey("value"),)  # how the path to a leaf ends in NNX


def _of_leaves(regulator: ErrorRegulateState) -> Iterator[tuple[str, str, jax.Array]]:
    """Yields name, leaf and scalar of everything in the local view."""
    vectors = jax.tree.leaves(regulator.local)  # NNX wraps them in variables
    paths = [path for path, _ in jax.tree.leaves_with_path(regulator.anchor)]
    if all(path[-1:] == _VARIABLE for path in paths):
        paths = [path[:-1] for path in paths]
    leaves = [jax.tree_util.keystr(p, simple=True, separator="/") for p in paths]
    for name, vector in zip(LocalView._fields, vectors, strict=True):
        if name in INTERNAL:
            continue
        for i, leaf in enumerate(leaves):
            scalar = lax.index_in_dim(vector, i, axis=-1, keepdims=False)
            yield name.removeprefix("leaf_"), leaf, scalar


def _scalar(node: Any) -> jax.Array:
    (scalar,) = jax.tree.leaves(node)  # NNX wraps it in a variable
    return scalar


def _of_groups(opt_state: optax.OptState) -> Iterator[tuple[str, str, jax.Array]]:
    """Yields label, name and scalar of whatever accumulates micro-batches.

    One that is inside of a regulator does not say when that one judges.
    """
    is_judged = has_regulator(opt_state)
    for label, state in find_states(opt_state, AccumulateState).items():
        if has_regulator(state) or not is_judged:
            micro_step = _scalar(state.micro_step)
            is_begun = _scalar(state.num_groups) > 0
            yield label, "has_updated", (micro_step == 0) & is_begun
            yield label, "micro_step", micro_step
            yield label, "num_dropped", _scalar(state.num_dropped)
    for label, state in find_states(opt_state, optax.MultiStepsState).items():
        if has_regulator(state):
            is_begun = _scalar(state.gradient_step) > 0
            has_updated = (_scalar(state.mini_step) == 0) & is_begun
            if "should_skip" in state.skip_state:  # then the counts did not move
                has_updated &= ~_scalar(state.skip_state["should_skip"])
            yield label, "has_updated", has_updated


def metrics(opt_state: optax.OptState) -> dict[str, jax.Array]:
    """Returns the last decision, and the reasons for it, as a flat dict of scalars.

    A pure function of the optimizer's state, usable inside ``jit``. The states are
    found at any depth: in chains, ``masked``, ``partition``, ``MultiSteps``,
    ``inject_hyperparams`` and in the ``opt_state`` of ``nnx.Optimizer``. Where there
    are several (one for each group of ``partition``, say), the name of the group
    leads the key: ``"encoder/verdict"``.

    ======================  ========================================================
    key                     meaning
    ======================  ========================================================
    verdict                 0 ACCEPT, 1 SKIP, 2 REVERT, 3 BOUND (int32)
    conduct                 0 HEALTHY, 1 SUSPECT, 2 RESTORING, 3 TRIAL, 4 EPISODE,
                            5 REWINDING; see docs/reverting.md (int32)
    scaled_error            rise of the loss in units of the tolerated rise
    scaled_norm_error       the same for the logarithm of the gradient norm
    learning_rate           in effect at this step: schedule x macro rate x damping; -1
                            where it is not known
    macro_rate              factor of the macro level (1 where there is none)
    is_searching            whether the macro level still leaps (bool)
    damping_factor          factor that harm cuts and time restores, at most 1
    num_accepted            steps accepted, including bounded ones (int32)
    num_bounded             steps accepted with a bounded gradient (int32)
    num_skipped             steps skipped (int32)
    num_rejected_in_a_row   steps rejected since the last accepted one (int32)
    num_reverts             reverts to the anchor (int32)
    num_revert_steps        steps spent on reverts, two each (int32)
    num_trials              reverts that test whether params are damaged (int32)
    num_harmful             trials that showed damage (int32)
    num_hard                steps of the current episode of hard data (int32)
    skips_left              steps that may still be skipped for their norm alone
    avg_value               average of the accepted losses, decay 0.95
    grad_norm               global norm of the gradient before clipping
    alignment               cosine between gradients and the way back to the anchor, at
                            the last audit
    alignment_error         its standard error
    num_audits_passed       audits with a positive alignment (int32)
    anchor_age              accepted steps since the anchor was set (int32)
    num_macro_held          steps at which the macro level kept its state (int32)
    num_micro_held          steps at which the micro level kept its state (int32)
    ======================  ========================================================

    With ``local=True`` there are also, for each leaf (``"grad_norm/encoder/kernel"``)
    with gradient ``g``, update ``u`` and params ``p``:

    ==========================  ====================================================
    key                         meaning
    ==========================  ====================================================
    grad_norm/<leaf>            ``|g|`` before clipping, also on rejected steps
    effective_rate/<leaf>       ``|u| / |g|``: the learning rate that SGD would need
    update_ratio/<leaf>         ``|u| / |p|``: how far the weights moved
    predicted_decrease/<leaf>   ``-<g, u>``: by how much the loss falls, to first order
    jump/<leaf>                 how far ``p`` is, at least, from where the update before
                                sent it, relative to ``|p| + |u|``; 0 up to rounding
    ==========================  ====================================================

    Of these ``effective_rate``, ``update_ratio`` and ``predicted_decrease`` are 0 where
    a step is rejected. Scalars without a type above are
    float32. Values that are not finite are shown as 1e37. The learning rate is known of
    Optax's optimizers and chains, with a number or a schedule, and with
    ``optax.inject_hyperparams``; not where groups have different ones, nor in the flat
    form. Where the state has further axes (under ``vmap``), so has every scalar.

    Around a regulator, `accumulate` adds the following, and ``optax.MultiSteps`` the
    first (with a ``should_skip_update_fn`` of your own, only if it tells
    ``should_skip``, as those of Optax do). All other keys are those of the last step.

    ======================  ========================================================
    key                     meaning
    ======================  ========================================================
    has_updated             whether the last micro-batch completed a step (bool)
    micro_step              micro-batches of the present group so far (int32)
    num_dropped             micro-batches that were not finite (int32)
    ======================  ========================================================

    ``damping`` and ``num_reverted`` are deprecated names of ``damping_factor`` and
    ``num_revert_steps``; they will be removed in 0.3.

    Args:
      opt_state: the state of an optimizer with a part of this package in it.

    Returns:
      The dict. A part that is not there has no keys, except that ``macro_rate`` is 1.

    Raises:
      ValueError: if no part of this package is found in the state.

    Example:
      >>> import jax.numpy as jnp, optax, lalerg_optax as lo
      >>> tx = lo.error_regulate(optax.adam(1e-3))
      >>> report = lo.metrics(tx.init(jnp.zeros(3)))
      >>> lo.Verdict(int(report["verdict"])).name, float(report["damping_factor"])
      ('ACCEPT', 1.0)
      >>> tx = lo.error_regulate(optax.sgd(0.1), local=True)
      >>> params = {"kernel": jnp.ones(4)}
      >>> _, state = tx.update(params, tx.init(params), params, value=2.0)
      >>> round(float(lo.metrics(state)["update_ratio/kernel"]), 3)
      0.1
    """
    regulators = find_states(opt_state, ErrorRegulateState)
    macros = find_states(opt_state, ScaleByMacroRateState)
    micros = find_states(opt_state, ScaleByMicroRateState)
    accumulated = {label + name: x for label, name, x in _of_groups(opt_state)}
    if not (regulators or macros or micros or accumulated):
        raise ValueError(
            "opt_state has no state of error_regulate, scale_by_macro_rate, "
            "scale_by_micro_rate or accumulate in it. Pass what tx.update returned; "
            "with Flax NNX that is optimizer.opt_state."
        )
    groups = {**regulators, **macros, **micros} or {"": None}
    report: dict[str, jax.Array] = {}
    for label, regulator in regulators.items():
        for name in _REGULATOR_FIELDS:
            report[label + name] = getattr(regulator, name)
        steps = regulator.num_revert_steps  # the last revert may be in progress
        report[label + "num_reverts"] = steps // 2 + steps % 2
        rates = [m.macro_rate for name, m in macros.items() if name.startswith(label)]
        macro_rate = rates[0] if rates else jnp.ones_like(regulator.damping_factor)
        if not rates:
            report[label + "macro_rate"] = macro_rate
        rate = regulator.base_rate * macro_rate * regulator.damping_factor
        is_known = (regulator.base_rate >= 0.0) & (len(rates) <= 1)
        report[label + "learning_rate"] = jnp.where(is_known, rate, -1.0)
        for former, name in FORMER_NAMES.items():
            report[label + former] = report[label + name]
        if regulator.local is not None:
            for name, leaf, scalar in _of_leaves(regulator):
                report[f"{label}{name}/{leaf}".rstrip("/")] = scalar
    for label, macro in macros.items():
        for name in ("macro_rate", "is_searching", "num_macro_held"):
            report[label + name] = getattr(macro, name)
    for label, micro in micros.items():
        report[label + "num_micro_held"] = held = _scalar(micro.num_micro_held)
        if not any(other.startswith(label) for other in {**regulators, **macros}):
            report[label + "macro_rate"] = jnp.ones_like(held, jnp.float32)
    if not (regulators or macros or micros):
        report["macro_rate"] = jnp.ones((), jnp.float32)
    report |= accumulated
    if len(groups) == 1:  # nothing to distinguish
        (label,) = groups
        report = {name.removeprefix(label): value for name, value in report.items()}
    return report


def is_stuck(opt_state: optax.OptState, after: jax.typing.ArrayLike = 32) -> jax.Array:
    """Returns whether so many steps in a row were rejected that a run should stop.

    A pure function, for a loop inside ``jit``: the condition of a ``lax.while_loop``,
    or a flag that the step returns. `Recorder` has ``stop_after`` for loops outside.

    Args:
      opt_state: the state of an optimizer. Regulators are found in it at any depth.
      after: steps, skipped or reverted, since the last accepted one, at least 1.

    Returns:
      A bool scalar: whether any regulator has rejected that many.

    Raises:
      ValueError: if ``after`` is less than 1, or there is no regulator in the state.

    Example:
      >>> import jax.numpy as jnp, optax, lalerg_optax as lo
      >>> tx, params = lo.error_regulate(optax.sgd(0.1)), jnp.ones(2)
      >>> state = tx.init(params)
      >>> while not lo.is_stuck(state, after=6):
      ...     _, state = tx.update(params, state, params, value=jnp.nan)
      >>> int(state.num_rejected_in_a_row)
      6
    """
    check_range("after", after, 1, float("inf"))
    regulators = find_states(opt_state, ErrorRegulateState)
    if not regulators:
        raise ValueError("opt_state has no state of error_regulate in it.")
    flags = [r.num_rejected_in_a_row >= after for r in regulators.values()]
    return functools.reduce(jnp.logical_or, flags)
