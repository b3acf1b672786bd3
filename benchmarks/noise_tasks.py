"""Tasks whose gradients are noise, on which rate and batch size are wrong.

``CHOOSE`` names those on which constants of the library may be chosen, ``REPORT`` those
on which nothing was. Two more parts ask for more: ``PLATEAUS`` and ``FULL`` batches.
"""

import itertools
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tasks
from flax import linen as nn
from jax import lax
from sweeps import HALF_DECADES, NUM_SEEDS, Rates
from tasks import MLP, Batch, Task

PyTree = Any

BATCH_SIZES = (1, 2, 4, 8, 16, 64)
NUM_STEPS = 2000


# Tasks


class Factorization(nn.Module):
    """Inner products of embeddings, and an offset of every row and column.

    Without offsets, single examples begin at a saddle, and luck decides who leaves it.
    """

    num_rows: int
    num_columns: int

    @nn.compact
    def __call__(self, x: jax.Array, is_training: bool) -> jax.Array:
        """Returns the entries at the pairs of indices."""
        product = tasks.Factorization(self.num_rows, self.num_columns, rank=4)
        zeros = nn.initializers.zeros
        rows = nn.Embed(self.num_rows, 1, embedding_init=zeros)(x[:, 0])
        columns = nn.Embed(self.num_columns, 1, embedding_init=zeros)(x[:, 1])
        return product(x, is_training) + (rows + columns)[:, 0]


def factorization() -> Task:
    """Matrix factorisation, a hundred digits by their pixels: sparse gradients.

    Smaller than that of ``tasks.py``, of which few examples would teach nothing.
    """
    x, _ = tasks.digit_images()
    x = x[:100, x.std(axis=0) > 0.05]
    indices = np.stack(np.meshgrid(*map(np.arange, x.shape), indexing="ij"), axis=-1)
    sets = tasks.split(indices.reshape(-1, 2), (x - x.mean()).reshape(-1) / x.std())
    model = Factorization(*x.shape)
    return tasks.task_of_model(model, tasks.squared_error, sets, 64, NUM_STEPS)


def affairs() -> Task:
    """Perceptron, a survey on affairs: hard examples."""
    from statsmodels.datasets import fair

    data = fair.load_pandas().data
    target = tasks.standardized(np.log1p(data.pop("affairs").to_numpy()))
    sets = tasks.split(tasks.standardized(data.to_numpy()), target)
    model = MLP((128, 128, 1))
    return tasks.task_of_model(model, tasks.squared_error, sets, 64, NUM_STEPS)


def labels() -> Task:
    """Perceptron, digits of which a fifth have random labels: hard examples."""
    x, y = tasks.digit_images()
    rng = np.random.default_rng(0)
    y = np.where(rng.random(len(y)) < 0.2, rng.integers(0, 10, len(y)), y)
    model = MLP((48, 48, 10))
    return tasks.task_of_model(
        model, tasks.cross_entropy, tasks.split(x, y), 64, NUM_STEPS
    )


def poisson() -> Task:
    """Poisson regression, visits to doctors: counts with a heavy tail."""
    from statsmodels.datasets import randhie

    data = randhie.load_pandas().data
    count = data.pop("mdvis").to_numpy(float)

    def criterion(out: jax.Array, target: jax.Array) -> jax.Array:
        return jnp.mean(jnp.exp(out[:, 0]) - target * out[:, 0])

    sets = tasks.split(tasks.standardized(data.to_numpy()), count)
    return tasks.task_of_model(MLP((1,)), criterion, sets, 64, NUM_STEPS)


def variational() -> Task:
    """Bayesian regression, diabetes: one sample of the weights a step.

    The loss is the negative evidence bound of an example, with a Gaussian likelihood
    whose normaliser makes it negative. At the end it is exact.
    """
    from sklearn.datasets import load_diabetes

    data = load_diabetes()
    x = tasks.standardized(data.data)
    x = np.column_stack([np.ones(len(x)), x])
    train, test = tasks.split(x, 0.1 * tasks.standardized(data.target))
    prior, noise = 0.1, 0.05

    def init(key: jax.Array) -> tuple[PyTree, PyTree]:
        mean = 0.01 * jax.random.normal(key, x.shape[1:])
        return {"mean": mean, "log_scale": jnp.full_like(mean, math.log(0.01))}, {}

    def loss(
        params: PyTree, rest: PyTree, batch: Batch, key: jax.Array, is_training: bool
    ) -> tuple[jax.Array, PyTree]:
        mean, scale = params["mean"], jnp.exp(params["log_scale"])
        inputs, target = batch
        if is_training:
            weights = mean + scale * jax.random.normal(key, mean.shape)
            square = (inputs @ weights - target) ** 2
        else:
            square = (inputs @ mean - target) ** 2 + inputs**2 @ scale**2
        divergence = 0.5 * (scale**2 + mean**2) / prior**2 - 0.5
        divergence = jnp.sum(divergence - jnp.log(scale / prior)) / len(train[0])
        normaliser = math.log(noise * math.sqrt(2.0 * math.pi))
        return 0.5 * square.mean() / noise**2 + normaliser + divergence, rest

    return Task(init, loss, train, test, 64, NUM_STEPS)


def _scored(
    cost: jax.Array, log_prob: jax.Array, direct: jax.Array, rest: PyTree
) -> tuple[jax.Array, PyTree]:
    """A mean cost of samples whose gradient is the score-function estimate.

    Args:
      cost: what each sample costs.
      log_prob: with which logarithm of probability it was drawn.
      direct: what of the cost is to be differentiated itself.
      rest: a running mean of the cost, which is subtracted.

    Returns:
      The mean cost, and the new running mean.
    """
    cost = lax.stop_gradient(cost)
    score = ((cost - rest["baseline"]) * log_prob + direct).mean()
    baseline = 0.95 * rest["baseline"] + 0.05 * cost.mean()
    return cost.mean() + score - lax.stop_gradient(score), {"baseline": baseline}


def bandit() -> Task:
    """Contextual bandit, digits 0 to 3: reward 1 for the right guess, score function.

    With all ten digits and one example a step, luck decides which are ever found.
    """
    model = MLP((32, 4))
    x, y = tasks.digit_images()
    train, test = tasks.split(x[y < 4], y[y < 4])

    def init(key: jax.Array) -> tuple[PyTree, PyTree]:
        params = model.init(key, train[0][:2], is_training=True)["params"]
        return params, {"baseline": jnp.float32(-0.25)}

    def loss(
        params: PyTree, rest: PyTree, batch: Batch, key: jax.Array, is_training: bool
    ) -> tuple[jax.Array, PyTree]:
        inputs, label = batch
        logits = model.apply({"params": params}, inputs, is_training=is_training)
        log_probs = jax.nn.log_softmax(logits)
        right = jnp.take_along_axis(log_probs, label[:, None], axis=-1)[:, 0]
        if not is_training:
            return -jnp.exp(right).mean(), rest
        guess = jax.random.categorical(key, logits)
        guessed = jnp.take_along_axis(log_probs, guess[:, None], axis=-1)[:, 0]
        return _scored(-(guess == label).astype(jnp.float32), guessed, 0.0, rest)

    return Task(init, loss, train, test, 64, NUM_STEPS)


def latent() -> Task:
    """Autoencoder with six bits of code, digits: score function.

    The loss is the negative evidence bound of an image; at the end it is exact, over
    all 64 codes.
    """
    encoder, decoder = MLP((32, 6), nn.tanh), MLP((64,))
    x, _ = tasks.digit_images()
    train, test = tasks.split(x)
    codes = jnp.asarray(list(itertools.product((0.0, 1.0), repeat=6)))

    def init(key: jax.Array) -> tuple[PyTree, PyTree]:
        keys = jax.random.split(key)
        params = {
            "encoder": encoder.init(keys[0], train[0][:2], is_training=True),
            "decoder": decoder.init(keys[1], codes[:2], is_training=True),
        }
        return params, {"baseline": jnp.float32(45.0)}

    def loss(
        params: PyTree, rest: PyTree, batch: Batch, key: jax.Array, is_training: bool
    ) -> tuple[jax.Array, PyTree]:
        (images,) = batch
        logits = encoder.apply(params["encoder"], images, is_training=is_training)
        decoded = partial(decoder.apply, params["decoder"], is_training=is_training)
        if is_training:
            code = jax.random.bernoulli(key, jax.nn.sigmoid(logits))
            code = code.astype(jnp.float32)
            shown = decoded(code)
        else:  # [example, code]
            logits, images = logits[:, None], images[:, None]
            code, shown = codes[None], decoded(codes)[None]
        log_prob = -optax.sigmoid_binary_cross_entropy(logits, code).sum(axis=-1)
        pixels = optax.sigmoid_binary_cross_entropy(shown, images).sum(axis=-1)
        cost = pixels + log_prob + 6.0 * math.log(2.0)
        if is_training:
            return _scored(cost, log_prob, pixels, rest)
        return (jnp.exp(log_prob) * cost).sum(axis=-1).mean(), rest

    return Task(init, loss, train, test, 64, NUM_STEPS)


def recurrent() -> Task:
    """Recurrent network, sixteen characters a sequence: few tokens."""
    sets, size = tasks.character_windows(16, 2000)
    model = tasks.RecurrentNetwork(size, width=16)
    return tasks.task_of_model(model, tasks.cross_entropy, sets, 16, NUM_STEPS)


def rows() -> Task:
    """Recurrent network (LSTM) that reads rows, digits."""
    x, y = tasks.digit_images()
    sets = tasks.split(x.reshape(-1, 8, 8), y)
    model = tasks.SequenceClassifier(width=16)
    return tasks.task_of_model(model, tasks.cross_entropy, sets, 64, NUM_STEPS)


# Plateaus


def _entropy(share: float) -> float:
    """Returns the loss of a constant guess at binary labels."""
    return -share * math.log(share) - (1.0 - share) * math.log(1.0 - share)


def _binary(out: jax.Array, target: jax.Array) -> jax.Array:
    return optax.sigmoid_binary_cross_entropy(out[:, 0], target).mean()


def _everything(model: nn.Module, criterion: Any, *arrays: np.ndarray) -> Task:
    """Returns a task that is trained on all there is."""
    data = tuple(
        jnp.asarray(a, jnp.int32 if a.dtype.kind == "i" else jnp.float32)
        for a in arrays
    )
    return tasks.task_of_model(model, criterion, (data, data), 64, NUM_STEPS)


def _bits(length: int) -> np.ndarray:
    """Returns all sequences of so many bits."""
    return np.array(list(itertools.product((0, 1), repeat=length)))


def parity(length: int) -> Task:
    """Returns the parity of so many bits for a small tanh network."""
    bits = _bits(length)
    model = MLP((2 * length, 1), nn.tanh)
    return _everything(model, _binary, 2.0 * bits - 1.0, bits.sum(axis=1) % 2.0)


class BitReader(nn.Module):
    """A small GRU that reads bits and says yes or no."""

    @nn.compact
    def __call__(self, x: jax.Array, is_training: bool) -> jax.Array:
        """Returns the logit of yes."""
        return nn.Dense(1)(nn.RNN(nn.GRUCell(8))(x[..., None])[:, -1])


def majority() -> Task:
    """Returns whether most of eight bits are set; the first one decides a draw."""
    bits = _bits(8)
    is_most = bits.sum(axis=1) + 0.5 * bits[:, 0] > 4.25
    return _everything(BitReader(), _binary, 2.0 * bits - 1.0, is_most.astype(float))


def unbalanced() -> Task:
    """Returns whether at least six of eight bits are set: 37 of 256 times."""
    bits = _bits(8)
    is_most = bits.sum(axis=1) >= 6
    return _everything(BitReader(), _binary, 2.0 * bits - 1.0, is_most.astype(float))


class Linear(nn.Module):
    """Two linear layers with nothing in between."""

    @nn.compact
    def __call__(self, x: jax.Array, is_training: bool) -> jax.Array:
        """Returns four numbers."""
        return nn.Dense(4, use_bias=False)(nn.Dense(8, use_bias=False)(x))


def _near_zero(task: Task, spared: str = "") -> Task:
    """Returns a task whose params begin next to zero, but for one layer."""

    def init(key: jax.Array) -> tuple[PyTree, PyTree]:
        params, rest = task.init(key)
        small = jax.tree.map(
            lambda p: (
                1e-6 * jax.random.normal(jax.random.fold_in(key, p.size), p.shape)
            ),
            params,
        )
        return {k: params[k] if k == spared else small[k] for k in params}, rest

    return task._replace(init=init)


def saddle_linear() -> Task:
    """Returns two linear layers next to zero, which are to learn a rotation."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(256, 8))
    rotation, _ = np.linalg.qr(rng.normal(size=(8, 4)))
    target = x @ rotation
    target /= np.sqrt(np.mean(target**2))
    return _near_zero(_everything(Linear(), tasks.squared_error, x, target))


def saddle_tanh() -> Task:
    """Returns a tanh network whose last two layers are next to zero, on digits."""
    model = MLP((32, 32, 10), nn.tanh)
    task = _everything(model, tasks.cross_entropy, *tasks.digit_images())
    return _near_zero(task, "Dense_0")


# Full batches


def digits(activation: str, depth: int, count: int) -> Task:
    """Returns a small network that sees so many digits at every step.

    They are one example, so that a batch of one holds all of them.
    """
    model = MLP((32,) * depth + (10,), getattr(nn, activation))
    x, y = tasks.digit_images()
    return _everything(model, tasks.cross_entropy, x[None, :count], y[None, :count])


# What is run


class Case(NamedTuple):
    """What is trained on, and how often.

    Attributes:
      make: makes the task.
      part: "choose" for those on which constants of the library may be chosen,
        "report" for those on which none was, "plateaus" or "full".
      batch_sizes: at which it is run.
      num_steps: steps of a run.
      tuning: rates that AdamW is tuned over.
      num_seeds: runs at each rate.
      num_tuning_seeds: runs at each rate of AdamW.
      chance: loss of the best constant guess.
    """

    make: Callable[[], Task]
    part: str
    batch_sizes: tuple[int, ...] = BATCH_SIZES
    num_steps: int = NUM_STEPS
    tuning: Rates = HALF_DECADES
    num_seeds: int = NUM_SEEDS
    num_tuning_seeds: int = NUM_SEEDS
    chance: float = math.nan


CHOOSE = {
    "logistic": Case(tasks.logistic, "choose"),
    "mlp": Case(tasks.mlp, "choose"),
    "factorization": Case(factorization, "choose"),
    "affairs": Case(affairs, "choose"),
    "variational": Case(variational, "choose"),
    "bandit": Case(bandit, "choose"),
    "recurrent": Case(recurrent, "choose", num_steps=1000),
}
REPORT = {
    "poisson": Case(poisson, "report"),
    "photo": Case(tasks.photo, "report"),
    "words": Case(tasks.words, "report"),
    "labels": Case(labels, "report"),
    "vae": Case(tasks.vae, "report"),
    "latent": Case(latent, "report"),
    "rows": Case(rows, "report"),
}
PLATEAU = Case(
    lambda: parity(2),
    "plateaus",
    batch_sizes=(8, 32, 256),
    tuning=HALF_DECADES[6:-2],  # 1e-4 ... 1
    num_seeds=20,
    num_tuning_seeds=20,
    chance=math.log(2.0),
)
PLATEAUS = {
    "xor": PLATEAU,
    "parity4": PLATEAU._replace(make=lambda: parity(4)),
    "parity6": PLATEAU._replace(make=lambda: parity(6)),
    "majority": PLATEAU._replace(make=majority),
    "unbalanced": PLATEAU._replace(make=unbalanced, chance=_entropy(37 / 256)),
    "saddle_linear": PLATEAU._replace(make=saddle_linear, chance=1.0),
    "saddle_tanh": PLATEAU._replace(make=saddle_tanh, chance=math.log(10.0)),
}
FULL = {
    f"{activation}{depth}_{count}_{num_steps}": Case(
        partial(digits, activation, depth, count),
        "full",
        batch_sizes=(1,),
        num_steps=num_steps,
        tuning=HALF_DECADES[6:-4],  # 1e-4 ... 1e-1
        num_seeds=12,
        chance=math.log(10.0),
    )
    for count in (1, 16, 512)
    for num_steps in (500, 2000)
    for activation in ("tanh", "relu", "gelu")
    for depth in (1, 2, 3)
}
NOISE = CHOOSE | REPORT
CASES = NOISE | PLATEAUS | FULL
