"""Honest streams of data with something rare in them.

Constants of the library may be chosen on the streams whose half is ``CHOOSE``; those of
``REPORT`` are for reporting only.
"""

import html.entities
import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jax import lax
from tasks import (
    MLP,
    Batch,
    RecurrentNetwork,
    ResidualMLP,
    cross_entropy,
    digit_images,
    mnist_images,
    source_text,
    split,
    squared_error,
    standardized,
)

PyTree = Any
Losses = tuple[jax.Array, jax.Array]

CHOOSE, REPORT = "CHOOSE", "REPORT"
CHUNK = 256  # examples at once where a loss on a part of the data is taken
PHASE = 1000  # steps from change to change in continual learning
DISCOUNT = 0.9


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
    data, _ = split(*digit_images())
    parts = parts_of(np.asarray(data[1]) >= 8)
    return trained(MLP((32, 10)), cross_entropy, data, parts, batch_size, kinds_of)


def images() -> Problem:
    """Deep residual network without normalisation, MNIST: 8 and 9 are rare."""
    pixels, labels = mnist_images()
    data, _ = split(pixels.reshape(len(pixels), -1) - pixels.mean(), labels)
    parts = parts_of(np.asarray(data[1]) >= 8)
    return trained(ResidualMLP(24), cross_entropy, data, parts, 32, whole)


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
    targets = standardized(bunch.target) * np.where(is_rare, scale, 1.0)
    targets = targets + spread * np.where(is_rare, 1.0, 0.1)
    data, _ = split(standardized(bunch.data), targets, is_rare.astype(int))
    parts = parts_of(data[2])
    return trained(MLP((64, 64, 1)), squared_error, data[:2], parts, 32, whole)


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
    code, entities = source_text().splitlines(), inspect.getsource(html.entities)
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
    pixels, labels = digit_images()
    padded = np.pad(x, ((0, 0), (0, pixels.shape[1] - x.shape[1])))
    is_second = np.repeat([0, 1], [len(pixels), len(x)])
    data, _ = split(
        np.concatenate([pixels, padded]),
        np.concatenate([labels, np.zeros(len(x), int)]),
        np.concatenate([np.zeros(len(pixels)), targets]),
        is_second,
    )
    parts = parts_of(data[3])
    return trained(MLP((32, 11)), _two_heads(second), data, parts, 64, whole)


def sums() -> Problem:
    """Perceptron with two heads, digits: sums of pixels are the second task."""
    x, _ = digit_images()
    return heads(x, standardized(x.sum(axis=1)), lambda out, t: (out - t) ** 2)


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
    data, _ = split(*cancer())

    def criterion(out: jax.Array, target: jax.Array) -> jax.Array:
        return optax.sigmoid_binary_cross_entropy(out[:, 0], target).mean()

    model, parts = MLP((16, 1), nn.tanh), parts_of(data[1])
    return trained(model, criterion, data, parts, batch_size, mixed)


def classes() -> Problem:
    """Perceptron, digits: two more classes in each phase."""
    data, _ = split(*digit_images())
    parts = parts_of(np.asarray(data[1]) // 2)
    return trained(MLP((32, 10)), cross_entropy, data, parts, 32, phased)


def permuted(num_phases: int = 5) -> Problem:
    """Perceptron, digits: pixels in another order in each phase."""
    (x, labels), _ = split(*digit_images())
    rng = np.random.default_rng(0)
    orders = [rng.permutation(x.shape[1]) for _ in range(num_phases)]
    data = (
        jnp.concatenate([x[:, order] for order in orders]),
        jnp.tile(labels, num_phases),
    )
    parts = parts_of(np.repeat(np.arange(num_phases), len(x)))
    return trained(MLP((32, 10)), cross_entropy, data, parts, 32, phased)


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
STREAMS = {
    stream.name: stream
    for stream in (
        Stream("rare_10", CHOOSE, "digits", "1 batch in 10", When(1 / 10)),
        Stream("rare_20", REPORT, "digits", "1 batch in 20", When(1 / 20)),
        Stream("rare_50", CHOOSE, "digits", "1 batch in 50", When(1 / 50)),
        Stream("rare_100", REPORT, "digits", "1 batch in 100", When(1 / 100)),
        Stream("rare_200", CHOOSE, "digits", "1 batch in 200", When(1 / 200)),
        Stream("every_20", REPORT, "digits", "each 20th batch", When(period=20)),
        Stream("every_100", CHOOSE, "digits", "each 100th batch", When(period=100)),
        Stream("blocks", REPORT, "digits", "30 batches in 330", When(0.0, 0, 330, 30)),
        Stream(
            "late", CHOOSE, "digits", "1 in 20 from step 3,000 on", When(1 / 20, 3000)
        ),
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
}
