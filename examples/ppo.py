"""Trains CartPole with PPO: a noisy objective that moves and may be negative.

Proximal policy optimization on gymnax' CartPole, environments and updates inside one
`jit`, rates and seeds at once by `vmap`. AdamW is compared with lalerg: "protected" is
AdamW's own rule under the regulator (`search=False`), "search" is lalerg as it is. Both
are told the PPO loss as `value`, or None, which leaves the gradient norm to judge by;
at a rate that suits AdamW, and at rates 10 and 100 times higher.

What one learns is mostly what not to expect (4 seeds, 1,600 gradient steps):

* The loss tells little. It doubles while the agent learns its first things, because
  returns of longer episodes are harder to predict, and leaps from one rollout to the
  next. With the loss, the regulator spends 0.2 to 0.3 % of the steps of runs in which
  nothing is wrong on going back; with None it skips or goes back at most 0.4 %.
* At the two rates at which AdamW learns (1e-3, 1e-2) protection neither helps nor hurts
  beyond what seeds differ by. At 1e-1 nothing learns without the search.
* The search settles between 4e-3 and 1e-2 from all three rates, and its median seed
  learns from each. But single seeds end far below all of AdamW's: where the search
  leaps once too far the policy no longer explores, and gives no gradient to come back
  by.

So take a rate that is known to work; if protection from NaN is wanted, pass None.

Run with: python examples/ppo.py
It takes three minutes of processor time (x86), and one more package:
python -m pip install -e ".[rl]"
"""

import argparse
import functools
import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from matplotlib.figure import Figure  # not pyplot: nothing needs a display
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

import lalerg_optax as lo

try:
    import gymnax
except ModuleNotFoundError:
    sys.exit('gymnax is missing: python -m pip install -e ".[rl]"')

GOOD_RATE = 1e-3
FACTORS = (1.0, 10.0, 100.0)
NUM_ENVS, ROLLOUT = 8, 128  # environments, and steps of each before an update
EPOCHS, NUM_MINIBATCHES = 4, 4
DISCOUNT, GAE_DECAY = 0.99, 0.95
CLIP, ENTROPY_BONUS, VALUE_WEIGHT, MAX_NORM = 0.2, 0.01, 0.5, 0.5

ENV, ENV_PARAMS = gymnax.make("CartPole-v1")


class Contender(NamedTuple):
    """An optimizer and what it is told."""

    name: str
    kind: str
    is_told: bool  # the loss
    color: str
    dashes: str


CONTENDERS = (
    Contender("AdamW", "adamw", True, "#E69F00", "-"),
    Contender("protected, loss", "protected", True, "#009E73", "-"),
    Contender("protected, None", "protected", False, "#009E73", ":"),
    Contender("search, loss", "search", True, "#0072B2", "-"),
    Contender("search, None", "search", False, "#0072B2", ":"),
)


def make_optimizer(kind: str, rate: jax.Array) -> optax.GradientTransformation:
    """Returns AdamW, lalerg with AdamW's rule, or lalerg as it is; all clip."""
    if kind == "adamw":
        return optax.chain(optax.clip_by_global_norm(MAX_NORM), optax.adamw(rate))
    if kind == "protected":
        plain = {"b2": 0.999, "gradient_share": 0.0, "search": False}
        return lo.lalerg(rate, clip_norm=MAX_NORM, **plain)
    return lo.lalerg(rate, clip_norm=MAX_NORM)


class Agent(nn.Module):
    """Two perceptrons: the scores of the two actions, and the value of a state."""

    @nn.compact
    def __call__(self, observation: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns scores and value."""
        outputs = []
        for size in (2, 1):
            x = observation
            for _ in range(2):
                x = nn.tanh(nn.Dense(64)(x))
            outputs.append(nn.Dense(size)(x))
        return outputs[0], outputs[1][..., 0]


AGENT = Agent()


class Run(NamedTuple):
    """All that a run carries from one update of the policy to the next."""

    key: jax.Array
    params: Any
    opt_state: Any
    env_state: Any
    observation: jax.Array
    length: jax.Array  # of the running episode of every environment
    last_length: jax.Array  # of the last that ended


class Steps(NamedTuple):
    """What was seen while acting; time first, then environments."""

    observation: jax.Array
    action: jax.Array
    log_prob: jax.Array
    value: jax.Array
    next_value: jax.Array  # of the state that the action led to, before a reset
    reward: jax.Array
    terminated: jax.Array
    done: jax.Array


def log_prob_of(scores: jax.Array, action: jax.Array) -> jax.Array:
    """Returns the logarithm of the probability of an action."""
    return jnp.take_along_axis(nn.log_softmax(scores), action[..., None], -1)[..., 0]


def act(run: Run, _: None) -> tuple[Run, Steps]:
    """Takes one step in every environment."""
    key, act_key, env_key = jax.random.split(run.key, 3)
    scores, value = AGENT.apply(run.params, run.observation)
    action = jax.random.categorical(act_key, scores)
    step = jax.vmap(ENV.step, (0, 0, 0, None))
    observation, env_state, reward, terminated, truncated, info = step(
        jax.random.split(env_key, NUM_ENVS), run.env_state, action, ENV_PARAMS
    )
    _, next_value = AGENT.apply(run.params, info["final_observation"])
    log_prob, done = log_prob_of(scores, action), terminated | truncated
    seen = Steps(
        *(run.observation, action, log_prob, value),
        *(next_value, reward, terminated, done),
    )
    length = run.length + 1.0
    run = run._replace(
        key=key,
        env_state=env_state,
        observation=observation,
        length=jnp.where(done, 0.0, length),
        last_length=jnp.where(done, length, run.last_length),
    )
    return run, seen


def advantages_of(steps: Steps) -> jax.Array:
    """Returns generalized advantage estimates (Schulman et al., 2016)."""
    future = jnp.where(steps.terminated, 0.0, steps.next_value)
    errors = steps.reward + DISCOUNT * future - steps.value

    def back(advantage: jax.Array, at: tuple) -> tuple[jax.Array, jax.Array]:
        error, done = at
        advantage = error + DISCOUNT * GAE_DECAY * jnp.where(done, 0.0, advantage)
        return advantage, advantage

    zeros = jnp.zeros(NUM_ENVS)
    return jax.lax.scan(back, zeros, (errors, steps.done), reverse=True)[1]


def ppo_loss(params: Any, batch: tuple[Steps, jax.Array]) -> jax.Array:
    """Returns the clipped loss of Schulman et al., 2017."""
    steps, advantages = batch
    scores, value = AGENT.apply(params, steps.observation)
    ratio = jnp.exp(log_prob_of(scores, steps.action) - steps.log_prob)
    gain = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
    clipped = jnp.clip(ratio, 1.0 - CLIP, 1.0 + CLIP)
    policy_loss = -jnp.minimum(ratio * gain, clipped * gain).mean()
    value_loss = jnp.square(value - (steps.value + advantages)).mean()
    log_probs = nn.log_softmax(scores)
    entropy = -(jnp.exp(log_probs) * log_probs).sum(-1).mean()
    return policy_loss + VALUE_WEIGHT * value_loss - ENTROPY_BONUS * entropy


def start(kind: str, rate: jax.Array, key: jax.Array) -> Run:
    """Returns a run before its first step."""
    key, init_key, env_key = jax.random.split(key, 3)
    observation, env_state = jax.vmap(ENV.reset, (0, None))(
        jax.random.split(env_key, NUM_ENVS), ENV_PARAMS
    )
    params = AGENT.init(init_key, observation)
    opt_state = make_optimizer(kind, rate).init(params)
    length = jnp.zeros(NUM_ENVS)
    return Run(key, params, opt_state, env_state, observation, length, length)


def improve(
    kind: str, is_told: bool, rate: jax.Array, run: Run
) -> tuple[Run, dict[str, jax.Array]]:
    """Acts for a while, then updates the policy on what was seen; tells how it went."""
    tx = make_optimizer(kind, rate)
    run, steps = jax.lax.scan(act, run, None, ROLLOUT)
    seen = steps, advantages_of(steps)
    seen = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), seen)
    key, *epoch_keys = jax.random.split(run.key, 1 + EPOCHS)
    shuffle = jax.vmap(lambda k: jax.random.permutation(k, NUM_ENVS * ROLLOUT))
    rows = shuffle(jnp.stack(epoch_keys)).reshape(EPOCHS * NUM_MINIBATCHES, -1)

    def step(carry: tuple, rows: jax.Array) -> tuple[tuple, jax.Array]:
        params, opt_state = carry
        batch = jax.tree.map(lambda x: x[rows], seen)
        loss, grads = jax.value_and_grad(ppo_loss)(params, batch)
        value = loss if is_told else None
        updates, opt_state = tx.update(grads, opt_state, params, value=value)
        return (lo.apply_updates(params, updates, opt_state), opt_state), loss

    carry, losses = jax.lax.scan(step, (run.params, run.opt_state), rows)
    run = run._replace(key=key, params=carry[0], opt_state=carry[1])
    told = {"length": run.last_length.mean(), "loss": losses.mean()}
    if kind != "adamw":
        names = ("num_skipped", "num_revert_steps", "macro_rate", "damping_factor")
        told |= {name: lo.metrics(run.opt_state)[name] for name in names}
    return run, told


def train(
    contender: Contender, rates: jax.Array, num_seeds: int, num_updates: int, seed: int
) -> tuple[dict[str, np.ndarray], bool]:
    """Returns what was told (update, rate, seed), and whether all params are finite."""
    keys = jax.random.split(jax.random.key(seed), num_seeds)  # of all contenders
    begin = functools.partial(start, contender.kind)
    go_on = functools.partial(improve, contender.kind, contender.is_told)
    runs = jax.jit(jax.vmap(jax.vmap(begin, (None, 0)), (0, None)))(rates, keys)
    go_on = jax.jit(jax.vmap(jax.vmap(go_on, (None, 0))), donate_argnums=1)
    told = []
    for _ in tqdm(range(num_updates), contender.name.ljust(16)):
        runs, report = go_on(rates, runs)
        told.append(jax.device_get(report))
    is_finite = all(np.isfinite(p).all() for p in jax.tree.leaves(runs.params))
    return {name: np.stack([t[name] for t in told]) for name in told[0]}, is_finite


def print_table(
    runs: dict[Contender, dict[str, np.ndarray]], rates: np.ndarray
) -> None:
    """Prints how the runs ended, by rate and contender."""
    table = Table(
        title="After training",
        caption="length: steps that an episode lasts, over the last fifth of the run, "
        "median and range of the seeds; skipped, reverted: share of the gradient "
        "steps; rate: in effect at the end, median",
    )
    columns = ("rate", "optimizer, value", "length", "range", "skipped", "reverted")
    for column in (*columns, "rate"):
        table.add_column(column, justify="left" if "," in column else "right")
    for i, rate in enumerate(rates):
        for contender, told in runs.items():
            num_updates = len(told["length"])
            ends = told["length"][-max(1, num_updates // 5) :, i].mean(0)
            cells = [f"{np.median(ends):.0f}", f"{ends.min():.0f}-{ends.max():.0f}"]
            if contender.kind == "adamw":
                cells += ["-", "-", f"{rate:.0e}"]
            else:
                num_steps = num_updates * EPOCHS * NUM_MINIBATCHES
                for name in ("num_skipped", "num_revert_steps"):
                    cells.append(f"{told[name][-1, i].mean() / num_steps:.2%}")
                factor = np.median((told["macro_rate"] * told["damping_factor"])[-1, i])
                cells.append(f"{rate * factor:.0e}")
            is_last = contender is list(runs)[-1]
            table.add_row(f"{rate:.0e}", contender.name, *cells, end_section=is_last)
    Console().print(table)


def draw(
    runs: dict[Contender, dict[str, np.ndarray]], rates: np.ndarray, path: str
) -> None:
    """Saves the figure: a column for each rate; length of episodes, loss and rate."""
    figure = Figure(figsize=(10, 7), layout="constrained")
    panels = figure.subplots(3, len(rates), sharex=True, sharey="row", squeeze=False)
    for i, rate in enumerate(rates):
        for contender, told in runs.items():
            steps = NUM_ENVS * ROLLOUT * np.arange(1, 1 + len(told["length"])) / 1000
            style = {"color": contender.color, "ls": contender.dashes, "lw": 1.4}
            factor = told.get("macro_rate", 1.0) * told.get("damping_factor", 1.0)
            curves = (told["length"], told["loss"], factor * rate + 0 * told["loss"])
            for axes, curve in zip(panels[:, i], curves, strict=True):
                axes.plot(steps, np.median(curve[:, i], axis=1), **style)
            low, high = told["length"][:, i].min(1), told["length"][:, i].max(1)
            if contender.is_told:
                panels[0, i].fill_between(
                    steps, low, high, color=contender.color, alpha=0.12, lw=0
                )
        factor = rate / rates[0]
        panels[0, i].set_title(f"Rate {rate:.0e}" + (f" ({factor:.0f}x)" * (i > 0)))
        panels[-1, i].set_xlabel("environment steps, thousands")
    panels[0, 0].set(ylabel="steps of an episode", ylim=(0, 510))
    panels[1, 0].set_ylabel("PPO loss")
    panels[1, 0].set_yscale("symlog", linthresh=0.01)
    panels[1, 0].set_yticks((-0.1, 0.0, 0.1, 1.0, 10.0, 100.0))
    panels[2, 0].set(ylabel="learning rate in effect", yscale="log")
    labels = [c.name for c in runs]
    lines = panels[0, 0].get_lines()
    figure.legend(lines, labels, loc="outside lower center", ncols=5, frameon=False)
    figure.suptitle("Median of the seeds; shaded: their range", size=9)
    figure.savefig(path, dpi=120)


def check(runs: dict[Contender, dict[str, np.ndarray]], unsound: list[str]) -> None:
    """Ends the script with a message if a run was not what it should be."""
    if unsound:
        sys.exit(f"Parameters are not finite: {', '.join(unsound)}.")
    for contender, told in runs.items():
        first, last = told["length"][1, 0].mean(), told["length"][-1, 0].mean()
        if not last > 1.5 * first:
            sys.exit(f"{contender.name} learnt nothing at the good rate.")
    print("All parameters are finite, and all learnt something at the good rate.")


def main() -> None:
    """Trains everything, prints the table, saves the figure and checks."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--updates", type=int, default=100, help="of the policy")
    parser.add_argument("--seeds", type=int, default=4, help="runs of everything")
    parser.add_argument("--seed", type=int, default=0, help="the first of them")
    parser.add_argument("--out", default="ppo.png", help="file of the figure")
    help_quick = "1 optimizer, 1 rate, 2 seeds, 12 updates: a mere trial"
    parser.add_argument("--quick", action="store_true", help=help_quick)
    args = parser.parse_args()
    if args.updates < 5 or args.seeds < 1:
        parser.error("--updates must be at least 5, --seeds at least 1")
    contenders, factors = CONTENDERS, FACTORS
    if args.quick:
        contenders, factors = CONTENDERS[1:2], FACTORS[:1]
        args.updates, args.seeds = 12, 2

    rates, runs, unsound = GOOD_RATE * np.array(factors, np.float32), {}, []
    for contender in contenders:
        told, is_finite = train(contender, rates, args.seeds, args.updates, args.seed)
        runs[contender] = told
        unsound += [] if is_finite else [contender.name]
    print_table(runs, rates)
    draw(runs, rates, args.out)
    print(f"The figure is in {args.out}")
    check(runs, unsound)


if __name__ == "__main__":
    main()
