"""Programs of the kinds that researchers write: no worse than the usual optimizer.

They are those of ``benchmarks/program_zoo.py``, a quarter as long and with fewer seeds;
``benchmarks/programs.py`` measures all of each.
"""

import functools

import jax
import numpy as np
import pytest
from helpers.benchmarks import benchmark
from helpers.quick import some

zoo, programs = benchmark("program_zoo"), benchmark("programs")
USUAL, LALERG, REGULATED = "usual", "lalerg", "error_regulate"
LOW, HIGH = 1e-3, 1e3  # factors of the usual rate
FACTORS = {USUAL: (LOW, 1.0), LALERG: (LOW, HIGH), REGULATED: (1.0,)}
NUM_SEEDS, SHORTEST = 2, 200
WORSE = 5.0  # at most, in % of the drop of the usual optimizer

QUICK = ("ELBO", "least squares")
# On a full batch of stiff residuals the rate runs away, and on targets that move it
# keeps falling: docs/programs.md
NOT_FOUND = ("PINN", "DQN", "DQN, told")
FOUND = [name for name in zoo.MAKERS if name not in NOT_FOUND]


@pytest.fixture(autouse=True)
def _programs_may_promote_ranks():
    with jax.numpy_rank_promotion("allow"):
        yield


@functools.cache
def runs(name, form):
    """Returns how all runs of a form ended, [factor of the usual rate, seed]."""
    program = zoo.made(name)
    num_steps = max(program.num_steps // 4, SHORTEST)
    how = {"factors": FACTORS[form], "side_by_side": False}
    return programs.runs(program, form, num_steps, NUM_SEEDS, **how)


def ends(name, form, factor=1.0):
    """Returns how the runs at a factor of the usual rate ended, by seed."""
    at = FACTORS[form].index(factor)
    return {k: x[at] for k, x in runs(name, form).items() if x is not None}


def excess(name, form, factor=1.0):
    """Returns how much higher losses end than the usual ones, in % of their drop."""
    usual, found = ends(name, USUAL), ends(name, form, factor)
    drop = np.mean(usual["start_loss"] - usual["loss"])
    assert drop > 0.0, "the usual optimizer has to learn something"
    return np.mean(100.0 * (found["loss"] - usual["loss"]) / drop)


@pytest.mark.parametrize("name", some(zoo.MAKERS, *QUICK), scope="module")
def test_protection_costs_nothing_where_nothing_is_wrong(name):
    protected = ends(name, REGULATED)
    assert protected["is_alive"].all()
    assert excess(name, REGULATED) <= 0.1
    assert not protected["num_skipped"].any()
    assert not protected["num_reverts"].any()


@pytest.mark.parametrize("name", some(FOUND, *QUICK), scope="module")
def test_a_rate_a_thousand_times_too_low_is_found(name):
    found = ends(name, LALERG, LOW)
    assert found["is_alive"].all()
    assert excess(name, LALERG, LOW) <= WORSE
    assert excess(name, USUAL, LOW) > 10.0 * WORSE, "it has to be too low"
    assert np.all(found["macro_rate"] > 30.0)


@pytest.mark.parametrize("name", some(FOUND, *QUICK), scope="module")
def test_a_rate_a_thousand_times_too_high_is_survived(name):
    found = ends(name, LALERG, HIGH)
    assert found["is_alive"].all()
    assert excess(name, LALERG, HIGH) <= WORSE
    assert np.all(found["macro_rate"] < 1.0)


@pytest.mark.slow
@pytest.mark.parametrize("name", NOT_FOUND)
@pytest.mark.parametrize("factor", [LOW, HIGH])
def test_where_no_good_rate_is_found_all_is_finite(name, factor):
    found = ends(name, LALERG, factor)
    assert found["is_alive"].all()
    assert np.isfinite(found["loss"]).all()


def test_a_program_says_where_its_rate_is_from():
    for name in zoo.MAKERS:
        program = zoo.made(name)
        assert program.about
        assert program.source
        assert program.metric
        assert program.sign in (-1, 1)
