"""Eight CPU devices for all tests; rank promotion is an error; the same examples.

Programs are compiled once for all workers and the processes that tests start.
"""

import atexit
import gc
import math
import os
import pathlib
import shutil
import tempfile
import time

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
# Most programs are small, and far more time goes into compiling than into running them.
# What LLVM makes of them is left as it is; HLO, buffers and collectives are the same.
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = os.environ.get(
    "JAX_DISABLE_MOST_OPTIMIZATIONS", "1"
)

import jax
import pytest
from helpers.quick import mark_the_rest
from hypothesis import settings

jax.config.update("jax_numpy_rank_promotion", "raise")

IS_QUICK = os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] == "1"
CACHE = "JAX_COMPILATION_CACHE_DIR"
if CACHE not in os.environ:  # what is set here is for workers and other processes
    os.environ[CACHE] = tempfile.mkdtemp()
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
    atexit.register(shutil.rmtree, os.environ[CACHE], ignore_errors=True)
jax.config.update("jax_compilation_cache_dir", os.environ[CACHE])

TIME_IS_UP = float(os.environ.get("TESTS_UNTIL", "inf"))  # in seconds of time.time()

# The same examples on every machine and day; a hundred times as many of them with
# pytest tests/contract/test_properties.py --hypothesis-profile=slow
settings.register_profile("quick", max_examples=30, deadline=None, derandomize=True)
settings.register_profile(
    "slow", parent=settings.get_profile("quick"), max_examples=3000
)
settings.load_profile("quick")


@pytest.hookimpl(tryfirst=True)  # before the slow ones are left out
def pytest_collection_modifyitems(items):
    mark_the_rest(items)
    if math.isfinite(TIME_IS_UP) and items:  # what is left out is not always the same
        first = int(TIME_IS_UP) % len(items)
        items[:] = items[first:] + items[:first]


def pytest_runtest_setup(item):
    if time.time() > TIME_IS_UP:
        pytest.skip("the time is up: TESTS_UNTIL")
    is_quick = IS_QUICK and item.get_closest_marker("optimized") is None
    jax.config.update("jax_disable_most_optimizations", is_quick)


CLIENTS = pathlib.Path(__file__).parent / "clients"


@pytest.fixture(scope="module", autouse=True)
def _what_other_packages_do_is_theirs(request):
    """They may promote ranks."""
    is_theirs = request.path.parent == CLIENTS
    with jax.numpy_rank_promotion("allow" if is_theirs else "raise"):
        yield


MAPPINGS = pathlib.Path("/proc/self/maps")
MANY_MAPPINGS = 30_000  # of the 65,530 that Linux allows a process


@pytest.fixture(autouse=True, scope="module")
def few_mappings():
    """Drops compiled programs before a process has more mappings than it may.

    Each program takes a few, and LLVM ends the process where it gets no more.
    """
    yield
    if MAPPINGS.exists() and MAPPINGS.read_bytes().count(b"\n") > MANY_MAPPINGS:
        jax.clear_caches()
        gc.collect()
