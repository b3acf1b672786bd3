"""With nothing to object to, the regulated optimizer is the optimizer."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.drive import plainly, runner, values
from helpers.quick import some
from optax import contrib
from sklearn.datasets import load_digits

import lalerg_optax as lo

BATCH_SIZE = 64


@functools.cache
def digits():
    images, labels = load_digits(return_X_y=True)
    return images.astype(np.float32) / 16.0, labels.astype(np.int32)


def minibatches(num_steps):
    images, labels = digits()
    rng = np.random.default_rng(0)
    index = rng.integers(0, len(labels), (num_steps, BATCH_SIZE))
    return images[index], labels[index]


def initial_params(width=32):
    rng = np.random.default_rng(1)

    def normal(*shape):
        return rng.standard_normal(shape).astype(np.float32)

    return {
        "hidden": {"w": normal(64, width) / 8.0, "b": np.zeros(width, np.float32)},
        "out": {"w": normal(width, 10) / width**0.5, "b": np.zeros(10, np.float32)},
    }


def logits_of(params, x):
    x = x @ params["hidden"]["w"] + params["hidden"]["b"][None]
    return jax.nn.relu(x) @ params["out"]["w"] + params["out"]["b"][None]


def loss_fn(params, batch):
    logits = logits_of(params, batch[0])
    return optax.losses.softmax_cross_entropy_with_integer_labels(
        logits, batch[1]
    ).mean()


def trainer(tx, num_steps, extra_args_of=None):
    """Returns a function, compiled once, that trains for ``num_steps``.

    Its arguments are factors of the loss and of the gradient at every step, and it
    returns the params of all steps, the last state, and all losses.
    """

    def signals_of(params, inputs):
        batch, loss_factor, grad_factor = inputs
        loss, grads = jax.value_and_grad(loss_fn)(params, batch)
        loss, grads = loss * loss_factor, optax.tree.scale(grad_factor, grads)
        return loss, grads, extra_args_of(grads, batch) if extra_args_of else {}

    run = runner(tx, signals_of, lambda step: (step.params, step.value), plainly)

    def train(factors=None):
        ones = jnp.ones(num_steps), jnp.ones(num_steps)
        inputs = (minibatches(num_steps), *(ones if factors is None else factors))
        params = jax.tree.map(jnp.asarray, initial_params())
        (_, state), (all_params, losses) = run((params, tx.init(params)), inputs)
        return all_params, state, losses

    return train


def run(tx, num_steps):
    return trainer(tx, num_steps)()


def assert_nothing_objected(state, num_steps):
    report = lo.metrics(state)
    assert report["num_accepted"] == num_steps
    assert report["damping_factor"] == 1.0


# ---- lalerg and AdamW ---------------------------------------------------------------

ADAM = {"b2": 0.999, "gradient_share": 0.0, "search": False}


SCHEDULE = optax.warmup_cosine_decay_schedule(0.0, 3e-3, 100, 1000)


@pytest.mark.parametrize(
    ("learning_rate", "weight_decay"),
    [
        pytest.param(1e-3, 0.0, id="constant-0.0"),
        pytest.param(1e-3, 0.1, id="constant-0.1", marks=pytest.mark.slow),
        pytest.param(SCHEDULE, 0.0, id="schedule-0.0", marks=pytest.mark.slow),
        pytest.param(SCHEDULE, 0.1, id="schedule-0.1"),
    ],
)
def test_lalerg_without_search_follows_adamw(learning_rate, weight_decay):
    plain, _, losses = run(optax.adamw(learning_rate, weight_decay=weight_decay), 1000)
    ours, state, our_losses = run(
        lo.lalerg(learning_rate, weight_decay=weight_decay, **ADAM), 1000
    )
    assert losses[-50:].mean() < 0.2 * losses[0]
    assert_nothing_objected(state, 1000)
    assert lo.metrics(state)["macro_rate"] == 1.0
    np.testing.assert_allclose(our_losses, losses, rtol=1e-4, atol=1e-5)
    chex.assert_trees_all_close(ours, plain, rtol=1e-4, atol=1e-5)


def test_clip_norm_clips_like_clip_by_global_norm():
    plain = optax.chain(optax.clip_by_global_norm(0.5), optax.adamw(1e-3))
    plain, _, _ = run(plain, 300)
    ours, state, _ = run(lo.lalerg(1e-3, clip_norm=0.5, **ADAM), 300)
    assert_nothing_objected(state, 300)
    chex.assert_trees_all_close(ours, plain, rtol=1e-4, atol=1e-5)
    free, _, _ = run(optax.adamw(1e-3), 300)
    with pytest.raises(AssertionError):
        chex.assert_trees_all_close(ours, free, rtol=1e-3, atol=1e-3)


def test_micro_replaces_the_second_level():
    plain, _, _ = run(optax.lion(1e-4, weight_decay=1e-2), 300)
    ours, state, _ = run(
        lo.lalerg(1e-4, micro=optax.scale_by_lion(), weight_decay=1e-2, search=False),
        300,
    )
    assert_nothing_objected(state, 300)
    chex.assert_trees_all_close(ours, plain, rtol=1e-4, atol=1e-5)


# ---- error_regulate and every optimizer of Optax ------------------------------------

NUM_STEPS = 150
OPTIMIZERS = {
    "adabelief": lambda: optax.adabelief(1e-3),
    "adadelta": lambda: optax.adadelta(1.0),
    "adafactor": lambda: optax.adafactor(1e-2, min_dim_size_to_factor=8),
    "adagrad": lambda: optax.adagrad(1e-2),
    "adam": lambda: optax.adam(1e-3),
    "adamax": lambda: optax.adamax(1e-3),
    "adamaxw": lambda: optax.adamaxw(1e-3),
    "adamw": lambda: optax.adamw(1e-3, weight_decay=1e-2),
    "adamw, clipped": lambda: optax.chain(
        optax.clip_by_global_norm(0.5), optax.adamw(1e-3)
    ),
    "adan": lambda: optax.adan(1e-3),
    "amsgrad": lambda: optax.amsgrad(1e-3),
    "fromage": lambda: optax.fromage(1e-2),
    "lamb": lambda: optax.lamb(1e-3),
    "lars": lambda: optax.lars(0.1),
    "lion": lambda: optax.lion(1e-4),
    "momentum": lambda: optax.sgd(1e-2, momentum=0.9),
    "nadam": lambda: optax.nadam(1e-3),
    "nadamw": lambda: optax.nadamw(1e-3),
    "noisy_sgd": lambda: optax.noisy_sgd(1e-2, eta=1e-4, key=0),
    "novograd": lambda: optax.novograd(1e-3),
    "optimistic_adam_v2": lambda: optax.optimistic_adam_v2(1e-3),
    "optimistic_gradient_descent": lambda: optax.optimistic_gradient_descent(1e-2),
    "polyak_sgd": lambda: optax.polyak_sgd(0.1),
    "radam": lambda: optax.radam(1e-3),
    "rmsprop": lambda: optax.rmsprop(1e-3),
    "rmsprop, centered": lambda: optax.rmsprop(1e-3, centered=True, momentum=0.9),
    "rprop": lambda: optax.rprop(1e-4, max_step_size=1e-3),
    "sgd": lambda: optax.sgd(1e-1),
    "sign_sgd": lambda: optax.sign_sgd(1e-4),
    "signum": lambda: optax.signum(1e-4),
    "sm3": lambda: optax.sm3(1e-2),
    "yogi": lambda: optax.yogi(1e-3),
    # its first steps are divided by eps alone
    "acprop": lambda: contrib.acprop(1e-3, eps=1e-2),
    "ademamix": lambda: contrib.ademamix(1e-3),
    "adopt": lambda: contrib.adopt(1e-3),
    "cocob": lambda: contrib.cocob(),
    "dadapt_adamw": lambda: contrib.dadapt_adamw(1.0),
    "dog": lambda: contrib.dog(1.0),
    "dowg": lambda: contrib.dowg(0.3),
    "galore": lambda: contrib.galore(1e-3, rank=4),
    "madgrad": lambda: contrib.madgrad(1e-3),
    "momo": lambda: contrib.momo(1e-1),
    "momo_adam": lambda: contrib.momo_adam(1e-3),
    "muon": lambda: contrib.muon(1e-3),
    "prodigy": lambda: contrib.prodigy(1.0),
    "simplified_ademamix": lambda: contrib.simplified_ademamix(1e-4),
    "sophia": lambda: contrib.sophia(1e-3),
    "schedule_free_adamw": lambda: contrib.schedule_free_adamw(1e-3),
    "schedule_free_sgd": lambda: contrib.schedule_free_sgd(1e-2),
    "mechanize": lambda: contrib.mechanize(optax.adamw(1e-3)),
    "reduce_on_plateau": lambda: optax.chain(
        optax.adam(1e-3), contrib.reduce_on_plateau(patience=40)
    ),
    "add_noise": lambda: optax.chain(optax.add_noise(1e-3, 0.5, 0), optax.sgd(1e-2)),
    "inject_hyperparams": lambda: optax.inject_hyperparams(optax.adam)(1e-3),
    "apply_if_finite": lambda: optax.apply_if_finite(optax.adam(1e-3), 3),
    "MultiSteps": lambda: optax.MultiSteps(optax.adam(1e-3), 2),
    "masked": lambda: optax.chain(
        optax.masked(optax.trace(0.9), {"hidden": True, "out": False}),
        optax.scale(-0.01),
    ),
    "freeze": lambda: optax.chain(
        optax.adam(1e-3), optax.freeze({"hidden": False, "out": True})
    ),
    "adaptive_grad_clip": lambda: optax.chain(
        optax.adaptive_grad_clip(0.01), optax.sgd(1e-1)
    ),
}
EXTRA_ARGS = {
    "sophia": lambda grads, batch: {"obj_fn": functools.partial(loss_fn, batch=batch)},
}
TOLERANCE = {  # they multiply rounding up
    "mechanize": 1e-3,
    "dadapt_adamw": 5e-4,
    "prodigy": 5e-4,  # one last place of the gradients by 2e-5, this one by 4e-5
}


def regulated_trainer(name):
    tx = lo.error_regulate(OPTIMIZERS[name]())
    return trainer(tx, NUM_STEPS, EXTRA_ARGS.get(name))


def poison(nan_losses=(), nan_grads=(), inf_grads=()):
    """Returns factors of loss and gradient that are not finite at some steps."""
    factors = np.ones((2, NUM_STEPS), np.float32)
    factors[0, list(nan_losses)] = np.nan
    factors[1, list(nan_grads)] = np.nan
    factors[1, list(inf_grads)] = np.inf
    return tuple(factors)


def assert_as_finite_as(tree, like):
    """Some states are infinite when all is well: the best loss of none, say."""

    def is_all_finite(x):
        inexact = jnp.issubdtype(x.dtype, jnp.inexact)
        return not inexact or bool(jnp.all(jnp.isfinite(x)))

    names = jax.tree_util.tree_leaves_with_path(tree)
    for (path, leaf), well in zip(names, jax.tree.leaves(like), strict=True):
        assert is_all_finite(leaf) or not is_all_finite(well), jax.tree_util.keystr(
            path
        )


# Those that differ in kind; the others take minutes together.
KINDS = (
    *("adafactor", "adagrad", "adam", "cocob", "dadapt_adamw", "dog", "lars"),
    *("mechanize", "momo", "muon", "polyak_sgd", "prodigy", "schedule_free_adamw"),
)
QUICK = ("adafactor", "adam", "mechanize", "momo", "muon", "schedule_free_adamw")


# by module: both tests of one in turn, so that they share what is compiled
kinds = pytest.mark.parametrize("name", some(KINDS, *QUICK), scope="module")


@kinds
def test_error_regulate_follows_an_optimizer_and_keeps_nan_out_of_it(name):
    assert_followed_and_kept_clean(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(OPTIMIZERS.keys() - set(KINDS)))
def test_error_regulate_follows_every_other_optimizer_too(name):
    assert_followed_and_kept_clean(name)


def assert_followed_and_kept_clean(name):
    train = regulated_trainer(name)
    plain, _, losses = trainer(OPTIMIZERS[name](), NUM_STEPS, EXTRA_ARGS.get(name))()
    ours, state, _ = train()
    assert np.all(np.isfinite(losses))
    assert_nothing_objected(state, NUM_STEPS)
    rtol = TOLERANCE.get(name, 1e-4)
    chex.assert_trees_all_close(ours, plain, rtol=rtol, atol=rtol / 10)

    params, poisoned, _ = train(poison([60, 90], [40, 91], [92]))
    chex.assert_tree_all_finite(params)
    assert_as_finite_as(poisoned, like=state)
    report = lo.metrics(poisoned)
    assert report["num_skipped"] + report["num_revert_steps"] >= 5
    assert report["num_accepted"] >= NUM_STEPS - 7
    moved = jax.tree.map(lambda p: np.any(p[-1] != p[-10]), params)
    assert moved["hidden"]["w"], "training does not go on"


@kinds
def test_nan_at_the_first_step_keeps_no_optimizer_from_training(name):
    params, state, losses = regulated_trainer(name)(poison(nan_grads=[0]))
    chex.assert_tree_all_finite(params)
    assert losses[-10:].mean() < losses[0]
    assert_as_finite_as(state.inner_state, like=OPTIMIZERS[name]().init(params))


def test_error_regulate_follows_lbfgs_with_its_line_search():
    batch = jax.tree.map(jnp.asarray, digits())

    def value_fn(params):
        return loss_fn(params, batch)

    def signals_of(params, _):
        loss, grads = jax.value_and_grad(value_fn)(params)
        return loss, grads, {"grad": grads, "value_fn": value_fn}

    def train(tx):
        params = jax.tree.map(jnp.asarray, initial_params())
        run = runner(tx, signals_of, values, plainly)
        return run((params, tx.init(params)), jnp.arange(10))

    (plain, _), losses = train(optax.lbfgs())
    (ours, state), _ = train(lo.error_regulate(optax.lbfgs()))
    assert losses[-1] < 0.5 * losses[0]
    assert_nothing_objected(state, 10)
    chex.assert_trees_all_close(ours, plain, rtol=1e-3, atol=1e-4)
