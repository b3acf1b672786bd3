"""A record of scalars is read by name as it was packed."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lalerg_optax._records import RegulatorScalars
from lalerg_optax._scalars import as_vector, count_if, pack, read, unpack
from lalerg_optax._search_rule import MacroScalars


class Mixed(NamedTuple):
    rate: Any = 1.5
    count: Any = 7
    is_on: Any = True
    last: Any = -2.0
    other: Any = 0


class Bare(NamedTuple):
    rate: Any = 0.25


@pytest.mark.parametrize("kind", [Mixed, Bare, MacroScalars, RegulatorScalars])
def test_what_is_packed_comes_back_with_its_kind(kind):
    record = kind()
    told = unpack(kind, pack(record))._asdict()
    for name, default in record._asdict().items():
        dtype = {bool: "bool", int: "int32", float: "float32"}[type(default)]
        assert (told[name].dtype, told[name].shape) == (dtype, ())
        assert told[name] == default


def test_a_record_is_two_arrays_or_one():
    packed = pack(Mixed())
    assert (packed.floats.shape, packed.counts.shape) == ((3,), (2,))
    assert pack(Bare()).counts is None


def test_names_are_read_from_a_whole_run():
    run = jax.vmap(lambda x: pack(Mixed(rate=x, count=jnp.int32(x), is_on=x > 1.0)))
    packed = run(jnp.arange(4.0))
    np.testing.assert_array_equal(read(Mixed, packed, "rate"), [0.0, 1.0, 2.0, 3.0])
    np.testing.assert_array_equal(read(Mixed, packed, "count"), [0, 1, 2, 3])
    assert read(Mixed, packed, "is_on").tolist() == [False, False, True, True]
    np.testing.assert_array_equal(read(Mixed, packed, "last"), -2.0)


def test_a_name_that_is_not_there_is_an_attribute_error():
    with pytest.raises(AttributeError, match="Mixed has no field 'speed'"):
        read(Mixed, pack(Mixed()), "speed")


def test_lanes_are_in_the_order_that_was_given():
    np.testing.assert_array_equal(as_vector([3.0, -1.0, 2.0]), [3.0, -1.0, 2.0])


def test_a_count_goes_up_where_it_should_and_stays_at_the_largest():
    largest = jnp.iinfo(jnp.int32).max
    counts = jnp.array([0, 5, largest - 1, largest], jnp.int32)
    assert count_if(jnp.bool_(True), counts).tolist() == [1, 6, largest, largest]
    assert count_if(jnp.bool_(False), counts).tolist() == counts.tolist()
