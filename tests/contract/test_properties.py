"""What holds for every sequence of losses and gradients, however odd.

Hypothesis draws sequences of finite, huge, tiny, infinite and NaN losses and gradients.
All have one length, so that every optimizer is compiled once. Many more are drawn with
``--hypothesis-profile=slow``.
"""

import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import reference
from helpers.drive import drive, plainly
from helpers.forms import flat
from helpers.quick import some
from hypothesis import event, example, given, settings
from hypothesis import strategies as st

import lalerg_optax as lo
from lalerg_optax import Verdict
from lalerg_optax._find import find_states
from lalerg_optax._records import Conduct

pytestmark = pytest.mark.optimized

ACCEPT, SKIP, REVERT, BOUND = 0, 1, 2, 3
TAKEN = (ACCEPT, BOUND)
assert [Verdict(v).name for v in range(4)] == ["ACCEPT", "SKIP", "REVERT", "BOUND"]
LENGTH, SIZE = 96, 4
NAN, INF = float("nan"), float("inf")
START = np.array([-0.5, 0.5, -2.0, 3.0], np.float32)

NESTED = {
    "lalerg": lo.lalerg(1e-2),
    "lalerg, far too bold": lo.lalerg(
        10.0, clip_norm=1.0, anchor_dtype="bfloat16", threshold=2.0
    ),
    "lalerg without search": lo.lalerg(1e-2, search=False),
    "momentum": lo.error_regulate(optax.sgd(1.0, momentum=0.9), patience=5),
}
FORMS = NESTED | {"flat": flat(audit_every=4)}
SEARCHING = ("lalerg", "lalerg, far too bold")


def forms(names):
    return pytest.mark.parametrize("name", names)


LEVELS = st.one_of(
    st.floats(width=32),
    st.floats(0.5, 4.0, width=32),
    st.sampled_from(
        [0.0, 1.0, -1.0, 1e-45, 1e-30, 1e4, 1e17, 1e37, 3.4e38, -3.4e38, NAN, INF, -INF]
    ),
)
USUAL_LEVELS = st.floats(0.5, 4.0, width=32)
DIRECTIONS = {
    "slope": lambda rng, n: np.ones((n, SIZE)),
    "slope with noise": lambda rng, n: 1.0 + rng.standard_normal((n, SIZE)),
    "to and fro": lambda rng, n: (-1.0) ** np.arange(n)[:, None] * np.ones((n, SIZE)),
    "one entry": lambda rng, n: np.ones((n, SIZE)) * (np.arange(SIZE) == 2),
}


def segments(levels, max_length):
    """A stretch of losses and gradients: length, levels, noise, direction."""
    return st.tuples(
        st.integers(1, max_length),
        levels,
        levels,
        st.sampled_from([0.0, 0.01, 0.3]),
        st.sampled_from(sorted(DIRECTIONS)),
    )


def sequences(levels=LEVELS, length=LENGTH, max_odd=4):
    """Losses and gradients: usual stretches with odd ones between them."""
    one = st.one_of(segments(USUAL_LEVELS, 40), segments(levels, max_odd))
    several = st.lists(one, min_size=1, max_size=10)
    return st.tuples(several, st.integers(0, 99)).map(
        functools.partial(as_arrays, length=length)
    )


def as_arrays(drawn, length):
    stretches, seed = drawn
    rng = np.random.default_rng(seed)
    losses, grads = [], []
    with np.errstate(all="ignore"):
        for num_steps, loss, factor, noise, direction in stretches:
            blur = 1.0 + noise * rng.standard_normal(num_steps)
            losses.append((loss * blur).astype(np.float32))
            slope = DIRECTIONS[direction](rng, num_steps)
            grads.append(np.where(slope == 0.0, 0.0, factor * slope).astype(np.float32))
    losses, grads = np.concatenate(losses), np.concatenate(grads)
    return np.resize(losses, length), np.resize(grads, (length, SIZE))


MANY_REVERTS = as_arrays(
    ([(1, 1.0, 1.0, 0.0, "slope"), (2, NAN, 1.0, 0.0, "slope")], 0), LENGTH
)
ALWAYS_WORSE = as_arrays(
    (
        [(20, 1.0, 1.0, 0.01, "slope")]
        + [(1, 10.0**k, 1.0, 0.0, "slope") for k in np.arange(2.0, 36.0, 0.45)],
        0,
    ),
    LENGTH,
)


def as_tree(vector):
    return {"bias": vector[..., 0], "weights": vector[..., 1:]}


def as_vector(tree):
    return jnp.concatenate([tree["bias"][..., None], tree["weights"]], axis=-1)


def is_finite(tree):
    leaves = jax.tree.leaves(tree)
    return functools.reduce(jnp.logical_and, [jnp.all(jnp.isfinite(x)) for x in leaves])


def regulator_of(state):
    (regulator,) = find_states(state, lo.ErrorRegulateState).values()
    return regulator


def told(step):
    """Returns what is compared of a step."""
    regulator = regulator_of(step.state)
    seen = lo.metrics(step.state) | {
        "params": as_vector(step.params),
        "params_before": as_vector(step.before),
        "plainly_applied": as_vector(optax.apply_updates(step.before, step.updates)),
        "anchor": as_vector(regulator.anchor),
        "is_finite": is_finite((step.params, step.updates, step.state)),
        "doubt": regulator.doubt,
        "start_value": regulator.history.start_value,
        "window": regulator.history.values,
    }
    for kind, names in {
        lo.ScaleByMacroRateState: ("num_macro_steps",),
        lo.ScaleByMicroRateState: ("micro_count", "mu", "nu"),
    }.items():
        for found in find_states(step.state, kind).values():
            seen |= {name: getattr(found, name) for name in names}
    return seen


def feed(tx, losses, grads, is_exact=True):
    """Feeds losses and gradients; returns what is seen at every step."""
    apply_updates = lo.apply_updates if is_exact else plainly
    how = {"see": told, "apply_updates": apply_updates}
    return drive(tx, as_tree(jnp.asarray(START)), (losses, as_tree(grads)), **how)[2]


@functools.cache
def compiled(name, is_exact=True):
    return jax.jit(functools.partial(feed, FORMS[name], is_exact=is_exact))


def seen_by(name, sequence, is_exact=True):
    return jax.tree.map(np.asarray, compiled(name, is_exact)(*sequence))


WAYS = [f"{way}-{name}" for way in ("lo", "optax") for name in FORMS]


@pytest.mark.parametrize(
    "way",
    some(WAYS, "lo-lalerg", "lo-flat", "optax-lalerg, far too bold", "optax-momentum"),
)
@given(sequence=sequences())
def test_params_updates_and_state_stay_finite(way, sequence):
    how, _, name = way.partition("-")
    assert np.all(seen_by(name, sequence, how == "lo")["is_finite"])


@forms(FORMS)
@given(sequence=sequences())
def test_counters_add_up(name, sequence):
    seen = seen_by(name, sequence)
    steps = np.arange(1, LENGTH + 1)
    for counter, verdicts in {
        "num_accepted": TAKEN,
        "num_bounded": BOUND,
        "num_skipped": SKIP,
        "num_revert_steps": REVERT,
    }.items():
        is_counted = np.isin(seen["verdict"], verdicts)
        np.testing.assert_array_equal(seen[counter], np.cumsum(is_counted))
    if name not in SEARCHING:
        assert np.all(seen["num_harmful"] <= seen["num_trials"])
        assert np.all(2 * seen["num_trials"] <= seen["num_revert_steps"] + 1)
    assert np.all(seen["num_audits_passed"] <= seen["num_accepted"])
    if "num_micro_held" in seen:
        taken = seen["micro_count"]
        # a restart, where params go back to the very start, forgets what was taken in
        assert np.all(taken + seen["num_micro_held"] <= steps)
        if np.all(np.diff(taken) >= 0):
            np.testing.assert_array_equal(taken + seen["num_micro_held"], steps)
    if "num_macro_held" in seen:
        rejected = seen["num_skipped"] + seen["num_revert_steps"]
        if name in NESTED:
            np.testing.assert_array_equal(seen["num_macro_held"], rejected)
        if name in SEARCHING:
            np.testing.assert_array_equal(
                seen["num_macro_steps"] + seen["num_macro_held"], steps
            )


@forms(FORMS)
@example(sequence=MANY_REVERTS)
@given(sequence=sequences())
def test_rates_and_errors_stay_in_their_bounds(name, sequence):
    seen = seen_by(name, sequence)
    assert np.all(
        (seen["damping_factor"] >= 2.0**-10) & (seen["damping_factor"] <= 1.0)
    )
    assert np.all((seen["macro_rate"] >= 2.0**-40) & (seen["macro_rate"] <= 2.0**40))
    assert np.all(np.abs(seen["alignment"]) <= 1.0)
    assert np.all((seen["grad_norm"] >= 0.0) & (seen["grad_norm"] <= 1e37))
    for error in ("scaled_error", "scaled_norm_error"):
        assert np.all(np.abs(seen[error]) <= 1e37)
    assert np.all(np.abs(seen["window"]) <= 1e37)
    assert np.all(seen["doubt"] >= 0.0)
    if name not in SEARCHING and name in NESTED:
        assert np.all(seen["macro_rate"] == 1.0)


@forms(FORMS)
@given(sequence=sequences())
def test_damping_falls_only_where_updates_did_harm_and_then_recovers(name, sequence):
    seen = seen_by(name, sequence)
    damping = np.concatenate([[1.0], seen["damping_factor"]])
    change, before = np.diff(damping), damping[:-1]
    is_harmful = np.diff(seen["num_harmful"], prepend=0) > 0
    is_taken = np.isin(seen["verdict"], TAKEN)
    assert np.all(change[~is_harmful & ~is_taken] == 0.0)
    assert np.all(change[~is_harmful & is_taken & (before < 1.0)] > 0.0)
    assert np.all(is_harmful[change < 0.0])
    if name not in SEARCHING:  # there, not before an audit was good
        cut = np.maximum(0.5 * before, 2.0**-10)
        np.testing.assert_array_equal(damping[1:][is_harmful], cut[is_harmful])


def is_bad_step(sequence):
    """Returns which steps are not finite."""
    losses, grads = sequence
    with np.errstate(over="ignore", invalid="ignore"):
        square = np.sum(np.square(grads), axis=1, dtype=np.float32)
    return ~np.isfinite(losses) | ~np.isfinite(square)


@forms(NESTED)
@given(sequence=sequences())
def test_verdicts_follow_from_the_errors(name, sequence):
    """Whoever looks at the metrics alone can tell why."""
    seen = seen_by(name, sequence)
    is_bad = is_bad_step(sequence)
    conduct, last = Conduct.HEALTHY, ACCEPT
    for t, verdict in enumerate(seen["verdict"].tolist()):
        was, conduct = conduct, Conduct(int(seen["conduct"][t]))
        if was in (Conduct.RESTORING, Conduct.REWINDING):
            assert verdict == REVERT
        elif verdict == REVERT:  # the first of the two steps
            assert conduct in (Conduct.RESTORING, Conduct.REWINDING)
        elif is_bad[t]:
            assert verdict == SKIP
        elif seen["scaled_error"][t] > 1.0:  # or it is a new level
            assert verdict == BOUND or (verdict, was) == (ACCEPT, Conduct.TRIAL)
        elif seen["scaled_norm_error"][t] > 1.0:
            assert verdict in (SKIP, BOUND) or was == Conduct.TRIAL
        else:
            assert verdict == ACCEPT
        event(f"{Verdict(last).name} to {Verdict(verdict).name}")
        event(f"{was.name} to {conduct.name}")
        last = verdict


@forms(FORMS)
@example(sequence=MANY_REVERTS)
@given(sequence=sequences(max_odd=40))
def test_params_go_back_for_two_steps_at_a_time(name, sequence):
    verdicts = seen_by(name, sequence)["verdict"]
    groups = [
        len(list(group))
        for flag, group in itertools.groupby(verdicts == REVERT)
        if flag
    ]
    if verdicts[-1] == REVERT:
        assert groups.pop() <= 2
    assert all(length == 2 for length in groups)


@example(sequence=ALWAYS_WORSE, patience=7)
@given(sequence=sequences(max_odd=40), patience=st.integers(4, 20))
def test_finite_steps_are_skipped_at_most_five_times(sequence, patience):
    verdicts = verdicts_with(sequence, patience=np.float32(patience))
    assert np.sum((verdicts == SKIP) & ~is_bad_step(sequence)) <= 5


@given(
    level=st.floats(-(2.0**10), 2.0**10, width=32),
    spread=st.sampled_from([0.01, 0.3]),
    patience=st.integers(4, 20),
    seed=st.integers(0, 99),
)
def test_whatever_comes_to_stay_is_accepted(level, spread, patience, seed):
    rng = np.random.default_rng(seed)
    losses = 1.0 + spread * rng.standard_normal(LENGTH)
    losses[30:] += level
    grads = 1.0 + 0.1 * rng.standard_normal((LENGTH, SIZE))
    sequence = losses.astype(np.float32), grads.astype(np.float32)
    verdicts = verdicts_with(sequence, patience=np.float32(patience))
    # up to a trial, in the episode, and up to the second one
    assert np.all(verdicts[30 + 24 + patience + 5 :] == ACCEPT)


@functools.cache
def with_hyperparameters(names):
    def run(sequence, values):
        tx = lo.error_regulate(optax.sgd(1e-3), **dict(zip(names, values, strict=True)))
        return feed(tx, *sequence)["verdict"]

    return jax.jit(run)


def verdicts_with(sequence, **hyperparameters):
    run = with_hyperparameters(tuple(hyperparameters))
    return np.asarray(run(sequence, tuple(hyperparameters.values())))


@forms(FORMS)
@given(sequence=sequences())
def test_a_skip_leaves_params_bit_for_bit(name, sequence):
    seen = seen_by(name, sequence)
    is_skipped = seen["verdict"] == SKIP
    for applied in ("params", "plainly_applied"):
        chex.assert_trees_all_equal(
            seen[applied][is_skipped], seen["params_before"][is_skipped]
        )
    if name in NESTED and "mu" in seen:  # and the moments
        for t in np.flatnonzero(is_skipped[1:]) + 1:
            for moment in (seen["mu"], seen["nu"]):
                now, before = (
                    jax.tree.map(lambda x, t=t: x[t], moment) for t in (t, t - 1)
                )
                chex.assert_trees_all_equal(now, before)


@forms(FORMS)
@given(sequence=sequences())
def test_a_revert_goes_to_the_anchor_that_was_there_before(name, sequence):
    seen = seen_by(name, sequence)
    is_reverted = seen["verdict"] == REVERT
    chex.assert_trees_all_equal(
        seen["params"][is_reverted], seen["anchor"][is_reverted].astype(np.float32)
    )
    unmoved = np.flatnonzero((seen["verdict"] != ACCEPT)[1:]) + 1  # when bounded, too
    chex.assert_trees_all_equal(seen["anchor"][unmoved], seen["anchor"][unmoved - 1])
    assert np.all(seen["anchor_age"][is_reverted] == 0)


@forms(some(FORMS, "lalerg, far too bold", "momentum", "flat"))
@given(sequence=sequences())
def test_with_plain_optax_the_second_step_of_a_revert_is_exact(name, sequence):
    seen = seen_by(name, sequence, is_exact=False)
    is_reverted = seen["verdict"] == REVERT
    is_second = is_reverted & np.roll(is_reverted, 1)
    is_second[0] = False
    # a whole number of pairs: every other one is a second
    for t in np.flatnonzero(is_second):
        first = t
        while first > 0 and is_reverted[first - 1]:
            first -= 1
        if (t - first) % 2 == 1:
            chex.assert_trees_all_equal(
                seen["params"][t], seen["anchor"][t].astype(np.float32)
            )


@forms(FORMS)
@given(sequence=sequences())
def test_the_anchor_is_what_params_were_as_many_updates_ago_as_its_age_says(
    name, sequence
):
    seen = seen_by(name, sequence)
    rounding = seen["anchor"].dtype
    path = [START]  # params after each update that led to where they are
    for t, verdict in enumerate(seen["verdict"]):
        if verdict in TAKEN:
            path.append(seen["params"][t])
        age = seen["anchor_age"][t]
        if verdict == REVERT:
            assert age == 0
            path = [seen["params"][t]]
            continue
        chex.assert_trees_all_equal(seen["anchor"][t], path[-1 - age].astype(rounding))
        assert age <= 32 or np.all(seen["anchor"][t] == seen["anchor"][t - 1])


@forms(FORMS)
@given(sequence=sequences())
def test_on_all_steps_but_a_revert_both_ways_to_apply_updates_agree(name, sequence):
    seen = seen_by(name, sequence)
    is_other = seen["verdict"] != REVERT
    # `lo.apply_updates` heals what is too large for its square to be a float32
    is_representable = np.all(np.abs(seen["plainly_applied"]) < 1e19, axis=-1)
    is_other &= np.logical_and.accumulate(
        is_representable.reshape(len(is_other), -1).all(1)
    )
    chex.assert_trees_all_equal(
        seen["params"][is_other], seen["plainly_applied"][is_other]
    )


USUAL = st.one_of(
    st.floats(2.0**-10, 2.0**10, width=32),
    st.floats(-(2.0**10), -(2.0**-10), width=32),
    st.sampled_from([0.0, NAN, INF, -INF]),
)


# with a search, loss and gradient have one unit: see test_invariance.py
@forms([name for name in NESTED if name not in SEARCHING])
@given(sequence=sequences(USUAL), power=st.integers(-20, 20))
def test_verdicts_do_not_depend_on_the_unit_of_the_loss(name, sequence, power):
    losses, grads = sequence
    seen = seen_by(name, sequence)
    other = seen_by(name, (losses * np.float32(2.0**power), grads))
    for key in ("verdict", "conduct", "scaled_error", "scaled_norm_error"):
        np.testing.assert_array_equal(other[key], seen[key], err_msg=key)
    for key in ("params", "anchor_age", "damping_factor"):
        np.testing.assert_array_equal(other[key], seen[key], err_msg=key)


def num_clear(seen):
    """Returns the number of steps before the first that is too close to call."""
    errors = [seen[n] for n in ("scaled_error", "scaled_norm_error")]
    distance = np.min([np.abs(e - x) for e in errors for x in (0.5, 1.0)], axis=0)
    return int(np.argmax([*(distance < 1e-4), True]))


@functools.cache
def compiled_vmap(name):
    return jax.jit(jax.vmap(functools.partial(feed, FORMS[name])))


@forms(some(("lalerg", "momentum", "flat"), "momentum"))
@given(batch=st.tuples(sequences(), sequences(), sequences()))
def test_runs_side_by_side_decide_like_each_alone(name, batch):
    together = compiled_vmap(name)(*(np.stack(x) for x in zip(*batch, strict=True)))
    for i, sequence in enumerate(batch):
        alone = seen_by(name, sequence)
        clear = slice(num_clear(alone))  # sums are rounded in another way
        for key in ("verdict", "num_skipped", "anchor_age"):
            np.testing.assert_array_equal(
                together[key][i][clear], alone[key][clear], err_msg=key
            )
        # the window of log norms has zeros in it
        for key in ("window", "damping_factor"):
            np.testing.assert_allclose(
                together[key][i][clear], alone[key][clear], rtol=1e-5, atol=1e-5
            )


NUM_EAGER = 12


@functools.cache
def compiled_step(name):
    return jax.jit(FORMS[name].update)


@forms(some(("lalerg", "momentum", "flat"), "lalerg"))
@settings(max_examples=settings.default.max_examples // 4)
@given(sequence=sequences(length=NUM_EAGER))
def test_step_by_step_without_jit_the_verdicts_are_the_same(name, sequence):
    tx = FORMS[name]
    params = as_tree(jnp.asarray(START))
    state = tx.init(params)
    for loss, grad in zip(*sequence, strict=True):
        grads = as_tree(jnp.asarray(grad))
        _, jitted = compiled_step(name)(grads, state, params, value=loss)
        updates, state = tx.update(grads, state, params, value=loss)
        report = jax.tree.map(lambda x: np.asarray(x)[None], lo.metrics(state))
        if num_clear(report):
            assert report["verdict"] == lo.metrics(jitted)["verdict"]
        chex.assert_trees_all_equal_shapes_and_dtypes(state, jitted)
        assert is_finite((updates, state))
        params = lo.apply_updates(params, updates, state)


def is_close_call(regulator):
    """Returns whether rounding may decide."""
    errors = regulator.scaled_error, regulator.scaled_norm_error
    if min(abs(e - bound) for e in errors for bound in (0.5, 1.0)) < 1e-3:
        return True
    doubt = regulator.doubt
    usual = 2.0 * regulator.harmless_doubt + 0.75
    bounds = 0.0, 0.5, 1.25, usual, 0.75 * regulator.patience
    is_exact = 4.0 * doubt == round(4.0 * doubt)
    return not is_exact and min(abs(doubt - bound) for bound in bounds) < 1e-3


@given(sequence=sequences())
def test_verdicts_are_those_of_the_reference(sequence):
    losses, grads = sequence
    seen = seen_by("momentum", sequence)
    params = START.astype(np.float64)
    links = reference.Chain(reference.Momentum(0.9), reference.LearningRate(1.0))
    regulator = reference.ErrorRegulate(links, params=params, patience=5)
    for t, (loss, grad) in enumerate(zip(losses, grads, strict=True)):
        regulator.update(grad.astype(np.float64), params, float(loss))
        if is_close_call(regulator):
            break
        for key in (
            *("verdict", "conduct", "anchor_age", "num_hard"),
            *("num_accepted", "num_bounded", "num_skipped", "num_revert_steps"),
            *("num_trials", "num_harmful"),
        ):
            assert seen[key][t] == getattr(regulator, key), (t, key)
        np.testing.assert_allclose(
            seen["damping_factor"][t], regulator.damping_factor, rtol=1e-5
        )
    event(f"compared {t // 12 * 12} steps")
