"""Any learning rate, any batch size: what is left of a run whose gradients are noise.

Every optimizer trains every task at batch sizes 1 ... 64 and at ``learning_rate`` 1e-7
... 1e1, three seeds each. It is compared with AdamW *tuned at the same batch size*: the
best of 17 half decades, with linear decay to zero. A cell is *within x %* when its
final loss on the whole training set exceeds that of tuned AdamW by at most x % of the
drop that tuned AdamW made. The noise is of several kinds: few examples, hard examples,
sparse gradients, one sample of a posterior, a score-function estimate, few tokens.

Two parts ask for more than noise. *Plateaus*: how many runs get stuck where the loss is
flat at first. *Full*: small networks on a few digits, all of them at every step.

    python benchmarks/noise.py --out benchmarks/results/noise   # all, for hours
    python benchmarks/noise.py --quick                          # about a minute
    python benchmarks/noise.py --only adamw                     # tuned AdamW, first
    python benchmarks/noise.py --only lalerg --tasks mlp bandit # some of it
    python benchmarks/noise.py --tasks CHOOSE                   # and not REPORT
    python benchmarks/noise.py --only plateaus full             # the other parts
    python benchmarks/noise.py --report-only                    # tables and figure

A row that is stored is not run again, so that a run may be stopped and goes on later;
``--force`` runs it anew. Two runs may fill one file at the same time. To try a variant
without storing anything, call `cells` from a script beside this one.
"""

import itertools
import math
import os
from collections.abc import Callable, Iterable
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tasks
from decades import ADAMW as TUNING
from decades import (
    DECADES,
    HALF_DECADES,
    NUM_SEEDS,
    PEERS,
    WEIGHT_DECAY,
    Optimizer,
    Rates,
    adamw,
    best_index,
    linear,
    percent,
    shares,
)
from decades import LALERG as SEARCHING
from flax import linen as nn
from jax import lax
from rich.progress import Progress
from store import RESULTS, Store, opened, options_of, publish, rounded, table
from tasks import MLP, Batch, Task

import lalerg_optax as lo

PyTree = Any
Make = Callable[[Any, int], Any]

BATCH_SIZES = (1, 2, 4, 8, 16, 64)
NUM_STEPS = 2000
GROUPS = ("adamw", "lalerg", "tuned", "peers", "plateaus", "full")
QUICK_STEPS = 100


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
    x, _ = tasks._digits()
    x = x[:100, x.std(axis=0) > 0.05]
    indices = np.stack(np.meshgrid(*map(np.arange, x.shape), indexing="ij"), axis=-1)
    sets = tasks._split(indices.reshape(-1, 2), (x - x.mean()).reshape(-1) / x.std())
    model = Factorization(*x.shape)
    return tasks._task(model, tasks._squared_error, sets, 64, NUM_STEPS)


def affairs() -> Task:
    """Perceptron, a survey on affairs: hard examples."""
    from statsmodels.datasets import fair

    data = fair.load_pandas().data
    target = tasks._standardized(np.log1p(data.pop("affairs").to_numpy()))
    sets = tasks._split(tasks._standardized(data.to_numpy()), target)
    model = MLP((128, 128, 1))
    return tasks._task(model, tasks._squared_error, sets, 64, NUM_STEPS)


def labels() -> Task:
    """Perceptron, digits of which a fifth have random labels: hard examples."""
    x, y = tasks._digits()
    rng = np.random.default_rng(0)
    y = np.where(rng.random(len(y)) < 0.2, rng.integers(0, 10, len(y)), y)
    model = MLP((48, 48, 10))
    return tasks._task(model, tasks._cross_entropy, tasks._split(x, y), 64, NUM_STEPS)


def poisson() -> Task:
    """Poisson regression, visits to doctors: counts with a heavy tail."""
    from statsmodels.datasets import randhie

    data = randhie.load_pandas().data
    count = data.pop("mdvis").to_numpy(float)

    def criterion(out: jax.Array, target: jax.Array) -> jax.Array:
        return jnp.mean(jnp.exp(out[:, 0]) - target * out[:, 0])

    sets = tasks._split(tasks._standardized(data.to_numpy()), count)
    return tasks._task(MLP((1,)), criterion, sets, 64, NUM_STEPS)


def variational() -> Task:
    """Bayesian regression, diabetes: one sample of the weights a step.

    The loss is the negative evidence bound of an example, with a Gaussian likelihood
    whose normaliser makes it negative. At the end it is exact.
    """
    from sklearn.datasets import load_diabetes

    data = load_diabetes()
    x = tasks._standardized(data.data)
    x = np.column_stack([np.ones(len(x)), x])
    train, test = tasks._split(x, 0.1 * tasks._standardized(data.target))
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
    x, y = tasks._digits()
    train, test = tasks._split(x[y < 4], y[y < 4])

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
    x, _ = tasks._digits()
    train, test = tasks._split(x)
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
    sets, size = tasks._characters(16, 2000)
    model = tasks.RecurrentNetwork(size, width=16)
    return tasks._task(model, tasks._cross_entropy, sets, 16, NUM_STEPS)


def rows() -> Task:
    """Recurrent network (LSTM) that reads rows, digits."""
    x, y = tasks._digits()
    sets = tasks._split(x.reshape(-1, 8, 8), y)
    model = tasks.SequenceClassifier(width=16)
    return tasks._task(model, tasks._cross_entropy, sets, 64, NUM_STEPS)


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
    return tasks._task(model, criterion, (data, data), 64, NUM_STEPS)


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
    return _near_zero(_everything(Linear(), tasks._squared_error, x, target))


def saddle_tanh() -> Task:
    """Returns a tanh network whose last two layers are next to zero, on digits."""
    model = MLP((32, 32, 10), nn.tanh)
    task = _everything(model, tasks._cross_entropy, *tasks._digits())
    return _near_zero(task, "Dense_0")


# Full batches


def digits(activation: str, depth: int, count: int) -> Task:
    """Returns a small network that sees so many digits at every step.

    They are one example, so that a batch of one holds all of them.
    """
    model = MLP((32,) * depth + (10,), getattr(nn, activation))
    x, y = tasks._digits()
    return _everything(model, tasks._cross_entropy, x[None, :count], y[None, :count])


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
SETS = {"CHOOSE": CHOOSE, "REPORT": REPORT, "PLATEAUS": PLATEAUS}
QUICK_CASES = ("logistic", "poisson", "xor", "tanh1_16_500")

FACTORS = (1e-3, 1.0, 1e3)  # of tuned AdamW's rate, on plateaus
FULL_RATES = (1e-6, 1e-3, 1e-1)


def both(tuned: float) -> Rates:
    """Returns the decades, and tuned AdamW's own rate."""
    return (*DECADES, tuned)


ADAMW = TUNING._replace(group="adamw")
LALERG = SEARCHING._replace(rates=both)
AT_TUNED = (
    Optimizer(
        "lalerg without search",
        "tuned",
        lambda rate, n: lo.lalerg(
            linear(rate, n), search=False, weight_decay=WEIGHT_DECAY
        ),
        "search=False, linear decay to zero",
        rates=lambda tuned: (tuned,),
    ),
    Optimizer(
        "error_regulate(adamw)",
        "tuned",
        lambda rate, n: lo.error_regulate(adamw(linear(rate, n))),
        "linear decay to zero",
        rates=lambda tuned: (tuned,),
    ),
)
OTHERS = tuple(
    peer for peer in PEERS if peer.name.startswith(("prodigy", "schedule_free"))
)
ROWS = (ADAMW, LALERG, *AT_TUNED, *OTHERS)
ON_PLATEAUS = LALERG._replace(
    group="plateaus", rates=lambda tuned: tuple(tuned * f for f in FACTORS)
)
ON_FULL = LALERG._replace(group="full", rates=lambda tuned: FULL_RATES)


# Runs


@cache
def task_of(name: str) -> Task:
    """Returns a task, made once."""
    return CASES[name].make()


@cache
def starts(name: str, num_seeds: int) -> tuple[PyTree, jax.Array]:
    """Returns where the runs of a task begin, and their losses there, by seed."""
    task = task_of(name)

    def start(seed: jax.Array) -> tuple[PyTree, jax.Array]:
        params, rest = task.init(jax.random.key(seed))
        return (params, rest), tasks._full_loss(task, task.train, params, rest)

    return jax.jit(jax.vmap(start))(jnp.arange(num_seeds))


def trained(
    task: Task,
    row: Optimizer,
    batch_sizes: tuple[int, ...],
    num_steps: int,
    which: jax.Array,
    rate: jax.Array,
    seed: jax.Array,
    start: PyTree,
) -> tuple[jax.Array, PyTree]:
    """Returns the loss on the whole training set after a run, and what else is kept.

    As `tasks.run`, with one of several batch sizes: the optimizer takes most of the
    time to compile, and is the same for all of them.
    """
    tx = optax.with_extra_args_support(row.make(rate, num_steps))
    key = jax.random.key(seed)

    def gradient(size: int, params: PyTree, rest: PyTree, draw: Any, noise: Any) -> Any:
        chosen = jax.random.randint(draw, (size,), 0, len(task.train[0]))
        batch = tuple(a[chosen] for a in task.train)
        grad = jax.value_and_grad(task.loss, has_aux=True)
        return grad(params, rest, batch, noise, True)

    branches = [partial(gradient, size) for size in batch_sizes]

    def step(carry: PyTree, i: jax.Array) -> tuple[PyTree, None]:
        params, rest, state = carry
        keys = jax.random.split(jax.random.fold_in(key, i))
        (loss, rest), grads = lax.switch(which, branches, params, rest, *keys)
        updates, state = tx.update(grads, state, params, value=loss)
        return (optax.apply_updates(params, updates), rest, state), None

    params, rest = start
    (params, rest, state), _ = lax.scan(
        step, (params, rest, tx.init(params)), jnp.arange(num_steps)
    )
    params = row.eval_params(state, params)
    return tasks._full_loss(task, task.train, params, rest), row.final(state)


def program(
    name: str,
    row: Optimizer,
    batch_sizes: tuple[int, ...],
    num_steps: int,
    num_seeds: int,
) -> Callable[[int, Rates], dict[str, np.ndarray]]:
    """Returns what runs all cells of a row at one of the batch sizes.

    It is compiled once for all of them. The cells run one after the other: side by side
    they would leave the cache, take both sides of every condition, and take twice as
    long to compile.
    """
    run = partial(trained, task_of(name), row, batch_sizes, num_steps)

    @jax.jit
    def cells(which: jax.Array, rates: jax.Array, begin: PyTree) -> PyTree:
        seeds = jnp.arange(num_seeds)
        return lax.map(
            lambda rate: lax.map(lambda s: run(which, rate, *s), (seeds, begin)), rates
        )

    def measured(batch_size: int, rates: Rates) -> dict[str, np.ndarray]:
        which = batch_sizes.index(batch_size)
        begin, _ = starts(name, num_seeds)
        losses, final = cells(which, jnp.asarray(rates, jnp.float32), begin)
        return jax.tree.map(np.asarray, {"train_loss": losses} | final)

    return measured


class Results(Store):
    """What has been measured, and what follows from it."""

    identity = ("task", "batch_size", "optimizer")
    current: tuple[str, ...] = ()

    def measure(self, key: tuple[str, ...], *args: Any, **kwargs: Any) -> None:
        """Measures and stores a run, unless one with the same cells is stored."""
        self.current = key
        super().measure(key, *args, **kwargs)

    def save(self) -> None:
        """Writes what was measured last, and leaves what another run wrote."""
        measured = self.runs[self.current]
        self.load(keep_about=False)
        self.runs[self.current] = measured
        path, self.path = self.path, self.path.with_suffix(f".{os.getpid()}")
        super().save()
        self.path.replace(path)
        self.path = path

    def get(self, task: str, size: int, name: str, field: str) -> np.ndarray:
        """Returns a field of a row, NaN where it was not finite."""
        return np.asarray(self.runs[task, str(size), name][field], float)

    def has(self, task: str, size: int, name: str) -> bool:
        """Returns whether a row was measured."""
        return (task, str(size), name) in self.runs

    def reference(self, task: str, size: int, field: str = "train_loss") -> float:
        """Returns a field of tuned AdamW, mean over the seeds; "rates": its rate."""
        best = best_index(self.get(task, size, ADAMW.name, "train_loss"))
        return float(self.get(task, size, ADAMW.name, field)[best].mean())

    def drop(self, task: str, size: int) -> float:
        """Returns by how much tuned AdamW lowered the loss."""
        start = self.get(task, size, ADAMW.name, "start_loss").mean()
        return float(start - self.reference(task, size))

    def percents(self, task: str, size: int, losses: np.ndarray) -> np.ndarray:
        """Returns losses above tuned AdamW's, in % of its drop."""
        excess = losses - self.reference(task, size)
        excess = 100.0 * np.asarray(excess, float) / self.drop(task, size)
        return np.where(np.isnan(excess), np.inf, excess)

    def excess(
        self, task: str, size: int, name: str, rates: Rates = DECADES
    ) -> np.ndarray:
        """Returns the excesses in % at those of the rates that were run, by seed."""
        known = self.runs[task, str(size), name]["rates"]
        chosen = [known.index(rate) for rate in rates if rate in known]
        losses = self.get(task, size, name, "train_loss")
        return self.percents(task, size, losses[chosen])

    def at_tuned(self, task: str, size: int, name: str) -> np.ndarray:
        """Returns the excesses in % at tuned AdamW's own rate, by seed."""
        return self.excess(task, size, name, (self.reference(task, size, "rates"),))[0]

    def cells(
        self,
        name: str,
        cases: Iterable[str],
        sizes: Iterable[int],
        found: Callable[..., np.ndarray] | None = None,
    ) -> np.ndarray:
        """Returns the excesses of all cells of a row that were measured.

        Args:
          name: of the row.
          cases: names of the tasks.
          sizes: batch sizes.
          found: (task, batch size, name) to the excesses; by default `excess`.
        """
        known = [p for p in itertools.product(cases, sizes) if self.has(*p, name)]
        excesses = [(found or self.excess)(*place, name).ravel() for place in known]
        return np.concatenate(excesses or [np.zeros(0)])

    def tasks_of(self, cases: Iterable[str], name: str) -> list[str]:
        """Returns those of the tasks that a row was measured on, at any batch size."""
        return [
            case
            for case in cases
            if any(self.has(case, size, name) for size in CASES[case].batch_sizes)
        ]


def measure(
    results: Results, name: str, row: Optimizer, is_quick: bool, is_forced: bool
) -> None:
    """Runs a row on a task at all batch sizes that are not stored yet."""
    case = CASES[name]
    num_seeds = case.num_tuning_seeds if row.name == ADAMW.name else case.num_seeds
    num_seeds = 1 if is_quick else num_seeds
    num_steps = QUICK_STEPS if is_quick else case.num_steps
    sizes = case.batch_sizes[::4] if is_quick else case.batch_sizes
    run = program(name, row, sizes, num_steps, num_seeds)

    def measured(size: int, rates: Rates) -> dict[str, Any]:
        entry = run(size, rates)
        if row.name == ADAMW.name:
            entry["start_loss"] = np.asarray(starts(name, num_seeds)[1])
        return {field: rounded(x) for field, x in entry.items()}

    for size in sizes:
        if row.name == ADAMW.name:
            rates = case.tuning
        else:
            rates = row.rates(results.reference(name, size, "rates"))
        rates = rates[::3] if is_quick and len(rates) > 3 else rates
        cells = {"rates": list(rates), "num_seeds": num_seeds, "num_steps": num_steps}
        key = (name, str(size), row.name)
        results.measure(key, cells, partial(measured, size, rates), force=is_forced)


def jobs_of(only: Iterable[str], names: Iterable[str]) -> list[tuple[str, Optimizer]]:
    """Returns what is to be run, tuned AdamW first."""
    jobs = [
        *((name, row) for row in ROWS[1:] for name in NOISE),
        *((name, ON_PLATEAUS) for name in PLATEAUS),
        *((name, ON_FULL) for name in FULL),
    ]
    asked = [
        (name, row)
        for name, row in jobs
        if row.group in only and (name in names or name in FULL)
    ]
    needed = {name for name, _ in asked}
    if "adamw" in only:
        needed |= set(FULL).union(names)
    return [*((name, ADAMW) for name in CASES if name in needed), *asked]


def cells(
    task_name: str,
    batch_size: int,
    make: Make,
    rates: Rates = DECADES,
    num_seeds: int = NUM_SEEDS,
) -> np.ndarray:
    """Tries a variant without storing it.

    Args:
      task_name: a key of ``CASES``.
      batch_size: one of its batch sizes (1 for a full batch).
      make: (learning rate, number of steps) to the transformation.
      rates: learning rates to try.
      num_seeds: runs at each rate.

    Returns:
      Excess over the stored tuned AdamW in % of its drop, [rate, seed].
    """
    return cells_of_sizes(task_name, (batch_size,), make, rates, num_seeds)[0]


def cells_of_sizes(
    task_name: str,
    batch_sizes: tuple[int, ...],
    make: Make,
    rates: Rates = DECADES,
    num_seeds: int = NUM_SEEDS,
) -> np.ndarray:
    """Tries a variant as `cells` does, compiled once for several batch sizes.

    Returns:
      Excess over the stored tuned AdamW in % of its drop, [batch size, rate, seed].
    """
    row = Optimizer("", "", make)
    num_steps = CASES[task_name].num_steps
    run = program(task_name, row, batch_sizes, num_steps, num_seeds)
    results = stored()
    return np.stack(
        [
            results.percents(task_name, size, run(size, rates)["train_loss"])
            for size in batch_sizes
        ]
    )


def stored() -> Results:
    """Returns what is stored with the repository."""
    results = Results(RESULTS / "noise.json")
    results.load()
    return results


# Tables


def in_short(cells: np.ndarray) -> str:
    """Returns how many % of cells are within 5 %, within 1 %, and the worst cell."""
    if not cells.size:
        return ""
    five, one, _ = shares(cells)
    return f"{five} / {one} / {percent(cells.max())}"


def summary_table(results: Results, cases: Iterable[str]) -> list[str]:
    """Returns how every optimizer does at every batch size.

    The first line is what tuned AdamW's own seeds are: no more can be expected.
    """
    rows = [("adamw, tuned", ADAMW, results.at_tuned)]
    rows += [(row.name, row, results.excess) for row in ROWS if row.group != "tuned"]
    lines = []
    for name, row, found in rows:
        known = results.tasks_of(cases, row.name)
        if known:
            cells = [results.cells(row.name, known, [s], found) for s in BATCH_SIZES]
            line = [in_short(c) for c in (*cells, np.concatenate(cells))]
            lines.append([name, *line, str(len(known))])
    header = ["optimizer", *(f"batch size {s}" for s in BATCH_SIZES), "all", "tasks"]
    return table(header, lines)


def task_table(results: Results) -> list[str]:
    """Returns how lalerg does on every task at every batch size."""
    lines = []
    for name in results.tasks_of(NOISE, LALERG.name):
        line = [in_short(results.cells(LALERG.name, [name], [s])) for s in BATCH_SIZES]
        lines.append([name, CASES[name].part, *line])
    header = ["task", "part", *(f"batch size {s}" for s in BATCH_SIZES)]
    return table(header, lines)


def tuned_table(results: Results) -> list[str]:
    """Returns excesses at tuned AdamW's own rate, mean and worst."""
    lines = []
    for name in results.tasks_of(NOISE, ADAMW.name):
        for row in (ADAMW, LALERG, *AT_TUNED):
            line = []
            for size in BATCH_SIZES:
                if results.has(name, size, row.name):
                    excess = results.at_tuned(name, size, row.name)
                    line.append(f"{percent(excess.mean())} ({percent(excess.max())})")
                else:
                    line.append("")
            if any(line):
                lines.append([name, row.name, *line])
    header = ["task", "optimizer", *(f"batch size {s}" for s in BATCH_SIZES)]
    return table(header, lines)


def reference_table(results: Results) -> list[str]:
    """Returns the rate of tuned AdamW, and the losses between which it went."""
    lines = []
    for name in results.tasks_of(NOISE, ADAMW.name):
        line = []
        for size in BATCH_SIZES:
            if results.has(name, size, ADAMW.name):
                rate = results.reference(name, size, "rates")
                end = results.reference(name, size)
                start = end + results.drop(name, size)
                line.append(f"{rate:.0e}: {start:.3g} to {end:.3g}")
            else:
                line.append("")
        lines.append([name, CASES[name].part, *line])
    header = ["task", "part", *(f"batch size {s}" for s in BATCH_SIZES)]
    return table(header, lines)


def plateau_table(results: Results) -> list[str]:
    """Returns how many runs ended above half of the loss of a constant guess."""
    lines = []
    for name, case in PLATEAUS.items():
        for size in case.batch_sizes:
            if not results.has(name, size, ADAMW.name):
                continue
            tuned = results.get(name, size, ADAMW.name, "train_loss")
            losses = [tuned[best_index(tuned)]]
            if results.has(name, size, LALERG.name):
                losses += [*results.get(name, size, LALERG.name, "train_loss")]
            stuck = [str(np.sum(~(x <= 0.5 * case.chance))) for x in losses]
            stuck += [""] * (1 + len(FACTORS) - len(stuck))
            rate = f"{results.reference(name, size, 'rates'):.0e}"
            lines.append([name, str(size), rate, *stuck])
    header = ["task", "batch size", "tuned rate", "tuned AdamW"]
    return table([*header, *(f"lalerg, rate x {f:g}" for f in FACTORS)], lines)


def full_table(results: Results) -> list[str]:
    """Returns dead runs and excess of lalerg on full batches."""
    lines = []
    for name in results.tasks_of(FULL, LALERG.name):
        losses = results.get(name, 1, LALERG.name, "train_loss")
        tuned = results.get(name, 1, ADAMW.name, "train_loss")
        limit = 0.5 * CASES[name].chance
        excess = results.percents(name, 1, losses)
        network, count, num_steps = name.split("_")
        lines.append(
            [
                network,
                count,
                num_steps,
                str(np.sum(~(tuned[best_index(tuned)] <= limit))),
                *(str(np.sum(~(x <= limit))) for x in losses),
                *shares(excess)[:2],
                percent(excess.max()),
            ]
        )
    header = ["network", "digits", "steps", "dead: tuned AdamW"]
    header += [f"lalerg, {rate:.0e}" for rate in FULL_RATES]
    return table([*header, "within 5 %", "within 1 %", "worst cell, %"], lines)


def report(results: Results) -> str:
    """Returns everything as Markdown."""
    lines = [
        "# Any learning rate, any batch size",
        "",
        results.made(),
        "",
        f"Learning rates 1e-7 ... 1e1, {NUM_SEEDS} seeds each. Excess is the final "
        "loss on the whole training set above that of AdamW tuned at the same batch "
        "size, in % of the drop that tuned AdamW made. Tuned AdamW is the best of 17 "
        "half decades with linear decay to zero. A cell of a table gives % of runs "
        "within 5 %, % of runs within 1 %, and the worst excess in %.",
        "",
    ]
    for title, cases in (("chosen on", CHOOSE), ("held back", REPORT)):
        lines += [
            f"## Tasks {title}",
            "",
            f"{', '.join(cases)}.",
            "",
            *summary_table(results, cases),
        ]
    lines += ["## lalerg, task by task", "", *task_table(results)]
    lines += [
        "## At tuned AdamW's own rate",
        "",
        "Excess in %, mean of the seeds and the worst of them. AdamW's own is how far "
        "its seeds are apart; its rate is the best on these seeds.",
        "",
        *tuned_table(results),
    ]
    lines += [
        "## Tuned AdamW",
        "",
        "Its rate, and the loss on the whole training set before and after.",
        "",
        *reference_table(results),
    ]
    if results.tasks_of(PLATEAUS, ADAMW.name):
        lines += [
            "## Plateaus",
            "",
            f"Runs of {PLATEAU.num_seeds} that end above half of the loss of a "
            "constant guess. Tuned AdamW is the best of nine half decades.",
            "",
            *plateau_table(results),
        ]
    if results.tasks_of(FULL, LALERG.name):
        lines += [
            "## Full batches",
            "",
            "All digits at every step. Dead are runs of 12 that end above half of ln "
            "10 (tuned AdamW: of three).",
            "",
            *full_table(results),
        ]
    lines += ["## How each is run", ""]
    lines += [f"- {r.name}: {r.note}." for r in ROWS if r.note]
    return "\n".join(lines)


# Figure


def draw(results: Results, path: Path) -> None:
    """Writes the figure: excess by learning rate and batch size, a panel a task."""
    import matplotlib.pyplot as plt

    names = {ADAMW.name: "AdamW", LALERG.name: "lalerg"}
    parts = [results.tasks_of(part, ADAMW.name) for part in (CHOOSE, REPORT)]
    num_columns = max(1, *map(len, parts))
    figure, axes = plt.subplots(
        4,
        num_columns,
        figsize=(1.9 * num_columns + 1.2, 7.6),
        squeeze=False,
        layout="constrained",
    )
    image = None
    for axis in axes.flat:
        axis.axis("off")
    rows = [(part, name) for part in parts for name in names]
    for line, (part, name) in zip(axes, rows, strict=True):
        for axis, task in zip(line, part, strict=False):
            shape = (len(BATCH_SIZES), len(DECADES))
            excess = np.full(shape, np.nan)
            for i, size in enumerate(BATCH_SIZES):
                if results.has(task, size, name):
                    found = results.excess(task, size, name).mean(axis=1)
                    if len(found) == len(DECADES):
                        excess[i] = np.clip(found, 0.0, 20.0)
            axis.axis("on")
            image = axis.imshow(
                excess, cmap="viridis_r", vmin=0.0, vmax=20.0, aspect="auto"
            )
            axis.set_title(f"{task}: {names[name]}", fontsize=8)
            axis.set_xticks(range(0, len(DECADES), 2))
            axis.set_xticklabels([f"{rate:.0e}" for rate in DECADES[::2]], fontsize=6)
            axis.set_yticks(range(len(BATCH_SIZES)))
            axis.set_yticklabels(BATCH_SIZES, fontsize=7)
    for axis in axes[:, 0]:
        axis.set_ylabel("batch size", fontsize=8)
    for axis in axes[-1]:
        axis.set_xlabel("learning_rate", fontsize=8)
    if image is not None:
        label = "excess over tuned AdamW, % of its drop"
        figure.colorbar(image, ax=axes, shrink=0.6, extend="max", label=label)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main() -> None:
    """Measures, stores, and writes tables and figure."""
    names = (*SETS, *NOISE, *PLATEAUS)
    options = options_of(__doc__, GROUPS, tuple(SETS), names)
    results = opened(Results, "noise", options)
    if not options.report_only:
        asked = {n for word in options.tasks for n in SETS.get(word, (word,))}
        jobs = jobs_of(options.only, asked)
        if options.quick:
            jobs = [j for j in jobs if j[0] in QUICK_CASES and j[1].group != "peers"]
        with Progress() as progress:
            bar = progress.add_task("", total=len(jobs))
            for name, row in jobs:
                progress.update(bar, description=f"{name}: {row.name}"[:44].ljust(44))
                is_forced = options.force and row.group in options.only
                measure(results, name, row, options.quick, is_forced)
                progress.advance(bar)
    publish(results, report(results), draw)


if __name__ == "__main__":
    main()
