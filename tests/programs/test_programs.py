"""Programs of the kinds that researchers write: no worse than the usual optimizer.

They are those of ``benchmarks/program_zoo.py``, shorter and with fewer seeds;
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
FACTORS = {USUAL: (1e-3, 1.0, 1e3), LALERG: (1e-3, 1e3), REGULATED: (1.0,)}
NUM_SEEDS = 2


@pytest.fixture(autouse=True)
def _programs_may_promote_ranks():
    with jax.numpy_rank_promotion("allow"):
        yield


@functools.cache
def runs(name, form):
    """Returns how all runs of a form ended, [factor of the usual rate, seed]."""
    program = zoo.made(name)
    num_steps = max(program.num_steps // 4, 200)
    how = {"factors": FACTORS[form], "side_by_side": False}
    return programs.runs(program, form, num_steps, NUM_SEEDS, **how)


def ends(name, form, factor=1.0):
    """Returns how the runs at one factor ended, by seed."""
    at = FACTORS[form].index(factor)
    return {k: x[at] for k, x in runs(name, form).items() if x is not None}


@pytest.mark.parametrize("name", ["ELBO"])
@pytest.mark.parametrize("form", FACTORS)
def test_runs(name, form):
    print(name, form, runs(name, form))
