"""Bad hyperparameters and bad calls are refused with a message that helps."""

import functools
import inspect
import math
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lalerg_optax as lo

regulated_sgd = functools.partial(lo.error_regulate, optax.sgd(0.1))
flat_regulator = functools.partial(lo.error_regulate, None)
biased_micro = functools.partial(lo.scale_by_micro_rate, bias_correction=False)


@pytest.mark.parametrize("factory", [lo.lalerg, lo.scale_by_micro_rate])
@pytest.mark.parametrize(
    ("b2", "message"),
    [
        ((0.99, 0.9), "must not become smaller"),
        ((0.9, 1.0), r"\[0.0, 1.0\)"),
        ((-0.1, 0.9), r"\[0.0, 1.0\)"),
        ((0.9,), "a number or a pair"),
        ((0.9, 0.99, 0.999), "a number or a pair"),
        ((0.9, "0.99"), "must be a number"),
    ],
)
def test_a_pair_of_decays_has_to_grow_within_the_range(factory, b2, message):
    with pytest.raises(ValueError, match=message):
        factory(b2=b2)


# factory, hyperparameter, its range, good values at the edge, bad ones beyond it
RANGES = [
    (lo.lalerg, "learning_rate", "[0.0, inf)", [0.0, 100], [-1e-3]),
    (lo.lalerg, "b1", "[0.0, 1.0)", [0.0, 0, 0.999], [-0.1, 1.0, 1, 2.0, 1 - 1e-9]),
    (lo.lalerg, "b2", "[0.0, 1.0)", [0.0, 0.9999], [-0.1, 1.0, 1, 2.0]),
    (lo.lalerg, "eps", "[0.0, inf)", [0.0, 1], [-1e-8]),
    (lo.lalerg, "gradient_share", "[0.0, 1.0]", [0.0, 1, 0.5], [-0.1, 1.1, 2]),
    (lo.lalerg, "weight_decay", "[0.0, inf)", [0.0, 1], [-1e-4]),
    (lo.lalerg, "clip_norm", "(0.0, inf)", [1e-6, 1], [0.0, 0, -1.0, 1e39, 1e-60]),
    (lo.lalerg, "threshold", "(0.0, inf)", [1e-6, 6], [0.0, -6.0]),
    (lo.lalerg, "anchor_every", "[1, inf)", [1, 32.0], [0, -4, 0.5]),
    (lo.scale_by_micro_rate, "b1", "[0.0, 1.0)", [0.0, 0.999], [-0.1, 1.0, 1]),
    (lo.scale_by_micro_rate, "b2", "[0.0, 1.0)", [0.0, 0.999], [-0.1, 1.0, 1]),
    (lo.scale_by_micro_rate, "eps", "[0.0, inf)", [0.0, 1], [-1e-8]),
    (lo.scale_by_micro_rate, "eps_root", "[0.0, inf)", [0.0, 1], [-1e-8]),
    (lo.scale_by_micro_rate, "gradient_share", "[0.0, 1.0]", [0.0, 1.0], [-0.1, 2]),
    (lo.scale_by_micro_rate, "initial_scale", "[0.0, inf)", [0.0, 1], [-0.1]),
    (biased_micro, "b2", "[0.0, 1.0]", [0.0, 1, 1.0], [-0.1, 1.1, 2]),
    (lo.scale_by_macro_rate, "growth_factor", "[1.0, inf)", [1.0, 4], [0.9, 0, -2.0]),
    (lo.scale_by_macro_rate, "backoff_factor", "(0.0, 1.0]", [0.1, 1], [0.0, 1.1, 2]),
    (lo.scale_by_macro_rate, "slow_growth_factor", "[1.0, inf)", [1], [0.99, -1.0]),
    (lo.scale_by_macro_rate, "good_alignment", "(0.0, 1.0)", [0.1, 0.9], [0, -0.1, 1]),
    (lo.scale_by_macro_rate, "audit_every", "[2, inf)", [2, 16.0], [1, 0, -16]),
    *(
        (factory, *entry)
        for factory in (regulated_sgd, flat_regulator)
        for entry in [
            ("threshold", "(0.0, inf)", [1e-6, 6], [0.0, 0, -6.0]),
            ("progress_fraction", "[0.0, inf)", [0, 2.0], [-0.1]),
            ("patience", "[4, inf)", [4, 32.0], [3, 0, -1]),
            ("anchor_every", "[1, inf)", [1, 32.0], [0, -4]),
            ("backoff_factor", "(0.0, 1.0]", [0.1, 1], [0.0, 1.5, -0.5]),
            ("recovery_steps", "(0.0, inf)", [0.5, 64], [0, 0.0, -64]),
            ("clip_norm", "(0.0, inf)", [1e-6, 1], [0.0, 0, -1.0]),
        ]
    ),
]
# No hyperparameter has a NaN in its range, and none has infinity: a constant that
# is not finite is a slip, and gives 0 * inf sooner or later.
BAD = [
    (factory, name, interval, bad)
    for factory, name, interval, _, bads in RANGES
    for bad in (*bads, math.nan, -math.inf, math.inf)
]
GOOD = [
    (factory, name, good)
    for factory, name, _, goods, _ in RANGES
    for good in (*goods, jnp.asarray(goods[0], jnp.float32))
]


def factory_name(argument):
    if argument is regulated_sgd:
        return "error_regulate(sgd)"
    if argument is flat_regulator:
        return "error_regulate()"
    if argument is biased_micro:
        return "scale_by_micro_rate(biased)"
    return getattr(argument, "__name__", None)


@pytest.mark.parametrize(("factory", "name", "interval", "bad"), BAD, ids=factory_name)
def test_bad_hyperparameter_is_a_value_error_with_name_range_and_value(
    factory, name, interval, bad
):
    with pytest.raises(ValueError, match=rf"\b{name}\b") as error:
        factory(**{name: bad})
    message = str(error.value)
    assert interval in message
    assert re.search(rf"got {name} = {re.escape(str(bad))}\.$", message)


@pytest.mark.parametrize(("factory", "name", "good"), GOOD, ids=factory_name)
def test_hyperparameter_at_the_edge_of_its_range_works(factory, name, good):
    tx, params = factory(**{name: good}), jnp.array([1.0, -2.0])
    state = tx.init(params)
    updates, _ = tx.update(params, state, params, value=jnp.asarray(1.0))
    assert np.all(np.isfinite(updates))


@pytest.mark.parametrize(
    "factory",
    [lo.lalerg, lo.scale_by_micro_rate, lo.scale_by_macro_rate, lo.error_regulate],
)
def test_every_numeric_hyperparameter_stands_in_the_table(factory):
    tabled = {
        name
        for row, name, *_ in RANGES
        if row is factory or getattr(row, "func", None) is factory
    }
    unnumbered = {"inner", "mask", "micro", "search", "axis_name", "mu_dtype", "audit"}
    unnumbered |= {"average", "anneal", "anchor_dtype", "anchor_memory"}
    unnumbered |= {"bias_correction", "per_tensor", "local"}
    assert set(inspect.signature(factory).parameters) - unnumbered == tabled


@pytest.mark.parametrize("factory", [lo.lalerg, regulated_sgd, flat_regulator])
@pytest.mark.parametrize("bad", ["float16", jnp.int32, "complex64", "narrow", 3])
def test_anchor_dtype_that_could_not_hold_all_params_is_a_value_error(factory, bad):
    with pytest.raises(ValueError, match=re.escape(f"got anchor_dtype = {bad!r}.")):
        factory(anchor_dtype=bad)


@pytest.mark.parametrize("factory", [lo.lalerg, regulated_sgd, flat_regulator])
def test_anchor_memory_of_no_kind_is_a_value_error(factory):
    with pytest.raises(ValueError, match="must be 'device' or 'pinned_host', got"):
        factory(anchor_memory="disk")


def test_anchor_memory_that_the_backend_has_not_is_a_value_error(monkeypatch):
    class Memory:
        kind = "device"

    class Device:
        def addressable_memories(self):
            return [Memory()]

    monkeypatch.setattr(jax, "local_devices", lambda: [Device()])
    lo.lalerg(anchor_memory="device").init(jnp.ones(3))
    tx = lo.lalerg(anchor_memory="pinned_host")
    with pytest.raises(ValueError, match=r"the memories of the cpu backend are \['dev"):
        tx.init(jnp.ones(3))


def test_making_an_optimizer_does_not_start_the_devices():
    """``jax.distributed.initialize`` may come later than ``tx = lalerg()``."""
    make = (
        "import jax, lalerg_optax as lo;"
        "lo.lalerg(anchor_memory='pinned_host', anchor_dtype='bfloat16', clip_norm=1.);"
        "lo.error_regulate(); print('made'); jax.devices()"
    )
    run = subprocess.run(
        [sys.executable, "-c", make],
        env=os.environ | {"JAX_PLATFORMS": "nowhere"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.stdout == "made\n"
    assert "Unable to initialize backend 'nowhere'" in run.stderr


@pytest.mark.parametrize("size", [0, -1, 2.5])
def test_history_of_no_slots_is_a_value_error(size):
    with pytest.raises(ValueError, match=rf"size .* at least 1, got size = {size}\."):
        lo.LossHistory.empty(size=size)


def test_audit_in_the_flat_form_is_a_value_error():
    with pytest.raises(ValueError, match="audit needs the gradient"):
        lo.error_regulate(audit=True)


THAT_NEED_VALUE = {
    "lalerg": lo.lalerg(),
    "error_regulate(sgd)": lo.error_regulate(optax.sgd(0.1)),
    "error_regulate()": lo.error_regulate(),
    "scale_by_macro_rate": lo.scale_by_macro_rate(),
    "chain": optax.chain(optax.clip(1.0), lo.lalerg()),
}
THAT_NEED_PARAMS = [name for name in THAT_NEED_VALUE if name != "scale_by_macro_rate"]


@pytest.mark.parametrize("name", THAT_NEED_VALUE)
def test_forgotten_value_is_a_type_error_that_names_it(name):
    tx, params = THAT_NEED_VALUE[name], jnp.ones(3)
    with pytest.raises(TypeError, match="'value'"):
        tx.update(params, tx.init(params), params)


@pytest.mark.parametrize("name", THAT_NEED_VALUE)
def test_value_is_keyword_only(name):
    tx, params = THAT_NEED_VALUE[name], jnp.ones(3)
    with pytest.raises(TypeError, match=r"by name|positional"):
        tx.update(params, tx.init(params), params, jnp.asarray(1.0))


@pytest.mark.parametrize("name", THAT_NEED_VALUE)
@pytest.mark.parametrize("shape", [(1,), (4,), (2, 2)])
def test_per_example_value_is_a_value_error_that_gives_its_shape(name, shape):
    tx, params = THAT_NEED_VALUE[name], jnp.ones(3)
    with pytest.raises(ValueError, match=rf"value .*scalar.*{re.escape(str(shape))}"):
        tx.update(params, tx.init(params), params, value=jnp.ones(shape))


@pytest.mark.parametrize("name", THAT_NEED_PARAMS)
def test_missing_params_are_a_value_error(name):
    tx, params = THAT_NEED_VALUE[name], jnp.ones(3)
    with pytest.raises(ValueError, match="needs the params"):
        tx.update(params, tx.init(params), value=jnp.asarray(1.0))


@pytest.mark.parametrize("name", THAT_NEED_VALUE)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 3e38, None])
def test_bad_data_never_raises(name, bad):
    tx, params = THAT_NEED_VALUE[name], jnp.ones(3)
    updates, _ = tx.update(params, tx.init(params), params, value=bad)
    assert np.all(np.isfinite(updates))
