"""Audit: the one conditional of a step, which looks back at the anchor and moves it."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from ._anchor import look_back, move
from ._average import Average, with_point
from ._judge_rule import JudgeRule
from ._mapped import mapped_axes, spread
from ._numbers import LARGEST
from ._records import LOOKS, Assessment, Conduct, Decision, Look, RegulatorScalars
from ._scalars import Scalars, as_vector, pack, read, unpack
from ._verdict import Verdict, is_applied


class AuditRule(NamedTuple):
    """Numbers of the audit.

    Attributes:
      num_early: steps with a look before the anchor is due: with the look at the move,
        they are enough for a standard error. Noise requires more.
      clear_errors: standard errors from zero at which an audit is over.
      most_looks: looks after which an unclear start counts as a start.
      good_errors: standard errors above zero at which a start is good.
      bad_errors: standard errors below zero at which it has failed; more, because a
        failure costs what was learnt, and because looks at one anchor share a way.
      most_reach: how far the first steps may lead, in units of the params.
      far_restarts: times that a start may be taken back because of that.
      most_restarts: times that a run may restart: where nothing lowers the rate, a
        start that fails once fails for ever.
      held_looks: looks beyond those wanted after which a held anchor is audited, too.
      variance_decay: decay of the average variance of a look.
    """

    num_early: int = 3
    clear_errors: float = 4.0
    most_looks: float = 16.0
    good_errors: float = 2.0
    bad_errors: float = 3.0
    most_reach: float = 1e-2
    most_restarts: int = 8
    far_restarts: int = 2
    held_looks: float = 5.0
    variance_decay: float = 0.75


RULE = AuditRule()


def due(
    last: RegulatorScalars,
    seen: Assessment,
    decision: Decision,
    rule: JudgeRule,
    *,
    audit: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    r"""Returns whether there is anything to do about the anchor.

    Also whether it may move (0 no, 1 if looks are clear, 2 yes), and how many looks are
    wanted before it does. With :math:`v` the variance of a look and :math:`\hat c` the
    largest recent alignment, it may move after as many accepted updates as below. The
    last term exists only with ``audit``, and 32 stands for ``anchor_every``.

    .. math::

        \min(\max(\lfloor n_{accepted} / 8 \rfloor,\; 5,\;
            \lfloor 5 \cdot 3 \, v / \hat c^2 \rfloor),\; 32)
    """
    shortest = jnp.maximum(last.num_accepted // 8, rule.min_anchor_every)
    shortest = jnp.minimum(shortest, rule.anchor_every)
    longest, num_wanted = shortest, jnp.zeros((), jnp.int32)
    if audit:
        # So many looks determine the alignment to a given share of itself. More looks
        # need a longer way to look back on. (As one array: one kernel.)
        steps = as_vector([rule.noise_steps, rule.least_steps])
        alignments = as_vector([last.alignment, last.alignment_scale])
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


def _summed_up(
    last: RegulatorScalars,
    is_seen: jax.Array,
    alignment: jax.Array,
    length: jax.Array,
    weight: jax.Array,
) -> Look:
    r"""Returns the summary of all looks at this anchor.

    With :math:`w_i` the weight of a look and :math:`c_i` its alignment, the alignment
    and the variance of a single look are

    .. math::

        c = \frac{\sum_i w_i c_i}{\sum_i w_i}, \qquad
        v = \frac{n^2}{n - 1} \frac{\sum_i w_i^2 (c_i - c)^2}{(\sum_i w_i)^2}

    It is a ratio of sums, not a mean of ratios: with one example a batch, the many
    small gradients agree with the way the params went, and the few large ones do not.
    """
    weight = jnp.where(is_seen, weight, 0.0)
    num_looks = last.num_looks + is_seen
    look_sum = last.look_sum + weight * alignment
    look_square = last.look_square + (weight * alignment) ** 2
    look_cross = last.look_cross + weight**2 * alignment
    look_weight = last.look_weight + weight
    look_weight_square = last.look_weight_square + weight**2
    count = jnp.maximum(num_looks, 1.0)
    rise = jnp.where(is_seen, -alignment * length, 0.0)
    look_rise = jnp.clip(last.look_rise + rise, -LARGEST, LARGEST)
    look_rise_square = jnp.minimum(last.look_rise_square + rise**2, LARGEST)
    scatter = jnp.maximum(look_rise_square - look_rise**2 / count, 0.0)
    unit = jnp.maximum(look_weight / count, 1e-15)
    mean = look_sum / (count * unit)
    rest = look_square - 2.0 * mean * look_cross + mean**2 * look_weight_square
    own = jnp.maximum(rest, 0.0) / (unit**2 * jnp.maximum(count - 1.0, 1.0))
    # the variance of few looks is itself uncertain
    pooled = last.look_variance + (1.0 - RULE.variance_decay) * (
        own - last.look_variance
    )
    variance = jnp.where(
        num_looks < 2.0,
        last.look_variance,
        jnp.where(last.look_variance > 0.0, pooled, own),
    )
    return Look(
        is_seen=is_seen,
        alignment=mean,
        alignment_error=jnp.sqrt(variance / count),
        look_sum=look_sum,
        look_square=look_square,
        look_cross=look_cross,
        look_weight=look_weight,
        look_weight_square=look_weight_square,
        rise=look_rise / count,
        rise_error=jnp.sqrt(scatter / count / jnp.maximum(count - 1.0, 1.0)),
        look_rise=look_rise,
        look_rise_square=look_rise_square,
        look_variance=variance,
        num_looks=num_looks,
    )


# jit: outside of a jitted step, a conditional would be compiled again at every call
@functools.partial(jax.jit, static_argnames=("audit", "axis_name"), inline=True)
def look_and_move(
    is_due: jax.Array,
    readiness: jax.Array,
    num_wanted: jax.Array,
    is_started: jax.Array,
    weight: jax.Array,
    bound: jax.Array,
    last: RegulatorScalars,
    anchor: optax.Params,
    params: optax.Params,
    grads: optax.Updates,
    grad_norm: jax.Array,
    average: Average | None,
    is_point: jax.Array,
    *,
    audit: bool,
    axis_name: str | tuple[str, ...] | None,
) -> tuple[optax.Params, Look, Average | None]:
    """Looks back at the anchor and moves it, and adds to the average, if due.

    This is the only conditional of a step, because an accelerator has to wait for the
    predicate. The updates depend on its result: so the copy precedes the in-place write
    of the params, and XLA needs no second one.

    Args:
      is_due: whether there is anything to do, bool scalar.
      readiness: whether the anchor may move if the looks allow it: 0 no, 1 once they
        are clear, 2 even if they are not, int32 scalar.
      num_wanted: looks that are wanted before the anchor moves, int32 scalar.
      is_started: whether the run has begun well, bool scalar.
      weight: of this look, float32 scalar.
      bound: factor of a gradient that is too long, float32 scalar.
      last: what is known.
      anchor: the anchor.
      params: the params.
      grads: the gradient.
      grad_norm: its norm.
      average: of the params, if one is kept.
      is_point: whether the params are added to it, bool scalar.
      audit: whether to look back.
      axis_name: mapped axes to average over.
    """

    def look_now() -> tuple[optax.Params, Average | None, Scalars]:
        look = Look(is_moved=readiness > 0)
        if audit:
            is_seen, alignment, length, reach = look_back(
                grads, grad_norm, anchor, params, axis_name
            )
            look = _summed_up(last, is_seen, alignment, bound * length, weight)
            # Before the first good audit, looks go on until together they are clear.
            error = look.alignment_error
            # three of one weight: a heavy one alone has no standard error
            is_enough = look.look_weight**2 > 2.5 * look.look_weight_square
            is_good = is_enough & (look.alignment > RULE.good_errors * error)
            is_bad = is_enough & (look.alignment < -RULE.bad_errors * error)
            is_still = is_seen & (look.look_square == 0.0)  # params have not moved
            is_clear = is_good | is_still | (look.num_looks >= RULE.most_looks)
            # A search from far below costs little, one from above may cost the run.
            is_far = reach > RULE.most_reach
            is_far &= last.num_revert_steps < 2 * RULE.far_restarts
            # a restart takes two steps
            is_bad &= last.num_revert_steps < 2 * RULE.most_restarts
            is_failed = (is_bad | is_far) & ~is_started
            # Afterwards until the way is long enough, or clearly up or down.
            is_over = jnp.abs(look.alignment) > RULE.clear_errors * error
            is_over = (readiness > 1) | (is_enough & is_over)
            is_moved = (readiness > 0) & ~is_failed
            is_moved &= jnp.where(is_started, is_over, is_clear)
            # the looks at an anchor that is held are reported as well
            is_held = is_started & (look.num_looks >= num_wanted + RULE.held_looks)
            look = look._replace(
                reach=jnp.where(is_failed, reach, 0.0),
                is_taken=(is_moved | is_held) & (look.num_looks > 0.0),
                is_failed=is_failed,
                is_moved=is_moved,
            )
        # Read back: otherwise XLA repeats the sums that this depends on, over all
        # leaves, in the kernel of each.
        report = spread(pack(look), axes)
        moved = move(read(Look, report, "is_moved"), anchor, params)
        is_kept = jnp.logical_not(read(Look, report, "is_failed"))
        return spread(moved, axes), added(is_point & is_kept), report

    def add() -> tuple[optax.Params, Average | None, Scalars]:
        return spread(anchor, axes), added(True), kept_looks()

    def keep() -> tuple[optax.Params, Average | None, Scalars]:
        return spread(anchor, axes), spread(average, axes), kept_looks()

    def added(is_point: jax.typing.ArrayLike) -> Average | None:
        if average is None:
            return None
        return spread(with_point(is_point, average, params), axes)

    def kept_looks() -> Scalars:
        looks = {name: getattr(last, name) for name in LOOKS} if audit else {}
        return spread(pack(Look(**looks)), axes)

    # under shard_map both have to differ over the same axes
    axes = mapped_axes((params, grads, grad_norm, is_due, last, average))
    # The branch that passes a buffer through has to be the first one: as the last one
    # it costs a copy (https://github.com/jax-ml/jax/issues/39449).
    branches, index = [keep, look_now], jnp.asarray(is_due, jnp.int32)
    if average is not None:
        branches, index = [keep, add, look_now], jnp.where(is_due, 2, is_point)
    moved, average, report = lax.switch(index, branches)
    return moved, unpack(Look, report), average
