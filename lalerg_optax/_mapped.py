"""Mapped: which axes of a ``shard_map`` values differ over, where that is tracked."""

from typing import Any

import jax
import optax
from jax import lax


def _axes(x: Any) -> frozenset[str]:
    manual = getattr(jax.typeof(x), "manual_axis_type", None)
    return frozenset(getattr(manual, "varying", ()))


def mapped_axes(tree: Any) -> frozenset[str]:
    """Returns the axes that any leaf differs over."""
    return frozenset().union(*map(_axes, jax.tree.leaves(tree)))


def spread(tree: Any, axes: frozenset[str]) -> Any:
    """Returns the tree as one whose leaves differ over these axes at least."""

    def over(x: jax.Array) -> jax.Array:
        missing = tuple(sorted(axes - _axes(x)))
        return lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(over, tree) if axes else tree


def check_mapped(
    link: str, params: optax.Params, value: Any, grad_norm: jax.Array
) -> None:
    """Raises a ValueError where devices would decide differently about equal params."""
    axes = mapped_axes((value, grad_norm)) - mapped_axes(params)
    if axes:
        name = "', '".join(sorted(axes))
        raise ValueError(
            f"{link}: loss or gradient differ between the devices of the mapped axis "
            f"'{name}', and the params do not. Average the gradients, "
            f"jax.lax.pmean(grads, '{name}'), and make the optimizer with "
            f"axis_name='{name}', so that all devices decide alike."
        )
