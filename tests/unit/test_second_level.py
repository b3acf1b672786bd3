"""A second level: a rule or a whole optimizer points downhill, whichever it is."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.drive import descend
from helpers.quick import some
from optax import contrib

import lalerg_optax as lo
from lalerg_optax._second_level import as_second_level

PARAMS = {
    "bias": jnp.array([0.5, -1.0]),
    "kernel": jnp.array([[1.0, -2.0], [0.5, 3.0]]),
}
GRADS = jax.tree.map(lambda p: 0.3 * p + 0.1, PARAMS)

# the optimizer at the rate 1, and the rule in it
PAIRS = {
    "lion": (functools.partial(optax.lion, weight_decay=0.0), optax.scale_by_lion),
    "momentum": (functools.partial(optax.sgd, momentum=0.9), lambda: optax.trace(0.9)),
    "adam": (optax.adam, optax.scale_by_adam),
    "rmsprop": (optax.rmsprop, functools.partial(optax.scale_by_rms, decay=0.9)),
    "radam": (optax.radam, optax.scale_by_radam),
    "adan": (optax.adan, optax.scale_by_adan),
}
# whole optimizers, written as people do
OPTIMIZERS = {
    "muon": lambda: contrib.muon(1.0),
    "muon, named": lambda: contrib.muon(
        1.0,
        muon_weight_dimension_numbers={
            "bias": None,  # Adam's
            "kernel": contrib.MuonDimensionNumbers(),
        },
    ),
    "adafactor": lambda: optax.adafactor(1.0),
    "lamb": lambda: optax.lamb(1.0),
    "novograd": lambda: optax.novograd(1.0),
    "sm3": lambda: optax.sm3(1.0),
    "ademamix": lambda: contrib.ademamix(1.0),
    "adamw": lambda: optax.adamw(1.0),
    "a schedule that begins at 0": lambda: optax.adam(optax.linear_schedule(0, 1, 9)),
    "injected": lambda: optax.inject_hyperparams(optax.lion)(1.0),
    "groups by name": lambda: optax.partition(
        {"matrices": contrib.muon(1.0), "rest": optax.adam(1.0)},
        {"bias": "rest", "kernel": "matrices"},
    ),
    "some of it frozen": lambda: optax.partition(
        {"frozen": optax.set_to_zero(), "rest": optax.adam(1.0)},
        {"bias": "frozen", "kernel": "rest"},
    ),
}


def slope(tx, steps=3):
    """Returns by how much steps with one gradient lower the loss, to first order."""
    state, total = tx.init(PARAMS), 0.0
    update = jax.jit(functools.partial(tx.update, value=1.0))
    for _ in range(steps):
        updates, state = update(GRADS, state, PARAMS)
        total += sum(map(jnp.vdot, *map(jax.tree.leaves, (GRADS, updates))))
    return total


@pytest.mark.parametrize("name", PAIRS)
def test_an_optimizer_at_rate_one_is_its_rule(name):
    optimizer, rule = PAIRS[name]
    steps = []
    for micro in (optimizer(1.0), rule()):
        tx, _ = as_second_level(micro)
        state = tx.init(PARAMS)
        for _ in range(3):
            updates, state = tx.update(GRADS, state, PARAMS)
        steps.append(updates)
    chex.assert_trees_all_close(*steps, rtol=1e-5)
    assert jnp.vdot(updates["kernel"], GRADS["kernel"]) > 0.0


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_whatever_is_written_points_uphill_as_second_level(name):
    assert slope(as_second_level(OPTIMIZERS[name]())[0]) > 0.0


@pytest.mark.parametrize("name", some(["lion", "muon", "lamb"], "lion", "muon"))
def test_a_whole_optimizer_finds_its_rate_downhill(name):
    micro = optax.lion(1.0) if name == "lion" else OPTIMIZERS[name]()
    params = jnp.array([[3.0, -2.0], [1.0, -4.0]])
    end, state = descend(lo.lalerg(1e-6, micro=micro), params, 400)
    assert jnp.sum(end**2) < 0.01 * jnp.sum(params**2)
    assert lo.metrics(state)["macro_rate"] > 1e3


@pytest.mark.parametrize("eager", [False, True], ids=["jitted", "eager"])
def test_a_rate_that_is_traced_is_turned_as_well(eager):
    def step(rate):
        tx = lo.lalerg(1.0, micro=optax.lion(rate), search=False)
        return tx.update(GRADS, tx.init(PARAMS), PARAMS, value=1.0)[0]

    found = (step if eager else jax.jit(step))(jnp.float32(0.01))
    expected, _ = (tx := optax.lion(0.01)).update(GRADS, tx.init(PARAMS), PARAMS)
    chex.assert_trees_all_close(found, expected, rtol=1e-5)


def test_eager_steps_try_it_only_once():
    seen = []

    def update(updates, state, params=None):
        del params
        seen.append(isinstance(jax.tree.leaves(updates)[0], jax.core.Tracer))
        return {name: -updates[name] for name in ("bias", "kernel")}, state

    tx = lo.lalerg(
        micro=optax.GradientTransformation(lambda _: optax.EmptyState(), update)
    )
    state = tx.init(PARAMS)
    num_traced = sum(seen)
    for _ in range(3):
        _, state = tx.update(GRADS, state, PARAMS, value=1.0)
    assert sum(seen) == num_traced


def test_what_cannot_be_tried_is_taken_as_a_rule():
    params = {"bias": jnp.ones(5), "kernel": jnp.ones((7, 3))}

    def update(updates, state, params_now=None):
        del params_now
        return jax.tree.map(lambda u, p: -(u + p), updates, params), state

    odd = optax.GradientTransformation(lambda _: optax.EmptyState(), update)
    turned, decays = as_second_level(odd)
    updates, _ = turned.update(params, turned.init(params), params)
    chex.assert_trees_all_equal(updates, jax.tree.map(lambda p: -2.0 * p, params))
    assert not decays(params)


@pytest.mark.parametrize("seed", range(4))
def test_noise_does_not_decide_which_way_it_points(seed):
    noise = {"eta": 1e4, "gamma": 0.55, "key": jax.random.key(seed)}
    for rule, wanted in ((optax.identity(), 1.0), (optax.scale(-1.0), -1.0)):
        turned, decays = as_second_level(optax.chain(optax.add_noise(**noise), rule))
        updates, _ = turned.update(GRADS, turned.init(PARAMS), PARAMS)
        tx = optax.chain(optax.add_noise(**noise), rule)
        expected, _ = tx.update(GRADS, tx.init(PARAMS), PARAMS)
        chex.assert_trees_all_close(
            updates, jax.tree.map(lambda u, w=wanted: w * u, expected), rtol=1e-6
        )
        assert not decays(PARAMS)


# ---- Weight decay stays in one place -------------------------------------------------


def decayed(**options):
    """Returns the first step without a gradient, in units of the params."""
    tx = lo.lalerg(1.0, search=False, **options)
    zeros = optax.tree.zeros_like(PARAMS)
    updates, _ = tx.update(zeros, tx.init(PARAMS), PARAMS, value=1.0)
    (rate,) = {
        round(float(r), 6)
        for u, p in zip(*map(jax.tree.leaves, (updates, PARAMS)), strict=True)
        for r in np.ravel(u / p)
    }
    return -rate


@pytest.mark.parametrize(
    ("options", "rate"),
    [
        ({}, 1e-4),
        ({"weight_decay": 0.01}, 0.01),
        ({"micro": optax.scale_by_lion()}, 1e-4),
        ({"micro": contrib.muon(1.0)}, 1e-4),
        ({"micro": optax.lion(1.0)}, 1e-3),
        ({"micro": optax.adamw(1.0, weight_decay=0.02)}, 0.02),
        ({"micro": optax.lion(1.0), "weight_decay": 0.0}, 1e-3),
        ({"micro": optax.lion(1.0, weight_decay=0.0), "weight_decay": 0.3}, 0.3),
        # moves at first, also where there is nothing to decay
        ({"micro": optax.yogi(1.0), "weight_decay": 0.0}, None),
    ],
)
def test_params_decay_once(options, rate):
    if rate is None:
        assert not as_second_level(options["micro"])[1](PARAMS)
    else:
        assert decayed(**options) == pytest.approx(rate, rel=1e-3)


def test_weight_decay_in_both_places_is_refused():
    with pytest.raises(ValueError, match=r"be added to that of micro, which decays"):
        lo.lalerg(micro=optax.lion(1.0), weight_decay=0.1).init(PARAMS)
    masked = optax.adamw(1.0, mask={"bias": False, "kernel": True})
    with pytest.raises(ValueError, match=r"be added to that of micro, which decays"):
        jax.jit(lo.lalerg(micro=masked, weight_decay=0.1).init)(PARAMS)


def test_weight_decay_of_a_rate_that_is_traced():
    @jax.jit
    def step(rate):
        tx = lo.lalerg(1.0, micro=optax.lion(1.0, weight_decay=rate), search=False)
        zeros = optax.tree.zeros_like(PARAMS)
        return tx.update(zeros, tx.init(PARAMS), PARAMS, value=1.0)[0]

    chex.assert_trees_all_close(
        step(0.5), jax.tree.map(lambda p: -0.5 * p, PARAMS), rtol=1e-5
    )
    chex.assert_trees_all_close(
        step(0.0), jax.tree.map(lambda p: -1e-4 * p, PARAMS), rtol=1e-5
    )


# ---- What cannot work is refused, with the reason ------------------------------------

REFUSED = {
    "prodigy": (contrib.prodigy, "finds its rate by itself"),
    "dog": (lambda: contrib.dog(1.0), "finds its rate by itself"),
    "mechanize": (
        lambda: contrib.mechanize(optax.adam(1.0)),
        "finds its rate by itself",
    ),
    "momo": (contrib.momo_adam, "finds its rate by itself"),
    "plateau": (
        lambda: optax.chain(optax.scale_by_adam(), contrib.reduce_on_plateau()),
        "finds its rate by itself",
    ),
    "a line search": (optax.lbfgs, "finds its rate by itself"),
    "Polyak's step": (optax.polyak_sgd, "depends on the loss: it finds its rate by"),
    "schedule-free": (contrib.schedule_free_adamw, "keeps params of its own"),
    "lookahead": (lambda: optax.lookahead(optax.sgd(1.0), 3, 0.5), "as they are"),
    "MultiSteps": (
        lambda: optax.MultiSteps(optax.sgd(1.0), 2).gradient_transformation(),
        "steps that change nothing",
    ),
    "a regulator": (lambda: lo.error_regulate(optax.sgd(1.0)), "protected already"),
    "lalerg": (lo.lalerg, "protected already"),
    "a first level": (
        lambda: optax.chain(optax.sgd(1.0), lo.scale_by_macro_rate()),
        "first level already",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_a_second_level_is_refused(name):
    make, reason = REFUSED[name]
    with pytest.raises(ValueError, match=reason):
        lo.lalerg(micro=make())


def test_groups_that_point_in_different_directions_are_refused():
    torn = optax.partition(
        {"matrices": contrib.muon(1.0), "rest": optax.scale_by_adam()},
        {"bias": "rest", "kernel": "matrices"},
    )
    with pytest.raises(ValueError, match="uphill for some params and downhill for"):
        lo.lalerg(micro=torn).init(PARAMS)
    with pytest.raises(ValueError, match="uphill for some params and downhill for"):
        jax.jit(lo.lalerg(micro=torn).init)(PARAMS)


@pytest.mark.parametrize(
    "micro",
    [
        optax.chain(optax.adam(1.0), optax.keep_params_nonnegative()),
        optax.chain(optax.sgd(1.0), optax.apply_every(3)),
        optax.GradientTransformation(
            lambda _: optax.EmptyState(),
            lambda u, s, p: (jax.tree.map(lambda g, x: -g * jnp.abs(x), u, p), s),
        ),
    ],
    ids=["params that stay positive", "every third step", "in units of the params"],
)
def test_what_moves_late_or_not_from_zero_points_uphill_as_well(micro):
    assert slope(as_second_level(micro)[0], steps=4) != 0.0
    positive = jax.tree.map(jnp.abs, PARAMS)
    tx, _ = as_second_level(micro)
    state, total = tx.init(positive), 0.0
    for _ in range(3):
        updates, state = tx.update(positive, state, positive)
        total += sum(jnp.sum(u) for u in jax.tree.leaves(updates))
    assert total > 0.0


def test_what_does_not_move_at_all_is_refused():
    with pytest.raises(ValueError, match="changes nothing in its first steps"):
        lo.lalerg(micro=optax.set_to_zero())


def test_groups_by_name_decay_once():
    groups = optax.partition(
        {
            "a": optax.adamw(1.0, weight_decay=0.02),
            "b": optax.adamw(1.0, weight_decay=0.02),
        },
        {"bias": "a", "kernel": "b"},
    )
    assert decayed(micro=groups) == pytest.approx(0.02, rel=1e-3)


def test_an_optimizer_made_inside_of_jit_is_good_outside():
    make = functools.lru_cache(lambda: lo.lalerg(0.1, micro=optax.lion(1.0)))
    state = jax.jit(lambda p: make().init(p))(PARAMS)
    updates, _ = jax.jit(lambda s: make().update(GRADS, s, PARAMS, value=1.0))(state)
    assert sum(map(jnp.vdot, *map(jax.tree.leaves, (GRADS, updates)))) < 0.0


def test_a_nan_at_the_first_step_is_no_sign_of_a_line_search():
    def update(updates, state, params=None):
        del params
        bad = jnp.where(state == 0, jnp.nan, -1.0)
        return jax.tree.map(lambda g: bad * g, updates), state + 1

    odd = optax.GradientTransformation(lambda params: jnp.zeros((), jnp.int32), update)
    lo.lalerg(0.1, micro=odd).init({"w": jnp.ones(3)})  # was refused
