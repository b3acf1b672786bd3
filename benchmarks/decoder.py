"""A decoder-only transformer that reads bytes, as a pure function of its params.

Rotary positions, root-mean-square norms, SwiGLU, tied embeddings and no biases. All
layers are scanned: a leaf of the params holds the matrices of all of them.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

PyTree = Any
NUM_TOKENS = 256


class Size(NamedTuple):
    """A model, and the batches that it is trained on.

    Attributes:
      width: of the features.
      depth: number of layers.
      hidden: width of the perceptron.
      head: width of a head of the attention.
      batch: windows of text a step.
      length: bytes that are predicted in a window.
    """

    width: int
    depth: int
    hidden: int
    head: int
    batch: int
    length: int


SIZES = {  # by their numbers of parameters, about
    "tiny": Size(32, 2, 88, 16, 8, 64),
    "250k": Size(64, 5, 160, 32, 4, 256),
    "1m": Size(128, 5, 352, 32, 16, 256),
    "long": Size(128, 5, 352, 32, 2, 128),  # 1 M in small batches, for many steps
    "4m": Size(256, 5, 704, 32, 16, 256),
    "12m": Size(384, 7, 960, 64, 16, 512),
    "30m": Size(512, 9, 1472, 64, 32, 512),
    "124m": Size(896, 13, 2368, 64, 32, 512),
}


def init(key: jax.Array, size: Size) -> PyTree:
    """Returns float32 params; those that write to the features begin smaller."""
    width, depth, hidden = size.width, size.depth, size.hidden
    shapes = {
        "query": (width, width),
        "key": (width, width),
        "value": (width, width),
        "out": (width, width),
        "gate": (width, hidden),
        "up": (width, hidden),
        "down": (hidden, width),
    }
    keys = dict(zip(shapes, jax.random.split(key, len(shapes)), strict=True))
    scales = {"out": (2 * depth) ** -0.5, "down": (2 * depth) ** -0.5}
    layers = {
        name: shape[0] ** -0.5
        * scales.get(name, 1.0)
        * jax.random.normal(keys[name], (depth, *shape))
        for name, shape in shapes.items()
    }
    layers |= {name: jnp.ones((depth, width)) for name in ("norm1", "norm2")}
    embedding = jax.random.normal(jax.random.fold_in(key, 1), (NUM_TOKENS, width))
    return {"embedding": 0.02 * embedding, "layers": layers, "norm": jnp.ones(width)}


def normed(x: jax.Array, scale: jax.Array) -> jax.Array:
    """Returns features of root mean square one, times a scale."""
    wide = x.astype(jnp.float32)
    mean_square = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
    return (wide * lax.rsqrt(mean_square + 1e-6) * scale[None, None]).astype(x.dtype)


def turned(x: jax.Array) -> jax.Array:
    """Returns heads, shape (batch, length, heads, width), turned by their positions."""
    half = x.shape[-1] // 2
    rates = 10_000.0 ** (-jnp.arange(half) / half)
    angles = jnp.arange(x.shape[1])[:, None] * rates[None]
    cos, sin = jnp.cos(angles)[None, :, None], jnp.sin(angles)[None, :, None]
    a, b = x[..., :half], x[..., half:]
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], -1).astype(x.dtype)


def attend(x: jax.Array, layer: PyTree, head: int) -> jax.Array:
    """Returns what every place reads at itself and before."""
    batch, length, width = x.shape
    query, key, value = (
        (x @ layer[name]).reshape(batch, length, width // head, head)
        for name in ("query", "key", "value")
    )
    scores = jnp.einsum("btnh,bsnh->bnts", turned(query), turned(key))
    is_before = jnp.tril(jnp.ones((length, length), bool))[None, None]
    scores = jnp.where(is_before, scores.astype(jnp.float32) * head**-0.5, -1e30)
    shares = jax.nn.softmax(scores, axis=-1).astype(x.dtype)
    read = jnp.einsum("bnts,bsnh->btnh", shares, value)
    return read.reshape(batch, length, width) @ layer["out"]


def logits_of(
    params: PyTree, tokens: jax.Array, size: Size, dtype: Any = jnp.float32
) -> jax.Array:
    """Returns float32 scores of every next byte, shape (batch, length, 256).

    Args:
      params: of the model.
      tokens: bytes as integers, shape (batch, length).
      size: of the model.
      dtype: of the matrix products.
    """

    def block(x: jax.Array, layer: PyTree) -> tuple[jax.Array, None]:
        layer = jax.tree.map(lambda w: w.astype(dtype) if w.ndim == 2 else w, layer)
        x = x + attend(normed(x, layer["norm1"]), layer, size.head)
        y = normed(x, layer["norm2"])
        hidden = jax.nn.silu(y @ layer["gate"]) * (y @ layer["up"])
        return x + hidden @ layer["down"], None

    embedding = params["embedding"].astype(dtype)
    x, _ = lax.scan(block, embedding[tokens], params["layers"])
    x = normed(x, params["norm"])
    return jnp.matmul(x, embedding.T, preferred_element_type=jnp.float32)


def loss_of(
    params: PyTree, tokens: jax.Array, size: Size, dtype: Any = jnp.float32
) -> jax.Array:
    """Returns the mean loss, nats a byte, of windows one byte longer than is read."""
    logits = logits_of(params, tokens[:, :-1], size, dtype)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
    return losses.mean()
