"""Error regulation: judge every step; accept, skip or revert it."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from ._anchor import (
    Audit,
    at_hand,
    check_anchor_dtype,
    check_anchor_memory,
    copy_params,
    global_norm,
    look_back,
    move,
)
from ._checks import (
    MISSING,
    as_loss,
    check_params,
    check_range,
    check_state,
    check_state_type,
    check_updates,
)
from ._gate import count_if
from ._inner import as_inner
from ._judge import LARGEST, Judgement, JudgeState, Verdict, init_judge, judge, overrule
from ._local import LocalView, act_in_turn, init_local, leaf_squares
from ._scalars import Scalars, pack, read, unpack

_MIN_ANCHOR_EVERY = 5  # steps; odd, so that a swing to and fro is not back at its start
_CLEAR = 0.99  # about one standard error; the significance of a single entry is 1
_HEALTHY = 0.5  # errors below half of what is tolerated: fit to be gone back to
_MIN_DAMPING = 2.0**-10


class RegulatorScalars(NamedTuple):
    """What the regulator told at the last step, and what it counts.

    Attributes:
      grad_norm: global norm of the gradient before clipping, float32.
      alignment: what the last audit told, in [-1, 1], float32.
      evidence: sum of the significances of looks back that together told nothing yet,
        float32.
      num_looks: number of such looks, float32.
      damping: factor of the updates, in [2^-10, 1], float32.
      verdict: the last `Verdict`, int32.
      num_accepted: number of steps accepted, int32.
      num_skipped: number of steps skipped, int32.
      num_reverted: number of steps spent on reverts (two each), int32.
      num_audits_passed: number of audits with a positive alignment, int32.
      anchor_age: accepted updates by which params are away from the anchor, int32.
    """

    grad_norm: Any = 0.0
    alignment: Any = 0.0
    evidence: Any = 0.0
    num_looks: Any = 0.0
    damping: Any = 1.0
    verdict: Any = 0
    num_accepted: Any = 0
    num_skipped: Any = 0
    num_reverted: Any = 0
    num_audits_passed: Any = 0
    anchor_age: Any = 0


class ErrorRegulateState(NamedTuple):
    """State of `error_regulate`. Every number in it is finite at all times.

    The scalars can be read by name: ``state.verdict``, ``state.damping``, ...

    Attributes:
      scalars: what was told at the last step, and counters; see `RegulatorScalars`.
      judge_state: history of the two signals and the last judgement.
      anchor: the params that a revert goes back to, a tree like the params.
      inner_state: the state of the wrapped transformation.
      local: what the last step did to each leaf; None unless asked for.

    Example:
      >>> import jax.numpy as jnp, optax, lalerg_optax as lo
      >>> tx = lo.error_regulate(optax.adam(1e-3))
      >>> params = jnp.array([1.0, 2.0])
      >>> state = tx.init(params)
      >>> _, state = tx.update(jnp.ones(2), state, params, value=0.5)
      >>> int(state.num_accepted), float(state.judge_state.avg_value)
      (1, 0.5)
      >>> [float(a) for a in state.anchor]
      [1.0, 2.0]
      >>> int(state.inner_state[0].count)  # Adam's
      1
    """

    scalars: Scalars
    judge_state: JudgeState
    anchor: optax.Params
    inner_state: optax.OptState
    local: LocalView | None = None

    def __getattr__(self, name: str) -> jax.Array:
        return read(RegulatorScalars, self.scalars, name)


def _damp(
    damping: jax.Array,
    judgement: Judgement,
    is_started: jax.Array,
    backoff_factor: jax.typing.ArrayLike,
    recovery_steps: jax.typing.ArrayLike,
) -> jax.Array:
    """Returns the damping: cut by a revert, restored by accepted steps."""
    recovery = jnp.asarray(backoff_factor, jnp.float32) ** (-1.0 / recovery_steps)
    recovered = jnp.minimum(damping * recovery, 1.0)
    cut = jnp.maximum(damping * backoff_factor, _MIN_DAMPING)
    is_cut = judgement.is_new_revert & is_started
    is_held = judgement.is_skipped | judgement.is_reverted
    return jnp.where(is_cut, cut, jnp.where(is_held, damping, recovered))


class _Look(NamedTuple):
    """What was done about the anchor: bools, and what the look back told, float32."""

    is_moved: Any = False
    is_seen: Any = False
    is_failed: Any = False
    alignment: Any = 0.0
    evidence: Any = 0.0
    num_looks: Any = 0.0


# jit: outside of a jitted step, a conditional would be compiled anew at every call
@functools.partial(jax.jit, static_argnames=("audit", "axis_name"), inline=True)
def _move_anchor(
    is_due: jax.Array,
    is_started: jax.Array,
    state: ErrorRegulateState,
    judge_state: JudgeState,
    params: optax.Params,
    grads: optax.Updates,
    grad_norm: jax.Array,
    *,
    audit: bool,
    axis_name: str | tuple[str, ...] | None,
) -> tuple[optax.Params, _Look, JudgeState]:
    """Where that is due, looks back at the anchor and moves it to the params.

    This is the only conditional of a step, because an accelerator has to wait for the
    predicate. The judgement comes out of it also where it stays as it is: the updates
    then depend on the conditional, the copy lies before the in-place write of the
    params, and XLA needs no second one.
    """
    last = unpack(RegulatorScalars, state.scalars)
    judgement = unpack(Judgement, judge_state.scalars)
    is_accepted = ~(judgement.is_skipped | judgement.is_reverted)
    is_healthy = (
        (judgement.scaled_error < _HEALTHY)
        & (judgement.scaled_norm_error < _HEALTHY)
        & (judgement.scaled_drift < _HEALTHY)
    )

    def look() -> tuple[optax.Params, Scalars, Scalars]:
        seen, judged, is_moved = _Look(), judge_state.scalars, is_healthy
        if audit:
            is_seen, alignment, significance = look_back(
                grads, grad_norm, state.anchor, params, axis_name
            )
            # Before the first good audit, one that says nothing is none: the next
            # step looks again, until all that was seen together says something.
            evidence = last.evidence + significance
            num_looks = last.num_looks + is_seen
            is_clear = jnp.abs(evidence) > _CLEAR * jnp.sqrt(num_looks)
            is_clear |= alignment == 0.0
            is_seen &= is_started | is_clear
            is_failed = is_seen & (alignment < 0.0) & ~is_started
            is_failed &= ~judgement.starts_anew
            is_moved &= ~is_failed & (is_started | is_seen)
            is_told = is_started | is_failed | is_moved
            seen = _Look(
                is_seen=is_seen,
                is_failed=is_failed,
                alignment=alignment,
                evidence=jnp.where(is_told, 0.0, evidence),
                num_looks=jnp.where(is_told, 0.0, num_looks),
            )
            judged = overrule(is_failed, judged, state.judge_state.scalars)
        # Read back, or XLA repeats the sums that this hangs on, over all leaves, in the
        # kernel of each.
        told = pack(seen._replace(is_moved=is_moved))
        anchor = move(read(_Look, told, "is_moved"), state.anchor, params)
        return anchor, told, judged

    def keep() -> tuple[optax.Params, Scalars, Scalars]:
        seen = _Look(evidence=last.evidence, num_looks=last.num_looks)
        return state.anchor, pack(seen), judge_state.scalars

    # The branch that passes a buffer through has to be the false one: as the true
    # one it costs a copy (https://github.com/jax-ml/jax/issues/39449).
    anchor, seen, judged = lax.cond(is_due & is_accepted, look, keep)
    report = unpack(_Look, seen)
    history = judge_state.history
    num_values = jnp.where(report.is_failed, 0, history.num_values)
    history = history._replace(num_values=num_values)
    return anchor, report, JudgeState(history, judged)


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
    r"""Accepts, skips or reverts every step by what it did to the loss.

    Optax hands over ``value``, the loss :math:`L_t` at the *current* params, so that
    the update of one step is judged at the next one, on another batch.

    **Errors.** Let :math:`m` and :math:`s` be the median and the upper spread
    (`LossHistory.centre_and_spread`) of the last 128 losses, :math:`m^g` and
    :math:`s^g` those of the logarithms of the gradient norm, :math:`L_1` the smallest
    of the first 16 losses, :math:`\bar L` the average of the accepted losses (decay
    0.95), :math:`\bar L^*` its best, and :math:`d` the average of
    :math:`|L - \bar L|` (decay 0.99). Each error is a rise in units of what is
    tolerated; 1 is the threshold:

    .. math::

        e_{loss}  &= \frac{L_t - m}{\max(k s,\; \varphi (L_1 - m),\; 10^{-5} |m|)} \\
        e_{norm}  &= \frac{\log |g_t| - m^g}{\max(k s^g,\; \log 4)} \\
        e_{drift} &= \frac{\bar L - \bar L^*}
                          {\max(4 d,\; (L_1 - \bar L^*) / 2,\; 10^{-5} |\bar L^*|)}

    with :math:`k` = ``threshold`` and :math:`\varphi` = ``progress_fraction``. The
    windows and :math:`d` are those before this step, the averages those with
    :math:`L_t`; an average weighs its n-th value with the larger of 1/n and 1 - decay,
    and :math:`\bar L^*` fades towards :math:`\bar L` by 1/1024 an accepted step. A
    loss or norm that is not finite, or whose square overflows float32, has an infinite
    error, shown as 1e37. :math:`e_{loss}` is 0 until 16 values are known and
    :math:`e_{drift}` until 128 are; :math:`e_{norm}` is known from the second step on,
    with a floor of log 16 instead of log 4 until there are 16 values. A loss that never
    was anything but constant (both :math:`s` and the progress are 0) has no error,
    because nothing tells its scale. A norm of 0 has no error and is not recorded.

    **Verdict.** An *outlier* has :math:`\max(e_{loss}, e_{norm}) > 1`.

    * ``ACCEPT``, no outlier and no drift: the update of ``inner`` times the damping.
      An entry whose update would make its parameter infinite stays.
    * ``SKIP``, the first outlier in a row, which may be a bad batch, and those from the
      third rejected step in a row on: update zero, params stay.
    * ``REVERT``, when the step before was the first outlier and this is another, or
      :math:`e_{drift} > 1`: params go back to the anchor, with the update
      :math:`a - p`, on this step and, whatever its loss, on the next. The damping is
      multiplied by ``backoff_factor``, down to 2^-10 at least; every accepted step
      multiplies it by ``backoff_factor ** (-1 / recovery_steps)``, up to 1. After a
      drift the averages start anew.

    An alarm, a finite loss or norm above what is tolerated, enters its window as the
    value that, as the 95th percentile, would make the tolerance 1.5 times as wide (but
    at most as what was tolerated). So the window follows a level that is there to stay,
    but slowly: a burst of outliers, or 5 % of all batches, do not blind the judge. A
    loss that cannot be judged yet is not recorded where the norm objects. After
    ``patience`` finite steps rejected in a row (others in between do not count)
    windows, :math:`L_1` and averages start anew and the step is accepted: at most
    ``patience + 1`` finite steps are rejected in a row, whatever the losses.

    **Anchor.** A copy of the params before the update of the step, made when the step
    is accepted, all errors are below 1/2, and params are at least so many accepted
    updates away from it: an eighth of all accepted so far (rounded down), at least 5
    and at most ``anchor_every``. An entry that is not finite, or whose square is not in
    float32, is not copied.

    **Audit**, if asked for: whenever the anchor is about to move, the regulator looks
    back at it with the fresh gradient, :math:`c = \langle g, a - p \rangle / (|g|
    |a - p|)`, and tells ``inner`` (extra argument ``audit``). The first audit decides
    whether the run has begun well. It is taken once it is clear: with
    :math:`z = \langle g, a - p \rangle / \sqrt{\sum_i g_i^2 (a_i - p_i)^2}`, how far
    :math:`c` is from what independent signs would give, when
    :math:`|\sum z| > 0.99 \sqrt n` for the :math:`n` looks so far; until then the
    anchor stays where it is and every step looks again. Then :math:`c < 0` on a step
    without other errors is one: the first steps led nowhere, the learning rate is too
    high, and params REVERT to the start; windows, :math:`L_1` and averages start anew
    without this loss. Before an audit had :math:`c > 0` no REVERT cuts the damping, and
    ``audit.is_restart`` tells links to start anew, too: lowering the rate is the macro
    level's business.

    **Exactness.** ``p + (a - p)`` is ``a`` up to rounding; given twice it is ``a``
    bit for bit, unless ``p`` is not finite. `apply_updates` gives ``a`` at once in
    every case, and to a single entry that is not finite on every step.

    Two forms. *Nested*, ``error_regulate(inner)``: ``inner`` sees a zero gradient, a
    ``value`` that is always usable, and the verdict (extra argument ``verdict``);
    links of this package then keep their state. A scalar in the state of ``inner`` that
    becomes NaN or infinite keeps its last value.
    ``optax.lookahead`` has to be all of ``inner``; params are its
    ``optax.LookaheadParams``, which go back together, and gradients are like them:
    ``jax.grad(lambda params: loss(params.fast))(params)``.

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
      patience: finite steps that may be rejected in a row, at least 4.
      anchor_every: accepted steps between two anchors, at least 1.
      backoff_factor: cut of the damping at a revert, in (0, 1].
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

    def init_fn(params: optax.Params) -> ErrorRegulateState:
        return ErrorRegulateState(
            scalars=pack(RegulatorScalars()),
            judge_state=init_judge(),
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

        # Measure: scalars only.
        last = unpack(RegulatorScalars, state.scalars)
        grad_norm = global_norm(updates)
        value = as_loss(value)
        squares = leaf_squares(updates, params) if local else None
        if axis_name is not None:
            value, grad_norm = lax.pmean((value, grad_norm), axis_name)

        # Judge.
        judge_state = judge(
            state.judge_state,
            value,
            grad_norm,
            norm_is_judged=not is_flat or value is None,
            threshold=threshold,
            progress_fraction=progress_fraction,
            patience=patience,
        )
        is_due = last.anchor_age >= jnp.minimum(
            jnp.maximum(last.num_accepted // 8, _MIN_ANCHOR_EVERY), anchor_every
        )
        is_started = last.num_audits_passed > 0 if audit else jnp.ones((), jnp.bool_)
        anchor, look, judge_state = _move_anchor(
            is_due,
            is_started,
            state,
            judge_state,
            params,
            updates,
            grad_norm,
            audit=audit,
            axis_name=axis_name,
        )
        judgement = unpack(Judgement, judge_state.scalars)
        report = None
        if audit:
            report = Audit(
                is_taken=look.is_seen & look.is_moved,  # one for each anchor
                alignment=look.alignment,
                is_restart=judgement.is_new_revert & ~is_started,
            )
        is_skipped, is_reverted = judgement.is_skipped, judgement.is_reverted
        is_accepted = ~(is_skipped | is_reverted)
        verdict = jnp.where(
            is_reverted, Verdict.REVERT, jnp.where(is_skipped, Verdict.SKIP, 0)
        ).astype(jnp.int32)

        # Inner: sees nothing of a rejected batch.
        scale = None
        if clip_norm is not None:
            scale = clip_norm / jnp.maximum(grad_norm, clip_norm)

        def admit(g: jax.Array) -> jax.Array:
            clipped = g if scale is None else (scale * g).astype(g.dtype)
            return jnp.where(is_accepted, clipped, jnp.zeros((), g.dtype))

        grads = jax.tree.map(admit, updates)
        usable_value = (
            None
            if value is None
            else jnp.where(is_accepted, value, judgement.avg_value)
        )
        # not those of an outer regulator
        extra_args |= {"verdict": verdict, "audit": report}
        inner_updates, inner_state = chained.update(
            grads, state.inner_state, params, value=usable_value, **extra_args
        )

        # Count.
        is_told = is_passed = jnp.zeros((), jnp.bool_)
        if report is not None:
            is_told = look.is_failed | report.is_taken
            is_passed = report.is_taken & (report.alignment > 0.0)
        scalars = pack(
            RegulatorScalars(
                grad_norm=jnp.nan_to_num(grad_norm, nan=LARGEST, posinf=LARGEST),
                alignment=jnp.where(is_told, look.alignment, last.alignment),
                evidence=jnp.where(is_reverted, 0.0, look.evidence),
                num_looks=jnp.where(is_reverted, 0.0, look.num_looks),
                damping=_damp(
                    last.damping, judgement, is_started, backoff_factor, recovery_steps
                ),
                verdict=verdict,
                num_accepted=count_if(is_accepted, last.num_accepted),
                num_skipped=count_if(is_skipped, last.num_skipped),
                num_reverted=count_if(is_reverted, last.num_reverted),
                num_audits_passed=count_if(is_passed, last.num_audits_passed),
                # the anchor is what params were before the update of this step
                anchor_age=jnp.where(
                    look.is_moved,
                    1,
                    jnp.where(is_reverted, 0, count_if(is_accepted, last.anchor_age)),
                ),
            )
        )

        # Act.
        damping = read(RegulatorScalars, scalars, "damping")
        gate = jnp.where(is_skipped, 0.0, damping)
        home = at_hand(is_reverted, anchor, params)

        def act(gate: jax.Array, p: jax.Array, u: jax.Array, a: jax.Array) -> jax.Array:
            damped = (gate * u).astype(p.dtype)
            step = jnp.where(is_reverted, a.astype(p.dtype) - p, damped)
            is_safe = jnp.isfinite(p + step)  # of 0 * nan, too
            return jnp.where(is_safe, step, jnp.zeros((), p.dtype))

        view = None
        if squares is None:
            steps = jax.tree.map(
                functools.partial(act, gate), params, inner_updates, home
            )
        else:
            steps, view = act_in_turn(
                act,
                gate,
                (params, inner_updates, home),
                updates,
                squares,
                is_accepted=is_accepted,
                axis_name=axis_name,
            )
        return steps, ErrorRegulateState(
            scalars=scalars,
            judge_state=judge_state,
            anchor=anchor,
            inner_state=inner_state,
            local=view,
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
