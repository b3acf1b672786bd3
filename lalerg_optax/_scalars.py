"""Scalars: a record of named scalars that is kept in two arrays.

Every output of a compiled step is a kernel of its own, which has to be compiled and
launched. As forty arrays, the scalars of regulator, judge and macro level would take
XLA six times as long to compile as all of AdamW.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax

Record = TypeVar("Record", bound=tuple[Any, ...])


class Scalars(NamedTuple):
    """A record of scalars, packed.

    Attributes:
      floats: the numbers and the truth values (0 or 1), in the order of the record,
        float32, shape ``(..., n)``.
      counts: the integers, likewise, int32, shape ``(..., m)``; None without any.
    """

    floats: jax.Array
    counts: jax.Array | None = None


def _defaults(kind: type[tuple[Any, ...]]) -> dict[str, Any]:
    """Returns the fields of a NamedTuple with their defaults."""
    # documented, but mypy does not know it for any type common to all NamedTuples
    return kind._field_defaults  # type: ignore[attr-defined]


def _is_count(default: Any) -> bool:
    return isinstance(default, int) and not isinstance(default, bool)


def as_vector(
    scalars: Sequence[jax.typing.ArrayLike], dtype: Any = jnp.float32
) -> jax.Array:
    """Returns scalars as one vector.

    A chain of selects is one elementwise kernel, which computes common parts of the
    entries once. ``jnp.stack`` would be compiled entry by entry.
    """
    lane = lax.iota(jnp.int32, len(scalars))
    packed = jnp.zeros(len(scalars), dtype)
    for i, scalar in enumerate(scalars):
        packed = jnp.where(lane == i, jnp.asarray(scalar, dtype), packed)
    return packed


# jit: outside of a jitted step, every operation would be dispatched by itself
@functools.partial(jax.jit, inline=True)
def pack(record: tuple[Any, ...]) -> Scalars:
    """Returns a record of scalars as one or two arrays.

    Args:
      record: a NamedTuple of scalars, whose class has a default for each field: a
        float, a bool or, for a counter, an int.
    """
    pairs = list(zip(record, _defaults(type(record)).values(), strict=True))
    counts = [x for x, d in pairs if _is_count(d)]
    return Scalars(
        floats=as_vector([x for x, d in pairs if not _is_count(d)]),
        counts=as_vector(counts, jnp.int32) if counts else None,
    )


def read(kind: type[tuple[Any, ...]], scalars: Scalars, name: str) -> jax.Array:
    """Returns one scalar of a record: float32, bool or int32.

    Raises:
      AttributeError: if the record has no such field.
    """
    defaults = _defaults(kind)
    if name not in defaults:
        raise AttributeError(f"{kind.__name__} has no field {name!r}.")
    floats, *counts = jax.tree.leaves(scalars)  # NNX wraps them in variables
    is_count = _is_count(defaults[name])
    lane = [n for n, d in defaults.items() if _is_count(d) == is_count].index(name)
    source = counts[0] if is_count else floats
    scalar = lax.index_in_dim(source, lane, axis=-1, keepdims=False)
    return scalar > 0.5 if isinstance(defaults[name], bool) else scalar


@functools.partial(jax.jit, static_argnames="kind", inline=True)
def unpack(kind: type[Record], scalars: Scalars) -> Record:
    """Returns the whole record."""
    return kind(*(read(kind, scalars, name) for name in _defaults(kind)))


def count_if(is_counted: jax.Array, count: jax.Array) -> jax.Array:
    """Returns the count, one higher where ``is_counted``; it saturates at 2^31 - 1."""
    is_full = count >= jnp.iinfo(jnp.int32).max
    return jnp.where(is_counted & ~is_full, count + 1, count)
