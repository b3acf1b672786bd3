"""Programs of the kinds that researchers write, each with the optimizer that is usual.

Data are made up, or come from scikit-learn. Where a rate is from is said at each
program. Nothing of the library was chosen on them.
"""

import math
from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from tasks import cross_entropy, digit_images, split, standardized

PyTree = Any
Params = Any
Loss = Callable[[Params, jax.Array], jax.Array]
Judge = Callable[[Params, PyTree], tuple[jax.Array, jax.Array]]


def constant(rate: Any, num_steps: int) -> Any:
    """Returns the rate: there is no schedule."""
    del num_steps
    return rate


def cosine(rate: Any, num_steps: int) -> optax.Schedule:
    """Returns the cosine decay to zero."""
    shape = optax.cosine_decay_schedule(1.0, num_steps)
    return lambda count: rate * shape(count)


def warmup_linear(rate: Any, num_steps: int) -> optax.Schedule:
    """Returns the linear decay to zero after a warm-up of a twentieth of the run."""
    warm = num_steps // 20
    up = optax.linear_schedule(0.0, 1.0, warm)
    down = optax.linear_schedule(1.0, 0.0, num_steps - warm)
    shape = optax.join_schedules([up, down], [warm])
    return lambda count: rate * shape(count)


class Program(NamedTuple):
    """A program, and how it is usually trained.

    Attributes:
      about: what it is.
      init: key to (params, whatever else it carries from step to step).
      gradient: (params, that, key of the step) to ((loss, that anew), gradient).
      judge: (params, that) to the training loss, with no other noise than that of a
        fixed key, and the user's own metric.
      metric: what that is.
      sign: 1 if more of it is better, -1 if less.
      usual: rate or schedule to the usual optimizer.
      rate: its usual rate.
      source: where both are from.
      num_steps: steps of a run.
      schedule: (rate, number of steps) to what the optimizer is given.
      weight_decay: of the usual optimizer, and so that of `lalerg`.
      is_told: whether optimizers are given the loss; else ``value=None``.
      is_double: whether it computes in float64.
    """

    about: str
    init: Callable[[jax.Array], tuple[Params, PyTree]]
    gradient: Callable[[Params, PyTree, jax.Array], PyTree]
    judge: Judge
    metric: str
    sign: int
    usual: Callable[[Any], optax.GradientTransformation]
    rate: float
    source: str
    num_steps: int
    schedule: Callable[[Any, int], Any] = constant
    weight_decay: float = 0.0
    is_told: bool = True
    is_double: bool = False


# What several have in common


def gradient_of(loss: Loss) -> Callable[[Params, PyTree, jax.Array], PyTree]:
    """Returns the gradient of a loss that needs nothing but a key."""

    def gradient(params: Params, rest: PyTree, key: jax.Array) -> PyTree:
        value, grads = jax.value_and_grad(loss)(params, key)
        return (value, rest), grads

    return gradient


def dense(key: jax.Array, *widths: int, scale: float = 1.0) -> list[PyTree]:
    """Returns layers of the given widths, with LeCun's variance."""
    keys = jax.random.split(key, len(widths))
    return [
        {
            "w": scale * jax.random.normal(k, (n, m)) / math.sqrt(n),
            "b": jnp.zeros(m),
        }
        for k, n, m in zip(keys, widths[:-1], widths[1:], strict=False)
    ]


def mlp(
    layers: list[PyTree],
    x: jax.Array,
    activation: Callable[[jax.Array], jax.Array] = jnp.tanh,
) -> jax.Array:
    """Returns what a perceptron makes of its input."""
    for layer in layers[:-1]:
        x = activation(x @ layer["w"] + layer["b"])
    return x @ layers[-1]["w"] + layers[-1]["b"]


def rows(key: jax.Array, size: int, *arrays: jax.Array) -> list[jax.Array]:
    """Returns a batch: random rows of the arrays."""
    chosen = jax.random.randint(key, (size,), 0, len(arrays[0]))
    return [a[chosen] for a in arrays]


def accuracy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Returns how many in 100 are right."""
    return 100.0 * (logits.argmax(axis=-1) == labels).mean()


def moons(key: jax.Array, size: int) -> jax.Array:
    """Returns points of two half circles that interlock."""
    keys = jax.random.split(key, 3)
    angle = math.pi * jax.random.uniform(keys[0], (size,))
    side = jnp.where(jax.random.bernoulli(keys[1], shape=(size,)), 1.0, -1.0)
    x = side * (jnp.cos(angle) - 0.5)
    y = side * (jnp.sin(angle) - 0.25)
    return jnp.stack([x, y], axis=-1) + 0.1 * jax.random.normal(keys[2], (size, 2))


FIXED = 7  # seed of all that is the same for every run


# Differential equations


def neural_ode() -> Program:
    """A neural ODE on pieces of a spiral."""
    spiral = np.array([[-0.1, 2.0], [-2.0, -0.1]])
    dt, length, num_points = 0.025, 10, 1000

    def advance(field: Callable[[Any], Any], y: Any, dt: float) -> Any:
        k1 = field(y)
        k2 = field(y + 0.5 * dt * k1)
        k3 = field(y + 0.5 * dt * k2)
        return y + dt / 6.0 * (k1 + 2.0 * k2 + 2.0 * k3 + field(y + dt * k3))

    points = [np.array([2.0, 0.0])]
    for _ in range(num_points - 1):
        y = points[-1]
        for _ in range(10):
            y = advance(lambda y: y**3 @ spiral, y, dt / 10)
        points.append(y)
    path = jnp.asarray(np.stack(points), jnp.float32)
    pieces = jnp.stack([path[i : i + num_points - length] for i in range(length)])

    def follow(params: Params, y: jax.Array, count: int) -> jax.Array:
        def step(y: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
            new = advance(lambda y: mlp(params, y**3), y, dt)
            return new, new

        return lax.scan(step, y, None, count)[1]

    def error(params: Params, true: jax.Array) -> jax.Array:
        return jnp.abs(follow(params, true[0], length - 1) - true[1:]).mean()

    def loss(params: Params, key: jax.Array) -> jax.Array:
        chosen = jax.random.randint(key, (20,), 0, pieces.shape[1])
        return error(params, pieces[:, chosen])

    def judge(params: Params, rest: PyTree) -> tuple[jax.Array, jax.Array]:
        gap = jnp.abs(follow(params, path[0], num_points - 1) - path[1:]).mean()
        return error(params, pieces), jnp.fmin(gap, 10.0)  # where it blows up: 10

    return Program(
        "Neural ODE, a spiral in pieces of ten points",
        lambda key: (dense(key, 2, 50, 2, scale=0.3), ()),
        gradient_of(loss),
        judge,
        "error on the whole path",
        -1,
        lambda rate: optax.rmsprop(rate, decay=0.99),
        1e-3,
        "RMSprop of torchdiffeq's `ode_demo.py`",
        2000,
    )


def burgers() -> Program:
    """A physics-informed network for Burgers' equation, which makes a shock."""
    viscosity = 0.01 / math.pi
    rng = np.random.default_rng(FIXED)
    inside = jnp.asarray(rng.uniform([-1.0, 0.0], [1.0, 1.0], (256, 2)), jnp.float32)
    at_first = jnp.linspace(-1.0, 1.0, 64)
    times = jnp.linspace(0.0, 1.0, 32)
    x, t = np.meshgrid(np.linspace(-1.0, 1.0, 64), np.linspace(0.05, 1.0, 20))
    nodes, weights = np.polynomial.hermite.hermgauss(80)  # Cole and Hopf's solution
    y = x[..., None] - 2.0 * np.sqrt(viscosity * t)[..., None] * nodes
    weights = weights * np.exp(-np.cos(math.pi * y) / (2.0 * math.pi * viscosity))
    true = jnp.asarray(-(np.sin(math.pi * y) * weights).sum(-1) / weights.sum(-1))
    grid = jnp.asarray(np.stack([x, t], -1), jnp.float32)

    def u(params: Params, x: jax.Array, t: jax.Array) -> jax.Array:
        return mlp(params, jnp.stack([x, t]))[0]

    def residual(params: Params, x: jax.Array, t: jax.Array) -> jax.Array:
        def along(x: jax.Array) -> tuple[jax.Array, jax.Array]:
            return jax.jvp(lambda x: u(params, x, t), (x,), (jnp.ones_like(x),))

        (value, u_x), (_, u_xx) = jax.jvp(along, (x,), (jnp.ones_like(x),))
        _, u_t = jax.jvp(lambda t: u(params, x, t), (t,), (jnp.ones_like(t),))
        return u_t + value * u_x - viscosity * u_xx

    def loss(params: Params, key: jax.Array) -> jax.Array:
        del key
        many = jax.vmap(partial(u, params))
        inner = jax.vmap(partial(residual, params))(inside[:, 0], inside[:, 1])
        start = many(at_first, jnp.zeros_like(at_first)) + jnp.sin(math.pi * at_first)
        sides = [many(jnp.full_like(times, x), times) for x in (-1.0, 1.0)]
        walls = jnp.concatenate(sides)
        return (inner**2).mean() + (start**2).mean() + (walls**2).mean()

    def judge(params: Params, rest: PyTree) -> tuple[jax.Array, jax.Array]:
        found = mlp(params, grid)[..., 0]
        gap = jnp.sqrt(((found - true) ** 2).sum() / (true**2).sum())
        return loss(params, jax.random.key(0)), gap

    return Program(
        "Physics-informed network, Burgers' equation at viscosity 0.01 / pi",
        lambda key: (dense(key, 2, 20, 20, 20, 1), ()),
        gradient_of(loss),
        judge,
        "relative error of the solution",
        -1,
        optax.adam,
        1e-3,
        "network, optimizer and rate of DeepXDE's `Burgers.py`",
        3000,
    )


# Generative models


def flow() -> Program:
    """A normalising flow of affine couplings on two moons."""
    train, test = (moons(jax.random.key(seed), 4000) for seed in (FIXED, FIXED + 1))

    def nll(params: Params, x: jax.Array) -> jax.Array:
        log_det = jnp.zeros(len(x))
        for layers in params:
            shift, log_scale = mlp(layers, x[:, :1], jax.nn.leaky_relu).T
            log_scale = 2.0 * jnp.tanh(log_scale)  # as in Real NVP
            x = jnp.stack([x[:, 1] * jnp.exp(log_scale) + shift, x[:, 0]], axis=-1)
            log_det = log_det + log_scale
        return (0.5 * (x**2).sum(axis=-1) - log_det).mean() + math.log(2.0 * math.pi)

    def loss(params: Params, key: jax.Array) -> jax.Array:
        squares = sum(jnp.sum(p**2) for p in jax.tree.leaves(params))
        return nll(params, moons(key, 256)) + 0.5e-5 * squares

    def init(key: jax.Array) -> tuple[Params, PyTree]:
        return [dense(k, 1, 32, 32, 2, scale=0.5) for k in jax.random.split(key, 6)], ()

    return Program(
        "Normalising flow, six affine couplings, two moons",
        init,
        gradient_of(loss),
        lambda params, rest: (nll(params, train), nll(params, test)),
        "held-out negative log likelihood",
        -1,
        optax.adam,
        5e-4,
        "rate and weight decay of the example of Real NVP of normflows",
        2500,
    )


def diffusion() -> Program:
    """Denoising diffusion with fifty noise levels on two moons."""
    keys = jax.random.split(jax.random.key(FIXED))
    train, test = moons(keys[0], 2000), moons(keys[1], 500)
    betas = jnp.linspace(1e-4, 0.2, 50)
    kept = jnp.cumprod(1.0 - betas)

    def waves(x: jax.Array) -> jax.Array:
        angles = x[..., None] * jnp.exp2(jnp.arange(6.0))
        return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)

    def noise_of(params: Params, x: jax.Array, level: jax.Array) -> jax.Array:
        inputs = [waves(x[:, 0]), waves(x[:, 1]), waves(level / 50.0)]
        h = mlp(params["first"], jnp.concatenate(inputs, axis=-1))
        for layer in params["blocks"]:
            h = h + jax.nn.gelu(mlp([layer], h))
        return mlp(params["last"], h)

    def denoising(params: Params, x: jax.Array, key: jax.Array) -> jax.Array:
        for_level, for_noise = jax.random.split(key)
        level = jax.random.randint(for_level, (len(x),), 0, 50)
        noise, share = jax.random.normal(for_noise, x.shape), kept[level][:, None]
        seen = jnp.sqrt(share) * x + jnp.sqrt(1.0 - share) * noise
        return ((noise_of(params, seen, level) - noise) ** 2).mean()

    def loss(params: Params, key: jax.Array) -> jax.Array:
        (x,) = rows(key, 256, train)
        return denoising(params, x, jax.random.fold_in(key, 1))

    def drawn(params: Params, size: int) -> jax.Array:
        keys = jax.random.split(jax.random.key(FIXED), 51)

        def back(x: jax.Array, now: PyTree) -> tuple[jax.Array, None]:
            level, key = now
            beta, share = betas[level], kept[level]
            noise = noise_of(params, x, jnp.full(size, level))
            mean = (x - beta / jnp.sqrt(1.0 - share) * noise) / jnp.sqrt(1.0 - beta)
            fresh = jnp.where(level > 0, jnp.sqrt(beta), 0.0)
            return mean + fresh * jax.random.normal(key, x.shape), None

        first = jax.random.normal(keys[50], (size, 2))
        return lax.scan(back, first, (jnp.arange(49, -1, -1), keys[:50]))[0]

    def apart(x: jax.Array, y: jax.Array) -> jax.Array:
        squares = ((x[:, None] - y[None]) ** 2).sum(axis=-1)
        return jnp.sqrt(squares + 1e-12).mean()

    def judge(params: Params, rest: PyTree) -> tuple[jax.Array, jax.Array]:
        x = drawn(params, len(test))
        energy = 2.0 * apart(x, test) - apart(x, x) - apart(test, test)
        many = jnp.tile(train, (8, 1))
        return denoising(params, many, jax.random.key(FIXED)), energy

    def init(key: jax.Array) -> tuple[Params, PyTree]:
        keys = jax.random.split(key, 3)
        blocks = dense(keys[1], 64, 64, 64, 64)
        first, last = dense(keys[0], 36, 64), dense(keys[2], 64, 2)
        return {"first": first, "blocks": blocks, "last": last}, ()

    return Program(
        "Denoising diffusion, fifty noise levels, two moons",
        init,
        gradient_of(loss),
        judge,
        "energy distance of 500 samples to held-out data",
        -1,
        lambda rate: optax.chain(
            optax.clip_by_global_norm(1.0), optax.adamw(rate, weight_decay=1e-2)
        ),
        1e-3,
        "clipped AdamW, rate and batch size of tiny-diffusion's `ddpm.py`",
        2000,
        weight_decay=1e-2,
    )


# Estimates from samples


def helium() -> Program:
    """Variational Monte Carlo: the ground state of helium, whose energy is negative."""

    def log_psi(params: Params, place: jax.Array) -> jax.Array:
        first, second = place[:3], place[3:]
        r1, r2 = jnp.linalg.norm(first), jnp.linalg.norm(second)
        r12 = jnp.linalg.norm(first - second)
        features = jnp.stack([r1 + r2, (r1 - r2) ** 2 / (1.0 + r1 + r2), r12])
        cusps = -2.0 * (r1 + r2) + 0.5 * r12 / (1.0 + r12)
        return cusps + mlp(params, features)[0]

    def local_energy(params: Params, place: jax.Array) -> jax.Array:
        slope = jax.grad(partial(log_psi, params))
        eye = jnp.eye(6)
        bend = jax.vmap(lambda v: v @ jax.jvp(slope, (place,), (v,))[1])(eye).sum()
        r1, r2 = jnp.linalg.norm(place[:3]), jnp.linalg.norm(place[3:])
        r12 = jnp.linalg.norm(place[:3] - place[3:])
        potential = -2.0 / r1 - 2.0 / r2 + 1.0 / r12
        return potential - 0.5 * (bend + (slope(place) ** 2).sum())

    def moved(
        params: Params, places: jax.Array, key: jax.Array, count: int
    ) -> jax.Array:
        def step(carry: PyTree, key: jax.Array) -> tuple[PyTree, None]:
            places, log_density = carry
            propose, accept = jax.random.split(key)
            new = places + 0.35 * jax.random.normal(propose, places.shape)
            new_log_density = 2.0 * jax.vmap(partial(log_psi, params))(new)
            luck = jnp.log(jax.random.uniform(accept, (len(places),)))
            goes = luck < new_log_density - log_density
            places = jnp.where(goes[:, None], new, places)
            return (places, jnp.where(goes, new_log_density, log_density)), None

        start = places, 2.0 * jax.vmap(partial(log_psi, params))(places)
        return lax.scan(step, start, jax.random.split(key, count))[0][0]

    def gradient(params: Params, places: jax.Array, key: jax.Array) -> PyTree:
        places = moved(params, places, key, 10)
        energies = jax.vmap(partial(local_energy, params))(places)
        center = jnp.median(energies)  # outliers are bounded, as in FermiNet
        spread = 5.0 * jnp.abs(energies - center).mean()
        bounded = jnp.clip(energies, center - spread, center + spread)

        def score(params: Params) -> jax.Array:
            logs = jax.vmap(partial(log_psi, params))(places)
            return 2.0 * ((bounded - bounded.mean()) * logs).mean()

        return (energies.mean(), places), jax.grad(score)(params)

    def judge(params: Params, rest: PyTree) -> tuple[jax.Array, jax.Array]:
        keys = jax.random.split(jax.random.key(FIXED), 21)
        places = moved(params, jax.random.normal(keys[0], (1024, 6)), keys[0], 200)

        def look(places: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
            places = moved(params, places, key, 10)
            return places, jax.vmap(partial(local_energy, params))(places).mean()

        energy = lax.scan(look, places, keys[1:])[1].mean()
        return energy, 1000.0 * (energy + 2.903724)

    def init(key: jax.Array) -> tuple[Params, PyTree]:
        layers, walkers = jax.random.split(key)
        params = dense(layers, 3, 24, 24, 1)
        places = jax.random.normal(walkers, (128, 6))
        return params, moved(params, places, walkers, 100)

    return Program(
        "Variational Monte Carlo, helium, 128 walkers",
        init,
        gradient,
        judge,
        "energy above the exact one, in mHa",
        -1,
        optax.adam,
        1e-3,
        "Adam at its default rate, as is common where K-FAC is not used",
        1500,
    )


def elbo() -> Program:
    """Variational inference, one sample a step: logistic regression with a prior."""
    from sklearn.datasets import load_breast_cancer

    data = load_breast_cancer()
    sets = split(standardized(data.data), data.target.astype(np.float32))
    size = data.data.shape[1] + 2  # weights, offset, logarithm of the prior's scale

    def log_likelihood(place: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
        return -optax.sigmoid_binary_cross_entropy(x @ place[:-2] + place[-2], y)

    def sampled(params: Params, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        scale = jnp.exp(params["log_scale"])
        noise = jax.random.normal(key, (size,))
        place = params["mean"] + scale * noise
        weights, offset, log_tau = place[:-2], place[-2], place[-1]
        prior = -0.5 * ((weights * jnp.exp(-log_tau)) ** 2).sum() - 30.0 * log_tau
        prior = prior - 0.5 * (offset / 5.0) ** 2 - 0.5 * log_tau**2
        entropy = 0.5 * (noise**2).sum() + params["log_scale"].sum()
        return place, -(log_likelihood(place, *sets[0]).sum() + prior + entropy)

    def judge(params: Params, rest: PyTree) -> tuple[jax.Array, jax.Array]:
        keys = jax.random.split(jax.random.key(FIXED), 400)
        places, bounds = jax.vmap(partial(sampled, params))(keys)
        found = jax.vmap(lambda place: log_likelihood(place, *sets[1]))(places)
        predictive = jax.nn.logsumexp(found, axis=0) - math.log(len(keys))
        return bounds.mean(), predictive.mean()

    def init(key: jax.Array) -> tuple[Params, PyTree]:
        mean = 0.1 * jax.random.normal(key, (size,))
        return {"mean": mean, "log_scale": jnp.full(size, math.log(0.1))}, ()

    return Program(
        "One-sample ELBO, logistic regression with a hierarchical prior, breast cancer",
        init,
        gradient_of(lambda params, key: sampled(params, key)[1]),
        judge,
        "held-out log predictive density",
        1,
        optax.adam,
        0.03,
        "optimizer and rate of Pyro's tutorial on Bayesian regression",
        1500,
    )


# Reinforcement learning


class CartPole(NamedTuple):
    """State of the cart, and for how long it has stood."""

    state: jax.Array
    time: jax.Array

    @classmethod
    def reset(cls, key: jax.Array) -> "CartPole":
        """Returns one near the middle."""
        return cls(
            jax.random.uniform(key, (4,), minval=-0.05, maxval=0.05), jnp.int32(0)
        )

    def push(self, action: jax.Array) -> "CartPole":
        """Returns it a fiftieth of a second later."""
        _, v, angle, spin = self.state
        sin, cos = jnp.sin(angle), jnp.cos(angle)
        force = jnp.where(action == 1, 10.0, -10.0)
        pull = (force + 0.05 * spin**2 * sin) / 1.1
        bend = (9.8 * sin - cos * pull) / (0.5 * (4.0 / 3.0 - 0.1 * cos**2 / 1.1))
        slide = pull - 0.05 * bend * cos / 1.1
        change = jnp.stack([v, slide, spin, bend])
        return CartPole(self.state + 0.02 * change, self.time + 1)

    @property
    def has_fallen(self) -> jax.Array:
        """Whether the pole has, or the cart has left."""
        return (jnp.abs(self.state[0]) > 2.4) | (jnp.abs(self.state[2]) > 0.2095)


class Memory(NamedTuple):
    """What a learner carries along: carts, transitions, target network."""

    carts: CartPole
    seen: dict[str, jax.Array]
    target: Params
    num_seen: jax.Array


def dqn(is_told: bool = False) -> Program:
    """Deep Q-learning on the cart and its pole."""
    num_carts, capacity, num_steps, discount = 2, 16384, 8000, 0.99

    def scores(params: Params, state: jax.Array) -> jax.Array:
        return mlp(params, state, jax.nn.relu)

    def acted(params: Params, memory: Memory, key: jax.Array) -> Memory:
        explore, guess, fresh = jax.random.split(key, 3)
        share = jnp.maximum(0.04, 1.0 - memory.num_seen / (0.16 * num_steps))
        old = memory.carts.state
        guesses = jax.random.randint(guess, (num_carts,), 0, 2)
        is_guess = jax.random.uniform(explore, (num_carts,)) < share
        actions = jnp.where(is_guess, guesses, scores(params, old).argmax(axis=-1))
        carts = jax.vmap(CartPole.push)(memory.carts, actions)
        fallen = jax.vmap(lambda cart: cart.has_fallen)(carts)
        now = {"old": old, "new": carts.state, "action": actions, "fallen": fallen}
        at = (memory.num_seen * num_carts) % capacity
        seen = {
            name: lax.dynamic_update_slice_in_dim(x, now[name].astype(x.dtype), at, 0)
            for name, x in memory.seen.items()
        }
        begun = jax.vmap(CartPole.reset)(jax.random.split(fresh, num_carts))
        is_over = fallen | (carts.time >= 500)
        carts = CartPole(
            jnp.where(is_over[:, None], begun.state, carts.state),
            jnp.where(is_over, 0, carts.time),
        )
        moves = memory.num_seen % 50 == 0
        target = jax.tree.map(
            lambda p, t: jnp.where(moves, p, t), params, memory.target
        )
        return Memory(carts, seen, target, memory.num_seen + 1)

    def gradient(params: Params, memory: Memory, key: jax.Array) -> PyTree:
        act, draw = jax.random.split(key)
        memory = acted(params, memory, act)
        size = jnp.minimum(memory.num_seen * num_carts, capacity)
        chosen = jax.random.randint(draw, (64,), 0, size)
        batch = {name: x[chosen] for name, x in memory.seen.items()}
        best = scores(memory.target, batch["new"]).max(axis=-1)
        goal = 1.0 + discount * jnp.where(batch["fallen"], 0.0, best)

        def loss(params: Params) -> jax.Array:
            found = scores(params, batch["old"])
            found = jnp.take_along_axis(found, batch["action"][:, None], axis=-1)[:, 0]
            return optax.huber_loss(found, goal).mean()

        value, grads = jax.value_and_grad(loss)(params)
        return (value, memory), grads

    def judge(params: Params, rest: PyTree) -> tuple[jax.Array, jax.Array]:
        keys = jax.random.split(jax.random.key(FIXED), 32)

        def step(carry: PyTree, _: None) -> tuple[PyTree, jax.Array]:
            carts, stands = carry
            actions = scores(params, carts.state).argmax(axis=-1)
            carts = jax.vmap(CartPole.push)(carts, actions)
            stands = stands & ~jax.vmap(lambda cart: cart.has_fallen)(carts)
            return (carts, stands), stands

        start = jax.vmap(CartPole.reset)(keys), jnp.ones(32, bool)
        stood = lax.scan(step, start, None, 499)[1].sum(axis=0)
        length = 1.0 + stood.mean()
        return -length / 500.0, length

    def init(key: jax.Array) -> tuple[Params, PyTree]:
        layers, place = jax.random.split(key)
        params = dense(layers, 4, 64, 64, 2, scale=math.sqrt(2.0))
        carts = jax.vmap(CartPole.reset)(jax.random.split(place, num_carts))
        seen = {
            "old": jnp.zeros((capacity, 4)),
            "new": jnp.zeros((capacity, 4)),
            "action": jnp.zeros(capacity, jnp.int32),
            "fallen": jnp.zeros(capacity, bool),
        }
        return params, Memory(carts, seen, params, jnp.int32(0))

    told = "told the loss" if is_told else "`value=None`"
    return Program(
        f"Deep Q-learning, CartPole, {told}; as loss counts the return / -500",
        init,
        gradient,
        judge,
        "return",
        1,
        optax.adam,
        2.3e-3,
        "rate, batch size and exploration of RL Zoo's first setting for CartPole",
        num_steps,
        is_told=is_told,
    )


# Representations


def graph() -> Program:
    """A graph network that labels nodes, of which few have labels."""
    rng = np.random.default_rng(FIXED)
    num_kinds, num_nodes, num_words = 6, 300, 80
    label = np.arange(num_nodes) % num_kinds
    is_alike = label[:, None] == label[None]
    edges = np.triu(rng.random((num_nodes, num_nodes)) < 0.005 + 0.03 * is_alike, 1)
    edges = edges + edges.T + np.eye(num_nodes)
    degree = edges.sum(axis=0)
    near = jnp.asarray(edges / np.sqrt(degree[:, None] * degree), jnp.float32)
    rates = rng.beta(0.3, 4.0, (num_kinds, num_words))
    has_word = rng.random((num_nodes, num_words)) < rates[label]
    shares = has_word / np.maximum(has_word.sum(axis=1, keepdims=True), 1)
    words, labels = jnp.asarray(shares, jnp.float32), jnp.asarray(label)
    known = jnp.arange(num_nodes) < 10 * num_kinds

    def logits(params: Params, masks: tuple[Any, Any]) -> jax.Array:
        hidden = jax.nn.relu(near @ mlp(params[:1], words * masks[0]))
        return near @ mlp(params[1:], hidden * masks[1])

    def objective(params: Params, masks: tuple[Any, Any]) -> jax.Array:
        losses = optax.softmax_cross_entropy_with_integer_labels(
            logits(params, masks), labels
        )
        squares = sum(jnp.sum(p**2) for p in jax.tree.leaves(params))
        return (losses * known).sum() / known.sum() + 0.5 * 5e-4 * squares

    def loss(params: Params, key: jax.Array) -> jax.Array:
        keys = jax.random.split(key)
        shapes = words.shape, (num_nodes, 16)
        masks = [
            2.0 * jax.random.bernoulli(k, shape=s)
            for k, s in zip(keys, shapes, strict=True)
        ]
        return objective(params, (masks[0], masks[1]))

    def judge(params: Params, rest: PyTree) -> tuple[jax.Array, jax.Array]:
        is_right = logits(params, (1.0, 1.0)).argmax(axis=-1) == labels
        share = (is_right & ~known).sum() / (~known).sum()
        return objective(params, (1.0, 1.0)), 100.0 * share

    return Program(
        "Graph convolutions, 300 nodes, 60 of them with a label",
        lambda key: (dense(key, num_words, 16, num_kinds), ()),
        gradient_of(loss),
        judge,
        "accuracy on the other nodes in %",
        1,
        optax.adam,
        0.01,
        "width, dropout, weight decay, rate and steps of pygcn",
        200,
    )


def contrastive() -> Program:
    """Contrastive learning: two views of a digit are to be alike."""
    (train, train_labels), (test, test_labels) = split(*digit_images())

    def view(image: jax.Array, key: jax.Array) -> jax.Array:
        keys = jax.random.split(key, 4)
        shift = jax.random.randint(keys[0], (2,), -1, 2)
        image = jnp.roll(image.reshape(8, 8), shift, (0, 1)).reshape(64)
        image = image * jax.random.uniform(keys[1], (64,), minval=0.5, maxval=1.5)
        image = image * jax.random.bernoulli(keys[2], 0.8, (64,))
        return image + 0.1 * jax.random.normal(keys[3], (64,))

    def features(params: Params, x: jax.Array) -> jax.Array:
        return jax.nn.relu(mlp(params["body"], x, jax.nn.relu))

    def alike(params: Params, images: jax.Array, key: jax.Array) -> jax.Array:
        size = len(images)
        keys = jax.random.split(key, 2 * size)
        x = jax.vmap(view)(jnp.concatenate([images, images]), keys)
        z = mlp(params["head"], features(params, x), jax.nn.relu)
        z = z / jnp.linalg.norm(z, axis=-1, keepdims=True)
        logits = z @ z.T / 0.5 - 1e9 * jnp.eye(2 * size)
        return cross_entropy(logits, (jnp.arange(2 * size) + size) % (2 * size))

    def loss(params: Params, key: jax.Array) -> jax.Array:
        squares = sum(jnp.sum(p**2) for p in jax.tree.leaves(params))
        draw, noise = jax.random.split(key)
        (images,) = rows(draw, 128, train)
        return alike(params, images, noise) + 0.5e-6 * squares

    def judge(params: Params, rest: PyTree) -> tuple[jax.Array, jax.Array]:
        keys = jax.random.split(jax.random.key(FIXED), 11)
        losses = lax.map(
            lambda now: alike(params, *now),
            (train[: 11 * 128].reshape(11, 128, 64), keys),
        )
        x = features(params, train)
        ridge = x.T @ x + 1e-2 * len(x) * jnp.eye(x.shape[1])
        probe = jnp.linalg.solve(ridge, x.T @ jax.nn.one_hot(train_labels, 10))
        return losses.mean(), accuracy(features(params, test) @ probe, test_labels)

    def init(key: jax.Array) -> tuple[Params, PyTree]:
        body, head = jax.random.split(key)
        gain = math.sqrt(2.0)
        return {
            "body": dense(body, 64, 64, 32, scale=gain),
            "head": dense(head, 32, 32, 16, scale=gain),
        }, ()

    return Program(
        "Contrastive learning (SimCLR), digits",
        init,
        gradient_of(loss),
        judge,
        "held-out accuracy of a linear probe in %",
        1,
        optax.adam,
        1e-3,
        "rate, weight decay and temperature of leftthomas/SimCLR",
        1000,
    )


def lora() -> Program:
    """Fine-tuning by low rank: a network that knows digits learns their mirror images.

    What is fine-tuned is trained once, by Adam.
    """
    sets = split(*digit_images())
    mirrored = [x.reshape(-1, 8, 8).swapaxes(1, 2).reshape(-1, 64) for x, _ in sets]
    labels = [y for _, y in sets]

    @cache
    def base() -> list[PyTree]:
        tx = optax.adam(1e-3)

        def step(carry: PyTree, key: jax.Array) -> tuple[PyTree, None]:
            params, state = carry
            x, y = rows(key, 64, *sets[0])
            grads = jax.grad(lambda p: cross_entropy(mlp(p, x, jax.nn.relu), y))(params)
            updates, state = tx.update(grads, state)
            return (optax.apply_updates(params, updates), state), None

        with jax.ensure_compile_time_eval():
            params = dense(jax.random.key(FIXED), 64, 96, 96, 10)
            keys = jax.random.split(jax.random.key(FIXED), 1000)
            run = jax.jit(lambda p: lax.scan(step, (p, tx.init(p)), keys)[0][0])
            return run(params)

    def logits(params: Params, x: jax.Array) -> jax.Array:
        layers = [
            {"w": layer["w"] + 8.0 * p["a"] @ p["b"], "b": layer["b"]}
            for layer, p in zip(base(), params, strict=True)
        ]
        return mlp(layers, x, jax.nn.relu)

    def loss(params: Params, key: jax.Array) -> jax.Array:
        x, y = rows(key, 32, mirrored[0], labels[0])
        return cross_entropy(logits(params, x), y)

    def init(key: jax.Array) -> tuple[Params, PyTree]:
        shapes = [layer["w"].shape for layer in base()]
        return [
            {
                "a": jax.random.normal(k, (n, 4)) / math.sqrt(3.0 * n),
                "b": jnp.zeros((4, m)),
            }
            for k, (n, m) in zip(jax.random.split(key, 3), shapes, strict=True)
        ], ()

    return Program(
        "LoRA of rank 4 on a perceptron, mirrored digits",
        init,
        gradient_of(loss),
        lambda params, rest: (
            cross_entropy(logits(params, mirrored[0]), labels[0]),
            accuracy(logits(params, mirrored[1]), labels[1]),
        ),
        "held-out accuracy in %",
        1,
        lambda rate: optax.adamw(rate, weight_decay=1e-2),
        2e-4,
        "rank, scale, weight decay, rate and schedule of LoRA's own GPT-2",
        1500,
        schedule=warmup_linear,
        weight_decay=1e-2,
    )


# Others


def least_squares() -> Program:
    """Nonlinear least squares in float64: three damped oscillations, no noise."""
    true = np.array(
        [[1.0, 0.7, 0.5], [0.2, 0.4, 0.1], [1.5, 3.0, 5.0], [0.0, 1.0, 2.0]]
    )
    times = np.linspace(0.0, 10.0, 200)

    def curve(place: jax.Array) -> jax.Array:
        amplitude, decay, frequency, phase = place[:, :, None]
        waves = jnp.cos(frequency * times[None] + phase)
        return (amplitude * jnp.exp(-decay * times[None]) * waves).sum(axis=0)

    def loss(params: Params, key: jax.Array) -> jax.Array:
        del key
        return jnp.mean((curve(params) - curve(jnp.asarray(true))) ** 2)

    def judge(params: Params, rest: PyTree) -> tuple[jax.Array, jax.Array]:
        gap = jnp.sqrt(jnp.mean((params - true) ** 2))
        return loss(params, jax.random.key(0)), jnp.log10(gap)

    def init(key: jax.Array) -> tuple[Params, PyTree]:
        return true + 0.1 * jax.random.normal(key, true.shape, jnp.float64), ()

    return Program(
        "Least squares in float64, three damped oscillations, no noise",
        init,
        gradient_of(loss),
        judge,
        "log10 of the error of the parameters",
        -1,
        optax.adam,
        1e-2,
        "Adam at the rate of most tutorials on curve fitting",
        3000,
        is_double=True,
    )


def equilibrium() -> Program:
    """A deep equilibrium network with implicit gradients, digits."""
    train, test = split(*digit_images())

    def cell(params: Params, x: jax.Array, z: jax.Array) -> jax.Array:
        return jnp.tanh(z @ params["w"] + x @ params["u"] + params["b"])

    def settled(step: Callable[[jax.Array], jax.Array], z: jax.Array) -> jax.Array:
        return lax.fori_loop(0, 25, lambda _, z: step(z), z)

    @jax.custom_vjp
    def fixed_point(params: Params, x: jax.Array) -> jax.Array:
        return settled(partial(cell, params, x), jnp.zeros((len(x), 48)))

    def forward(params: Params, x: jax.Array) -> tuple[jax.Array, PyTree]:
        z = fixed_point(params, x)
        return z, (params, x, z)

    def backward(kept: PyTree, slope: jax.Array) -> tuple[PyTree, jax.Array]:
        params, x, z = kept
        _, pull_z = jax.vjp(partial(cell, params, x), z)
        _, pull = jax.vjp(lambda params, x: cell(params, x, z), params, x)
        return pull(settled(lambda u: slope + pull_z(u)[0], slope))

    fixed_point.defvjp(forward, backward)

    def logits(params: Params, x: jax.Array) -> jax.Array:
        return mlp(params["out"], fixed_point(params["cell"], x))

    def loss(params: Params, key: jax.Array) -> jax.Array:
        x, y = rows(key, 64, *train)
        return cross_entropy(logits(params, x), y)

    def init(key: jax.Array) -> tuple[Params, PyTree]:
        keys = jax.random.split(key, 3)
        w, u = (
            dense(k, n, 48)[0]["w"] for k, n in zip(keys[:2], (48, 64), strict=True)
        )
        inner = {"w": 0.5 * w, "u": u, "b": jnp.zeros(48)}
        return {"cell": inner, "out": dense(keys[2], 48, 10)}, ()

    return Program(
        "Deep equilibrium network with implicit gradients, digits",
        init,
        gradient_of(loss),
        lambda params, rest: (
            cross_entropy(logits(params, train[0]), train[1]),
            accuracy(logits(params, test[0]), test[1]),
        ),
        "held-out accuracy in %",
        1,
        optax.adam,
        1e-3,
        "rate and cosine decay of the tutorial *Deep implicit layers*",
        1000,
        schedule=cosine,
    )


def adding() -> Program:
    """The adding problem: a GRU of which two in forty inputs count."""
    length, width = 40, 20

    def drawn(key: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
        keys = jax.random.split(key, 3)
        x = jax.random.uniform(keys[0], (length, size))
        half = length // 2
        early = jax.random.randint(keys[1], (size,), 0, half)
        late = jax.random.randint(keys[2], (size,), half, length)
        at = jax.nn.one_hot(early, length, axis=0) + jax.nn.one_hot(
            late, length, axis=0
        )
        return jnp.stack([x, at], axis=-1), (x * at).sum(axis=0)

    def error(params: Params, x: jax.Array, y: jax.Array) -> jax.Array:
        seen = mlp(params["in"], x)

        def step(h: jax.Array, now: jax.Array) -> tuple[jax.Array, None]:
            gates = jax.nn.sigmoid(now[:, : 2 * width] + mlp(params["gates"], h))
            keep, reset = gates[:, :width], gates[:, width:]
            new = jnp.tanh(now[:, 2 * width :] + reset * mlp(params["new"], h))
            return keep * h + (1.0 - keep) * new, None

        h, _ = lax.scan(step, jnp.zeros((x.shape[1], width)), seen)
        return (mlp(params["out"], h)[:, 0] - y) ** 2

    def judge(params: Params, rest: PyTree) -> tuple[jax.Array, jax.Array]:
        errors = error(params, *drawn(jax.random.key(FIXED), 2000))
        return errors.mean(), 100.0 * (errors < 0.04**2).mean()

    def init(key: jax.Array) -> tuple[Params, PyTree]:
        keys = jax.random.split(key, 4)
        return {
            "in": dense(keys[0], 2, 3 * width),
            "gates": dense(keys[1], width, 2 * width),
            "new": dense(keys[2], width, width),
            "out": dense(keys[3], width, 1),
        }, ()

    return Program(
        "Long recurrence: the adding problem over forty steps, GRU",
        init,
        gradient_of(lambda params, key: error(params, *drawn(key, 32)).mean()),
        judge,
        "right within 0.04, in %",
        1,
        lambda rate: optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate)),
        1e-3,
        "clipped Adam at its default rate",
        2000,
    )


MAKERS: dict[str, Callable[[], Program]] = {
    "neural ODE": neural_ode,
    "PINN": burgers,
    "flow": flow,
    "diffusion": diffusion,
    "VMC": helium,
    "ELBO": elbo,
    "DQN": dqn,
    "DQN, told": partial(dqn, is_told=True),
    "graph": graph,
    "contrastive": contrastive,
    "LoRA": lora,
    "least squares": least_squares,
    "equilibrium": equilibrium,
    "recurrence": adding,
}


@cache
def made(name: str) -> Program:
    """Returns a program, made once."""
    return MAKERS[name]()
