"""What the regulator hands to what it wraps, and the flat form."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from helpers.drive import Task, descend, drive, square, train
from helpers.judged import ACCEPT, BOUND, REVERT, SKIP, exceptions, make, verdicts_of
from helpers.spies import keeps

import lalerg_optax as lo


def handed(losses, grads):
    """Returns what is handed on at every step."""
    told = keeps("value", "verdict", "is_harmful")
    tx = lo.error_regulate(optax.chain(told, optax.sgd(1e-2)))
    *_, states = drive(tx, jnp.ones(8), (losses, grads), see=lambda step: step.state)
    return jax.tree.map(np.asarray, states.inner_state[0])


def test_inner_is_handed_verdicts_and_a_loss_that_is_always_usable():
    losses, grads = make(num_steps=60)
    losses[40], losses[50] = 1e6, np.nan
    told = handed(losses, grads)
    values = told["value"]
    assert np.all(np.isfinite(values))
    assert exceptions(told["verdict"]) == {40: BOUND, 50: SKIP}
    assert not np.any(told["is_harmful"])
    before = np.sort(losses[:40])
    # with the 95th percentile there, 6 spreads would be 1.5 times as wide as they were
    wider = 1.5 * (before[38] - before[19])
    np.testing.assert_allclose(values[40] - before[19], wider, rtol=1e-4)
    assert 0.9 < values[50] < 1.1, "the average"
    is_usual = np.delete(np.arange(60), [40, 50])
    np.testing.assert_array_equal(values[is_usual], losses[is_usual])


def test_inner_is_told_of_harm_once_at_the_step_that_shows_it():
    losses, grads = make(num_steps=60)
    losses[40:42] = 9.0
    told = handed(losses, grads)
    assert np.flatnonzero(told["is_harmful"]).tolist() == [43]
    assert told["verdict"][43] == ACCEPT


def test_flat_form_judges_the_loss_and_follows_a_schedule():
    losses, grads = make()
    losses[200] = 4.0
    losses[250:252] = 4.0
    schedule = optax.piecewise_constant_schedule(1e-4, {100: 30.0})
    tx = optax.chain(
        lo.scale_by_micro_rate(),
        optax.scale_by_learning_rate(schedule),
        lo.error_regulate(),
    )
    verdicts = verdicts_of(losses, grads, tx)
    # a leap of the rate is no error
    assert exceptions(verdicts) == {
        **{200: BOUND, 250: BOUND, 251: BOUND},  # one high loss was harmless before
    }


# ---- with an audit, with a loss that comes and goes ----------------------------------


def test_an_audit_alone_looks_and_changes_no_step_of_a_run_that_goes_well():
    start = jnp.array([3.0, -2.0, 1.0])
    runs = [
        descend(lo.error_regulate(optax.sgd(1e-3), audit=audit), start, 200)
        for audit in (False, True)
    ]
    (params, plain), (audited_params, audited) = runs
    np.testing.assert_array_equal(audited_params, params)
    assert audited.num_audits_passed > 5 > plain.num_audits_passed == 0
    np.testing.assert_allclose(audited.alignment, 1.0, rtol=1e-2)
    assert audited.num_accepted == plain.num_accepted == 200


def test_an_audit_alone_goes_back_from_a_start_that_led_too_far():
    start = jnp.array([3.0, -2.0, 1.0])
    tx = lo.error_regulate(optax.sgd(0.9), audit=True)
    *_, verdicts = train(tx, Task(start, square, jnp.zeros(12)), see=verdict_of)
    assert REVERT in verdicts.tolist()
    plain = lo.error_regulate(optax.sgd(0.9))
    *_, verdicts = train(plain, Task(start, square, jnp.zeros(12)), see=verdict_of)
    assert not np.any(verdicts)


def verdict_of(step):
    return step.state.verdict


def test_a_loss_that_comes_late_is_judged_from_then_on_and_by_losses_alone():
    losses, grads = make(num_steps=300)
    losses[250] = 5.0
    grads[60] *= 100.0
    tx, params = lo.error_regulate(optax.sgd(1e-3)), jnp.ones(8)
    params, state, before = drive(tx, params, (None, grads[:100]), see=verdict_of)
    assert exceptions(before) == {60: SKIP}
    assert state.history.num_values.tolist() == [0, 100]
    signals = losses[100:], grads[100:]
    params, state, after = drive(tx, params, signals, state, see=verdict_of)
    assert exceptions(after) == {150: BOUND}
    assert 0.9 < state.avg_value < 1.1
    assert state.history.start_value[0] > 0.5, "no zeros of the steps without a loss"
    *_, last = drive(tx, params, (None, grads[:50]), state, see=verdict_of)
    assert np.all(np.asarray(last) == ACCEPT)
