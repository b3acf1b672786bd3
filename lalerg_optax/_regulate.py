"""Error regulation: judge every step; accept, bound, skip or revert it."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from ._anchor import (
    at_hand,
    check_anchor_dtype,
    check_anchor_memory,
    copy_params,
    global_norm,
)
from ._audit import RULE, look_and_move
from ._checks import (
    MISSING,
    as_loss,
    check_params,
    check_range,
    check_state,
    check_state_type,
    check_updates,
)
from ._history import LossHistory
from ._inner import as_inner
from ._judge import (
    Assessment,
    Conduct,
    Decision,
    JudgeRule,
    Look,
    RegulatorScalars,
    assess,
    decide,
    learn,
    overruled,
)
from ._local import (
    LeafSquares,
    LocalView,
    act_in_turn,
    init_local,
    leaf_squares,
)
from ._scalars import Scalars, lanes, pack, read, unpack
from ._verdict import Audit, Verdict, is_applied


class ErrorRegulateState(NamedTuple):
    """State of `error_regulate`. Every number in it is finite at all times.

    The scalars can be read by name: ``state.verdict``, ``state.damping``, ...

    Attributes:
      scalars: what was told at the last step, what is remembered, and counters; see
        `RegulatorScalars`.
      history: the recent losses and the recent logarithms of the gradient norm, an
        alarm clipped to what was tolerated; leading axis 2.
      anchor: the params that a revert goes back to, a tree like the params.
      inner_state: the state of the wrapped transformation.
      local: what the last step did to each leaf; None unless asked for.

    Example:
      >>> import jax.numpy as jnp, optax, lalerg_optax as lo
      >>> tx = lo.error_regulate(optax.adam(1e-3))
      >>> params = jnp.array([1.0, 2.0])
      >>> state = tx.init(params)
      >>> _, state = tx.update(jnp.ones(2), state, params, value=0.5)
      >>> int(state.num_accepted), float(state.avg_value)
      (1, 0.5)
      >>> [float(a) for a in state.anchor]
      [1.0, 2.0]
      >>> int(state.inner_state[0].count)  # Adam's
      1
    """

    scalars: Scalars
    history: LossHistory
    anchor: optax.Params
    inner_state: optax.OptState
    local: LocalView | None = None

    def __getattr__(self, name: str) -> jax.Array:
        return read(RegulatorScalars, self.scalars, name)


def _due(
    last: RegulatorScalars,
    seen: Assessment,
    decision: Decision,
    rule: JudgeRule,
    *,
    audit: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns if there is anything to do about the anchor.

    And whether it may move (0 no, 1 if looks are clear, 2 yes), and how many looks are
    wanted before it does.
    """
    shortest = jnp.maximum(last.num_accepted // 8, rule.min_anchor_every)
    shortest = jnp.minimum(shortest, rule.anchor_every)
    longest, num_wanted = shortest, jnp.zeros((), jnp.int32)
    if audit:
        # So many looks tell the alignment to so much of itself. The more they are, the
        # longer the way that they have to look back on. (As one array: one kernel.)
        steps = lanes([rule.noise_steps, rule.least_steps])
        alignments = lanes([last.alignment, last.alignment_scale])
        looks = steps * last.look_variance / jnp.maximum(alignments**2, 1e-12)
        looks = jnp.minimum(looks, 1e6)
        ways = (rule.min_anchor_every * looks).astype(jnp.int32)
        longest = jnp.clip(ways[0], shortest, rule.anchor_every)
        shortest = jnp.clip(ways[1], shortest, longest)
        most = jnp.maximum(longest - 1, RULE.num_early)
        num_wanted = jnp.clip(looks[0].astype(jnp.int32), RULE.num_early, most)
    is_ordinary = decision.verdict == Verdict.ACCEPT
    may_move = is_ordinary & seen.is_healthy & (last.anchor_age >= shortest)
    may_move &= decision.conduct == Conduct.HEALTHY
    is_late = may_move & (last.anchor_age >= longest)
    readiness = may_move.astype(jnp.int32) + is_late
    if not audit:
        return may_move, readiness, num_wanted
    early = jnp.maximum(shortest - num_wanted, 1)
    is_due = is_applied(decision.verdict) & (last.anchor_age >= early)
    return is_due, readiness, num_wanted


def _scale(
    seen: Assessment,
    verdict: jax.Array,
    grad_norm: jax.Array,
    clip_norm: jax.typing.ArrayLike | None,
) -> jax.Array:
    """Returns the factor of a gradient that is to be bounded, or clipped."""
    limit = jnp.where(verdict == Verdict.BOUND, jnp.exp(seen.log_limit), jnp.inf)
    if clip_norm is not None:
        limit = jnp.minimum(limit, clip_norm)
    return jnp.where(grad_norm > limit, limit / grad_norm, 1.0)


def _scaled(g: jax.Array, scale: jax.Array) -> jax.Array:
    """Returns a gradient times a scale of at most 1.

    What is rounded to bfloat16 for several uses XLA stores; to cut digits off is free.
    """
    if g.dtype != jnp.bfloat16:
        return scale.astype(g.dtype) * g
    wide = lax.bitcast_convert_type(scale * g.astype(jnp.float32), jnp.uint32)
    return lax.bitcast_convert_type((wide >> 16).astype(jnp.uint16), jnp.bfloat16)


def _admitted(
    grads: optax.Updates, verdict: jax.Array, scale: jax.Array
) -> optax.Updates:
    """Returns the gradient that ``inner`` sees: zero on a rejected batch."""
    is_open = is_applied(verdict)

    def admit(g: jax.Array) -> jax.Array:
        return _scaled(jnp.where(is_open, g, 0).astype(g.dtype), scale)

    return jax.tree.map(admit, grads)


def _loss_told(seen: Assessment, verdict: jax.Array, avg_value: jax.Array) -> jax.Array:
    """Returns the loss that ``inner`` sees: the average one on a rejected batch."""
    is_bounded = verdict == Verdict.BOUND
    loss = jnp.where(is_bounded, seen.recorded[0], seen.signals[0])
    return jnp.where(is_applied(verdict), loss, avg_value)


def _told(
    last: RegulatorScalars,
    decision: Decision,
    look: Look,
    verdict: jax.Array,
    is_started: jax.Array,
    *,
    audit: bool,
) -> dict[str, Any]:
    """Returns what links of this package are told of a step, as extra arguments."""
    told = Audit(
        is_taken=look.is_taken,
        alignment=look.alignment,
        alignment_error=look.alignment_error,
        reach=look.reach,
        is_restart=decision.is_new_revert & ~is_started,
    )
    return {
        "verdict": verdict,
        # what was not finite alone says nothing of a rate that did well
        "is_harmful": decision.is_harmful & ((last.peak_doubt > 0.0) | ~is_started),
        "audit": told if audit else None,
    }


def _act(
    verdict: jax.Array,
    damping: jax.Array,
    params: optax.Params,
    inner_updates: optax.Updates,
    anchor: optax.Params,
    grads: optax.Updates,
    squares: LeafSquares | None,
    axis_name: str | tuple[str, ...] | None,
) -> tuple[optax.Updates, LocalView | None]:
    """Returns the step that params take, and its local view if squares are given."""
    is_reverted = verdict == Verdict.REVERT
    gate = jnp.where(verdict == Verdict.SKIP, 0.0, damping)
    home = at_hand(is_reverted, anchor, params)

    def act(gate: jax.Array, p: jax.Array, u: jax.Array, a: jax.Array) -> jax.Array:
        damped = (gate * u).astype(p.dtype)
        step = jnp.where(is_reverted, a.astype(p.dtype) - p, damped)
        is_safe = jnp.isfinite(p + step)  # of 0 * nan, too
        return jnp.where(is_safe, step, jnp.zeros((), p.dtype))

    if squares is None:
        act_on_leaf = functools.partial(act, gate)
        return jax.tree.map(act_on_leaf, params, inner_updates, home), None
    return act_in_turn(
        act,
        gate,
        (params, inner_updates, home),
        grads,
        squares,
        is_accepted=is_applied(verdict),
        axis_name=axis_name,
    )


def error_regulate(
    inner: optax.GradientTransformation | None = None,
    *,
    threshold: jax.typing.ArrayLike = 6.0,
    progress_fraction: jax.typing.ArrayLike = 0.1,
    patience: jax.typing.ArrayLike = 32,
    anchor_every: jax.typing.ArrayLike = 32,
    backoff_factor: jax.typing.ArrayLike = 0.5,
    recovery_steps: jax.typing.ArrayLike = 64,
    clip_norm: jax.typing.ArrayLike | None = None,
    audit: bool = False,
    local: bool = False,
    anchor_dtype: jax.typing.DTypeLike | None = None,
    anchor_memory: str = "device",
    axis_name: str | tuple[str, ...] | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Judges every update by what it did to the loss, and undoes one that did harm.

    Optax hands over ``value``, the loss :math:`L_t` at the *current* params, so that
    the update of one step is judged at the next ones, on other batches. A high loss
    alone is no verdict: it may be a hard batch. What tells is whether losses stay high,
    and whether they do at params that are known to be healthy.

    **Errors.** Let :math:`m` and :math:`s` be the median and the upper spread
    (`LossHistory.centre_and_spread`) of the last 128 losses, :math:`m^g` and
    :math:`s^g` those of the logarithms of the gradient norm, and :math:`L_1` the
    smallest of the first 16 losses. Each error is a rise in units of what is tolerated;
    1 is the threshold:

    .. math::

        e_{loss}  &= \frac{L_t - m}{\max(k s,\; \varphi (L_1 - m),\; 10^{-5} |m|)} \
        e_{norm}  &= \frac{\log |g_t| - m^g}{\max(k s^g,\; \log 4,\; h - m^g)}

    with :math:`k` = ``threshold``, :math:`\varphi` = ``progress_fraction`` and
    :math:`h` the largest log norm of a bounded step that did no harm, at most that of
    5/4 of the bound. The windows are
    those before this step. A loss or norm that is not finite, or a norm whose square
    overflows float32, has an infinite error, shown as 1e37. :math:`e_{loss}` is 0 until
    16 values are known; :math:`e_{norm}` is known from the second step on, with a floor
    of log 16 instead of log 4 until there are 16 values. A loss that never was
    anything but
    constant (both :math:`s` and the progress are 0) has no error, because nothing tells
    its scale. A norm of 0 has no error and is not recorded. A step is *healthy* where
    both errors are below 1/2.

    **Doubt** sums up the evidence against the params,

    .. math::

        D \leftarrow \max(0,\; D + \min(\max(e_{loss}, 0), 1) - 1/4)

    so that two high losses in a row weigh as much as many that are a little too high.
    A step that is not finite adds 3/4. Let :math:`H` be the most doubt that ever
    subsided by itself, or proved to be that of the data: the params come under trial
    where

    .. math:: D \ge \max(5/4,\; \min(2 H + 3/4,\; 3/2 \; patience))

    (5/4 on a step that is not finite). So a kind of data that was hard for a while and
    did no harm is left alone from then on. After a first harm, a trial at least 16
    accepted steps later at which less than half of the progress :math:`L_1 - m` is
    undone makes :math:`H` at least 16 times the doubt so far, for rare data often raise
    the loss of all others for some steps, and that passes. The anchor is held
    meanwhile, so that waiting costs no more than these steps. Where doubt reaches
    :math:`3/2 \; patience`, and less than half of the progress is undone, it is the new
    level.

    **Verdict.**

    ==========  ====================================================================
    verdict     when, and what is done
    ==========  ====================================================================
    ``ACCEPT``  nothing below: the update of ``inner`` times the damping. An entry
                whose update would make its parameter infinite stays.
    ``BOUND``   :math:`e_{loss} > 1`: accepted, but ``inner`` sees a gradient scaled
                down to a log norm of :math:`m^g + \max(k s^g, \log 16, h - m^g)`; in an
                episode, to 5/4 of the last such norm.
    ``SKIP``    not finite; or :math:`e_{norm} > 1` though the loss is ordinary, while
                any of 5 such skips are left (one comes back in 16,384 accepted steps;
                after that it is ``BOUND`` to :math:`m^g + \log 4`): update zero.
    ``REVERT``  params go back to the anchor, on this step and the next.
    ==========  ====================================================================

    **Conduct**, the state between two steps, and what ends it:

    =============  =================================================================
    HEALTHY        :math:`D > 1/2`: SUSPECT
    SUSPECT        the anchor is held. :math:`D = 0`: HEALTHY. Trial: REVERT
    TRIAL          params are those of the anchor. If the mean :math:`e_{loss}` of the
                   two losses there (each between -1 and 1) is below 1/4, and the last
                   below 1/2, the updates since the anchor *did harm*: the damping is
                   multiplied by ``backoff_factor``, down to 2^-10 at least. Else it is
                   the data: EPISODE
    EPISODE        the anchor is held. If the error falls from above 1 to
                   below 1/2, or to a sixteenth, the data are as before, and what was
                   learnt from the others may have been poison: REVERT, once, for
                   :math:`H` is larger now. If it gets below 1/2 by and by, they have
                   been learnt: HEALTHY. After ``patience`` steps, that is the new
                   level: windows start anew and the step is accepted; but where half
                   of the progress is undone, first REVERT, to see whether the loss is
                   high there still
    =============  =================================================================

    n accepted steps after the last harm :math:`(n / recovery\_steps)^2` cuts of the
    damping are made good, up to 1. Without a loss (``value=None``) :math:`e_{norm}`
    takes the place of :math:`e_{loss}`, and a large norm is skipped first while skips
    are left.

    An alarm, a finite loss or norm with an error above 1, enters its window as the
    value that, as the 95th percentile, would make the tolerance 1.5 times as wide (but
    at most as what was tolerated). So the window follows a level that is there to stay,
    but slowly: a burst of outliers does not blind the judge. A loss that cannot be
    judged yet is not recorded where the norm objects, nor is anything from the second
    step of a revert until the conduct is HEALTHY again.

    **Anchor.** A copy of the params before the update of the step, made when the step
    is accepted and healthy, the conduct is HEALTHY, and params are at least so many
    accepted updates away from it: an eighth of all accepted so far (rounded down), at
    least 5 and at most ``anchor_every``. An entry that is not finite, or whose square
    is not in float32, is not copied.

    **Audit**, if asked for: on the last steps before the anchor may move, and from
    then on, every accepted step looks back at it with the fresh gradient,
    :math:`c_i = \langle g, a - p \rangle / (|g| |a - p|)`. When the anchor moves, or
    after n + 5 looks where it is held, ``inner`` is told (extra argument ``audit``)
    :math:`c = \sum w_i c_i / \sum w_i`, with the weights :math:`w_i = |g|` in units of
    its median (at most what is tolerated, or 16) times the updates since the anchor
    was made, and its standard error
    :math:`\sqrt{v / N}`. Of N looks the variance of one is :math:`v = \frac{N^2}{N - 1}
    \sum w_i^2 (c_i - c)^2 / (\sum w_i)^2`, averaged over anchors (decay 0.75).
    :math:`16 v / c^2` looks, with what was told last, tell it to a quarter of itself.
    The noisier they are, the longer is the way that they look back on: the 5 steps
    between anchors become at least :math:`5 \cdot 3 v / \hat c^2`, with :math:`\hat c
    \leftarrow \max(|c| - \sqrt{v / N}, 3/4 \, \hat c)` at every audit. From then on the
    anchor waits until c is more than 4 standard errors from 0, but not for longer than
    :math:`5 \cdot 16 v / c^2` steps; both at most ``anchor_every``. Looks begin n steps
    before it may move, with n = 16 v / c^2 rounded down, at least 3 and at most one
    less than the longest way. The first audit decides whether the run has begun well,
    and looks go on until it is clear: with at least 3 of them (none of which outweighs
    the others: :math:`(\sum w_i)^2 > 2.5 \sum w_i^2`), mean above 2 standard errors, or
    16 of them. A mean below -3 standard errors says that the first steps led nowhere,
    and params more than 1 % of the anchor's norm away from it that they were too long,
    whatever they led to (at the first two tries alone: a search from below costs
    little). REVERT to the start, at most 8 times; windows and :math:`L_1` start anew
    without this loss. Before an audit had :math:`c > 0` no harm cuts the damping, and
    ``audit.is_restart`` tells links to start anew, too: lowering the rate is the macro
    level's business.

    **Exactness.** ``p + (a - p)`` is ``a`` up to rounding; given twice it is ``a``
    bit for bit, unless ``p`` is not finite. `apply_updates` gives ``a`` at once in
    every case, and to a single entry that is not finite on every step.

    Two forms. *Nested*, ``error_regulate(inner)``: ``inner`` sees nothing of a rejected
    batch: a zero gradient, for ``value`` the average loss, the verdict (extra argument
    ``verdict``) and whether updates did harm (``is_harmful``); links of this package
    then keep their state. Of a bounded batch it sees a bounded gradient, and for
    ``value`` what the window remembers of the loss. A scalar in the state of ``inner``
    that becomes NaN or infinite keeps its last value. ``optax.lookahead`` has to be all
    of ``inner``; params are its ``optax.LookaheadParams``, which go back together, and
    gradients are like them: ``jax.grad(lambda params: loss(params.fast))(params)``.

    *Flat*, ``error_regulate()`` at the end of a chain: the incoming updates are no
    gradients and their size follows the schedule, so only the loss is judged, and
    whether the updates are finite; without a loss (``value=None``), their norm. Links
    of this package in front of it keep NaN out of their states; others do not, and
    belong inside ``optax.apply_if_finite``.

    Scale invariant in the loss. Shift invariant as long as the noise of the loss is
    above 1e-5 of its level.

    Args:
      inner: the transformation to protect; None for the flat form.
      threshold: tolerated rise in units of the upper spread, above 0. Taken from
        the skip-step rules of MaxText, levanter and OLMo (6 standard deviations).
      progress_fraction: tolerated rise of the loss in units of the progress since
        the start, at least 0.
      patience: steps after which hard data are the new level, at least 4.
      anchor_every: accepted steps between two anchors, at least 1.
      backoff_factor: cut of the damping when updates did harm, in (0, 1].
      recovery_steps: accepted steps in which one cut is made good, above 0.
      clip_norm: if given, gradients are scaled down to this global norm, above 0;
        the norm is judged before.
      audit: whether to look back at the anchor before moving it (see above).
      local: whether to tell, too, what a step did to each leaf of the params:
        `metrics` then has ``"update_ratio/<leaf>"`` and others. Costs nothing when off;
        when on, one more pass over gradients, updates and params, and room for about
        an eighth of the updates (and with JAX 0.12 in bfloat16 a leaf more), or for
        the largest leaf.
      anchor_dtype: dtype of the anchor of real params, ``"bfloat16"`` say, which
        takes half of the memory; by default that of the params. A revert then goes
        back to the rounded params. It has to have the range of float32.
      anchor_memory: ``"device"``, or ``"pinned_host"`` to keep the anchor in the
        memory of the host. It then crosses over when it moves and when params go back
        to it, and a step needs room for one more copy of the params while it runs.
      axis_name: name of the mapped axes (``shard_map``, ``pmap``) over which value,
        norm and what a look back tells are averaged, so that all devices decide alike.
        Gradients are not: average them before (``jax.lax.pmean``) or in a link of
        ``inner``, or replicated params will drift apart. Not needed under plain
        ``jit`` with sharded arrays.

    Returns:
      An ``optax.GradientTransformationExtraArgs`` whose ``update`` takes the
      keyword ``value``: a scalar, the mean loss at the current params, or None to
      judge by gradient norm alone. Updates have the dtypes of the params.

    Raises:
      ValueError: for a hyperparameter outside of its range; in ``init`` when the
        devices do not have that memory; in ``update`` when params are missing,
        ``value`` is no scalar, gradients have not the tree and the shapes of the
        params, or the state is that of other params or of another configuration.
      TypeError: if ``inner`` is no transformation or one that refuses extra arguments,
        ``value`` no number, or the state that of another transformation.

    Example:
      >>> import jax, jax.numpy as jnp, optax, lalerg_optax as lo
      >>> tx = lo.error_regulate(optax.sgd(0.1))
      >>> params = jnp.array([1.0, -2.0])
      >>> state = tx.init(params)
      >>> loss, grads = jax.value_and_grad(lambda p: jnp.sum(p**2))(params)
      >>> updates, state = tx.update(grads, state, params, value=loss)
      >>> [round(float(u), 3) for u in updates], int(state.verdict)
      ([-0.2, 0.4], 0)
      >>> updates, state = tx.update(grads, state, params, value=jnp.nan)
      >>> bool(jnp.all(updates == 0.0)), int(state.verdict)
      (True, 1)

    References:
      Chowdhery et al., `PaLM <https://arxiv.org/abs/2204.02311>`_, 2022, section
      5.1, restarts from a checkpoint and skips batches by hand. Rejecting and
      retrying with a smaller step is the rule of trust regions (Conn, Gould and
      Toint, 2000), of error-controlled ODE solvers (Hairer, Norsett and Wanner,
      1993), and of Rprop with weight backtracking (Riedmiller and Braun, 1993).
    """
    check_range("threshold", threshold, 0.0, float("inf"), low_open=True)
    check_range("progress_fraction", progress_fraction, 0.0, float("inf"))
    check_range("patience", patience, 4, float("inf"))
    check_range("anchor_every", anchor_every, 1, float("inf"))
    check_range("backoff_factor", backoff_factor, 0.0, 1.0, low_open=True)
    check_range("recovery_steps", recovery_steps, 0.0, float("inf"), low_open=True)
    if clip_norm is not None:
        check_range("clip_norm", clip_norm, 0.0, float("inf"), low_open=True)
    check_anchor_dtype(anchor_dtype)
    check_anchor_memory(anchor_memory)
    is_flat = inner is None
    if is_flat and audit:
        raise ValueError("audit needs the gradient, which the flat form does not see.")
    if is_flat and local:
        raise ValueError("local needs the gradient, which the flat form does not see.")
    chained = as_inner(optax.identity() if is_flat else inner)
    rule = JudgeRule(
        threshold=threshold,
        progress_fraction=progress_fraction,
        patience=patience,
        anchor_every=anchor_every,
        backoff_factor=backoff_factor,
        recovery_steps=recovery_steps,
    )

    def init_fn(params: optax.Params) -> ErrorRegulateState:
        return ErrorRegulateState(
            scalars=pack(RegulatorScalars()),
            history=LossHistory.empty(shape=(2,)),
            anchor=copy_params(params, anchor_dtype, anchor_memory),
            inner_state=chained.init(params),
            local=init_local(params) if local else None,
        )

    def update_fn(
        updates: optax.Updates,
        state: ErrorRegulateState,
        params: optax.Params | None = None,
        *,
        value: jax.typing.ArrayLike | None = MISSING,
        **extra_args: Any,
    ) -> tuple[optax.Updates, ErrorRegulateState]:
        check_params("error_regulate", params)
        check_state_type("error_regulate", state, ErrorRegulateState)
        check_updates("error_regulate", updates, params)
        check_state("error_regulate", state, init_fn, params)

        # Measure.
        last = unpack(RegulatorScalars, state.scalars)
        grad_norm = global_norm(updates)
        value = as_loss(value)
        squares = leaf_squares(updates, params) if local else None
        if axis_name is not None:
            value, grad_norm = lax.pmean((value, grad_norm), axis_name)

        # Assess, look, decide, learn: scalars, but for the anchor.
        seen = assess(
            last,
            state.history,
            value,
            grad_norm,
            rule,
            norm_is_judged=not is_flat or value is None,
        )
        decision = decide(last, seen, rule, has_value=value is not None)
        is_started = last.num_audits_passed > 0 if audit else jnp.ones((), jnp.bool_)
        due = _due(last, seen, decision, rule, audit=audit)
        # where the way is longer, there is more to see
        weight = seen.weight * last.anchor_age
        way_back = state.anchor, params, updates, grad_norm
        anchor, look = look_and_move(
            *due, is_started, weight, last, *way_back, audit=audit, axis_name=axis_name
        )
        decision = overruled(decision, look.is_failed)
        scalars, history = learn(
            last, state.history, grad_norm, seen, look, decision, is_started, rule
        )
        # read back: what comes later takes it from memory and does not decide again
        verdict, damping, avg_value = (
            read(RegulatorScalars, scalars, name)
            for name in ("verdict", "damping", "avg_value")
        )

        # Inner: sees nothing of a rejected batch.
        scale = _scale(seen, verdict, grad_norm, clip_norm)
        # not those of an outer regulator
        extra_args |= _told(last, decision, look, verdict, is_started, audit=audit)
        inner_updates, inner_state = chained.update(
            _admitted(updates, verdict, scale),
            state.inner_state,
            params,
            value=None if value is None else _loss_told(seen, verdict, avg_value),
            **extra_args,
        )

        # Act.
        steps, view = _act(
            verdict, damping, params, inner_updates, anchor, updates, squares, axis_name
        )
        return steps, ErrorRegulateState(
            scalars=scalars,
            history=history,
            anchor=anchor,
            inner_state=inner_state,
            local=view,
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
