"""The contract tests that Optax ships for its own optimizers, run on ours.

The wheel's ``optax/contrib/_common_test.py`` runs every test on the rows of a table,
and looks the factory of a row up by name in ``optax.contrib``. Here the module is
loaded once for each of our factories, with a table of one row and a stand-in for
``optax.contrib``. The name in the row is "momo" throughout: to the optimizer of that
name, the module hands the loss.
"""

import functools
import importlib.util
import types
from unittest import mock

import jax
import optax
import optax.contrib
import pytest
from absl.testing import parameterized
from helpers.forms import flat

import lalerg_optax as lo

NAME_THAT_GETS_THE_LOSS = "momo"


def with_jitted_update(factory):
    """Returns the factory with ``update`` under ``jax.jit``.

    Some of the tests call ``update`` by itself, where JAX compiles the branches of
    every conditional anew at every call.
    """

    @functools.wraps(factory)
    def jitted_factory(*args, **kwargs):
        init, update = factory(*args, **kwargs)
        return optax.GradientTransformationExtraArgs(init, jax.jit(update))

    return jitted_factory


def contract_tests(factory, opt_kwargs, wrapper=None, wrapper_kwargs=None):
    """Returns Optax's test class with one row in its table: ``factory``, wrapped."""
    row = {
        "opt_name": NAME_THAT_GETS_THE_LOSS,
        "opt_kwargs": opt_kwargs,
        "wrapper_name": wrapper and wrapper.__name__,
        "wrapper_kwargs": wrapper_kwargs,
    }
    product = parameterized.product

    def product_over_our_row(table, **grid):
        assert {"opt_name", "opt_kwargs"} <= set(table[0])
        return product([row], **grid)

    spec = importlib.util.find_spec("optax.contrib._common_test")
    module = importlib.util.module_from_spec(spec)
    with mock.patch.object(parameterized, "product", product_over_our_row):
        spec.loader.exec_module(module)
    factories = {NAME_THAT_GETS_THE_LOSS: with_jitted_update(factory)}
    if wrapper is not None:
        factories[wrapper.__name__] = with_jitted_update(wrapper)
    module.contrib = types.SimpleNamespace(**factories)
    return module.ContribTest


def micro_level(learning_rate: optax.ScalarOrSchedule):
    return optax.chain(
        lo.scale_by_micro_rate(), optax.scale_by_learning_rate(learning_rate)
    )


def macro_level(learning_rate: optax.ScalarOrSchedule):
    return optax.chain(
        lo.scale_by_macro_rate(search=False),
        optax.scale_by_learning_rate(learning_rate),
    )


def flat_form(learning_rate: optax.ScalarOrSchedule):
    return flat(learning_rate)


class TestLalerg(contract_tests(lo.lalerg, {"learning_rate": 1e-2})):
    pass


@pytest.mark.slow
class TestErrorRegulate(
    contract_tests(
        optax.sgd,
        {"learning_rate": 1e-3},
        wrapper=lo.error_regulate,
        wrapper_kwargs={"threshold": 6.0},
    )
):
    pass


@pytest.mark.slow
class TestFlatForm(contract_tests(flat_form, {"learning_rate": 1e-2})):
    pass


@pytest.mark.slow
class TestMicroLevel(contract_tests(micro_level, {"learning_rate": 1e-2})):
    pass


@pytest.mark.slow
class TestMacroLevel(contract_tests(macro_level, {"learning_rate": 1e-3})):
    pass
