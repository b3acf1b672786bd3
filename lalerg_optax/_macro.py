"""Macro level: one rate for all parameters, from the loss over many steps."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from ._checks import MISSING, as_loss, check_range, check_state_type, given
from ._gate import open_gate
from ._mapped import mapped_axes, spread
from ._numbers import LARGEST
from ._scalars import Scalars, count_if, pack, read, unpack
from ._search import harm, step
from ._search_rule import MacroScalars, Phase, SearchRule
from ._verdict import Audit
from ._warm_up import without_growth
from ._windows import choose, observe


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


def with_rate_found(
    state: ScaleByMacroRateState, num_steps: jax.typing.ArrayLike
) -> ScaleByMacroRateState:
    """Returns the state as it would be had the search ended at this rate.

    The alignment at smaller rates and the loss at the start were never seen. The best
    alignment is taken to be 1, the largest cosine: an alignment clearly above a half
    causes a leap, and otherwise the loss alone steers. The schedule is trusted, also
    where it goes on growing.

    Args:
      state: a state of `scale_by_macro_rate`.
      num_steps: number of steps of the run so far; the more, the smaller the next
        changes of the rate.
    """
    known = unpack(MacroScalars, state.scalars)
    return ScaleByMacroRateState(
        pack(
            known._replace(
                phase=int(Phase.STEER),
                best_alignment=1.0,
                top_rate=LARGEST,
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
    r"""Scales all updates by one rate that it searches for (first level).

    Args:
      search: whether to look for the rate; if False, it is 1.
      anneal: whether the rate keeps falling, as the run gets longer. Leave that to a
        schedule that decays; `lalerg` sets it where there is no schedule.
      growth_factor: largest leap of the search, at least 1.
      slow_growth_factor: unit of the steps once the search is over, at least 1.
      backoff_factor: cut, in (0, 1].
      good_alignment: threshold of a good one, as a share of the best, in (0, 1).
      audit_every: accepted steps in a window when used alone, at least 2.

    Returns:
      An ``optax.GradientTransformationExtraArgs`` whose ``update`` takes the
      keyword ``value``, a scalar loss or None. With None and without a regulator
      the rate stays as it is. Updates keep their dtypes.

    Raises:
      ValueError: for a hyperparameter outside its range.

    Example:
      >>> import jax.numpy as jnp, lalerg_optax as lo
      >>> tx = lo.scale_by_macro_rate(audit_every=2)
      >>> updates = jnp.array([1.0])
      >>> state = tx.init(updates)
      >>> for loss in (8.0, 8.0, 8.0, 8.0, 4.0, 4.0):
      ...     _, state = tx.update(updates, state, value=loss)
      >>> float(state.macro_rate)
      2.0

    Inside `error_regulate` with ``audit=True``, every few steps fresh gradients show
    the alignment :math:`c` with the way back to the anchor, and its standard error.
    With :math:`c^*` the best so far, let

    .. math::

        \rho = \frac{c}{\max(c^*, |c|)}

    The rate :math:`r` leaps up. Once a leap was too far, it is steered to where the
    loss rises, on the way from the anchor to the params, by as much as progress and
    noise allow:

    .. math::

        r \leftarrow growth^{\rho} \; r \quad \text{(search)}, \qquad
        r \leftarrow slow\_growth^{\,w e} \; r \quad \text{(found)}

    From then on a schedule that grows, a warm-up, does not raise the product of both.
    All phases and equations: ``docs/algorithm.md``. Used alone, it compares the mean
    losses of windows. A step that is not accepted gives a zero update.

    References:
      The bold driver (Battiti, 1989), delta-bar-delta (Jacobs, 1988), the learning rate
      range test (Smith, 2017) and TCP's slow start (Jacobson, 1988).
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
        scalars = pack(MacroScalars() if search else unsearched)
        return ScaleByMacroRateState(spread(scalars, mapped_axes(params)))

    def update_fn(
        updates: optax.Updates,
        state: ScaleByMacroRateState,
        params: optax.Params | None = None,
        *surplus: Any,
        value: jax.typing.ArrayLike | None = MISSING,
        verdict: jax.Array | None = None,
        audit: Audit | None = None,
        is_harmful: jax.Array | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, ScaleByMacroRateState]:
        del params
        value = given(value, surplus, extra_args)
        check_state_type("scale_by_macro_rate", state, ScaleByMacroRateState)
        loss = jnp.zeros((), jnp.float32) if value is None else as_loss(value)
        loss = lax.stop_gradient(loss)
        is_open, updates = open_gate(updates, verdict, loss)

        last = unpack(MacroScalars, state.scalars)
        known = unsearched
        if search:
            # of a run whose search was off so far
            is_begun = last.num_macro_steps > 0
            phase = jnp.where(is_begun, last.phase, Phase.START).astype(jnp.int32)
            last = last._replace(phase=phase)
            if audit is not None:
                last = without_growth(last, audit.base_rate, rule)
            if is_harmful is not None:
                last = choose(is_harmful, harm(last, audit, rule), last)
            seen = observe(last, None if value is None else loss)
            taken = step(seen, audit, rule, has_value=value is not None)
            known = choose(is_open, taken, last)
        known = known._replace(
            num_macro_held=count_if(~is_open, state.num_macro_held),
        )
        new_state = ScaleByMacroRateState(pack(known))
        rate = new_state.macro_rate
        scaled = jax.tree.map(lambda u: (rate * u).astype(u.dtype), updates)
        return scaled, new_state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
