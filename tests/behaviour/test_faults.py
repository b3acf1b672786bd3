"""A small zoo of faults; the large one, on real tasks, is ``benchmarks/faults.py``.

A fault is data (what happens at every step), so that one program runs all of them.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

import lalerg_optax as lo

NUM_STEPS, HIT = 400, 160
ALL = 1000
INF, NAN = 0x7F800000, 0x7FC00000
NONE = {
    "grad_factor": 1.0,
    "grad_term": 0.0,
    "grad_reach": 0,  # entries of the largest leaf; ALL for all leaves
    "loss_scale": 0.0,
    "loss_term": 0.0,
    "update_factor": 1.0,
    "rate_factor": 1.0,
    "poison": 0,  # 1 targets of other examples, 2 inputs times 100, 3 one example
    "target": 0,  # 1 a parameter, 2 its first moment, 3 its second
    "keep": 0xFFFFFFFF,
    "flip": 0,
}
AT = {"1 step": [HIT], "10 steps": np.arange(HIT, HIT + 10)}
AT["20 steps"] = np.arange(HIT, HIT + 20)
AT["50 steps"] = np.arange(HIT, HIT + 50)
AT["5 %"] = np.flatnonzero(np.random.default_rng(0).random(NUM_STEPS) < 0.05)
FAULTS = {
    f"{name}, {when}": (what, AT[when])
    for what, name, times in [
        ({"grad_term": np.nan, "grad_reach": 1}, "NaN in an entry", "1 step"),
        ({"grad_term": np.inf, "grad_reach": 64}, "Inf in a leaf", "1 step"),
        ({"grad_term": np.nan, "grad_reach": ALL}, "NaN in all", "1 step, 10 steps"),
        ({"loss_term": np.nan}, "NaN loss", "1 step, 10 steps"),
        ({"loss_term": np.inf}, "Inf loss", "1 step"),
        ({"grad_factor": 1e3}, "gradient x 1e3", "1 step, 10 steps"),
        ({"grad_factor": 1e6}, "gradient x 1e6", "1 step, 10 steps"),
        ({"grad_factor": 1e9}, "gradient x 1e9", "1 step, 10 steps, 5 %"),
        ({"grad_factor": -1.0}, "ascent", "20 steps"),
        ({"grad_factor": -100.0}, "steep ascent", "10 steps"),
        ({"update_factor": -300.0}, "update uphill", "1 step, 10 steps"),
        ({"poison": 1}, "shuffled targets", "1 step, 20 steps, 5 %"),
        ({"poison": 2}, "inputs x 100", "1 step, 20 steps, 5 %"),
        ({"poison": 3}, "constant batch", "1 step, 20 steps, 5 %"),
        ({"rate_factor": 1e3}, "rate x 1000", "50 steps"),
        ({"loss_scale": 2.0**32}, "loss scale overflow", "10 steps, 5 %"),
        *(
            ({"target": target, "flip": 1 << bit}, f"bit {bit} of {name}", "1 step")
            for target, name in enumerate(["param", "mu", "nu"], 1)
            for bit in (31, 30, 23, 22)
        ),
        *(
            ({"target": target, "keep": 0, "flip": bits}, f"{name} = {value}", "1 step")
            for target, name in enumerate(["param", "mu", "nu"], 1)
            for value, bits in {"Inf": INF, "NaN": NAN}.items()
        ),
    ]
    for when in times.split(", ")
}
OPTIMIZERS = {
    "lalerg": lo.lalerg,
    "lalerg, no search": functools.partial(lo.lalerg, search=False),
    "error_regulate": lambda rate: lo.error_regulate(optax.adamw(rate)),
    "adamw": optax.adamw,
}
OPEN = "gradient x 1e3, 10 steps"  # see below


def plan(what, steps):
    """Returns what happens at every step."""
    fields = {}
    for name, usual in NONE.items():
        dtype = np.float32 if isinstance(usual, float) else np.uint32
        field = np.full(NUM_STEPS, np.array(usual).astype(dtype))
        field[np.asarray(steps, int)] = np.array(what.get(name, usual)).astype(dtype)
        fields[name] = field
    return fields


def strike(tree, now, target):
    """Hits the first entry of the weights ``w``."""
    w = tree["w"]
    bits = (lax.bitcast_convert_type(w[0, 0], jnp.uint32) & now["keep"]) ^ now["flip"]
    struck = w.at[0, 0].set(lax.bitcast_convert_type(bits, jnp.float32))
    return tree | {"w": jnp.where(now["target"] == target, struck, w)}


def strike_moments(state, now):
    def is_adam(node):
        return isinstance(node, optax.ScaleByAdamState | lo.ScaleByMicroRateState)

    def hit(node):
        if not is_adam(node):
            return node
        mu, nu = strike(node.mu, now, 2), strike(node.nu, now, 3)
        return node._replace(mu=mu, nu=nu)

    return jax.tree.map(hit, state, is_leaf=is_adam)


def poison(x, y, now):
    code = now["poison"]
    y = jnp.where(code == 1, jnp.roll(y, 1), jnp.where(code == 3, y[0], y))
    return jnp.where(code == 2, 100.0 * x, jnp.where(code == 3, x[:1], x)), y


def spoil(grads, now):
    def each(g, is_largest):
        scale = jnp.where(now["loss_scale"] > 0.0, now["loss_scale"], 1.0)
        half = (scale * g).astype(jnp.float16).astype(jnp.float32) / scale
        g = now["grad_factor"] * jnp.where(now["loss_scale"] > 0.0, half, g)
        entry = lax.iota(jnp.uint32, g.size).reshape(g.shape)
        is_all = now["grad_reach"] == ALL
        is_hit = is_all | (is_largest & (entry < now["grad_reach"]))
        return jnp.where(is_hit, g + now["grad_term"], g)

    return {name: each(g, name == "w") for name, g in grads.items()}


@functools.cache
def run_all(name, seed=0):
    """Returns the drop without fault, all final losses, and where all was finite."""
    rng = np.random.default_rng(seed)
    data = jnp.asarray(rng.standard_normal((512, 8)), jnp.float32)
    teacher = jnp.asarray(rng.standard_normal(8), jnp.float32)
    # noise, as data have: a norm that falls a thousandfold within a window tells little
    noise = jnp.asarray(0.1 * rng.standard_normal(512), jnp.float32)
    targets = jnp.tanh(data @ teacher) + noise
    batches = jnp.asarray(rng.integers(0, 512, (NUM_STEPS, 32)))
    start = {
        "w": jnp.asarray(0.3 * rng.standard_normal((8, 8)), jnp.float32),
        "v": jnp.asarray(0.3 * rng.standard_normal(8), jnp.float32),
    }
    is_own = name != "adamw"

    def loss_fn(params, x, y):
        return jnp.mean((jnp.tanh(x @ params["w"]) @ params["v"] - y) ** 2)

    def train(plan):
        schedule = optax.linear_schedule(0.02, 0.0, NUM_STEPS)
        tx = optax.with_extra_args_support(
            OPTIMIZERS[name](lambda t: schedule(t) * plan["rate_factor"][t])
        )

        def step(carry, inputs):
            (params, state), (batch, now) = carry, inputs
            params, state = strike(params, now, 1), strike_moments(state, now)
            x, y = poison(data[batch], targets[batch], now)
            loss, grads = jax.value_and_grad(loss_fn)(params, x, y)
            value = loss + now["loss_term"]
            updates, state = tx.update(spoil(grads, now), state, params, value=value)
            updates = jax.tree.map(lambda u: now["update_factor"] * u, updates)
            if is_own:
                params = lo.apply_updates(params, updates, state)
            else:
                params = optax.apply_updates(params, updates)
            finite = jnp.isfinite(params["w"]).all() & jnp.isfinite(params["v"]).all()
            return (params, state), finite

        (params, _), finite = lax.scan(step, (start, tx.init(start)), (batches, plan))
        return loss_fn(params, data, targets), finite.all()

    plans = [plan(*fault) for fault in [({}, []), *FAULTS.values()]]
    plans = jax.tree.map(lambda *rows: np.stack(rows), *plans)
    losses, finite = jax.tree.map(np.asarray, jax.jit(jax.vmap(train))(plans))
    drop = float(loss_fn(start, data, targets)) - losses[0]
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
    assert not finite["NaN in an entry, 1 step"]
    assert not finite["param = NaN, 1 step"]
