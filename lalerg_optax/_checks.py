"""Checks of user input: hyperparameters at construction, all others at tracing."""

import inspect
import math
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax


class _Missing:
    """A forgotten value, as opposed to None; pickled by reference."""


MISSING: Any = _Missing


# Names of scalars in metrics and states of 0.1; they will be removed in 0.3.
FORMER_NAMES = {"damping": "damping_factor", "num_reverted": "num_revert_steps"}


def present_name(name: str) -> str:
    """Returns the present name of a scalar, and warns of a deprecated one."""
    if name not in FORMER_NAMES:
        return name
    now = FORMER_NAMES[name]
    warnings.warn(
        f"{name} is called {now} since lalerg_optax 0.2; the old name goes in 0.3.",
        DeprecationWarning,
        stacklevel=3,
    )
    return now


def check_range(
    name: str,
    value: Any,
    low: float,
    high: float,
    *,
    low_open: bool = False,
    high_open: bool = False,
) -> None:
    """Raises a ValueError unless ``value`` lies between ``low`` and ``high``.

    It has to lie there in float32, too, in which steps are computed. An array or a
    tracer passes: ``optax.inject_hyperparams`` passes hyperparameters as arrays, which
    may have no value yet.
    """
    if isinstance(value, jax.Array):
        is_narrow = value.dtype in (jnp.bfloat16, jnp.float16)
        if is_narrow and name != "learning_rate":  # which is a factor, whatever it is
            raise ValueError(
                f"{name} is of {value.dtype}, in which a decay of 0.999 is 1: with "
                "optax.inject_hyperparams and params of that dtype, pass "
                "hyperparam_dtype=jnp.float32."
            )
        return
    if not isinstance(value, int | float | np.number | np.ndarray):
        raise ValueError(f"{name} must be a number, got {name} = {value!r}.")
    high_open = high_open or math.isinf(high)
    with np.errstate(over="ignore", under="ignore"):
        stored = np.float32(value)
    # a NaN is neither above nor below
    above = all(x > low if low_open else x >= low for x in (value, stored))
    below = all(x < high if high_open else x <= high for x in (value, stored))
    if not (above and below):
        left, right = "(" if low_open else "[", ")" if high_open else "]"
        raise ValueError(
            f"{name} must be in the range {left}{low}, {high}{right}, got "
            f"{name} = {value}."
        )


def check_growing(
    name: str, value: Any, low: float, high: float, *, high_open: bool = False
) -> tuple[Any, Any]:
    """Returns first and last value of a hyperparameter, one object if it is a number.

    Raises:
      ValueError: unless ``value`` is a number in the range, or a pair of numbers below
        ``high``, of which the second is not below the first.
    """
    if not isinstance(value, tuple | list):
        check_range(name, value, low, high, high_open=high_open)
        return value, value
    if len(value) != 2:
        raise ValueError(f"{name} must be a number or a pair, got {name} = {value!r}.")
    for number in value:
        check_range(name, number, low, high, high_open=True)
    first, last = value
    is_known = not any(isinstance(number, jax.Array) for number in value)
    if is_known and first > last:
        raise ValueError(
            f"{name} must not become smaller: the first of a pair is at most the "
            f"second, got {name} = {value!r}."
        )
    return first, last


def check_transformation(
    name: str, inner: Any, example: str = "optax.sgd(0.1)"
) -> None:
    """Raises a TypeError unless ``inner`` is a gradient transformation."""
    if not (hasattr(inner, "init") and hasattr(inner, "update")):
        raise TypeError(
            f"{name} must be an Optax gradient transformation such as "
            f"{example}, got {name} = {inner!r}."
        )
    if not isinstance(inner, optax.GradientTransformationExtraArgs):
        return
    parameters = inspect.signature(inner.update).parameters.values()
    if all(p.kind != inspect.Parameter.VAR_KEYWORD for p in parameters):
        names = ", ".join(p.name for p in parameters)
        raise TypeError(
            f"{name} must take any extra argument (**extra_args), but its update takes "
            f"{names} alone. Wrap it in an optax.GradientTransformationExtraArgs that "
            "takes all, value among them, and hands on what it needs; or let it be "
            "an optax.GradientTransformation, which is handed none."
        )


def given(value: Any, surplus: tuple[Any, ...], extra_args: dict[str, Any]) -> Any:
    """Returns the loss as it was given: as ``value``, or as ``loss``.

    Levanter and MaxText call it ``loss``; it is taken out of the other arguments.

    Raises:
      TypeError: if it was given by position, or by both names.
    """
    if surplus:
        raise TypeError(
            "the loss is given by name: call update(grads, state, params, value=loss)."
        )
    if "loss" not in extra_args:
        return value
    if value is not MISSING:
        raise TypeError("value and loss are two names of one argument: give one.")
    return extra_args.pop("loss")


def as_loss(value: jax.typing.ArrayLike | None) -> jax.Array | None:
    """Returns ``value`` as a float32 scalar; None stays None."""
    if value is None:
        return None
    if value is MISSING:
        raise TypeError(
            "update needs the keyword 'value', the mean loss of the batch: call "
            "update(grads, state, params, value=loss). Flax linen: take "
            "lalerg_optax.flax.TrainState, whose apply_gradients passes it on. Where a "
            "library makes the call and passes none, wrap the optimizer: "
            "lalerg_optax.without_value(tx) judges by gradient norm alone, "
            "lalerg_optax.value_from_gradient(tx) gets the loss through the gradient."
        )
    if isinstance(value, tuple | list):
        raise TypeError(
            f"value must be a scalar, the mean loss of the batch, got a "
            f"{type(value).__name__} of {len(value)}. With has_aux=True, "
            "jax.value_and_grad returns (loss, aux): pass the loss alone."
        )
    try:
        dtype = jnp.result_type(value)
        is_real = dtype == jnp.bool_ or not jnp.issubdtype(dtype, jnp.complexfloating)
    except (TypeError, ValueError):
        is_real = False
    if not is_real:
        raise TypeError(
            "value must be a real number, the mean loss of the batch, got "
            f"value = {value!r}."
        )
    if jnp.shape(value):
        raise ValueError(
            "value must be a scalar, the mean loss of the batch, got shape "
            f"{jnp.shape(value)}: take the mean of the losses of its examples."
        )
    return jnp.asarray(value, jnp.float32)


def _difference(tree: Any, model: Any) -> str | None:
    """Returns the first difference of a tree from its model, in words."""
    leaves, wanted = jax.tree.leaves(tree), jax.tree.leaves(model)
    structure: Any = jax.tree.structure(tree)
    is_same_tree = structure == jax.tree.structure(model)
    if is_same_tree and [*map(jnp.shape, leaves)] == [*map(jnp.shape, wanted)]:
        return None
    found, sought = _shapes(tree), _shapes(model)
    for path in {**sought, **found}:
        if path not in found:
            return f"there is no leaf {path}"
        if path not in sought:
            return f"leaf {path} is one too many"
        if found[path] != sought[path]:
            return f"leaf {path} has shape {found[path]} instead of {sought[path]}"
    return "the containers are of other types"


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of all leaves by path."""
    return {
        jax.tree_util.keystr(path) or "(the whole)": jnp.shape(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def check_updates(link: str, updates: Any, model: Any) -> None:
    """Raises a ValueError unless updates have the tree and the shapes of ``model``."""
    difference = _difference(updates, model)
    if difference is not None:
        raise ValueError(
            f"{link} got gradients (or updates) that are not like the params: "
            f"{difference}. Pass the gradient of the mean loss with respect to the "
            "params that init was called with."
        )


def as_arrays(tree: Any) -> Any:
    """Returns a tree in which Python's numbers are arrays."""
    return jax.tree.map(
        lambda x: jnp.asarray(x) if isinstance(x, float | complex) else x, tree
    )


def as_params(link: str, tree: Any) -> Any:
    """Returns params (or what is like them) as arrays.

    Python's numbers become arrays, and a ``jax.ShapeDtypeStruct``, of which only the
    shape is known, an array of zeros.

    Raises:
      TypeError: if a leaf is no array, or not of floating point.
    """

    def as_array(path: Any, leaf: Any) -> Any:
        where = jax.tree_util.keystr(path) or "(the whole)"
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return jnp.zeros(leaf.shape, leaf.dtype, device=leaf.sharding)
        if not (hasattr(leaf, "dtype") and hasattr(leaf, "shape")):
            raise TypeError(
                f"{link}: leaf {where} of the params is no array: {leaf!r}. Of an "
                "Equinox module pass equinox.filter(model, equinox.is_inexact_array)."
            )
        if not jnp.issubdtype(leaf.dtype, jnp.inexact):
            raise TypeError(
                f"{link}: leaf {where} of the params is of {leaf.dtype}, and only "
                "floating point can be trained: leave it out, or give it None. Of an "
                "Equinox module pass equinox.filter(model, equinox.is_inexact_array)."
            )
        return leaf

    return jax.tree.map_with_path(as_array, as_arrays(tree))


def check_params(link: str, params: Any) -> None:
    """Raises a ValueError if there are no params."""
    if params is None:
        raise ValueError(
            f"{link} needs the params: call update(grads, state, params, value=loss). "
            "Where a library makes the call and passes none, wrap the optimizer in "
            "lalerg_optax.tracks_params(tx)."
        )


def check_state_type(link: str, state: Any, kind: type) -> None:
    """Raises a TypeError unless a state is of its kind."""
    if not isinstance(state, kind):
        raise TypeError(
            f"{link} needs a state of type {kind.__name__}, got one of type "
            f"{type(state).__name__}. Call update(grads, state, params, value=loss) "
            "with the state that init(params) of the same optimizer returned, or "
            "that was restored into one."
        )


def check_state(link: str, state: Any, init: Callable[[Any], Any], params: Any) -> None:
    """Raises a ValueError unless ``init(params)`` could have returned the state.

    Trees and shapes are compared, and the dtypes of the anchor. Nothing is computed:
    ``init`` is only traced, once.
    """
    expected = jax.eval_shape(init, params)
    difference = _difference(state, expected)
    if difference is None:
        for a, b in zip(
            *map(jax.tree.leaves, (state.anchor, expected.anchor)), strict=True
        ):
            if a.dtype != b.dtype:
                difference = f"the anchor is {a.dtype} instead of {b.dtype}"
    if difference is not None:
        raise ValueError(
            f"{link} got a state of another configuration or of other params: in the "
            f"state, {difference}. Call update with the optimizer and the params "
            "that the state was made with, or init(params) for a new one."
        )
