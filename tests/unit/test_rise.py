"""By how much the loss rises on the way from the anchor to the params, and may."""

import jax.numpy as jnp
import numpy as np
import pytest

from lalerg_optax._rise import averaged, room_left
from lalerg_optax._search_rule import MacroScalars, Phase, SearchRule
from lalerg_optax._verdict import Audit

# 16 of 400 steps since the last audit; the loss fell from 3 to 1, and varies by 0.25
KNOWN = MacroScalars(
    macro_rate=jnp.float32(0.5),
    avg_rise=jnp.float32(0.4),
    avg_rise_error=jnp.float32(0.0),
    avg_loss=jnp.float32(1.0),
    start_loss=jnp.float32(2.5),
    first_window_mean=jnp.float32(3.0),
    loss_variance=jnp.float32(0.0625),
    window_count=jnp.int32(16),
    num_macro_steps=jnp.int32(400),
    phase=jnp.int32(Phase.STEER),
)
SHARE, PROGRESS, DEVIATION, RISE = 16 / 400, 2.0, 0.25, 0.4 * 0.5**2


def room_of(anneal=False, **known):
    known = {name: jnp.float32(value) for name, value in known.items()}
    return float(room_left(KNOWN._replace(**known), SearchRule(anneal=anneal)))


def octaves(allowed, rise=RISE):
    return float(np.clip(0.5 * np.log2(allowed / rise), -4.0, 2.0))


def test_room_is_by_how_many_octaves_the_rise_is_below_what_progress_and_noise_allow():
    allowed = 0.7 * SHARE**0.5 * (PROGRESS * DEVIATION) ** 0.5
    np.testing.assert_allclose(room_of(), octaves(allowed), atol=1e-5)
    # twice the rate has four times the rise: an octave less room
    np.testing.assert_allclose(room_of() - room_of(macro_rate=1.0), 1.0, atol=1e-5)
    uncertain = RISE + 0.5 * 0.4 * 0.5**2
    np.testing.assert_allclose(
        room_of(avg_rise_error=0.4), octaves(allowed, uncertain), atol=1e-5
    )


@pytest.mark.parametrize(
    ("deviation", "counted"), [(1e-3, 0.01 * PROGRESS), (50.0, 3.0 * PROGRESS)]
)
def test_noise_counts_for_at_least_a_hundredth_and_at_most_three_times_the_progress(
    deviation, counted
):
    allowed = 0.7 * SHARE**0.5 * (PROGRESS * counted) ** 0.5
    wanted = octaves(allowed)
    found = room_of(loss_variance=deviation**2)
    if deviation > PROGRESS:  # progress is then not clear, either
        assert found >= wanted - 1e-5
    else:
        np.testing.assert_allclose(found, wanted, atol=1e-5)


@pytest.mark.parametrize("deviation", [DEVIATION, 1e-3, 0.0])
def test_without_a_schedule_a_rise_falls_with_the_run_and_needs_noise(deviation):
    counted = max(deviation, 0.01 * PROGRESS)
    mean = (PROGRESS * counted) ** 0.5
    allowed = 2.0 * SHARE * min(mean, 10.0 * deviation)
    found = room_of(anneal=True, loss_variance=deviation**2)
    np.testing.assert_allclose(found, octaves(max(allowed, 1e-30)), atol=1e-5)


def test_a_way_that_clearly_leads_downhill_leaves_an_octave_and_its_error_does_not():
    far = {"loss_variance": 1e-6, "macro_rate": 100.0}
    assert room_of(avg_rise=-0.4, avg_rise_error=0.1, **far) == 1.0
    assert room_of(avg_rise=-0.2, avg_rise_error=0.1, **far) == -4.0


@pytest.mark.parametrize(("phase", "weight"), [(Phase.STEER, 0.16), (Phase.SEARCH, 1)])
def test_rises_are_averaged_in_units_of_the_squared_rate_once_the_rate_is_found(
    phase, weight
):
    known = KNOWN._replace(
        phase=jnp.int32(phase), num_windows=jnp.int32(7), window_mean=jnp.float32(0.5)
    )
    audit = Audit(*(jnp.float32(0.0) for _ in Audit._fields))
    audit = audit._replace(rise=jnp.float32(0.3), rise_error=jnp.float32(0.1))
    found = averaged(known, audit, SearchRule())
    rise = 0.4 + weight * (0.3 / 0.5**2 - 0.4)
    np.testing.assert_allclose(found.avg_rise, rise, rtol=1e-5)
    np.testing.assert_allclose(found.avg_rise_error, weight * 0.1 / 0.5**2, rtol=1e-5)
    np.testing.assert_allclose(found.avg_loss, 1.0 - weight * 0.5, rtol=1e-5)
