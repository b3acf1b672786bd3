"""Real loss spikes, replayed: what would have been done about them, and when."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.drive import drive

import lalerg_optax as lo
from lalerg_optax import Verdict

ACCEPT, SKIP, REVERT, BOUND = (
    Verdict.ACCEPT,
    Verdict.SKIP,
    Verdict.REVERT,
    Verdict.BOUND,
)

# BLOOM-176B's first spike, step by step, as published with its training logs
BLOOM_LOSSES = [2.199, 2.220, 2.595, 2.242, 2.345, 5.098, 3.492, 3.213, 2.805]
BLOOM_NORMS = [0.242, 0.947, 2.39, 15.9, 145.0, 960.0, 353.0, 379.0, 650.0]
FIRST_ABNORMAL = 1  # its norm is four times that of the step before
JUMP = 5  # of the loss

QUIET = 600
NUM_PHASES = 40  # more than there are steps between two anchors


def trace(quiet_norm, norm_noise, seed, phase):
    """Returns losses and norms: a quiet run up to the spike, and the spike."""
    rng = np.random.default_rng(seed)
    num_steps = QUIET + NUM_PHASES + len(BLOOM_LOSSES)
    losses = 2.2 + 0.03 * rng.standard_normal(num_steps)
    norms = quiet_norm * np.exp(norm_noise * rng.standard_normal(num_steps))
    spike = slice(QUIET + phase, QUIET + phase + len(BLOOM_LOSSES))
    losses[spike], norms[spike] = BLOOM_LOSSES, BLOOM_NORMS
    return losses.astype(np.float32), norms.astype(np.float32)


def told(step):
    return lo.metrics(step.state) | {"before": step.before, "after": step.params}


@jax.jit
@jax.vmap
def replay(losses, norms):
    tx = lo.error_regulate(optax.sgd(1e-3))
    grads = norms[:, None] * jnp.array([[0.6, 0.0, 0.8]])
    return drive(tx, jnp.ones(3), (losses, grads), see=told)[2]


@functools.cache
def replay_all(quiet_norm, norm_noise, seed=0):
    """Replays the spike at every distance from the last anchor; start and reports."""
    phases = range(NUM_PHASES)
    traces = [trace(quiet_norm, norm_noise, seed, phase) for phase in phases]
    report = jax.tree.map(np.asarray, replay(*map(np.stack, zip(*traces, strict=True))))
    return [
        (QUIET + phase, jax.tree.map(lambda x, i=phase: x[i], report))
        for phase in phases
    ]


# the level of the norm before the spike, and which step of it is the first outlier
LEVELS = [
    pytest.param(0.20, 1, marks=pytest.mark.slow),
    (0.22, 1),
    (0.242, 2),
    pytest.param(0.26, 2, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(
    "norm_noise", [pytest.param(0.05, marks=pytest.mark.slow), 0.1]
)
@pytest.mark.parametrize(("level", "first"), LEVELS)
def test_bloom_spike_is_held_off_by_its_norms_and_undone_as_the_loss_jumps(
    level, first, norm_noise
):
    for start, report in replay_all(level, norm_noise):
        assert np.all(report["verdict"][:start] == ACCEPT), "the quiet run is quiet"
        spike = slice(start, start + len(BLOOM_LOSSES))
        before = [ACCEPT, SKIP] if first == 1 else [ACCEPT, ACCEPT]
        after = [BOUND, SKIP, SKIP, REVERT, REVERT, BOUND, BOUND]
        assert report["verdict"][spike].tolist() == before + after
        assert report["scaled_norm_error"][start + first] > 1.0
        loss_errors = report["scaled_error"][spike]
        assert np.all(loss_errors[:2] < 1.0), "the loss knows nothing of step 1"
        assert loss_errors[JUMP] > 1.0
        assert report["num_harmful"][-1] == 0, "a replay goes on whatever is done"


@pytest.mark.parametrize(("level", "first"), LEVELS)
def test_bloom_spike_goes_back_to_before_the_first_abnormal_norm(level, first):
    depths = []
    for start, report in replay_all(level, 0.1):
        reverted = report["after"][start + JUMP + 1]
        (home,) = np.flatnonzero(np.all(report["before"] == reverted, axis=1))[:1]
        depths.append(start + FIRST_ABNORMAL - home)
    # updates between the anchor and the first params whose norm is abnormal
    assert min(depths) == 1
    assert max(depths) == 32
    assert set(depths) == set(range(1, 33)), "any depth is as likely"
