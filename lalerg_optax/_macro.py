"""Macro level: one rate for all parameters, from how the loss does over many steps."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ._anchor import Audit
from ._checks import MISSING, as_loss, check_range, check_state_type
from ._gate import count_if, open_gate
from ._judge import LARGEST, Verdict
from ._scalars import Scalars, pack, read, unpack

_MAX_RATE = 2.0**40
_ALIGNMENT_DECAY = 0.5
_STANDARD_ERRORS = 2.0
_SHARE = 1.0 / 8.0  # of the run so far: an audit of fewer steps moves the rate by less
_SHALLOW, _DEEP = 1.0, 4.0  # powers of the backoff factor: a cut, a cut in the dark
_FIRST = 2.0  # half as deep: a start that was good at once may be right
_GAIN = 0.5  # exponent of a growth that the loss alone speaks for
_BOLDEST = 2.0  # exponent of the largest growth: hardly more than a cut takes
_FLOOR = 1.0 / 8.0  # of the rate that was found: reverts cut no further
_BLIND_LEAP = 0.5  # the share of a leap to dare where no alignment is known
_LARGEST_LOSS = 1e16  # its square, times the length of most windows, is a float32


class MacroScalars(NamedTuple):
    """What the macro level knows.

    Attributes:
      macro_rate: factor of the updates, in [2^-40, 2^40], float32.
      macro_min_rate: what a REVERT may not undershoot, float32.
      macro_growth: how fast the rate may grow once the search is over, in (0, 1],
        float32.
      is_searching: whether the rate still grows by leaps, bool.
      has_improved: whether an audit was ever good, bool.
      has_failed: whether the run had to go back to its start, bool.
      is_reverting: whether the last verdict was REVERT, bool.
      avg_alignment: exponential average of the alignment of audits, float32.
      best_alignment: the largest ``avg_alignment``, float32.
      window_mean: mean of the losses accepted since the last audit, float32.
      window_sum_of_squares: of their deviations from that mean, float32.
      last_window_mean: the mean of the window before, float32.
      last_window_variance: the variance of that mean, float32.
      best_window_mean: the lowest mean of a whole window, float32.
      best_window_variance: the variance of that mean, float32.
      window_count: number of losses in the window, int32.
      last_macro_revert: ``num_macro_steps`` at the last REVERT, int32.
      num_macro_steps: number of losses ever taken in, int32.
      num_windows: number of windows that are complete, int32.
      num_macro_held: number of steps that left the rate as it was because the
        verdict or a number that is not finite said so, int32.
    """

    macro_rate: Any = 1.0
    macro_min_rate: Any = 1.0 / _MAX_RATE
    macro_growth: Any = 1.0
    is_searching: Any = True
    has_improved: Any = False
    has_failed: Any = False
    is_reverting: Any = False
    avg_alignment: Any = 0.0
    best_alignment: Any = 0.0
    window_mean: Any = 0.0
    window_sum_of_squares: Any = 0.0
    last_window_mean: Any = 0.0
    last_window_variance: Any = 0.0
    best_window_mean: Any = 0.0
    best_window_variance: Any = 0.0
    window_count: Any = 0
    last_macro_revert: Any = 0
    num_macro_steps: Any = 0
    num_windows: Any = 0
    num_macro_held: Any = 0


class ScaleByMacroRateState(NamedTuple):
    """State of `scale_by_macro_rate`.

    The scalars can be read by name: ``state.macro_rate``, ``state.is_searching``, ...

    Attributes:
      scalars: what the macro level knows; see `MacroScalars`.

    Example:
      >>> import jax.numpy as jnp, lalerg_optax as lo
      >>> state = lo.scale_by_macro_rate().init(jnp.zeros(3))
      >>> float(state.macro_rate), bool(state.is_searching)
      (1.0, True)
    """

    scalars: Scalars

    def __getattr__(self, name: str) -> jax.Array:
        return read(MacroScalars, self.scalars, name)


def under_way(
    state: ScaleByMacroRateState, num_steps: jax.typing.ArrayLike
) -> ScaleByMacroRateState:
    """Returns the state as it would be had the search ended at this rate.

    How well steps are aligned at smaller rates was never seen. Taken for 1, than which
    no cosine is larger, it makes for the most careful steps.

    Args:
      state: a state of `scale_by_macro_rate`.
      num_steps: number of steps of the run so far; the more, the smaller the next ones.
    """
    known = unpack(MacroScalars, state.scalars)
    return ScaleByMacroRateState(
        pack(
            known._replace(
                macro_min_rate=_FLOOR * known.macro_rate,
                is_searching=False,
                has_improved=True,
                best_alignment=1.0,
                num_macro_steps=num_steps,
            )
        )
    )


def scale_by_macro_rate(
    *,
    search: bool = True,
    anneal: bool = False,
    growth_factor: jax.typing.ArrayLike = 4.0,
    slow_growth_factor: jax.typing.ArrayLike = 1.5,
    backoff_factor: jax.typing.ArrayLike = 0.5,
    good_alignment: jax.typing.ArrayLike = 0.25,
    audit_every: jax.typing.ArrayLike = 16,
) -> optax.GradientTransformationExtraArgs:
    r"""Scales all updates by one rate that follows how the loss does (first level).

    The rate :math:`r` is a number without unit that starts at 1 and multiplies the
    updates: chain ``optax.scale_by_learning_rate(learning_rate)`` behind it. From
    time to time an *audit* tells whether the steps since the last one led downhill, and
    before the update of that step is scaled, the rate is adapted.

    Inside ``error_regulate(..., audit=True)`` the regulator takes the audits. Let
    :math:`c` be the average (decay 0.5, from the first positive one on) of the
    alignments that it reports (the cosine between a fresh gradient and the way back
    to the anchor) and :math:`\rho = c / \max(\max c, |c|)`: 1 where the slope leads on
    as it did at the smallest rates, 0 where the steps reach the bottom, negative where
    they go beyond.

    **Search.** Every audit with :math:`\rho > good\_alignment` is good, and

    .. math:: r \leftarrow growth^{\rho} \, r.

    The first one that is not ends the search and :math:`r \leftarrow backoff \cdot r`
    (the cut alone as long as no :math:`c` was positive). Before, what a good alignment
    is has to be learnt from below: the very first good audit is followed by
    :math:`r \leftarrow backoff^2 \cdot r`, and :math:`c` begins anew. If already the
    first steps led uphill, the regulator goes back to the start (REVERT),
    :math:`r \leftarrow backoff^4 \cdot r`, and so once more after the first good audit;
    any other REVERT before a good audit does the same, and one after it halves
    the rate.

    **Afterwards** the rate is steered in small steps. With :math:`n` the steps since
    the last audit or REVERT, :math:`t` all accepted steps so far, :math:`b = 1` if the
    mean loss of these :math:`n` steps is the lowest so far, else 0,

    .. math::

        r &\leftarrow slow\_growth^{\,w e} \, r, \qquad w = \min(1, 8 n / t) \\
        e &= \begin{cases}
            1/2 + \rho / good\_alignment & b = 1 \\
            \min(\rho / good\_alignment, 0) & b = 0
        \end{cases}

    but :math:`-1 \le e \le 2`, and :math:`e \ge 0` unless ``anneal`` is set or the mean
    loss is more than 2 standard errors above the lowest. So the rate grows while that
    pays, and stays where the steps swing across the valley; the weight :math:`w` makes
    this a matter of the relative length of the run, not of its number of steps.

    A REVERT after the search halves the rate (:math:`backoff`), though not below 1/8 of
    what the search found, if there was another one within the last eighth of the run;
    the first may be a fault of the data, and the regulator's damping will do. Each of
    them also halves every positive :math:`e` to come, so that a rate that grows until
    it fails does so only a few times; each audit makes :math:`backoff^{-n / t}` of that
    good. A REVERT counts once for its two steps, and never ends the search. An
    alignment of exactly 0 (params have not moved at all) is neither good nor bad and
    leaves :math:`\rho` as it is, which is 1 as long as no alignment is known.

    Alone, or with a regulator that takes no audits, one falls due every
    ``audit_every`` accepted steps and compares the mean loss of this window with that
    of the last one, the first window being only a mark: good if it fell by more than
    2 standard errors of the difference, bad if it rose by as much; then
    :math:`r \leftarrow backoff^4 \cdot r`, and the search goes on. While it does
    neither, :math:`\rho = 1/2`; the first good audit ends the search where it is,
    because there is no way back from a rate that is too bold. Afterwards
    :math:`\rho = -good\_alignment` where the mean loss is more than 2 standard errors
    above the lowest, and 0 elsewhere.

    A step that is not accepted, or alone one with a loss or an update that is not
    finite, gives a zero update; a SKIP leaves rate and window as they were, a REVERT
    empties the window. Losses are clipped to 1e16 in magnitude, :math:`r` to
    [2^-40, 2^40]. With ``search=False``, :math:`r` is 1: what is left is the
    regulator's damping. A run may be taken up with another choice: switched off, the
    search forgets its rate, and switched on, it begins.

    Args:
      search: whether to look for the rate; if False, it is 1.
      anneal: whether the rate falls when the loss stalls. Leave that to the schedule
        where there is one that decays; `lalerg` sets it where there is none.
      growth_factor: largest leap of the search, at least 1.
      slow_growth_factor: unit of the steps up or down once the search is over, at
        least 1.
      backoff_factor: cut, in (0, 1].
      good_alignment: what counts as good, as a share of the best, in (0, 1).
      audit_every: accepted steps in a window when standing alone, at least 2.

    How much the defaults matter is measured in ``benchmarks/decades.py``.

    Returns:
      An ``optax.GradientTransformationExtraArgs`` whose ``update`` takes the
      keyword ``value``, a scalar loss or None. With None and without a regulator
      the rate stays as it is. Updates keep their dtypes.

    Raises:
      ValueError: for a hyperparameter outside of its range.

    Example:
      >>> import jax.numpy as jnp, lalerg_optax as lo
      >>> tx = lo.scale_by_macro_rate(audit_every=2)
      >>> updates = jnp.array([1.0])
      >>> state = tx.init(updates)
      >>> for loss in (8.0, 8.0, 8.0, 8.0, 4.0, 4.0):
      ...     _, state = tx.update(updates, state, value=loss)
      >>> float(state.macro_rate)
      2.0

    References:
      The bold driver (Battiti, 1989), delta-bar-delta (Jacobs, 1988), the learning
      rate range test (Smith, 2017) and TCP's slow start (Jacobson, 1988) grow while
      all goes well and back off when not. Doubling and halving until a step is
      reasonable is how the No-U-Turn sampler starts (Hoffman and Gelman, 2014).
    """
    check_range("growth_factor", growth_factor, 1.0, float("inf"))
    check_range("backoff_factor", backoff_factor, 0.0, 1.0, low_open=True)
    check_range("slow_growth_factor", slow_growth_factor, 1.0, float("inf"))
    check_range(
        "good_alignment", good_alignment, 0.0, 1.0, low_open=True, high_open=True
    )
    check_range("audit_every", audit_every, 2, float("inf"))

    # without a search there is nothing to find
    unsearched = MacroScalars(is_searching=False, has_improved=True)

    def init_fn(params: optax.Params) -> ScaleByMacroRateState:
        del params
        return ScaleByMacroRateState(pack(MacroScalars() if search else unsearched))

    def observe(state: MacroScalars, loss: jax.Array) -> MacroScalars:
        """Adds a loss to the window (Welford's sums)."""
        count = optax.safe_increment(state.window_count)
        mean = state.window_mean + (loss - state.window_mean) / count
        square = (loss - state.window_mean) * (loss - mean)
        return state._replace(
            window_count=count,
            num_macro_steps=optax.safe_increment(state.num_macro_steps),
            window_mean=mean,
            window_sum_of_squares=jnp.minimum(
                state.window_sum_of_squares + square, LARGEST
            ),
        )

    def start_window(state: MacroScalars) -> MacroScalars:
        """Forgets the losses since the last audit."""
        return state._replace(
            window_count=jnp.zeros((), jnp.int32),
            window_mean=jnp.zeros((), jnp.float32),
            window_sum_of_squares=jnp.zeros((), jnp.float32),
        )

    def variance_of_mean(state: MacroScalars) -> jax.Array:
        n = jnp.maximum(state.window_count, 2).astype(jnp.float32)
        return state.window_sum_of_squares / ((n - 1.0) * n)

    def audit_window(state: MacroScalars) -> tuple[jax.Array, jax.Array]:
        """Returns whether the window was good, and whether it was bad."""
        variance = variance_of_mean(state) + state.last_window_variance
        margin = _STANDARD_ERRORS * jnp.sqrt(variance)
        rise = state.window_mean - state.last_window_mean
        is_known = state.num_windows > 0
        return is_known & (rise < -margin), is_known & (rise > margin)

    def audit_alignment(
        state: MacroScalars, alignment: jax.Array
    ) -> tuple[jax.Array, jax.Array, MacroScalars]:
        """Returns whether the audit was good, whether it was bad, and the state."""
        average = jnp.where(
            state.best_alignment > 0.0,
            _ALIGNMENT_DECAY * state.avg_alignment + (1 - _ALIGNMENT_DECAY) * alignment,
            alignment,
        )
        has_moved = alignment != 0.0
        average = jnp.where(has_moved, average, state.avg_alignment)
        best = jnp.maximum(state.best_alignment, average)
        is_good = average > good_alignment * best
        return (
            has_moved & is_good,
            has_moved & ~is_good,
            state._replace(avg_alignment=average, best_alignment=best),
        )

    def clipped(rate: jax.Array) -> jax.Array:
        return jnp.clip(rate, 1.0 / _MAX_RATE, _MAX_RATE)

    def leap(
        state: MacroScalars,
        boldness: jax.Array,
        is_good: jax.Array,
        is_bad: jax.Array,
        is_found: jax.Array,
    ) -> MacroScalars:
        """The search: leaps, until one was too far."""
        is_first = is_good & ~state.has_improved & ~is_found
        is_too_far = is_bad & state.has_improved
        depth = jnp.where(is_bad | state.has_failed, _DEEP, _FIRST)
        depth = jnp.where(is_too_far, _SHALLOW, depth)
        factor = jnp.where(
            is_bad | is_first, backoff_factor**depth, growth_factor**boldness
        )
        rate = clipped(state.macro_rate * jnp.where(is_found, 1.0, factor))
        # a good alignment has to be known, or nothing could be told from later ones
        is_ended = (is_too_far & (state.best_alignment > 0.0)) | is_found
        return state._replace(
            macro_rate=rate,
            macro_min_rate=jnp.where(is_ended, rate * _FLOOR, state.macro_min_rate),
            is_searching=~is_ended,
            has_improved=state.has_improved | is_good,
            # what a good alignment is, is learnt from down there
            avg_alignment=jnp.where(is_first, 0.0, state.avg_alignment),
            best_alignment=jnp.where(is_first, 0.0, state.best_alignment),
        )

    def steer(
        state: MacroScalars, tilt: jax.Array, is_best: jax.Array, is_worse: jax.Array
    ) -> MacroScalars:
        """After the search: small steps, by the loss and by where the slope leads."""
        power = jnp.where(is_best, _GAIN + tilt, jnp.minimum(tilt, 0.0))
        power = jnp.minimum(power, _BOLDEST)
        may_fall = True if anneal else is_worse
        power = jnp.maximum(power, jnp.where(may_fall, -1.0, 0.0))
        power = jnp.minimum(power, state.macro_growth * power)  # of growth alone
        share = state.window_count / jnp.maximum(state.num_macro_steps, 1)
        factor = slow_growth_factor ** (power * jnp.minimum(share / _SHARE, 1.0))
        return state._replace(
            macro_rate=clipped(state.macro_rate * factor),
            macro_growth=jnp.minimum(state.macro_growth * backoff_factor**-share, 1.0),
        )

    def cut(state: MacroScalars) -> MacroScalars:
        """A REVERT."""
        steps_since = state.num_macro_steps - state.last_macro_revert
        is_rare = ~state.is_searching & (steps_since >= _SHARE * state.num_macro_steps)
        depth = jnp.where(state.has_improved, _SHALLOW, _DEEP)
        depth = jnp.where(is_rare, 0.0, depth)
        floor = jnp.minimum(state.macro_rate, state.macro_min_rate)
        return start_window(state)._replace(
            macro_rate=jnp.maximum(state.macro_rate * backoff_factor**depth, floor),
            macro_growth=state.macro_growth
            * jnp.where(state.is_searching, 1.0, backoff_factor),
            last_macro_revert=state.num_macro_steps,
            has_failed=state.has_failed | ~state.has_improved,
        )

    def choose(pred: jax.Array, new: MacroScalars, old: MacroScalars) -> MacroScalars:
        return jax.tree.map(lambda n, o: jnp.where(pred, n, o), new, old)

    def learn(
        seen: MacroScalars, audit: Audit | None, has_value: bool
    ) -> tuple[jax.Array, MacroScalars]:
        """Returns whether an audit is due, and what is known after it."""
        variance = variance_of_mean(seen)
        rise = seen.window_mean - seen.best_window_mean
        margin = _STANDARD_ERRORS * jnp.sqrt(variance + seen.best_window_variance)
        is_first = seen.num_windows == 0
        is_best = (is_first | (rise < 0.0)) & has_value
        is_worse = ~is_first & (rise > margin) & has_value
        if audit is not None:
            is_audited, is_found = audit.is_taken, jnp.zeros((), jnp.bool_)
            is_good, is_bad, audited = audit_alignment(seen, audit.alignment)
            average = audited.avg_alignment
            best = jnp.maximum(audited.best_alignment, jnp.abs(average))
            boldness = jnp.where(best > 0.0, average / best, 1.0)
        else:  # the loss is all that is known
            audited = seen
            is_audited = (seen.window_count >= audit_every) & has_value
            is_good, is_bad = audit_window(seen)
            is_found = is_good  # there is no way back from more than that
            blind = jnp.where(is_first, 0.0, _BLIND_LEAP)
            down = jnp.where(is_worse, -jnp.asarray(good_alignment), 0.0)
            boldness = jnp.where(seen.is_searching, blind, down)
        audited = choose(
            seen.is_searching,
            leap(audited, boldness, is_good, is_bad, is_found),
            steer(audited, boldness / good_alignment, is_best, is_worse),
        )
        best_mean, best_variance = seen.best_window_mean, seen.best_window_variance
        return is_audited, start_window(audited)._replace(
            last_window_mean=seen.window_mean,
            last_window_variance=variance,
            best_window_mean=jnp.where(is_best, seen.window_mean, best_mean),
            best_window_variance=jnp.where(is_best, variance, best_variance),
            num_windows=optax.safe_increment(seen.num_windows),
        )

    def update_fn(
        updates: optax.Updates,
        state: ScaleByMacroRateState,
        params: optax.Params | None = None,
        *,
        value: jax.typing.ArrayLike | None = MISSING,
        verdict: jax.Array | None = None,
        audit: Audit | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, ScaleByMacroRateState]:
        del params, extra_args
        check_state_type("scale_by_macro_rate", state, ScaleByMacroRateState)
        loss = as_loss(0.0 if value is None else value)
        is_open, updates = open_gate(updates, verdict, loss)
        is_reverted = jnp.zeros((), jnp.bool_)
        if verdict is not None:
            is_reverted = verdict == Verdict.REVERT

        last = unpack(MacroScalars, state.scalars)
        # A revert lasts two steps, and is one piece of news.
        is_news = is_reverted & ~last.is_reverting
        known = unsearched
        if search:
            # of a run whose search was off so far
            is_begun = last.num_macro_steps > 0
            last = last._replace(
                is_searching=last.is_searching | ~is_begun,
                has_improved=last.has_improved & is_begun,
            )
            seen = observe(last, jnp.clip(loss, -_LARGEST_LOSS, _LARGEST_LOSS))
            is_audited, audited = learn(seen, audit, value is not None)
            known = choose(is_open, choose(is_audited, audited, seen), last)
            known = choose(is_news, cut(last), known)
        known = known._replace(
            is_reverting=is_reverted,
            num_macro_held=count_if(~is_open, last.num_macro_held),
        )
        new_state = ScaleByMacroRateState(pack(known))
        rate = new_state.macro_rate
        scaled = jax.tree.map(lambda u: (rate * u).astype(u.dtype), updates)
        return scaled, new_state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
