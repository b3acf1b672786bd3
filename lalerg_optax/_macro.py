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
    no cosine is larger, it makes for the most careful steps: it takes an alignment
    clearly above a half for a leap, and noisy runs are steered to an alignment of 0.

    Args:
      state: a state of `scale_by_macro_rate`.
      num_steps: number of steps of the run so far; the more, the smaller the next ones.
    """
    known = unpack(MacroScalars, state.scalars)
    return ScaleByMacroRateState(
        pack(
            known._replace(
                phase=int(Phase.STEER),
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

    Inside ``error_regulate(..., audit=True)`` the regulator takes the audits. Each
    tells an alignment :math:`c_k` (of fresh gradients with the way back to the anchor,
    1 if they all point there) and its standard error :math:`\sigma_k`. What is known
    of the alignment is their average :math:`c`, by Kalman's filter: with the best
    alignment :math:`c^*` so far, :math:`q = (\max(c^*, |c|) / 4)^2` by which it may
    drift between two audits, and :math:`P` the variance,

    .. math::

        G = \frac{P + q}{P + 2 q + \sigma_k^2}, \qquad
        c \leftarrow c + G (c_k - c), \qquad P \leftarrow (1 - G) (P + q), \qquad
        \sigma^2 \leftarrow (1 - G)^2 \sigma^2 + G^2 \sigma_k^2

    so that crisp audits count nearly alone, and noisy ones together. One that is more
    than 2 standard errors from the average has :math:`G \ge 1/2`. :math:`c^*` is the
    largest :math:`c - \sigma`. An alignment of exactly 0 (params have not moved at
    all) changes nothing, and lets the search leap.

    =========  =====================  ===============================  =========
    phase      audit                  factor of the rate               next
    =========  =====================  ===============================  =========
    START      good                   :math:`backoff^2`                SEARCH
    RESTARTED  good                   :math:`backoff^4`                SEARCH
    both       bad                    :math:`backoff^4`                the same
    both       unclear                :math:`\sqrt{growth}`            SEARCH
    SEARCH     good                   :math:`growth^{\rho}`            SEARCH
    SEARCH     bad                    :math:`backoff`                  STEER
    SEARCH     bad, no best known     :math:`backoff^2`                STEER
    SEARCH     unclear, no best       :math:`\sqrt{growth}`            SEARCH
    SEARCH     unclear, best known,   :math:`growth^{\rho / 2}`         SEARCH
               :math:`c` good
    SEARCH     unclear otherwise, or  1                                STEER
               nothing is gained
    STEER      any                    :math:`slow\_growth^{w e}`       STEER
    both       an update did harm     :math:`backoff^4`                RESTARTED
    others     an update did harm     :math:`backoff`                  the same
    =========  =====================  ===============================  =========

    with :math:`\rho = c / \max(c^*, |c|)`; :math:`c` alone is good where it is above
    :math:`good\_alignment \cdot c^*`. An audit is *good* where :math:`c - 2 \sigma >
    good\_alignment \cdot c^*` (in START and RESTARTED 0), *bad* where :math:`c + 2
    \sigma` is not; or in SEARCH where the mean loss since the last audit is clearly
    above the lowest, half of the progress is undone, and it was less in the window
    before. What a good alignment is, is learnt anew from below after the first good
    audit, and the first window is the last one before that. *Nothing is gained* where
    there was clear progress, and the loss fell clearly less than 1 % of what it would
    at the pace so far: where it is at its floor, there is nothing to be had from a
    higher rate. In STEER an alignment clearly above half of the best is followed by a
    leap, as in SEARCH, while there is anything to gain.

    **STEER.** With :math:`n` the steps since the last audit, :math:`t` all accepted
    steps so far, and :math:`b = 1` if the mean loss of these :math:`n` steps is the
    lowest so far and not nothing was gained, else 0,

    .. math::

        e &= T e_{bold} + (1 - T) \, e_{careful}, \qquad
            w = \min(1, 8 n / t) \\
        e_{bold} &= \begin{cases}
            1/2 + (\rho + 0.05) / good\_alignment & b = 1 \\
            \min((\rho + 0.05) / good\_alignment, 0) & b = 0
        \end{cases}, \qquad e_{bold} \le 2 \\
        e_{careful} &= 2 \, (\rho + 0.2), \qquad |e_{careful}| \le 1 \\
        T &= \frac{(L_{first} - L_{best})^2}{(L_{first} - L_{best})^2 + 4 \, v}

    with :math:`\rho = c / \max(c^*, |c| + 2 \sigma)`, :math:`v` the variance of a loss
    within a window (average, decay 3/4) and the mean losses of the first and of the
    best window. :math:`e_{bold} \ge 0` unless ``anneal`` is set, the mean loss is
    clearly above the lowest (by 2 standard errors of the difference, from :math:`v`),
    or :math:`c + 2 \sigma < -c^*`; it is at least -1. So the rate grows while that
    pays, and stays where the steps swing across the valley. Where the noise of a loss
    is as large as all progress, the alignment alone decides. It is steered to a fifth
    of its best below zero, where it is at rates that are best with a schedule that
    falls: there the params go to and fro. With ``anneal`` :math:`e_{careful} = \rho -
    0.15` instead, and 0 stands in place of 0.05; in a run that was taken up by `adopt`,
    whose best was never seen, to 0. The weight :math:`w` makes this a matter of the
    relative length of the run. Where half of the progress is clearly undone (by 2
    standard errors of the difference), and the mean loss still rises, the rate is
    multiplied by ``backoff`` instead, and a search is over: one that comes down again
    is not helped by another cut. But if this audit and the average are good, the data
    are others: the lowest mean loss, and that of the first window, are this one from
    then on.

    A start that the regulator took back because it led too far is cut to lead a
    thousandth of the norm of the params.

    Alone, or with a regulator that takes no audits, one falls due every
    ``audit_every`` accepted steps and compares the mean loss of this window with that
    of the last one, the first window being only a mark: good if it fell by more than
    2 standard errors of the difference, bad if it rose by as much. While it does
    neither, :math:`\rho = 1/2`; the first good audit ends the search where it is,
    because there is no way back from a rate that is too bold. Afterwards :math:`T = 1`
    and :math:`\rho = -good\_alignment` where the mean loss is clearly above the lowest,
    and 0 elsewhere.

    A step that is not accepted, or alone one with a loss or an update that is not
    finite, gives a zero update and leaves rate and window as they were; harm empties
    the window. Losses are clipped to 1e16 in magnitude, :math:`r` to
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
    unsearched = MacroScalars(phase=int(Phase.STEER))

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
        loss = jnp.zeros((), jnp.float32) if value is None else as_loss(value)
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
            assert loss is not None
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
