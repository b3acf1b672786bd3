"""The search for a rate, in whole runs."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.drive import Task, descend, square, train, values
from helpers.judged import REVERT

import lalerg_optax as lo


def test_failing_first_steps_revert_and_lower_the_rate():
    # the gradient of |p|^2 at a rate that overshoots from the first step on
    start = jnp.array([0.3, -0.2, 0.1])
    task = Task(start, square, jnp.zeros(60))
    params, _, seen = train(lo.lalerg(10.0), task)
    report = lo.metrics(seen.state)
    reverts, rates = seen.params[report["verdict"] == REVERT], report["macro_rate"]
    assert len(reverts) >= 2
    chex.assert_trees_all_equal(reverts[0], start)
    assert rates[-1] < 1.0 / 16.0
    assert jnp.sum(params**2) < jnp.sum(start**2)


def test_search_raises_a_rate_that_is_too_small_and_only_if_asked_to():
    def final_rate(search):
        tx = lo.lalerg(1e-6, search=search)
        params, state = descend(tx, jnp.array([3.0, -2.0, 1.0]), 300)
        return lo.metrics(state)["macro_rate"], square(params)

    rate, loss = final_rate(search=True)
    assert rate > 1e3
    assert loss < 0.1
    rate, loss = final_rate(search=False)
    assert rate == 1.0
    assert loss > 10.0


@pytest.mark.parametrize("learning_rate", [1e-4, 1e-3])
def test_by_the_loss_alone_a_rate_that_is_too_small_grows_while_the_loss_falls(
    learning_rate,
):
    start = jnp.array([3.0, -2.0, 1.0])
    sgd = optax.sgd(learning_rate)
    alone, state = descend(optax.chain(lo.scale_by_macro_rate(), sgd), start, 300)
    bare, _ = descend(sgd, start, 300)
    assert lo.metrics(state)["macro_rate"] > 16.0
    # what is left of it goes with the exponent of the rate
    assert jnp.log(square(alone) / square(start)) < 4.0 * jnp.log(
        square(bare) / square(start)
    )


CURVATURE = jnp.logspace(-1.0, 0.5, 20)


def bowl_loss(params, batch):
    noise, fault = batch
    return jnp.sum(CURVATURE * (params - noise) ** 2) + fault


@functools.cache
def bowl_noise(num_steps):
    draw = jax.vmap(lambda t: jax.random.normal(jax.random.key(t), CURVATURE.shape))
    return 0.1 * draw(jnp.arange(num_steps))


def told(step):
    return lo.metrics(step.state) | {"loss": step.value}


def bowl(tx, num_steps, bad_steps=()):
    """Trains on a noisy, narrow bowl; returns the metrics of every step."""
    fault = jnp.zeros(num_steps).at[jnp.array(bad_steps, int)].set(jnp.nan)
    task = Task(jnp.ones(20), bowl_loss, (bowl_noise(num_steps), fault))
    return train(tx, task, see=told)[2]


@pytest.mark.parametrize("search", [True, False])
def test_many_reverts_do_not_freeze_the_run(search):
    steps = np.arange(5000)
    bad_steps = steps[(steps % 250 > 247) & (steps > 200)]  # two in every 250
    tx = lo.lalerg(1e-3, search=search)
    report = bowl(tx, 5000, bad_steps)
    assert report["num_revert_steps"][-1] >= 2 * 19
    if search:
        clean = bowl(tx, 5000)["macro_rate"][-1]
        assert report["macro_rate"][-1] > clean / 32
    else:
        assert report["macro_rate"][-1] == 1.0
    assert jnp.max(report["damping_factor"][-100:]) == 1.0


SLOW_START = lo.lalerg(1e-6)


@pytest.mark.parametrize("bad_steps", [(4,), (1, 2), (20, 21)])
def test_bad_batches_early_on_do_not_end_the_search(bad_steps):
    clean = bowl(SLOW_START, 600)
    spoilt = bowl(SLOW_START, 600, bad_steps)
    assert clean["macro_rate"][-1] > 1e3
    assert spoilt["macro_rate"][-1] > clean["macro_rate"][-1] / 16


@pytest.mark.parametrize(
    "micro",
    [
        pytest.param(optax.scale_by_lion(), id="lion"),
        pytest.param(optax.trace(0.9), id="momentum", marks=pytest.mark.slow),
        pytest.param(optax.scale_by_adam(), id="adam", marks=pytest.mark.slow),
    ],
)
def test_any_second_level_trains_on_after_a_failed_start(micro):
    report = bowl(lo.lalerg(1e3, micro=micro), 1500)
    assert report["num_revert_steps"][-1] >= 2
    assert report["macro_rate"][-1] > 1e-9
    assert jnp.mean(report["loss"][-50:]) < 0.5 * report["loss"][0]


def test_params_that_do_not_move_mean_that_the_rate_is_too_small():
    report = bowl(lo.lalerg(1e-9), 400)  # below the resolution of params near 1
    assert report["macro_rate"][-1] > 1e3


@pytest.mark.parametrize(
    "learning_rate",
    [
        1e-6,
        pytest.param(1e-2, marks=pytest.mark.slow),
        pytest.param(10.0, marks=pytest.mark.slow),
    ],
)
def test_search_finds_its_rate_with_a_narrow_anchor_too(learning_rate):
    """Its steps begin far below the resolution of bfloat16."""
    rng = np.random.default_rng(1)
    inputs = jnp.asarray(rng.standard_normal((256, 32)), jnp.float32)
    targets = jnp.tanh(inputs @ jnp.asarray(rng.standard_normal((32, 4)), jnp.float32))

    def loss_fn(params, batch):
        hidden = jnp.tanh(inputs[batch] @ params["in"])
        return jnp.mean(jnp.square(hidden @ params["out"] - targets[batch]))

    def final_loss(anchor_dtype):
        tx = lo.lalerg(learning_rate, anchor_dtype=anchor_dtype)
        params = {
            "in": 0.2 * rng.standard_normal((32, 64)).astype(np.float32),
            "out": 0.1 * rng.standard_normal((64, 4)).astype(np.float32),
        }
        batches = rng.integers(0, 256, (600, 32))
        *_, losses = train(tx, Task(params, loss_fn, batches), see=values)
        return losses[-20:].mean() / losses[0]

    assert final_loss("bfloat16") < 0.15
    assert final_loss(None) < 0.15
