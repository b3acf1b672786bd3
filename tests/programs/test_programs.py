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

NUM_SEEDS = 2
QUICK = ("ELBO", "graph", "least squares")
EVERY = pytest.mark.parametrize("name", some(zoo.MAKERS, *QUICK), scope="module")


@pytest.fixture(autouse=True)
def _programs_may_promote_ranks():
    with jax.numpy_rank_promotion("allow"):
        yield


@functools.cache
def ends(name, form, factor=1.0):
    """Returns how the runs of a program ended, by seed."""
    program = zoo.made(name)
    num_steps = max(program.num_steps // 4, 200)
    found = programs.runs(program, form, num_steps, NUM_SEEDS, (factor,))
    return {name: x[0] for name, x in found.items() if x is not None}


def drop(name):
    """Returns by how much the usual optimizer lowers the loss."""
    found = ends(name, USUAL)
    return np.mean(found["start_loss"] - found["loss"])
