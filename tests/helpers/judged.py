"""Runs of made-up losses and gradients, and what the regulator says of them."""

import jax.numpy as jnp
import numpy as np
import optax

import lalerg_optax as lo
from lalerg_optax import Verdict

from .drive import drive

ACCEPT, SKIP, REVERT, BOUND = Verdict
BAD = [np.nan, np.inf, -np.inf]
NAMES = {  # some of the metrics
    *("verdict", "scaled_error", "macro_rate", "damping_factor", "num_accepted"),
    *("num_skipped", "num_revert_steps", "num_bounded", "avg_value", "grad_norm"),
}
REGULATED = lo.error_regulate(optax.sgd(1e-2))
SLOW = lo.error_regulate(optax.sgd(1e-5))  # hardly moves


def noisy(rng, num_steps, level=1.0, noise=0.05):
    """Returns losses of a stationary run and gradients of about equal norm.

    They have a slope in common, or the first steps would seem to lead uphill.
    """
    losses = level * (1.0 + noise * rng.standard_normal(num_steps))
    grads = 1.0 + 0.5 * rng.standard_normal((num_steps, 8))
    return losses.astype(np.float32), grads.astype(np.float32)


def make(num_steps=400, seed=0, **kwargs):
    """Returns losses and gradients in which there is nothing to object to yet."""
    return noisy(np.random.default_rng(seed), num_steps, **kwargs)


def _told(step):
    return step.params, lo.metrics(step.state), step.state


def judge(losses, grads, tx=REGULATED):
    """Returns params before the first and after every step, reports and states."""
    start = jnp.ones(grads.shape[1])
    *_, (params, report, states) = drive(tx, start, (losses, grads), see=_told)
    return np.concatenate([start[None], params]), report, states


def verdicts_of(losses, grads, tx=REGULATED):
    return np.asarray(judge(losses, grads, tx)[1]["verdict"])


def exceptions(verdicts):
    """Returns all verdicts but ACCEPT, by step."""
    return {int(t): Verdict(verdicts[t]) for t in np.flatnonzero(verdicts)}


def lengths(all_params):
    """Returns how far params moved in each step."""
    return np.linalg.norm(np.diff(all_params, axis=0), axis=1)
