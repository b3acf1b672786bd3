"""Macro level: one rate for all parameters, from how the loss does over many steps."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ._anchor import Audit
from ._checks import as_loss, check_range
from ._gate import count_if, open_gate
from ._judge import Verdict
from ._scalars import Scalars, pack, read, unpack

_MAX_RATE = 2.0**40
_ALIGNMENT_DECAY = 0.5
_STANDARD_ERRORS = 2.0
_LARGEST_LOSS = 1e16  # its square, times the length of a window, is a float32


class MacroScalars(NamedTuple):
    """What the macro level knows.

    Attributes:
      macro_rate: factor of the updates, in [2^-40, 2^40], float32.
      macro_min_rate: what a cut may not undershoot, float32.
      macro_max_rate: what growth may not exceed, float32.
      is_searching: whether the rate still grows by leaps, bool.
      has_improved: whether an audit was ever good, bool.
      is_reverting: whether the last verdict was REVERT, bool.
      avg_alignment: exponential average of the alignment of audits, float32.
      best_alignment: the largest ``avg_alignment``, float32.
      window_mean: mean of the losses accepted since the last audit, float32.
      window_sum_of_squares: of their deviations from that mean, float32.
      last_window_mean: the mean of the window before, float32.
      last_window_variance: the variance of that mean, float32.
      best_window_mean: the lowest mean of a whole window, float32.
      window_count: number of losses in the window, int32.
      num_windows: number of windows that are complete, int32.
      num_macro_held: number of steps that left the rate as it was because the
        verdict or a number that is not finite said so, int32.
    """

    macro_rate: Any = 1.0
    macro_min_rate: Any = 1.0 / _MAX_RATE
    macro_max_rate: Any = _MAX_RATE
    is_searching: Any = True
    has_improved: Any = False
    is_reverting: Any = False
    avg_alignment: Any = 0.0
    best_alignment: Any = 0.0
    window_mean: Any = 0.0
    window_sum_of_squares: Any = 0.0
    last_window_mean: Any = 0.0
    last_window_variance: Any = 0.0
    best_window_mean: Any = 0.0
    window_count: Any = 0
    num_windows: Any = 0
    num_macro_held: Any = 0


class ScaleByMacroRateState(NamedTuple):
    """State of `scale_by_macro_rate`.

    The scalars can be read by name: ``state.macro_rate``, ``state.is_searching``, ...

    Attributes:
      scalars: what the macro level knows; see `MacroScalars`.
    """

    scalars: Scalars

    def __getattr__(self, name: str) -> jax.Array:
        return read(MacroScalars, self.scalars, name)


def scale_by_macro_rate(
    *,
    search: bool = True,
    growth_factor: jax.typing.ArrayLike = 2.0,
    backoff_factor: jax.typing.ArrayLike = 0.5,
    slow_growth_factor: jax.typing.ArrayLike = 1.05,
    max_slow_growth: jax.typing.ArrayLike = 8.0,
    good_alignment: jax.typing.ArrayLike = 0.25,
    audit_every: jax.typing.ArrayLike = 16,
) -> optax.GradientTransformationExtraArgs:
    r"""Scales all updates by one rate that follows how the loss does (first level).

    The rate :math:`r` is a number without unit that starts at 1 and multiplies the
    updates: chain ``optax.scale_by_learning_rate(learning_rate)`` behind it. From
    time to time an *audit* tells whether the steps since the last one were good, and
    before the update of that step is scaled

    .. math::

        r \leftarrow \begin{cases}
            \min(growth \cdot r,\; r_{max}) & \text{the search goes on} \\
            \min(slow\_growth \cdot r,\; r_{max})
                & \text{search is over, mean loss of the window is the best so far} \\
            \max(r / slow\_growth,\; r_{min})
                & \text{search is over, no new best, and } c < 0 \\
            \max(backoff \cdot r,\; r_{min})
                & \text{bad while searching, or a REVERT} \\
            \max(backoff^4 \cdot r,\; r_{min})
                & \text{the same before any good audit}
        \end{cases}

    A bad audit after a good one ends the search; from then on the new rate bounds all
    others, :math:`r_{min} = r / max\_slow\_growth` and
    :math:`r_{max} = max\_slow\_growth \cdot r`. Before, the bounds are 2^-40 and 2^40.
    A REVERT counts once for its two steps, and never ends the search.
    The cut before a good audit is deep because what a good audit looks like is learnt
    from below.

    Inside ``error_regulate(..., audit=True)`` the regulator takes the audits. With
    :math:`c` the average (decay 0.5, from the first one on) of the alignments that it
    reports (the cosine between a fresh gradient and the way back to the anchor), an
    audit is good while :math:`c > good\_alignment \cdot \max c`, and bad otherwise. An
    alignment of exactly 0 (params have not moved at all) is neither. Bad before any
    good one is a REVERT.

    Alone, or with a regulator that takes no audits, one falls due every
    ``audit_every`` accepted steps and compares the mean loss of this window with that
    of the last one, the first window being only a mark: good if it fell by more than
    2 standard errors of the difference, bad if it rose by as much. While it does
    neither, the rate grows; the first good audit ends the search, because there is
    no way back from a rate that is too bold.

    A step that is not accepted, or alone one with a loss or an update that is not
    finite, gives a zero update; a SKIP leaves rate and window as they were, a REVERT
    empties the window. Losses are clipped to 1e16 in magnitude. With
    ``search=False``, :math:`r_{min} = r_{max} = 1`: what is left is the regulator's
    damping.

    Args:
      search: whether to look for the rate; if False, it is 1.
      growth_factor: leap of the search, at least 1.
      backoff_factor: cut, in (0, 1].
      slow_growth_factor: step up or down once the search is over, at least 1.
      max_slow_growth: bound of all such steps together, at least 1.
      good_alignment: what counts as good, as a share of the best, in [0, 1).
      audit_every: accepted steps in a window when standing alone, at least 2.

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
    check_range("max_slow_growth", max_slow_growth, 1.0, float("inf"))
    check_range("good_alignment", good_alignment, 0.0, 1.0, high_open=True)
    check_range("audit_every", audit_every, 2, float("inf"))

    def init_fn(params: optax.Params) -> ScaleByMacroRateState:
        del params
        bounds = () if search else (1.0, 1.0)
        known = MacroScalars(1.0, *bounds)._replace(
            is_searching=search, has_improved=not search
        )
        return ScaleByMacroRateState(pack(known))

    def observe(state: MacroScalars, loss: jax.Array) -> MacroScalars:
        """Adds a loss to the window (Welford's sums)."""
        count = state.window_count + 1
        mean = state.window_mean + (loss - state.window_mean) / count
        return state._replace(
            window_count=count,
            window_mean=mean,
            window_sum_of_squares=state.window_sum_of_squares
            + (loss - state.window_mean) * (loss - mean),
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
            state.has_improved,
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

    def adapt(
        state: MacroScalars,
        is_audited: jax.Array,
        is_good: jax.Array,
        is_bad: jax.Array,
        is_best: jax.Array,
        is_uphill: jax.Array,
        is_found: jax.Array,
        is_reverted: jax.Array,
    ) -> MacroScalars:
        """Applies the rule of the docstring."""
        rate, max_rate = state.macro_rate, state.macro_max_rate
        is_bad &= is_audited & state.is_searching
        leap = jnp.where(is_found, rate, jnp.minimum(rate * growth_factor, max_rate))
        crawl = jnp.minimum(rate * slow_growth_factor, max_rate)
        recede = jnp.maximum(rate / slow_growth_factor, state.macro_min_rate)
        slow = jnp.where(is_best, crawl, jnp.where(is_uphill, recede, rate))
        grown = jnp.where(state.is_searching, leap, slow)
        factor = jnp.where(state.has_improved, backoff_factor, backoff_factor**4)
        cut = jnp.maximum(rate * factor, state.macro_min_rate)
        new_rate = jnp.where(
            is_bad | is_reverted, cut, jnp.where(is_audited, grown, rate)
        )
        is_ended = is_audited & state.is_searching
        is_ended &= jnp.where(is_bad, state.has_improved, is_found)
        widest = jnp.minimum(new_rate * max_slow_growth, _MAX_RATE)
        return state._replace(
            macro_rate=new_rate,
            macro_min_rate=jnp.where(
                is_ended, new_rate / max_slow_growth, state.macro_min_rate
            ),
            macro_max_rate=jnp.where(is_ended, widest, max_rate),
            is_searching=state.is_searching & ~is_ended,
            has_improved=state.has_improved | (is_audited & is_good),
        )

    def update_fn(
        updates: optax.Updates,
        state: ScaleByMacroRateState,
        params: optax.Params | None = None,
        *,
        value: jax.typing.ArrayLike | None,
        verdict: jax.Array | None = None,
        audit: Audit | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, ScaleByMacroRateState]:
        del params, extra_args
        loss = as_loss(0.0 if value is None else value)
        is_open, updates = open_gate(updates, verdict, loss)
        is_reverted = jnp.zeros((), jnp.bool_)
        if verdict is not None:
            is_reverted = verdict == Verdict.REVERT

        last = unpack(MacroScalars, state.scalars)
        seen = observe(last, jnp.clip(loss, -_LARGEST_LOSS, _LARGEST_LOSS))
        is_known, is_found = jnp.ones((), jnp.bool_), jnp.zeros((), jnp.bool_)
        if audit is not None:
            is_audited = audit.is_taken & is_open
            is_good, is_bad, audited = audit_alignment(seen, audit.alignment)
        else:
            is_audited = is_open & (seen.window_count >= audit_every)
            if value is None:
                is_audited = jnp.zeros((), jnp.bool_)
            is_known = seen.num_windows > 0
            is_good, is_bad = audit_window(seen)
            is_found = is_good  # there is no way back from more than that
            audited = seen
        is_best = (seen.window_mean < seen.best_window_mean) | (seen.num_windows == 0)
        if value is None:
            is_best = jnp.zeros((), jnp.bool_)
        audited = start_window(audited)._replace(
            last_window_mean=seen.window_mean,
            last_window_variance=variance_of_mean(seen),
            best_window_mean=jnp.where(
                is_best, seen.window_mean, seen.best_window_mean
            ),
            num_windows=optax.safe_increment(seen.num_windows),
        )

        def choose(pred: jax.Array, new: Any, old: Any) -> Any:
            return jax.tree.map(lambda n, o: jnp.where(pred, n, o), new, old)

        # A revert lasts two steps, and is one piece of news.
        is_news = is_reverted & ~last.is_reverting
        held = choose(is_news, start_window(last), last)
        known = choose(is_audited, audited, choose(is_open, seen, held))
        known = adapt(
            known,
            is_audited & is_known,
            is_good,
            is_bad,
            is_best,
            audited.avg_alignment < 0.0,
            is_found,
            is_news,
        )._replace(
            is_reverting=is_reverted,
            num_macro_held=count_if(~is_open, last.num_macro_held),
        )
        new_state = ScaleByMacroRateState(pack(known))
        rate = new_state.macro_rate
        scaled = jax.tree.map(lambda u: (rate * u).astype(u.dtype), updates)
        return scaled, new_state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
