"""The zoo of faults on one small task; on real ones, ``benchmarks/faults.py``.

A fault is data (what happens at every step), so that one program runs all of them.
"""

import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.benchmarks import benchmark
from jax import lax

import lalerg_optax as lo

zoo = benchmark("fault_zoo")
loop = benchmark("train")

NUM_STEPS, HIT = 400, 0.4  # where faults begin, in units of the run
MORE = (  # than the tables of the benchmark have
    zoo.Fault("gradient x 1e9, 5 % of steps", "", {"grad_factor": 1e9}, share=0.05),
    zoo.Fault("gradient x -1, 20 steps", "", {"grad_factor": -1.0}, 20),
    zoo.Fault("update x -300, 1 step", "", {"update_factor": -300.0}),
    zoo.Fault("update x -300, 10 steps", "", {"update_factor": -300.0}, 10),
    zoo.Fault("loss scale 2^32, 5 %", "", {"loss_scale": 2.0**32}, share=0.05),
)
FAULTS = {fault.name: fault for fault in (*zoo.FAULTS, *MORE)}
OPTIMIZERS = {
    "lalerg": lo.lalerg,
    "lalerg, no search": functools.partial(lo.lalerg, search=False),
    "error_regulate": lambda rate: lo.error_regulate(optax.adamw(rate)),
    "adamw": optax.adamw,
}
OPEN = "gradient x 1e3, 10 steps"  # see below


@functools.cache
def run_all(name, seed=0):
    """Returns the drop without fault, all final losses, and where all was finite."""
    rng = np.random.default_rng(seed)
    data = jnp.asarray(rng.standard_normal((512, 8)), jnp.float32)
    teacher = jnp.asarray(rng.standard_normal(8), jnp.float32)
    # noise, as data have: a norm that falls a thousandfold within a window tells little
    noise = jnp.asarray(0.1 * rng.standard_normal(512), jnp.float32)
    train = data, jnp.tanh(data @ teacher) + noise
    rows = jnp.asarray(rng.integers(0, 512, (NUM_STEPS, 32)))
    start = {
        "w": jnp.asarray(0.3 * rng.standard_normal((8, 8)), jnp.float32),
        "v": jnp.asarray(0.3 * rng.standard_normal(8), jnp.float32),
    }
    is_own = name != "adamw"

    def loss_fn(params, batch):
        x, y = batch
        return jnp.mean((jnp.tanh(x @ params["w"]) @ params["v"] - y) ** 2)

    def run(plan):
        schedule = optax.linear_schedule(0.02, 0.0, NUM_STEPS)
        tx = optax.with_extra_args_support(
            OPTIMIZERS[name](lambda t: schedule(t) * plan.rate_factor[t])
        )

        def step(carry, inputs):
            (params, state), (chosen, now) = carry, inputs
            params = zoo.struck(params, now, zoo.TARGETS["parameter"])
            state = zoo.struck_moments(state, now)
            batch = tuple(a[chosen] for a in train)
            batch = zoo.poisoned(batch, train, now.poison)
            loss, grads = jax.value_and_grad(loss_fn)(params, batch)
            value = loss + now.loss_term
            grads = zoo.spoilt(grads, now)
            updates, state = tx.update(grads, state, params, value=value)
            updates = jax.tree.map(lambda u: now.update_factor * u, updates)
            if is_own:
                params = lo.apply_updates(params, updates, state)
            else:
                params = optax.apply_updates(params, updates)
            return (params, state), loop.is_finite(params)

        (params, _), finite = lax.scan(step, (start, tx.init(start)), (rows, plan))
        return loss_fn(params, train), finite.all()

    with mock.patch.multiple(zoo, EARLIEST=HIT, LATEST=HIT):
        faults = zoo.NONE, *FAULTS.values()
        plans = [fault.plan(seed, NUM_STEPS) for fault in faults]
    plans = jax.tree.map(lambda *rows: np.stack(rows), *plans)
    losses, finite = jax.tree.map(
        np.asarray, jax.jit(lambda all_of: lax.map(run, all_of))(plans)
    )
    drop = float(loss_fn(start, train)) - losses[0]
    assert drop > 0.2, "the task is learnt"
    excess = np.where(np.isfinite(losses), losses - losses[0], np.inf) / drop
    return dict(zip(FAULTS, excess[1:], strict=True)), dict(
        zip(FAULTS, finite[1:], strict=True)
    )


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name != "adamw"])
def test_every_fault_costs_less_than_5_percent_of_the_drop(name):
    excess, _ = run_all(name)
    is_open = {OPEN} if name == "lalerg" else set()
    too_much = {fault: e for fault, e in excess.items() if e > 0.05}
    assert set(too_much) <= is_open, too_much


@pytest.mark.slow
@pytest.mark.xfail(
    strict=True,
    reason="where the norm fell a lot within its window, x 1e3 is hardly odd: such a "
    "gradient is accepted as it is, and costs 7 and 15 % on two of four sets of data",
)
def test_ten_large_gradients_cost_less_than_5_percent_of_the_drop():
    assert max(run_all("lalerg", seed)[0][OPEN] for seed in range(4)) < 0.05


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name != "adamw"])
def test_no_parameter_is_ever_not_finite(name):
    _, finite = run_all(name)
    assert [fault for fault, is_finite in finite.items() if not is_finite] == []


def test_the_zoo_has_teeth():
    excess, finite = run_all("adamw")
    assert np.mean([e > 0.05 for e in excess.values()]) > 1 / 3
    assert not finite["gradient nan in one entry, 1 step"]
    assert not finite["parameter: becomes NaN"]
