"""Nothing is censored: is rare data learnt, or taken for harm?

A guard that takes a *hard* batch for a *harmful* update silently keeps a model from
learning what is rare. Here every optimizer trains on honest streams of data as people
have them: batches of a rare kind, blocks, a kind that comes up in mid-run, two levels
of loss, class imbalance, buckets of length, two tasks on one trunk, classes that are
added, inputs that change, rewards that are sparse. Nothing is wrong with any of them.

A run *passes* when its final loss on the rare part of the training data is at most 1.10
times that of bare AdamW plus 0.05, and no kind of batch was rejected more than five
times. In continual learning the mean loss of the whole run takes its place, at most
1.05 times AdamW's. AdamW's is the mean of its seeds or, because they differ where data
are rare, the worst of them: both are told. What a failure looks like is shown by
"adamw, blind", which drops every batch that has something rare in it.

    python benchmarks/mixtures.py --out benchmarks/results/mixtures   # half an hour
    python benchmarks/mixtures.py --quick                             # about a minute
    python benchmarks/mixtures.py --tasks CHOOSE --only lalerg adamw  # some of it
    python benchmarks/mixtures.py --report-only                       # the tables

Constants of the library may be chosen on the streams of ``CHOOSE``, the others are
there to report; both words name their streams for ``--tasks``. Every optimizer has the
rate of AdamW's that is best for the stream, of seven half decades, by the mean of the
losses on all parts of the data (in continual learning, by the loss of the run). What is
stored is not run again, so that a run may be stopped and goes on later; ``--force``
runs it anew.
"""

import html.entities
import inspect
import time
from collections.abc import Callable, Iterable, Iterator
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from decades import best_index, linear
from faults import ADAMW, WEIGHT_DECAY, Optimizer
from faults import OPTIMIZERS as ALL_OPTIMIZERS
from flax import linen as nn
from jax import lax
from rich.progress import Progress
from store import Store, opened, options_of, publish, rounded, table
from tasks import (
    MLP,
    Batch,
    RecurrentNetwork,
    ResidualMLP,
    _cross_entropy,
    _digits,
    _mnist,
    _source,
    _split,
    _squared_error,
    _standardized,
)

import lalerg_optax as lo

PyTree = Any
Losses = tuple[jax.Array, jax.Array]

RATES = tuple(float(f"{10 ** (k / 2):.5g}") for k in range(-8, -1))
NUM_SEEDS = 3
FACTOR, SLACK = 1.10, 0.05  # of a loss on the rare part, against bare AdamW's
RUN_FACTOR = 1.05  # of a mean loss over the run
MOST_REJECTED = 5  # batches of any kind
CHOOSE, REPORT = "CHOOSE", "REPORT"
TUNING = "adamw, half decades"
CHUNK = 256  # examples at once where a loss on a part of the data is taken
PHASE = 1000  # steps from change to change in continual learning
DISCOUNT = 0.9
BOUND = getattr(lo.Verdict, "BOUND", None)  # accepted, with a bounded gradient


# When


class When(NamedTuple):
    """When a batch is rare, or an example; numbers, so that one program has them all.

    Attributes:
      share: of steps, at random; of examples where batches are mixed; of examples that
        repeat what was before where learning is continual.
      first: the step from which on there is anything rare.
      period: if above 0, the last ``length`` of so many steps are rare instead.
      length: see above.
    """

    share: float = 0.0
    first: int = 0
    period: int = 0
    length: int = 1


Kinds = Callable[[jax.Array, jax.Array, When, int, int], jax.Array]


def whole(
    step: jax.Array, key: jax.Array, when: When, batch_size: int, num_kinds: int
) -> jax.Array:
    """Returns one kind for all of a batch: the last one if it is rare."""
    drawn, other = jax.random.split(key)
    is_turn = step % jnp.maximum(when.period, 1) >= when.period - when.length
    is_drawn = jax.random.uniform(drawn) < when.share
    is_rare = jnp.where(when.period > 0, is_turn, is_drawn) & (step >= when.first)
    common = jax.random.randint(other, (), 0, num_kinds - 1)
    return jnp.full(batch_size, jnp.where(is_rare, num_kinds - 1, common))


def mixed(
    step: jax.Array, key: jax.Array, when: When, batch_size: int, num_kinds: int
) -> jax.Array:
    """Returns kinds of examples that are drawn independently; the last one is rare."""
    del step
    is_rare = jax.random.uniform(key, (batch_size,)) < when.share
    return jnp.where(is_rare, num_kinds - 1, 0)


def phased(
    step: jax.Array, key: jax.Array, when: When, batch_size: int, num_kinds: int
) -> jax.Array:
    """Returns kinds of which there is another one in each phase."""
    repeats, which = jax.random.split(key)
    now = jnp.minimum(step // PHASE, num_kinds - 1)
    so_far = jax.random.randint(which, (batch_size,), 0, now + 1)
    is_repeated = jax.random.uniform(repeats, (batch_size,)) < when.share
    return jnp.where(is_repeated, so_far, now)


# Problems


class Problem(NamedTuple):
    """A model, its loss, and a stream of its data.

    Attributes:
      init: key to params.
      loss: (params, batch) to the mean loss.
      data: arrays with the examples along the first axis.
      draw: (step, key, when) to the indices of a batch and its kind.
      final: params to the losses on the common part of the data and on the rare one.
      num_kinds: kinds of batches; the last one is the rare one.
    """

    init: Callable[[jax.Array], PyTree]
    loss: Callable[[PyTree, Batch], jax.Array]
    data: Batch
    draw: Callable[[jax.Array, jax.Array, When], tuple[jax.Array, jax.Array]]
    final: Callable[[PyTree], Losses]
    num_kinds: int


def drawn(parts: list[np.ndarray], batch_size: int, kinds_of: Kinds) -> Any:
    """Returns a ``draw`` that chooses kinds first, and then an example of each."""
    sizes = jnp.asarray([len(part) for part in parts])
    longest = max(map(len, parts))
    places = jnp.asarray(np.stack([np.resize(part, longest) for part in parts]))

    def draw(step: jax.Array, key: jax.Array, when: When) -> PyTree:
        chosen, which = jax.random.split(jax.random.fold_in(key, step))
        kinds = kinds_of(step, chosen, when, batch_size, len(parts))
        number = jax.random.randint(which, kinds.shape, 0, sizes[kinds])
        return places[kinds, number], kinds.max()

    return draw


def trained(
    model: nn.Module,
    criterion: Callable[..., jax.Array],
    data: Batch,
    parts: list[np.ndarray],
    batch_size: int,
    kinds_of: Kinds,
) -> Problem:
    """A problem from a Flax model whose input is the first array of a batch.

    Args:
      model: the model.
      criterion: compares what it makes of the input with all other arrays.
      data: the training set.
      parts: indices of the examples of each kind; those of the last are the rare part.
      batch_size: examples a step.
      kinds_of: chooses the kinds of a batch.
    """

    def init(key: jax.Array) -> PyTree:
        return model.init(key, data[0][:2], is_training=True)

    def loss(params: PyTree, batch: Batch) -> jax.Array:
        return criterion(model.apply(params, batch[0], is_training=True), *batch[1:])

    def loss_on(part: np.ndarray, params: PyTree) -> jax.Array:
        num_chunks = -(-len(part) // CHUNK)
        cut = len(part) - len(part) % num_chunks  # pieces of one size
        pieces = jnp.asarray(part[:cut].reshape(num_chunks, -1))
        losses = lax.map(lambda i: loss(params, tuple(a[i] for a in data)), pieces)
        return losses.mean()

    def final(params: PyTree) -> Losses:
        common = np.concatenate(parts[:-1])
        return loss_on(common, params), loss_on(parts[-1], params)

    draw = drawn(parts, batch_size, kinds_of)
    return Problem(init, loss, data, draw, final, len(parts))


def parts_of(kinds: Any) -> list[np.ndarray]:
    """Returns the indices of each kind, in order."""
    kinds = np.asarray(kinds)
    return [np.flatnonzero(kinds == kind) for kind in np.unique(kinds)]


def digits(batch_size: int, kinds_of: Kinds) -> Problem:
    """Perceptron, digits: 8 and 9 are rare."""
    data, _ = _split(*_digits())
    parts = parts_of(np.asarray(data[1]) >= 8)
    return trained(MLP((32, 10)), _cross_entropy, data, parts, batch_size, kinds_of)


def images() -> Problem:
    """Deep residual network without normalisation, MNIST: 8 and 9 are rare."""
    pixels, labels = _mnist()
    data, _ = _split(pixels.reshape(len(pixels), -1) - pixels.mean(), labels)
    parts = parts_of(np.asarray(data[1]) >= 8)
    return trained(ResidualMLP(24), _cross_entropy, data, parts, 32, whole)


def levels(scale: float, noise: float) -> Problem:
    """Regression with a perceptron, diabetes: two domains, the sexes.

    Args:
      scale: factor of the targets of the rare domain.
      noise: its standard deviation in the targets of the rare domain; a tenth of it in
        those of the common one.
    """
    from sklearn.datasets import load_diabetes

    bunch = load_diabetes()
    is_rare = bunch.data[:, bunch.feature_names.index("sex")] > 0.0
    spread = np.random.default_rng(0).normal(0.0, noise, len(is_rare))
    targets = _standardized(bunch.target) * np.where(is_rare, scale, 1.0)
    targets = targets + spread * np.where(is_rare, 1.0, 0.1)
    data, _ = _split(_standardized(bunch.data), targets, is_rare.astype(int))
    parts = parts_of(data[2])
    return trained(MLP((64, 64, 1)), _squared_error, data[:2], parts, 32, whole)


def _masked_cross_entropy(
    logits: jax.Array, labels: jax.Array, mask: jax.Array
) -> jax.Array:
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return (mask * losses).sum() / mask.sum()


def buckets() -> Problem:
    """Recurrent network, lines of source text: those of a table, long, are rare.

    There are short and longer lines of code, and the lines of a table of characters;
    the mask ends with a line's last character.
    """
    code, entities = _source().splitlines(), inspect.getsource(html.entities)
    bounds = {(1, 10): code, (11, 22): code, (23, 40): entities.splitlines()}
    rng = np.random.default_rng(0)
    coded: list[bytes] = []
    kinds: list[int] = []
    for kind, ((least, most), lines) in enumerate(bounds.items()):
        found = [f"\n{x}\n".encode() for x in lines if least <= len(x) <= most]
        chosen = [found[i] for i in rng.permutation(len(found))[:600]]
        coded += chosen
        kinds += [kind] * len(chosen)
    text = np.zeros((len(coded), max(map(len, coded))), np.uint8)
    for row, line in zip(text, coded, strict=True):
        row[: len(line)] = np.frombuffer(line, np.uint8)
    letters, codes = np.unique(text, return_inverse=True)
    codes = jnp.asarray(codes.reshape(text.shape), jnp.int32)
    data = codes[:, :-1], codes[:, 1:], jnp.asarray(text[:, 1:] > 0, jnp.float32)
    model = RecurrentNetwork(len(letters), width=24)
    return trained(model, _masked_cross_entropy, data, parts_of(kinds), 8, whole)


def _two_heads(
    second: Callable[[jax.Array, jax.Array], jax.Array],
) -> Callable[..., jax.Array]:
    """Returns a criterion: ten logits of the first task, one output of the second."""

    def criterion(
        out: jax.Array, labels: jax.Array, targets: jax.Array, is_second: jax.Array
    ) -> jax.Array:
        first = optax.softmax_cross_entropy_with_integer_labels(out[:, :10], labels)
        return jnp.where(is_second, second(out[:, 10], targets), first).mean()

    return criterion


def heads(
    x: np.ndarray, targets: np.ndarray, second: Callable[..., jax.Array]
) -> Problem:
    """Perceptron with two heads, digits: batches of a second task are rare.

    Args:
      x: inputs of the second task, of at most 64 features.
      targets: what one output is compared with.
      second: (output, target) to the losses of the second task.
    """
    pixels, labels = _digits()
    padded = np.pad(x, ((0, 0), (0, pixels.shape[1] - x.shape[1])))
    is_second = np.repeat([0, 1], [len(pixels), len(x)])
    data, _ = _split(
        np.concatenate([pixels, padded]),
        np.concatenate([labels, np.zeros(len(x), int)]),
        np.concatenate([np.zeros(len(pixels)), targets]),
        is_second,
    )
    parts = parts_of(data[3])
    return trained(MLP((32, 11)), _two_heads(second), data, parts, 64, whole)


def sums() -> Problem:
    """Perceptron with two heads, digits: sums of pixels are the second task."""
    x, _ = _digits()
    return heads(x, _standardized(x.sum(axis=1)), lambda out, t: (out - t) ** 2)


def cancer() -> tuple[np.ndarray, np.ndarray]:
    """Returns the features of breast cancer, in [0, 1], and which is malignant.

    They are not centred: a network that is odd at the start would learn of malignant
    ones whatever it learns of benign ones.
    """
    from sklearn.datasets import load_breast_cancer

    bunch = load_breast_cancer()
    x = bunch.data - bunch.data.min(axis=0)
    return x / x.max(axis=0), 1.0 - bunch.target


def diagnosis() -> Problem:
    """Perceptron with two heads, digits: breast cancer is the second task."""
    return heads(*cancer(), optax.sigmoid_binary_cross_entropy)


def positives(batch_size: int) -> Problem:
    """Small tanh network, breast cancer: malignant ones are rare."""
    data, _ = _split(*cancer())

    def criterion(out: jax.Array, target: jax.Array) -> jax.Array:
        return optax.sigmoid_binary_cross_entropy(out[:, 0], target).mean()

    model, parts = MLP((16, 1), nn.tanh), parts_of(data[1])
    return trained(model, criterion, data, parts, batch_size, mixed)


def classes() -> Problem:
    """Perceptron, digits: two more classes in each phase."""
    data, _ = _split(*_digits())
    parts = parts_of(np.asarray(data[1]) // 2)
    return trained(MLP((32, 10)), _cross_entropy, data, parts, 32, phased)


def permuted(num_phases: int = 5) -> Problem:
    """Perceptron, digits: pixels in another order in each phase."""
    (x, labels), _ = _split(*_digits())
    rng = np.random.default_rng(0)
    orders = [rng.permutation(x.shape[1]) for _ in range(num_phases)]
    data = (
        jnp.concatenate([x[:, order] for order in orders]),
        jnp.tile(labels, num_phases),
    )
    parts = parts_of(np.repeat(np.arange(num_phases), len(x)))
    return trained(MLP((32, 10)), _cross_entropy, data, parts, 32, phased)


def walk(num_states: int, share_right: float, num_steps: int = 50_000) -> np.ndarray:
    """Returns transitions of a random walk in a corridor, as 2 * state + action.

    It begins anew at the left end whenever it leaves at the right one.
    """
    goes_right = np.random.default_rng(0).random(num_steps) < share_right
    transitions, state = np.zeros(num_steps, int), 0
    for i, right in enumerate(goes_right):
        transitions[i] = 2 * state + right
        state = max(0, state + (1 if right else -1)) % num_states
    return transitions


def corridor(model: nn.Module, num_states: int, share_right: float) -> Problem:
    """Q-learning in a corridor with a reward at its end, online, batches of one.

    The policy is random. What is known of it is the value of the best one; the loss on
    the rare part is the mean squared error of all values in units of their own mean
    square, that on the common part the temporal difference error.

    Args:
      model: states to the values of two actions, left and right.
      num_states: length of the corridor.
      share_right: of the steps that the policy takes to the right.
    """
    states = np.eye(num_states)
    here, right = np.divmod(np.arange(2 * num_states), 2)
    there = np.maximum(0, here + 2 * right - 1)
    is_end = there == num_states
    there = there % num_states
    values = np.zeros((num_states, 2))
    for _ in range(1000):
        values = is_end + DISCOUNT * ~is_end * values[there].max(axis=1)
        values = values.reshape(num_states, 2)
    reward = 1.0 / np.sqrt(np.mean(values**2))
    best = jnp.asarray(reward * values, jnp.float32)
    data = (
        *(jnp.asarray(a, jnp.float32) for a in (states[here], states[there])),
        *(jnp.asarray(a) for a in (right, reward * is_end, ~is_end)),
    )
    transitions = jnp.asarray(walk(num_states, share_right))

    def init(key: jax.Array) -> PyTree:
        return model.init(key, data[0][:2], is_training=True)

    def loss(params: PyTree, batch: Batch) -> jax.Array:
        *around, action, gain, goes_on = batch
        value, to_come = (model.apply(params, s, is_training=True) for s in around)
        value = jnp.take_along_axis(value, action[:, None], axis=1)[:, 0]
        goal = gain + DISCOUNT * goes_on * to_come.max(axis=1)
        return jnp.mean((value - lax.stop_gradient(goal)) ** 2)

    def draw(step: jax.Array, key: jax.Array, when: When) -> PyTree:
        first = jax.random.randint(key, (), 0, len(transitions))
        now = transitions[(first + step) % len(transitions)]
        return now[None], jnp.asarray(is_end)[now].astype(jnp.int32)

    def final(params: PyTree) -> Losses:
        value = model.apply(params, jnp.asarray(states), is_training=True)
        return loss(params, data), jnp.mean((value - best) ** 2)

    return Problem(init, loss, data, draw, final, 2)


# Streams


class Family(NamedTuple):
    """Streams that are run in one program.

    Attributes:
      make: makes the problem.
      num_steps: steps of a run.
      is_decayed: whether the rate decays to zero, linearly; else it is constant.
      is_continual: whether what counts is the mean loss over the run.
    """

    make: Callable[[], Problem]
    num_steps: int
    is_decayed: bool = False
    is_continual: bool = False


class Stream(NamedTuple):
    """A stream of data.

    Attributes:
      name: how the tables call it.
      half: ``CHOOSE`` if constants of the library may be chosen on it, or ``REPORT``.
      family: problem and length.
      note: what is rare in it, and when.
      when: the same in numbers.
    """

    name: str
    half: str
    family: str
    note: str
    when: When = When()


FAMILIES = {
    "digits": Family(partial(digits, 64, whole), 6000),
    "mixed 8": Family(partial(digits, 8, mixed), 6000, is_decayed=True),
    "mixed 64": Family(partial(digits, 64, mixed), 3000, is_decayed=True),
    "images": Family(images, 1600, is_decayed=True),
    "scales": Family(partial(levels, 10.0, 0.0), 3000, is_decayed=True),
    "noises": Family(partial(levels, 1.0, 3.0), 3000, is_decayed=True),
    "buckets": Family(buckets, 900, is_decayed=True),
    "sums": Family(sums, 3000, is_decayed=True),
    "diagnosis": Family(diagnosis, 3000),
    "classes": Family(classes, 5 * PHASE, is_continual=True),
    "permuted": Family(permuted, 5 * PHASE, is_continual=True),
    "corridor of 4": Family(partial(corridor, MLP((2,)), 4, 0.9), 4000),
    "corridor of 7": Family(partial(corridor, MLP((16, 2), nn.tanh), 7, 0.5), 6000),
    "positives 1": Family(partial(positives, 1), 6000, is_decayed=True),
    "positives 8": Family(partial(positives, 8), 3000, is_decayed=True),
}
_STREAMS = (
    Stream("rare_10", CHOOSE, "digits", "1 batch in 10", When(1 / 10)),
    Stream("rare_20", REPORT, "digits", "1 batch in 20", When(1 / 20)),
    Stream("rare_50", CHOOSE, "digits", "1 batch in 50", When(1 / 50)),
    Stream("rare_100", REPORT, "digits", "1 batch in 100", When(1 / 100)),
    Stream("rare_200", CHOOSE, "digits", "1 batch in 200", When(1 / 200)),
    Stream("every_20", REPORT, "digits", "each 20th batch", When(period=20)),
    Stream("every_100", CHOOSE, "digits", "each 100th batch", When(period=100)),
    Stream("blocks", REPORT, "digits", "30 batches in 330", When(0.0, 0, 330, 30)),
    Stream("late", CHOOSE, "digits", "1 in 20 from step 3,000 on", When(1 / 20, 3000)),
    Stream("mixed_8_0.1", CHOOSE, "mixed 8", "0.1 % of examples", When(0.001)),
    Stream("mixed_8_0.3", REPORT, "mixed 8", "0.3 % of examples", When(0.003)),
    Stream("mixed_8_1", CHOOSE, "mixed 8", "1 % of examples", When(0.01)),
    Stream("mixed_8_3", REPORT, "mixed 8", "3 % of examples", When(0.03)),
    Stream("mixed_64_0.1", REPORT, "mixed 64", "0.1 % of examples", When(0.001)),
    Stream("mixed_64_0.3", CHOOSE, "mixed 64", "0.3 % of examples", When(0.003)),
    Stream("mixed_64_1", REPORT, "mixed 64", "1 % of examples", When(0.01)),
    Stream("mixed_64_3", CHOOSE, "mixed 64", "3 % of examples", When(0.03)),
    Stream("images_20", CHOOSE, "images", "1 batch in 20", When(1 / 20)),
    Stream("images_100", REPORT, "images", "1 batch in 100", When(1 / 100)),
    Stream("scales", CHOOSE, "scales", "1 in 30, targets times 10", When(1 / 30)),
    Stream("noises", REPORT, "noises", "1 in 30, noise times 10", When(1 / 30)),
    Stream("buckets", REPORT, "buckets", "1 batch in 30", When(1 / 30)),
    Stream("sums", CHOOSE, "sums", "each 50th batch", When(period=50)),
    Stream("diagnosis", REPORT, "diagnosis", "each 50th batch", When(period=50)),
    Stream("classes", CHOOSE, "classes", "the new classes alone"),
    Stream("growing", REPORT, "classes", "all classes so far", When(1.0)),
    Stream("permuted", REPORT, "permuted", "the new order alone"),
    Stream("corridor_5", CHOOSE, "corridor of 4", "a reward in 5 steps"),
    Stream("corridor_50", REPORT, "corridor of 7", "a reward in 56 steps"),
    Stream("positives_1_1", CHOOSE, "positives 1", "1 % of examples", When(0.01)),
    Stream("positives_1_3", REPORT, "positives 1", "3 % of examples", When(0.03)),
    Stream("positives_1_10", CHOOSE, "positives 1", "10 % of examples", When(0.1)),
    Stream("positives_8_1", REPORT, "positives 8", "1 % of examples", When(0.01)),
    Stream("positives_8_3", CHOOSE, "positives 8", "3 % of examples", When(0.03)),
    Stream("positives_8_10", REPORT, "positives 8", "10 % of examples", When(0.1)),
)
STREAMS = {stream.name: stream for stream in _STREAMS}
QUICK_STREAMS = ("rare_20", "scales")
QUICK_OPTIMIZERS = ("adamw", "error_regulate(adamw)")
QUICK_STEPS = 300


# Optimizers


def blind(inner: optax.GradientTransformation) -> Any:
    """Drops every batch that has something rare in it: what a censor would do."""

    def update_fn(
        updates: PyTree,
        state: PyTree,
        params: Any = None,
        *,
        is_rare: Any,
        **extra: Any,
    ) -> PyTree:
        del extra
        after = inner.update(updates, state, params)
        before = optax.tree.zeros_like(updates), state
        return jax.tree.map(lambda b, a: jnp.where(is_rare, b, a), before, after)

    return optax.GradientTransformationExtraArgs(inner.init, update_fn)


BLIND = Optimizer(
    "adamw, blind",
    lambda rate: blind(ADAMW.make(rate)),
    "drops whatever has something rare in it, to show what a failure looks like",
)
OPTIMIZERS = (
    *(
        optimizer
        for optimizer in ALL_OPTIMIZERS
        if optimizer.is_own or optimizer.name in ("adamw", "skip_step(adamw)")
    ),
    Optimizer(
        "lalerg, b2 = 0.999",
        lambda rate: lo.lalerg(rate, weight_decay=WEIGHT_DECAY, b2=0.999),
        "a second moment that remembers ten times as long",
        is_own=True,
    ),
    BLIND,
)


# Runs


class Prepared(NamedTuple):
    """What is the same for every optimizer.

    Attributes:
      problem: the problem.
      params: those at the start, [seed].
      indices: of all batches, [stream, seed, step, example].
      kinds: of all batches, [stream, seed, step].
    """

    problem: Problem
    params: PyTree
    indices: jax.Array
    kinds: jax.Array


def prepare(
    family: Family, whens: Iterable[When], num_seeds: int, num_steps: int
) -> Prepared:
    """Draws start and batches of all runs of a family."""
    problem = family.make()
    keys = jax.vmap(jax.random.key)(jnp.arange(num_seeds))
    params = jax.jit(jax.vmap(problem.init))(keys)

    @jax.jit
    def plan(when: When, key: jax.Array) -> PyTree:
        steps = jnp.arange(num_steps)
        return jax.vmap(problem.draw, (0, None, None))(steps, key, when)

    numbers = When(*map(jnp.asarray, zip(*whens, strict=True)))
    indices, kinds = jax.vmap(jax.vmap(plan, (None, 0)), (0, None))(numbers, keys)
    return Prepared(problem, params, indices, kinds)


def is_zero(tree: PyTree) -> jax.Array:
    """Returns whether every entry is."""
    return jnp.stack([jnp.all(x == 0) for x in jax.tree.leaves(tree)]).all()


def run(
    problem: Problem,
    optimizer: Optimizer,
    is_decayed: bool,
    rate: jax.Array,
    params: PyTree,
    indices: jax.Array,
    kinds: jax.Array,
) -> dict[str, jax.Array]:
    """One run; a pure function of the last four."""
    schedule = linear(rate, len(kinds)) if is_decayed else rate
    tx = optax.with_extra_args_support(optimizer.make(schedule))

    def step(carry: PyTree, now: PyTree) -> tuple[PyTree, PyTree]:
        params, state = carry
        chosen, kind = now
        batch = tuple(a[chosen] for a in problem.data)
        loss, grads = jax.value_and_grad(problem.loss)(params, batch)
        is_rare = kind == problem.num_kinds - 1
        updates, state = tx.update(grads, state, params, value=loss, is_rare=is_rare)
        if optimizer.is_own:
            verdict = lo.metrics(state)["verdict"]
            params = lo.apply_updates(params, updates, state)
        else:  # of a gradient that is not zero AdamW always makes an update
            is_skipped = is_zero(updates) & ~is_zero(grads)
            verdict = jnp.where(is_skipped, lo.Verdict.SKIP, lo.Verdict.ACCEPT)
            params = optax.apply_updates(params, updates)
        return (params, state), (loss, verdict.astype(jnp.int8))

    (params, state), (losses, verdicts) = lax.scan(
        step, (params, tx.init(params)), (indices, kinds)
    )
    is_skipped, is_reverted = (
        verdicts == verdict for verdict in (lo.Verdict.SKIP, lo.Verdict.REVERT)
    )
    is_rejected = is_skipped | is_reverted
    told = {
        "num_accepted": (~is_rejected).sum(),
        "num_skipped": is_skipped.sum(),
        "num_reverted": is_reverted.sum(),
    }
    if optimizer.is_own:
        report = lo.metrics(state)
        told = {name: report[name] for name in told}
    is_bound = jnp.zeros_like(is_rejected) if BOUND is None else verdicts == BOUND
    common_loss, rare_loss = problem.final(params)
    return {
        "rare_loss": rare_loss,
        "common_loss": common_loss,
        "mean_loss": losses.mean(),
        **told,
        "steps": by_kind(jnp.ones_like(is_rejected), kinds, problem.num_kinds),
        "rejected": by_kind(is_rejected, kinds, problem.num_kinds),
        "bound": by_kind(is_bound, kinds, problem.num_kinds),
    }


def by_kind(flags: jax.Array, kinds: jax.Array, num_kinds: int) -> jax.Array:
    """Returns how many steps of each kind have a flag."""
    return (flags[:, None] & (kinds[:, None] == jnp.arange(num_kinds))).sum(axis=0)


def measure(
    prepared: Prepared, optimizer: Optimizer, family: Family, rates: list[float]
) -> list[dict[str, Any]]:
    """Runs all streams of a family and all seeds, each stream at its rate."""
    problem, params, indices, kinds = prepared
    started = time.perf_counter()
    one = partial(run, problem, optimizer, family.is_decayed)
    cells = jax.jit(jax.vmap(jax.vmap(one, (None, 0, 0, 0)), (0, None, 0, 0)))
    out = cells(jnp.asarray(rates, jnp.float32), params, indices, kinds)
    out = jax.tree.map(np.asarray, out)
    seconds = round((time.perf_counter() - started) / len(rates), 1)
    return [
        {"seconds": seconds} | {name: rounded(x[i]) for name, x in out.items()}
        for i in range(len(rates))
    ]


def tune(prepared: Prepared, family: Family, rates: list[float]) -> list[Any]:
    """Runs AdamW at all rates; returns what it is judged by, [rate, seed] a stream."""
    problem, params, indices, kinds = prepared
    started = time.perf_counter()

    def one(rate: jax.Array, *given: PyTree) -> jax.Array:
        end = run(problem, ADAMW, family.is_decayed, rate, *given)
        if family.is_continual:
            return end["mean_loss"]
        return (end["common_loss"] + end["rare_loss"]) / 2.0

    seeds = jax.vmap(one, (None, 0, 0, 0))
    every = jax.vmap(jax.vmap(seeds, (0, None, None, None)), (None, None, 0, 0))
    out = jax.jit(every)(jnp.asarray(rates, jnp.float32), params, indices, kinds)
    losses = np.asarray(out)
    seconds = round((time.perf_counter() - started) / len(losses), 1)
    return [{"seconds": seconds, "losses": rounded(x)} for x in losses]


class Runs(Store):
    """What has been measured, and what follows from it."""

    identity = ("stream", "optimizer")

    def get(self, stream: str, name: str, field: str) -> np.ndarray:
        """Returns a field of all seeds, NaN where it was not finite."""
        return np.asarray(self.runs[stream, name][field], float)

    def has(self, stream: str, *names: str) -> bool:
        """Returns whether these optimizers were run on a stream."""
        return all((stream, name) in self.runs for name in names)

    def rate(self, stream: str) -> float:
        """Returns AdamW's best rate."""
        tuned = self.runs[stream, TUNING]
        return tuned["rates"][best_index(tuned["losses"])]

    def measured(self, stream: str, name: str) -> np.ndarray:
        """Returns the losses that count."""
        is_continual = FAMILIES[STREAMS[stream].family].is_continual
        return self.get(stream, name, "mean_loss" if is_continual else "rare_loss")

    def is_learnt(
        self, stream: str, name: str, reference: Callable[..., Any] = np.mean
    ) -> np.ndarray:
        """Returns whether the loss is near enough to that of bare AdamW, by seed."""
        base = reference(self.measured(stream, ADAMW.name))
        is_continual = FAMILIES[STREAMS[stream].family].is_continual
        limit = RUN_FACTOR * base if is_continual else FACTOR * base + SLACK
        return self.measured(stream, name) <= limit  # a NaN is not

    def is_spared(self, stream: str, name: str) -> np.ndarray:
        """Returns whether no kind of batch was rejected often, by seed."""
        rejected = self.get(stream, name, "rejected")
        return rejected.max(axis=1) <= MOST_REJECTED

    def passes(
        self, stream: str, name: str, reference: Callable[..., Any] = np.mean
    ) -> np.ndarray:
        """Returns whether both is so, by seed."""
        is_learnt = self.is_learnt(stream, name, reference)
        return is_learnt & self.is_spared(stream, name)


def jobs_of(
    results: Runs,
    family: Family,
    group: list[Stream],
    optimizers: list[Optimizer],
    quick: bool,
) -> Iterator[tuple[str, list[dict[str, Any]], Callable[[], list[Any]]]]:
    """Yields what is run of some streams of a family: tuning first, as all need a rate.

    Each is a name, what tells its runs from others, by stream, and a function that runs
    all streams when it is first called.
    """
    size = {
        "num_seeds": NUM_SEEDS,
        "num_steps": QUICK_STEPS if quick else family.num_steps,
    }
    prepared = cache(partial(prepare, family, [s.when for s in group], **size))
    same = [
        size | {"when": list(s.when), "is_decayed": family.is_decayed} for s in group
    ]
    tried = list(RATES[::3] if quick else RATES)
    cells = [c | {"rates": tried} for c in same]
    yield TUNING, cells, cache(lambda: tune(prepared(), family, tried))
    rates = [results.rate(stream.name) for stream in group]
    cells = [c | {"rate": rate} for c, rate in zip(same, rates, strict=True)]
    for o in optimizers:
        yield o.name, cells, cache(lambda o=o: measure(prepared(), o, family, rates))


def measure_all(
    results: Runs,
    streams: list[Stream],
    optimizers: list[Optimizer],
    quick: bool,
    forced: tuple[str, ...],
) -> None:
    """Runs every family and optimizer that is not stored yet; stores it by stream."""
    families = list(dict.fromkeys(stream.family for stream in streams))
    with Progress() as progress:
        bar = progress.add_task("", total=len(families) * (1 + len(optimizers)))
        for family in families:
            group = [stream for stream in streams if stream.family == family]
            jobs = jobs_of(results, FAMILIES[family], group, optimizers, quick)
            for name, cells, measured in jobs:
                label = f"{family}: {name}"
                progress.update(bar, description=label[:40].ljust(40))
                for i, stream in enumerate(group):
                    results.measure(
                        (stream.name, name),
                        cells[i],
                        lambda i=i, s=stream, m=measured: {"half": s.half} | m()[i],
                        name in forced,
                    )
                progress.advance(bar)


# Tables


def streams_of(results: Runs, *names: str, half: str = "") -> list[Stream]:
    """Returns the streams, of a half, on which AdamW and these were measured."""
    return [
        stream
        for stream in STREAMS.values()
        if half in ("", stream.half) and results.has(stream.name, ADAMW.name, *names)
    ]


def names_of(results: Runs) -> list[str]:
    """Returns the optimizers that were measured."""
    known = {name for _, name in results.runs}
    return [o.name for o in OPTIMIZERS if o.name in known]


def mark(passes: np.ndarray) -> str:
    """Returns whether all seeds pass."""
    return "yes" if passes.all() else f"no, {passes.sum()} of {passes.size}"


def spread(losses: np.ndarray) -> str:
    """Returns from where to where losses go."""
    return f"{losses.min():.3g} to {losses.max():.3g}"


def stream_table(results: Runs) -> list[str]:
    """Returns what the streams are."""
    lines = []
    for stream in streams_of(results):
        family = FAMILIES[stream.family]
        make = getattr(family.make, "func", family.make)
        steps = results.get(stream.name, ADAMW.name, "steps")
        lines.append(
            [
                stream.name,
                stream.half,
                (make.__doc__ or "").splitlines()[0].rstrip("."),
                stream.note,
                f"{steps.sum() / len(steps):.0f}",
                f"{steps[:, -1].mean():.0f}",
                f"{results.rate(stream.name):.1e}"
                + (", linear decay" if family.is_decayed else ", constant"),
            ]
        )
    header = ["stream", "half", "problem", "rare", "steps", "rare ones", "rate"]
    return table(header, lines)


def run_table(results: Runs, half: str) -> list[str]:
    """Returns how every optimizer ends on every stream."""
    lines = []
    for name in names_of(results):
        for stream in streams_of(results, name, half=half):
            key = stream.name, name
            losses = results.measured(*key)
            rejected, bound = (results.get(*key, f) for f in ("rejected", "bound"))
            lines.append(
                [
                    *key,
                    f"{losses.mean():.3g}",
                    spread(losses),
                    f"{results.get(*key, 'common_loss').mean():.3g}",
                    f"{rejected[:, -1].max():.0f}",
                    f"{rejected[:, :-1].max():.0f}",
                    f"{bound[:, -1].max():.0f}",
                    f"{bound[:, :-1].max():.0f}",
                    mark(results.passes(*key)),
                    mark(results.passes(*key, np.max)),
                ]
            )
    order = list(STREAMS)
    lines.sort(key=lambda line: order.index(line[0]))
    return table(
        [
            "stream",
            "optimizer",
            "loss that counts",
            "seeds",
            "loss, common",
            "rejected, rare",
            "another kind",
            "bounded, rare",
            "another kind",
            "passes",
            "against the worst seed",
        ],
        lines,
    )


def percent(flags: Iterable[np.ndarray]) -> str:
    """Returns how many % of all runs have a flag."""
    every = np.concatenate([np.zeros(0), *flags])
    return f"{100.0 * every.mean():.0f}" if every.size else ""


def share_table(results: Runs) -> list[str]:
    """Returns the shares of runs that pass, as a table and in a line."""
    lines, told = [], []
    for name in names_of(results):
        every = [stream.name for stream in streams_of(results, name)]
        line = [name]
        for half in (CHOOSE, REPORT, ""):
            chosen = streams_of(results, name, half=half)
            line.append(percent(results.passes(s.name, name) for s in chosen))
        told.append(f"{name} {line[-1]} %")
        line += [
            percent(results.passes(s, name, np.max) for s in every),
            percent(results.is_learnt(s, name) for s in every),
            percent(results.is_spared(s, name) for s in every),
            f"{sum(results.passes(s, name).all() for s in every)} of {len(every)}",
        ]
        lines.append(line)
    header = [
        "optimizer",
        f"runs that pass, % of {CHOOSE}",
        f"of {REPORT}",
        "of all",
        "against the worst seed",
        "by the loss alone",
        "by the rejections alone",
        "streams on which all seeds pass",
    ]
    return [*table(header, lines), f"Runs that pass: {', '.join(told)}."]


def report(results: Runs) -> str:
    """Returns everything as Markdown."""
    seeds = {entry["num_seeds"] for entry in results.runs.values()}
    lines = [
        "# Nothing is censored",
        "",
        results.made(),
        "",
        "Honest streams of data, with something rare in them; "
        f"{' or '.join(map(str, sorted(seeds)))} seeds. A run passes if its final loss "
        f"on the rare part of the training set is at most {FACTOR} times bare AdamW's "
        f"plus {SLACK}, and no kind of batch was rejected more than {MOST_REJECTED} "
        "times (a revert takes two steps). In continual learning ("
        + ", ".join(s.name for s in _STREAMS if FAMILIES[s.family].is_continual)
        + f") the mean loss of the run takes its place, at most {RUN_FACTOR} times "
        "AdamW's. Bare AdamW's is the mean over its seeds, or its worst one. What was "
        "rejected or bounded is the most of any seed (and of any other kind). The "
        "rate is the best of seven half decades for AdamW. Constants of the library "
        f"were chosen on {CHOOSE}, if on any.",
    ]
    for half in (CHOOSE, REPORT):
        lines += ["", f"## {half}", "", *run_table(results, half)]
    lines += ["## Streams", "", *stream_table(results)]
    known = names_of(results)
    lines += ["## How each is run", ""]
    lines += [f"- {o.name}: {o.note}." for o in OPTIMIZERS if o.name in known]
    return "\n".join([*lines, "", "## Runs that pass", "", *share_table(results)])


def main() -> None:
    """Measures, stores, and writes the tables."""
    names = [optimizer.name for optimizer in OPTIMIZERS]
    options = options_of(__doc__, names, tuple(STREAMS), (CHOOSE, REPORT, *STREAMS))
    results = opened(Runs, "mixtures", options)
    if not options.report_only:
        streams = [s for s in _STREAMS if {s.name, s.half} & set(options.tasks)]
        # the others are compared with it
        optimizers = [o for o in OPTIMIZERS if o.name in (ADAMW.name, *options.only)]
        if options.quick:
            streams = [s for s in streams if s.name in QUICK_STREAMS]
            optimizers = [o for o in optimizers if o.name in QUICK_OPTIMIZERS]
        forced = tuple(options.only) if options.force else ()
        forced += (TUNING,) * (ADAMW.name in forced)
        measure_all(results, streams, optimizers, options.quick, forced)
    publish(results, report(results))


if __name__ == "__main__":
    main()
