"""The rule of the macro level, driven by audits that the tests make up."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import reference
from helpers.audits import Driver
from helpers.drive import drive, stay

import lalerg_optax as lo
from lalerg_optax._search_rule import Phase


@pytest.mark.parametrize("num_without_loss", [0, 100])
@pytest.mark.parametrize("anneal", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_made_up_audits_in_every_state_move_the_rate_as_in_the_reference(
    seed, anneal, num_without_loss
):
    rng = np.random.default_rng(seed)
    driver, macro = Driver(anneal=anneal), reference.MacroRate(anneal=anneal)
    phases = set()
    level = 8.0
    for step in range(500):
        if step % 125 == 0:  # audits of another kind
            mean, spread, error = rng.choice([-0.3, 0.0, 0.1, 0.5]), 0.2, rng.random()
        has_audit, harm = rng.random() < 0.25, rng.random() < 0.01
        alignment = float(np.float32(np.clip(rng.normal(mean, spread), -1.0, 1.0)))
        noise = float(np.float32(0.2 * error))
        level *= 1.01 if rng.random() < 0.3 else 0.99
        value = float(np.float32(level + rng.normal(0.0, 0.1)))
        value = None if step < num_without_loss else value
        length = float(np.float32(10.0 ** rng.uniform(-4.0, 0.0)))
        driver.tell(
            alignment if has_audit else None, value, noise, harm=harm, length=length
        )
        told = reference.Audit(alignment, noise, -length * alignment, length * noise)
        audit = told if has_audit else False
        macro.update(np.ones(1), np.ones(1), value, 0, audit, is_harmful=harm)
        phases.add(driver.phase)
        assert driver.phase == macro.phase, step
        np.testing.assert_allclose(driver.rate, macro.macro_rate, rtol=1e-3)
    assert {Phase.SEARCH, Phase.STEER} <= phases


@pytest.mark.parametrize("search", [False, True])
def test_macro_rate_alone_is_that_of_the_reference(search):
    rng = np.random.default_rng(0)
    num_runs, num_steps = 50, 140
    slopes = rng.choice([-0.1, -0.02, 0.0, 0.02], (num_runs, num_steps // 20))
    noise = rng.normal(0.0, 0.1, (num_runs, num_steps))
    losses = 10.0 + np.cumsum(slopes.repeat(20, axis=1), axis=1) + noise
    losses[rng.random(losses.shape) < 0.02] = np.nan
    losses = losses.astype(np.float32)
    chosen = {
        "search": search,
        "growth_factor": 3.0,
        "backoff_factor": 0.4,
        "slow_growth_factor": 1.3,
        "good_alignment": 0.4,
        "audit_every": 7,
    }
    fields = ("macro_rate", "phase", "num_windows")
    tx = lo.scale_by_macro_rate(**chosen)

    def see(step):
        return step.updates[0], *(getattr(step.state, name) for name in fields)

    def run(losses):
        signals = losses, jnp.ones((num_steps, 2))
        return drive(tx, jnp.ones(2), signals, see=see, apply_updates=stay)[2]

    all_seen = np.stack(jax.jit(jax.vmap(run))(losses), -1)
    for seen, run_losses in zip(all_seen, losses, strict=True):
        macro = reference.MacroRate(**chosen)
        expected = []
        for loss in run_losses:
            scaled = macro.update(np.ones(2), np.ones(2), float(loss))
            expected.append([scaled[0], *(getattr(macro, name) for name in fields)])
        np.testing.assert_allclose(seen, expected, rtol=1e-5)


def test_a_loss_that_comes_late_finds_a_rate_too():
    rates = []
    for num_before in (0, 40):
        driver = Driver()
        for _ in range(num_before):
            driver.tell_alone(None)
        assert driver.rate == 1.0
        for i in range(100):
            driver.tell_alone(5.0 - 0.02 * i)
        rates.append(driver.rate)
    assert rates[0] > 1.5
    assert rates[1] > 1.5, "steps without a loss are no losses of zero"
