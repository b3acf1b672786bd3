"""Proximal policy optimisation on CartPole: a noisy loss that rises with success.

The longer an episode, the larger the returns and with them the error of their estimate.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from client_packages import import_client

import lalerg_optax as lo
from lalerg_optax import Verdict
from lalerg_optax._verdict import is_applied

gymnax = import_client("gymnax")

NUM_SEEDS = 8  # of one, the length of an episode tells little
NUM_UPDATES, NUM_EPOCHS, NUM_ENVS, LENGTH = 40, 4, 16, 64
DISCOUNT, SMOOTHING, CLIP = 0.99, 0.95, 0.2
OPTIMIZERS = {
    "lalerg, no search": lambda: lo.lalerg(5e-3, search=False),
    "error_regulate, no value": lambda: lo.without_value(
        lo.error_regulate(optax.adam(5e-3))
    ),
    "adam": lambda: optax.with_extra_args_support(optax.adam(5e-3)),
}
OURS = [name for name in OPTIMIZERS if name != "adam"]
REJECTED = (Verdict.SKIP, Verdict.REVERT)


class Step(NamedTuple):
    """What was seen, done and got, with shape ``(LENGTH, NUM_ENVS, ...)``."""

    observation: jax.Array
    action: jax.Array
    log_prob: jax.Array
    value: jax.Array
    reward: jax.Array
    is_over: jax.Array


def init_params(key):
    keys = jax.random.split(key, 3)
    return {
        "hidden": jax.random.normal(keys[0], (4, 64)) / 2.0,
        "policy": jax.random.normal(keys[1], (64, 2)) * 0.01,
        "value": jax.random.normal(keys[2], (64,)) / 8.0,
    }


def policy_and_value(params, observation):
    hidden = jnp.tanh(observation @ params["hidden"])
    return jax.nn.log_softmax(hidden @ params["policy"]), hidden @ params["value"]


def pick(log_probs, action):
    return jnp.take_along_axis(log_probs, action[..., None], axis=-1)[..., 0]


def rollout(params, envs, key):
    """Plays on; returns the environments and all steps."""
    env, env_params = gymnax.make("CartPole-v1")

    def play(envs, key):
        observation, state = envs
        act_key, step_key = jax.random.split(key)
        log_probs, value = policy_and_value(params, observation)
        action = jax.random.categorical(act_key, log_probs)
        keys = jax.random.split(step_key, NUM_ENVS)
        seen, state, reward, terminated, truncated, _ = jax.vmap(
            env.step, in_axes=(0, 0, 0, None)
        )(keys, state, action, env_params)
        is_over = terminated | truncated
        step = Step(
            observation, action, pick(log_probs, action), value, reward, is_over
        )
        return (seen, state), step

    return jax.lax.scan(play, envs, jax.random.split(key, LENGTH))


def advantages(steps, last_value):
    """Returns generalised advantage estimates."""

    def back(carry, step):
        advantage, next_value = carry
        goes_on = 1.0 - step.is_over
        error = step.reward + DISCOUNT * goes_on * next_value - step.value
        advantage = error + DISCOUNT * SMOOTHING * goes_on * advantage
        return (advantage, step.value), advantage

    start = (jnp.zeros(NUM_ENVS), last_value)
    return jax.lax.scan(back, start, steps, reverse=True)[1]


def loss_fn(params, steps, advantage):
    log_probs, value = policy_and_value(params, steps.observation)
    ratio = jnp.exp(pick(log_probs, steps.action) - steps.log_prob)
    normed = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
    clipped = jnp.clip(ratio, 1.0 - CLIP, 1.0 + CLIP)
    policy_loss = -jnp.minimum(ratio * normed, clipped * normed).mean()
    value_loss = jnp.square(value - advantage - steps.value).mean()
    entropy = -(jnp.exp(log_probs) * log_probs).sum(axis=-1).mean()
    return policy_loss + 0.01 * value_loss - 0.01 * entropy


@functools.cache
def train(name, poisoned_update=None):
    """Returns params, losses, verdicts and lengths of an episode.

    Each has a leading axis for the seed, and all but the params one for the update.
    """
    tx = OPTIMIZERS[name]()
    env, env_params = gymnax.make("CartPole-v1")

    def update(carry, inputs):
        params, opt_state, envs = carry
        t, key = inputs
        envs, steps = rollout(params, envs, key)
        _, last_value = policy_and_value(params, envs[0])
        advantage = advantages(steps, last_value)
        if poisoned_update is not None:
            advantage += jnp.where(t == poisoned_update, jnp.nan, 0.0)

        def epoch(carry, _):
            params, opt_state = carry
            loss, grads = jax.value_and_grad(loss_fn)(params, steps, advantage)
            updates, opt_state = tx.update(grads, opt_state, params, value=loss)
            params = optax.apply_updates(params, updates)
            is_ours = name in OURS
            verdict = lo.metrics(opt_state)["verdict"] if is_ours else jnp.zeros(())
            return (params, opt_state), (loss, verdict)

        carry, told = jax.lax.scan(epoch, (params, opt_state), length=NUM_EPOCHS)
        length = LENGTH * NUM_ENVS / (1.0 + steps.is_over.sum())
        return (*carry, envs), (*told, length)

    def run(key):
        keys = jax.random.split(key, 2 + NUM_UPDATES)
        params = init_params(keys[0])
        reset = jax.vmap(env.reset, in_axes=(0, None))
        envs = reset(jax.random.split(keys[1], NUM_ENVS), env_params)
        carry = params, tx.init(params), envs
        carry, told = jax.lax.scan(update, carry, (jnp.arange(NUM_UPDATES), keys[2:]))
        return carry[0], *told

    keys = jax.random.split(jax.random.key(0), NUM_SEEDS)
    params, *told = jax.jit(jax.vmap(run))(keys)
    return params, *map(np.asarray, told)


@pytest.mark.parametrize("name", OURS)
def test_a_policy_learns_as_fast_as_with_adam_and_is_left_alone(name):
    _, losses, verdicts, lengths = train(name)
    *_, bare = train("adam")
    assert np.all(losses.max(axis=(1, 2)) > 1.5 * losses[:, 0, 0])
    at_the_end = lengths[:, -5:].mean()
    assert at_the_end > 3 * lengths[:, 0].mean()
    assert at_the_end > 0.7 * bare[:, -5:].mean()
    num_rejected = [np.sum(verdicts == v, axis=(1, 2)) for v in REJECTED]
    assert np.max(num_rejected) <= 4, "of 160 steps"


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_update_of_nans_is_survived(name):
    params, _, verdicts, lengths = train(name, poisoned_update=10)
    is_finite = all(bool(np.all(np.isfinite(p))) for p in params.values())
    assert is_finite == (name != "adam")
    if name in OURS:
        assert not np.any(is_applied(verdicts[:, 10]))
        assert np.all(is_applied(verdicts[:, 11, 2:])), "once the params are back"
        assert lengths[:, -5:].mean() > 3 * lengths[:, 0].mean()
