"""Packages that call an optimizer themselves, and real data for them."""

import functools
import importlib
import os
import warnings

import jax
import numpy as np
import pytest
from sklearn.datasets import load_breast_cancer, load_diabetes


def import_client(name):
    """Returns a package; without it the tests of the module are skipped.

    Unless LALERG_REQUIRE_CLIENTS is set, as where all of them ought to be there. What
    a package warns of when it is imported is not ours to mend; where it switches on
    double precision (NetKet), that is taken back for the other modules.
    """
    is_double = jax.config.jax_enable_x64
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if os.environ.get("LALERG_REQUIRE_CLIENTS"):
            package = importlib.import_module(name)
        else:
            package = pytest.importorskip(name)
    jax.config.update("jax_enable_x64", is_double)
    return package


def _standardised(x):
    return ((x - x.mean(axis=0)) / x.std(axis=0)).astype(np.float32)


@functools.cache
def diabetes():
    """Returns the features and the progression of 442 patients, standardised."""
    x, y = load_diabetes(return_X_y=True)
    return _standardised(x), _standardised(y)


@functools.cache
def breast_cancer():
    """Returns the features of 569 tumours, standardised, and 1 for a benign one."""
    x, y = load_breast_cancer(return_X_y=True)
    return _standardised(x), y.astype(np.float32)
