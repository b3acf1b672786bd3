"""Sums over all entries of trees, with few kernels and no temporaries."""

import functools
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ._numbers import root

PyTree = Any

_MAX_SMALL_ENTRIES = 2**14  # larger leaves are worth a kernel of their own
_MAX_SINGLE_LEAVES = 64  # only more of them take long to compile
_LEAVES_PER_GROUP = 16


def _real_parts(leaves: tuple[jax.Array, ...]) -> list[tuple[jax.Array, ...]]:
    """Returns the leaves in float32; complex ones as their real and imaginary parts."""
    if any(jnp.iscomplexobj(x) for x in leaves):
        parts = [tuple(x.real for x in leaves), tuple(x.imag for x in leaves)]
    else:
        parts = [leaves]
    return [tuple(map(_widened, _apart(part))) for part in parts]


def _apart(leaves: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """Keeps casts of these leaves apart from other casts of the same leaves.

    XLA would do a cast that several computations have in common once, and store it.
    """
    if all(x.dtype == jnp.float32 for x in leaves):
        return leaves
    return lax.optimization_barrier(leaves)


def _widened(x: jax.Array) -> jax.Array:
    return x.astype(jnp.float32)


def _alike(leaves: tuple[jax.Array, ...]) -> Any:
    """Returns what leaves must have in common to be added entry by entry."""
    return leaves[0].shape, tuple(str(jax.typeof(x)) for x in leaves)


def sum_entries(term: Callable[..., jax.Array], *trees: PyTree) -> jax.Array:
    """Returns the sum of ``term(x, y, ...)`` over all entries, in float32.

    Many small leaves of one shape are added up entry by entry before they are summed:
    XLA would take longer to compile one reduction for each of two thousand leaves, and
    a scalar from each, than all the rest of the step. A few leaves are not added up,
    because on several devices they may be sharded in different ways, and would have to
    move.

    Args:
      term: an elementwise function of one entry of each tree, in float32. A complex
        entry comes as two.
      *trees: trees of one structure with the same shapes.
    """
    leaves = zip(*map(jax.tree.leaves, trees), strict=True)
    parts = [part for entry in leaves for part in _real_parts(entry)]
    shapes: dict[Any, list[tuple[jax.Array, ...]]] = {}
    for part in parts:
        shapes.setdefault(_alike(part), []).append(part)
    total = jnp.zeros((), jnp.float32)
    for (shape, _), alike in shapes.items():
        is_small = np.prod(shape) <= _MAX_SMALL_ENTRIES
        is_shared = len(alike) > _MAX_SINGLE_LEAVES and is_small
        step = _LEAVES_PER_GROUP if is_shared else 1
        for first in range(0, len(alike), step):
            terms = [term(*part) for part in alike[first : first + step]]
            total += jnp.sum(functools.reduce(operator.add, terms))
    return total


def global_norm(tree: PyTree) -> jax.Array:
    """Returns the global l2 norm, accumulated in float32 whatever the dtypes."""
    return root(sum_entries(lambda x: x * x, tree))
