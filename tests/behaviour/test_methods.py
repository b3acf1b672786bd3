"""Every adaptive method that people know, protected: no worse, and alive.

The methods are those of ``benchmarks/recipes.py``, with which ``benchmarks/methods.py``
measures more of them.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import drive
from helpers.benchmarks import benchmark
from optax import contrib
from sklearn.datasets import load_digits

import lalerg_optax as lo

recipes = benchmark("recipes")
METHODS, BARE, REGULATED, SECOND = (
    getattr(recipes, name) for name in ("METHODS", "BARE", "REGULATED", "SECOND")
)

NUM_STEPS = 250
NAN, UPHILL, POISON, LENGTH = 60, 80, 100, 5  # steps of faults
FASTER = 3.0  # than the rates of the benchmark, for a network that is smaller
WORSE, WORSE_WITH_FAULTS = 0.02, 0.05  # at most, of the drop of the loss


class Task(NamedTuple):
    """What is learnt: params at first, loss, all data, and the batches of all steps."""

    params: Any
    loss_fn: Any
    data: tuple
    batches: tuple


def batches_of(data, batch_size):
    rows = np.random.default_rng(0).integers(0, len(data[0]), (NUM_STEPS, batch_size))
    return tuple(a[rows] for a in data)


@functools.cache
def digits():
    """A perceptron tells digits apart."""
    images, labels = load_digits(return_X_y=True)
    data = (images.astype(np.float32) / 16.0, labels.astype(np.int32))
    rng = np.random.default_rng(1)
    params = {
        "hidden": rng.standard_normal((64, 32)).astype(np.float32) / 8.0,
        "out": rng.standard_normal((32, 10)).astype(np.float32) / 6.0,
    }

    def loss_fn(params, batch):
        logits = jax.nn.relu(batch[0] @ params["hidden"]) @ params["out"]
        losses = optax.losses.softmax_cross_entropy_with_integer_labels
        return losses(logits, batch[1]).mean()

    return Task(params, loss_fn, data, batches_of(data, 64))


@functools.cache
def factors():
    """Images and pixels have embeddings; most rows have no gradient at a step."""
    images = load_digits().data[:200]
    images = (images - images.mean()) / images.std()
    places = np.stack(np.meshgrid(*map(np.arange, images.shape), indexing="ij"), -1)
    data = (
        places.reshape(-1, 2).astype(np.int32),
        images.reshape(-1).astype(np.float32),
    )
    rng = np.random.default_rng(2)
    params = {
        name: rng.normal(0.0, 0.3, (size, 6)).astype(np.float32)
        for name, size in zip(("images", "pixels"), images.shape, strict=True)
    }

    def loss_fn(params, batch):
        places, values = batch
        rows = params["images"][places[:, 0]] * params["pixels"][places[:, 1]]
        return jnp.mean((rows.sum(axis=1) - values) ** 2)

    return Task(params, loss_fn, data, batches_of(data, 64))


class End(NamedTuple):
    start_loss: float
    loss: float
    is_alive: bool
    num_skipped: int
    num_revert_steps: int


@functools.cache
def trainer(task_of, name, form, rate):
    """Returns a run over factors of the gradient and batches, compiled once."""
    method, task = METHODS[name], task_of()
    rate = FASTER * method.rate if rate is None else rate
    tx = recipes.optimizer(method, form, NUM_STEPS, rate)

    def step(carry, now):
        params, state = carry
        factor, batch = now
        loss, grads = jax.value_and_grad(lambda p: task.loss_fn(method.seen(p), batch))(
            params
        )
        grads = jax.tree.map(lambda g: factor * g, grads)
        grads = method.given(grads) if form == BARE else grads
        updates, state = tx.update(grads, state, params, value=loss)
        return (recipes.applied(form, params, updates, state), state), None

    @jax.jit
    def run(params, *steps):
        params = method.begin(params)
        (params, state), _ = jax.lax.scan(step, (params, tx.init(params)), steps)
        report = {} if form == BARE else lo.metrics(state)
        return (
            task.loss_fn(recipes.evaluated(method, form, state, params), task.data),
            recipes.is_finite(params),
            report.get("num_skipped", 0),
            report.get("num_revert_steps", 0),
        )

    return run


@functools.cache
def end_of(task_of, name, form, rate=None, with_faults=False):
    task = task_of()
    factor = np.ones(NUM_STEPS, np.float32)
    *inputs, targets = (a.copy() for a in task.batches)
    if with_faults:
        factor[NAN] = np.nan
        factor[UPHILL : UPHILL + LENGTH] = -1e4
        poisoned = targets[POISON : POISON + LENGTH]
        poisoned[...] = np.roll(poisoned, 1, axis=1)  # those of other examples
    start_loss = float(task.loss_fn(task.params, task.data))
    run = trainer(task_of, name, form, rate)
    loss, is_alive, *counts = run(task.params, factor, (*inputs, targets))
    is_alive = bool(is_alive) and np.isfinite(loss)
    return End(start_loss, float(loss), is_alive, *map(int, counts))


SPARSE = {"AdaGrad": 2.0, "Adam": 0.06, "Adafactor": 0.3}  # and their rates
NAN_PROOF = "one rate a tensor"  # its bare form is our own second level
# those that differ in kind
ALWAYS_SECOND = ("AdaGrad", NAN_PROOF)
ALWAYS_REGULATED = (
    *("SGD, momentum", "Adam", "Lion", "Muon", "Adafactor"),
    *("AdamW, warm-up and cosine", "schedule-free (AdamW)", "Lookahead (Adam)"),
)


def cases():
    def marks(name, quick):
        return [] if name in quick else [pytest.mark.slow]

    assert {*ALWAYS_SECOND, *ALWAYS_REGULATED} <= set(METHODS)
    for name, method in METHODS.items():
        case = functools.partial(pytest.param, digits, name)
        pace = marks(name, ALWAYS_REGULATED)
        yield case(REGULATED, None, id=f"{name}-regulated", marks=pace)
        # a schedule is no second level of its own
        if method.micro is not None and not name.startswith("AdamW, "):
            pace = marks(name, ALWAYS_SECOND)
            yield case(SECOND, None, id=f"{name}-second level", marks=pace)
    for name, rate in SPARSE.items():
        pace = marks(name, ("Adam",))
        yield pytest.param(
            *(factors, name, REGULATED, rate), id=f"{name}-sparse", marks=pace
        )


# by module: both tests of a case in turn, so that they share what is compiled
all_cases = pytest.mark.parametrize(
    ("task", "name", "form", "rate"), [*cases()], scope="module"
)


@all_cases
def test_with_nothing_wrong_it_ends_no_worse_than_bare(task, name, form, rate):
    bare, protected = (end_of(task, name, f, rate) for f in (BARE, form))
    drop = bare.start_loss - bare.loss
    assert drop > 0.5 * bare.start_loss, "the method has to have learnt"
    assert protected.loss <= bare.loss + WORSE * drop
    assert protected.is_alive


@all_cases
def test_with_faults_it_lives_and_ends_nearly_as_low(task, name, form, rate):
    bare = end_of(task, name, BARE, rate, with_faults=True)
    is_harmed = not bare.is_alive or bare.loss > bare.start_loss
    assert is_harmed, "the faults have to be ones that matter"
    assert bare.is_alive == (name == NAN_PROOF)
    without = end_of(task, name, form, rate)
    protected = end_of(task, name, form, rate, with_faults=True)
    assert protected.is_alive
    drop = without.start_loss - without.loss
    assert protected.loss <= without.loss + WORSE_WITH_FAULTS * drop
    assert protected.num_skipped >= 2
    # all of the steps uphill are skipped, or it is gone back
    assert protected.num_revert_steps >= 2 or protected.num_skipped > LENGTH


def test_gradients_of_embeddings_are_mostly_zero():
    task = factors()
    grads = jax.grad(task.loss_fn)(task.params, [a[0] for a in task.batches])
    is_touched = np.any(np.asarray(grads["images"]) != 0.0, axis=1)
    assert 0.1 < np.mean(is_touched) < 0.35


# ---- What has a form of its own ------------------------------------------------------

LOOKAHEAD = optax.lookahead(optax.sgd(0.1), sync_period=3, slow_step_size=0.5)


def test_a_revert_takes_fast_and_slow_params_of_lookahead_back():
    tx = lo.error_regulate(LOOKAHEAD)
    good = optax.LookaheadParams(jnp.array([1.0, 2.0]), jnp.array([0.5, 1.5]))
    state, params = tx.init(good), jax.tree.map(lambda p: 1e3 * p, good)
    grads = jax.tree.map(jnp.ones_like, good)
    for _ in range(2):
        updates, state = tx.update(grads, state, params, value=jnp.inf)
        params = lo.apply_updates(params, updates, state)
    jax.tree.map(np.testing.assert_array_equal, params, good)


def test_protected_lookahead_takes_the_steps_of_lookahead():
    def loss_fn(params):
        return jnp.sum(params.fast**2)

    tx = lo.error_regulate(LOOKAHEAD)
    params = bare = optax.LookaheadParams.init_synced(jnp.array([1.0, -2.0]))
    state, bare_state = tx.init(params), LOOKAHEAD.init(bare)
    for _ in range(7):
        loss, grads = jax.value_and_grad(loss_fn)(params)
        updates, state = tx.update(grads, state, params, value=loss)
        params = optax.apply_updates(params, updates)
        grads = jax.grad(loss_fn)(bare).fast
        updates, bare_state = LOOKAHEAD.update(grads, bare_state, bare)
        bare = optax.apply_updates(bare, updates)
    assert np.any(params.fast != params.slow)
    for x, y in zip(params, bare, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-6)


def test_schedule_free_is_evaluated_with_the_state_inside_of_the_regulator():
    tx = lo.error_regulate(contrib.schedule_free_adamw(0.1))
    params = jnp.ones(2)
    state = tx.init(params)
    found = contrib.schedule_free_eval_params(state.inner_state, params)
    np.testing.assert_allclose(found, params, rtol=1e-6)
    with pytest.raises(AttributeError, match="no field 'b1'"):
        contrib.schedule_free_eval_params(state, params)


# ---- What is refused -----------------------------------------------------------------

BOTH = optax.LookaheadParams.init_synced(jnp.ones(2))
ADVERSARY = optax.chain(contrib.normalize(), optax.sgd(0.05))
SAM = contrib.sam(optax.sgd(0.1), ADVERSARY)

# maker, params, gradients, error, what it says
REFUSED = {
    "lookahead with plain params": (
        lambda: lo.error_regulate(LOOKAHEAD),
        jnp.ones(2),
        jnp.ones(2),
        (ValueError, r"params = optax\.LookaheadParams\.init_synced\(params\) with"),
    ),
    "lookahead with the gradient of fast params": (
        lambda: lo.error_regulate(LOOKAHEAD),
        BOTH,
        jnp.ones(2),
        (ValueError, r"not like the params: there is no leaf \.fast"),
    ),
    "lookahead in a chain": (
        lambda: lo.error_regulate(optax.chain(optax.clip(1.0), LOOKAHEAD)),
        BOTH,
        BOTH,
        (ValueError, r"wrap it as a whole, error_regulate\(optax\.lookahead"),
    ),
    "lookahead as second level": (
        lambda: lo.lalerg(micro=LOOKAHEAD),
        BOTH,
        BOTH,
        (ValueError, r"no part of a chain, nor a second level"),
    ),
    "regulator in lookahead": (
        lambda: optax.lookahead(lo.error_regulate(optax.sgd(0.1)), 3, 0.5),
        BOTH,
        jnp.ones(2),
        (TypeError, r"update needs the keyword 'value'.*without_value"),
    ),
    "sam": (
        lambda: lo.error_regulate(SAM),
        jnp.ones(2),
        jnp.ones(2),
        (TypeError, r"inner must take any extra argument .* grad_fn alone\. Wrap it"),
    ),
    "sam as second level": (
        lambda: lo.lalerg(micro=SAM),
        jnp.ones(2),
        jnp.ones(2),
        (TypeError, r"micro must take any extra argument .* grad_fn alone\. Wrap it"),
    ),
    "regulator in sam": (
        lambda: contrib.sam(lo.error_regulate(optax.sgd(0.1)), ADVERSARY),
        jnp.ones(2),
        jnp.ones(2),
        (TypeError, r"sam.*unexpected keyword argument 'value'"),
    ),
    "regulator in split_real_and_imaginary": (
        lambda: contrib.split_real_and_imaginary(lo.lalerg()),
        jnp.ones(2),
        jnp.ones(2),
        (TypeError, r"update needs the keyword 'value'.*without_value"),
    ),
}


@pytest.mark.parametrize(
    ("make", "params", "grads", "refusal"), REFUSED.values(), ids=REFUSED
)
def test_what_cannot_work_is_refused_with_what_to_do(make, params, grads, refusal):
    error, message = refusal

    def step():
        tx = optax.with_extra_args_support(make())
        return tx.update(grads, tx.init(params), params, value=1.0)

    with pytest.raises(error, match=message):
        step()


def test_sam_that_drops_what_it_does_not_know_can_be_protected():
    """The wrapping that the message asks for."""
    inner = optax.GradientTransformationExtraArgs(
        SAM.init,
        lambda updates, state, params=None, **extra_args: SAM.update(
            updates, state, params
        ),
    )
    tx, params = lo.error_regulate(inner), jnp.array([1.0, -2.0])

    task = drive.Task(params, drive.square, jnp.zeros(60))
    losses = drive.train(tx, task, see=drive.values)[2]
    assert losses[-1] < 0.05 * losses[0]
