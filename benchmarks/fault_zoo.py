"""A zoo of faults: what can happen to a run, as data for every step.

So one program for each task and optimizer runs them all: `HOOKS` and `poisoned` do to
a step of `train.train` what its `Plan` says.
"""

import zlib
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from tasks import Batch
from train import Hooks

import lalerg_optax as lo

PyTree = Any

EARLIEST, LATEST = 0.2, 0.6  # where a fault begins, in units of the run


class Plan(NamedTuple):
    """What happens at every step; each is an array over the steps.

    Attributes:
      poison: 0 nothing, 1 targets of other examples, 2 inputs times 100, 3 all examples
        are one.
      grad_factor: factor of the gradient.
      grad_term: added to the gradient where ``grad_reach`` says.
      grad_reach: 0 nowhere, 1 one entry, 2 one leaf, 3 all.
      row_factor: factor of a row of a leaf: what a number that is an operand of a
        matrix product does to the gradient of the weights.
      row_exponent: power of two that is such a factor, too.
      grad_flip: bits of one entry of the gradient that are flipped.
      loss_scale: if above 0, gradients are those of float16 with this loss scale.
      loss_term: added to the loss.
      update_factor: factor of the update, behind the optimizer's back.
      rate_factor: factor of the learning rate's schedule.
      target: what is hit between two steps: 0 nothing, 1 a parameter, 2 an entry of the
        first moment, 3 of the second.
      keep: bits of the entry that is hit which stay.
      flip: bits of it which are flipped (after that).
      place: a random number that chooses leaf and entry.
    """

    poison: Any = 0
    grad_factor: Any = 1.0
    grad_term: Any = 0.0
    grad_reach: Any = 0
    row_factor: Any = 1.0
    row_exponent: Any = 0
    grad_flip: Any = 0
    loss_scale: Any = 0.0
    loss_term: Any = 0.0
    update_factor: Any = 1.0
    rate_factor: Any = 1.0
    target: Any = 0
    keep: Any = 0xFFFFFFFF
    flip: Any = 0
    place: Any = 0


_DTYPES = Plan(*(np.float32 if isinstance(x, float) else np.uint32 for x in Plan()))


class Fault(NamedTuple):
    """A fault.

    Attributes:
      name: how the tables call it.
      family: what it is a kind of.
      what: fields of the `Plan` at the steps that are hit.
      length: number of steps hit in a row.
      share: if above 0, that share of all steps is hit instead.
      every: if above 0, each so many-th step is hit instead.
      base: fields of the `Plan` at all other steps.
    """

    name: str
    family: str
    what: dict[str, Any]
    length: int = 1
    share: float = 0.0
    every: int = 0
    base: Mapping[str, Any] = MappingProxyType({})

    def plan(self, seed: int, num_steps: int) -> Plan:
        """Returns what happens at every step of a run."""
        rng = np.random.default_rng([seed, zlib.crc32(self.name.encode())])
        first = int(num_steps * rng.uniform(EARLIEST, LATEST))
        steps = np.arange(num_steps)
        is_hit = (steps >= first) & (steps < first + self.length)
        if self.share:  # not the first: there is nothing to tell what it should be
            is_hit = (rng.random(num_steps) < self.share) & (steps > 0)
        if self.every:
            is_hit = steps % self.every == self.every - 1
        what = {"place": rng.integers(2**31)} | self.what
        fields = {
            name: np.where(is_hit, what.get(name, default), default).astype(dtype)
            for name, default, dtype in zip(
                Plan._fields, Plan(**self.base), _DTYPES, strict=True
            )
        }
        return Plan(**fields)


NONE = Fault("none", "none", {}, 0)
REACHES = {"one entry": 1, "one leaf": 2, "all": 3}
POISONS = {"shuffled targets": 1, "inputs x 100": 2, "constant batch": 3}
TARGETS = {"parameter": 1, "first moment": 2, "second moment": 3}
BITS = {"sign": 31, "top exponent": 30, "low exponent": 23, "top mantissa": 22}
VALUES = {"Inf": 0x7F800000, "NaN": 0x7FC00000}


OPERANDS = {  # a flipped bit of a number below 2: by what it is multiplied
    "sign": {"row_factor": -1.0},
    "exponent + 8": {"row_exponent": 8},
    "exponent + 32": {"row_exponent": 32},
    "top exponent": {"row_exponent": 128},
}


def _counted(num_steps: int) -> str:
    return f"{num_steps} step" + "s" * (num_steps > 1)


FAULTS = (
    *(
        Fault(
            f"gradient {value} in {where}, {_counted(length)}",
            "gradient not finite",
            {"grad_term": float(value), "grad_reach": reach},
            length,
        )
        for value, length in (("nan", 1), ("inf", 1), ("nan", 10))
        for where, reach in REACHES.items()
    ),
    *(
        Fault(
            f"loss {value}, {_counted(length)}",
            "loss not finite",
            {"loss_term": float(value)},
            length,
        )
        for value, length in (("nan", 1), ("inf", 1), ("nan", 10))
    ),
    *(  # as where one example in a thousand holds a NaN, and a batch has hundreds
        Fault(
            f"loss and gradient nan, 1 step in {every}",
            "data not finite",
            {"loss_term": np.nan, "grad_term": np.nan, "grad_reach": REACHES["all"]},
            share=1.0 / every,
        )
        for every in (16, 8, 4)
    ),
    *(
        Fault(
            f"gradient x {factor:.0e}, {_counted(length)}".replace("e+0", "e"),
            "gradient too large",
            {"grad_factor": factor},
            length,
        )
        for factor in (1e3, 1e6, 1e9)
        for length in (1, 3, 10)
    ),
    *(
        Fault(
            f"gradient x {factor:g}, {_counted(length)}",
            "ascent",
            {"grad_factor": factor},
            length,
        )
        for factor, length in ((-1.0, 10), (-1.0, 30), (-100.0, 3), (-100.0, 10))
    ),
    *(
        Fault(
            f"update x {factor:g}, {_counted(length)}",
            "ascent",
            {"update_factor": factor},
            length,
        )
        for factor, length in ((-10.0, 10), (-100.0, 1), (-100.0, 3), (-1000.0, 3))
    ),
    *(
        Fault(f"{kind}, {when}", "poisoned batches", {"poison": code}, *how)
        for kind, code in POISONS.items()
        for when, how in {
            "1 step": (1,),
            "20 steps": (20,),
            "5 % of steps": (0, 0.05),
        }.items()
    ),
    *(
        Fault(f"rate x {factor:g}, 50 steps", "rate bomb", {"rate_factor": factor}, 50)
        for factor in (30.0, 1000.0)
    ),
    *(
        Fault(
            f"{name}: {bit} bit flipped",
            f"{name.split()[-1]} hit",
            {"target": target, "flip": 1 << position},
        )
        for name, target in TARGETS.items()
        for bit, position in BITS.items()
    ),
    *(
        Fault(
            f"{name}: becomes {value}",
            f"{name.split()[-1]} hit",
            {"target": target, "keep": 0, "flip": bits},
        )
        for name, target in TARGETS.items()
        for value, bits in VALUES.items()
    ),
    # as they show in the gradient of the weights (arXiv 2604.00726)
    *(
        Fault(f"operand of a product: {bit} bit flipped", "matrix product hit", what)
        for bit, what in OPERANDS.items()
    ),
    *(
        Fault(
            f"entry of a product: {bit} bit flipped",
            "matrix product hit",
            {"grad_flip": 1 << position},
        )
        for bit, position in BITS.items()
    ),
    Fault(
        "operand of a product: exponent + 32, 1 % of steps",
        "matrix product hit",
        OPERANDS["exponent + 32"],
        share=0.01,
    ),
    # the largest float16 is 65504
    Fault(
        "loss scale 2^32 at every 50th step",
        "loss scale overflow",
        {"loss_scale": 2.0**32},
        every=50,
        base={"loss_scale": 2.0**10},
    ),
    Fault(
        "loss scale 2^32, 10 steps",
        "loss scale overflow",
        {"loss_scale": 2.0**32},
        10,
        base={"loss_scale": 2.0**10},
    ),
)
FAMILIES = tuple(dict.fromkeys(fault.family for fault in FAULTS))


def poisoned(batch: Batch, train: Batch, poison: jax.Array) -> Batch:
    """Returns a batch with what its plan does to it."""
    *inputs, targets = batch

    def larger(a: jax.Array, whole: jax.Array) -> jax.Array:
        if jnp.issubdtype(a.dtype, jnp.floating):
            return 100.0 * a
        return (100 * a) % (whole.max(axis=0) + 1)  # some other index

    scaled = tuple(larger(a, w) for a, w in zip(inputs, train, strict=False))
    same = tuple(jnp.broadcast_to(a[:1], a.shape) for a in batch)
    choices = (
        batch,
        (*inputs, jnp.roll(targets, 1, axis=0)),
        (*scaled, targets),
        same,
    )
    return jax.tree.map(
        lambda *leaves: jnp.select([poison == i for i in range(4)], leaves), *choices
    )


def _pick(tree: PyTree, place: jax.Array) -> tuple[PyTree, PyTree, PyTree]:
    """Returns which leaf and, in every leaf, which entry and row it chooses: bools.

    A row is what belongs to one output: all entries that are equal in their last index.
    """
    leaves, structure = jax.tree.flatten(tree)
    is_leaf = [place % len(leaves) == i for i in range(len(leaves))]
    is_entry, is_row = [], []
    for leaf, chosen in zip(leaves, is_leaf, strict=True):
        number = lax.iota(jnp.uint32, leaf.size).reshape(leaf.shape)
        width = leaf.shape[-1] if leaf.ndim else 1
        entry = place // len(leaves) % leaf.size
        is_entry.append(chosen & (number == entry))
        is_row.append(chosen & (number % width == entry % width))
    return tuple(map(structure.unflatten, (is_leaf, is_entry, is_row)))


def spoilt(grads: PyTree, plan: Plan) -> PyTree:
    """Returns gradients with what their plan does to them."""

    def spoil(
        g: jax.Array, leaf: jax.Array, entry: jax.Array, row: jax.Array
    ) -> jax.Array:
        scale = jnp.where(plan.loss_scale > 0.0, plan.loss_scale, 1.0)
        half = (scale * g).astype(jnp.float16).astype(g.dtype) / scale
        g = plan.grad_factor * jnp.where(plan.loss_scale > 0.0, half, g)
        reach = plan.grad_reach
        is_hit = (reach == 3) | ((reach == 2) & leaf) | ((reach == 1) & entry)
        g = jnp.where(is_hit, g + plan.grad_term, g)
        multiplied = jnp.ldexp(plan.row_factor * g, plan.row_exponent.astype(jnp.int32))
        g = jnp.where(row, multiplied, g)
        bits = lax.bitcast_convert_type(g, jnp.uint32) ^ plan.grad_flip
        return jnp.where(entry, lax.bitcast_convert_type(bits, g.dtype), g)

    return jax.tree.map(spoil, grads, *_pick(grads, plan.place))


def struck(tree: PyTree, plan: Plan, target: int) -> PyTree:
    """Returns a tree with one entry hit, if that is what the plan aims at."""
    _, is_entry, _ = _pick(tree, plan.place)

    def strike(x: jax.Array, entry: jax.Array) -> jax.Array:
        bits = lax.bitcast_convert_type(x, jnp.uint32)
        hit = lax.bitcast_convert_type((bits & plan.keep) ^ plan.flip, x.dtype)
        return jnp.where(entry & (plan.target == target), hit, x)

    return jax.tree.map(strike, tree, is_entry)


def struck_moments(state: PyTree, plan: Plan) -> PyTree:
    """Returns an optimizer's state with a moment hit, if that is what is aimed at."""

    def is_adam(node: Any) -> bool:
        return isinstance(node, optax.ScaleByAdamState | lo.ScaleByMicroRateState)

    def strike(node: Any) -> Any:
        if not is_adam(node):
            return node
        mu = struck(node.mu, plan, TARGETS["first moment"])
        return node._replace(mu=mu, nu=struck(node.nu, plan, TARGETS["second moment"]))

    return jax.tree.map(strike, state, is_leaf=is_adam)


def _strike(params: PyTree, state: PyTree, plan: Plan) -> tuple[PyTree, PyTree]:
    return struck(params, plan, TARGETS["parameter"]), struck_moments(state, plan)


def _told(loss: jax.Array, grads: PyTree, plan: Plan) -> tuple[jax.Array, PyTree]:
    return loss + plan.loss_term, spoilt(grads, plan)


def _bent(updates: PyTree, plan: Plan) -> PyTree:
    return jax.tree.map(lambda u: plan.update_factor * u, updates)


HOOKS = Hooks(strike=_strike, told=_told, bent=_bent)
