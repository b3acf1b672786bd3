"""Macro level: one rate for all parameters, from how the loss does over many steps."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ._checks import MISSING, as_loss, check_range, check_state_type
from ._gate import open_gate
from ._scalars import Scalars, count_if, pack, read, unpack
from ._search import MacroScalars, Phase, SearchRule, choose, harm, observe, step
from ._verdict import Audit


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
        if name == "is_searching":
            return self.phase < Phase.STEER
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
                phase=jnp.int32(Phase.STEER),
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

    rule = SearchRule(
        anneal=anneal,
        growth_factor=growth_factor,
        slow_growth_factor=slow_growth_factor,
        backoff_factor=backoff_factor,
        good_alignment=good_alignment,
        audit_every=audit_every,
    )
    # without a search there is nothing to find
    unsearched = MacroScalars(phase=jnp.int32(Phase.STEER))

    def init_fn(params: optax.Params) -> ScaleByMacroRateState:
        del params
        return ScaleByMacroRateState(pack(MacroScalars() if search else unsearched))

    def update_fn(
        updates: optax.Updates,
        state: ScaleByMacroRateState,
        params: optax.Params | None = None,
        *,
        value: jax.typing.ArrayLike | None = MISSING,
        verdict: jax.Array | None = None,
        audit: Audit | None = None,
        is_harmful: jax.Array | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, ScaleByMacroRateState]:
        del params, extra_args
        check_state_type("scale_by_macro_rate", state, ScaleByMacroRateState)
        loss = as_loss(0.0 if value is None else value)
        is_open, updates = open_gate(updates, verdict, loss)

        last = unpack(MacroScalars, state.scalars)
        known = unsearched
        if search:
            # of a run whose search was off so far
            is_begun = last.num_macro_steps > 0
            phase = jnp.where(is_begun, last.phase, Phase.START).astype(jnp.int32)
            last = last._replace(phase=phase)
            if is_harmful is not None:
                last = choose(is_harmful, harm(last, audit, rule), last)
            taken = step(observe(last, loss), audit, rule, has_value=value is not None)
            known = choose(is_open, taken, last)
        known = known._replace(
            num_macro_held=count_if(~is_open, state.num_macro_held),
        )
        new_state = ScaleByMacroRateState(pack(known))
        rate = new_state.macro_rate
        scaled = jax.tree.map(lambda u: (rate * u).astype(u.dtype), updates)
        return scaled, new_state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
