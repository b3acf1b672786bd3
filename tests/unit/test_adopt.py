"""A run that is under way goes on under another optimizer."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.buffers import shared_buffers
from helpers.digits_run import SHARDINGS, batches, init_params, loss_fn, make_mesh, put
from optax.contrib import schedule_free_adamw

import lalerg_optax as lo
from lalerg_optax import Verdict

NUM_BEFORE, NUM_AFTER = 30, 20
DECAY = optax.cosine_decay_schedule(3e-3, 100)
ADAMW = {"b1": 0.9, "b2": 0.999, "eps": 1e-8, "weight_decay": 1e-4}
ADAM = {"b1": 0.9, "b2": 0.999, "eps": 1e-8}
PLAIN = {
    "adamw": optax.adamw(DECAY, **ADAMW),
    "adam": optax.adam(3e-3, **ADAM),
    "clipped adamw": optax.chain(
        optax.clip_by_global_norm(0.5), optax.adamw(DECAY, **ADAMW)
    ),
}
SAME = {"gradient_share": 0.0, "search": False}
LALERG = {
    "adamw": lo.lalerg(DECAY, **ADAMW, **SAME),
    "adam": lo.lalerg(3e-3, **ADAM, weight_decay=0.0, **SAME),
    "clipped adamw": lo.lalerg(DECAY, **ADAMW, **SAME, clip_norm=0.5),
}
SEARCHING = lo.lalerg(DECAY, **ADAMW, gradient_share=0.0)


@functools.cache
def make_step(tx):
    """Returns a step of any optimizer."""
    tx = optax.with_extra_args_support(tx)

    @jax.jit
    def step(params, state, batch):
        value, grads = jax.value_and_grad(loss_fn)(params, batch)
        updates, state = tx.update(grads, state, params, value=value)
        return lo.apply_updates(params, updates, state), state, value

    return step


def train(tx, params, state, data):
    """Returns params, state and losses."""
    losses = []
    for batch in zip(*data, strict=True):
        params, state, value = make_step(tx)(params, state, batch)
        losses.append(float(value))
    return params, state, losses


def healthy(first=NUM_BEFORE, last=NUM_BEFORE + NUM_AFTER):
    return tuple(x[first:last].copy() for x in batches(None))


@functools.cache
def before(name):
    """Returns params and state of a plain run that is under way."""
    tx, params = PLAIN[name], init_params()
    return train(tx, params, tx.init(params), healthy(0, NUM_BEFORE))[:2]


@functools.cache
def go_on(name):
    """Returns what becomes of the plain run."""
    return train(PLAIN[name], *before(name), healthy())


def used(state):
    """Returns a state with other numbers in it than a fresh one."""
    leaves, tree = jax.tree.flatten(state)
    return tree.unflatten(
        [x + jnp.asarray(i + 1, x.dtype) for i, x in enumerate(leaves)]
    )


def assert_is_a_state_of(tx, params, state):
    fresh = tx.init(params)
    chex.assert_trees_all_equal_structs(state, fresh)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, fresh)


def assert_same_run(run, other):
    """Up to rounding: XLA fuses operations in other ways."""
    np.testing.assert_allclose(run[2], other[2], rtol=1e-6)  # measured: 2e-7
    chex.assert_trees_all_close(run[0], other[0], rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(run[1], other[1], rtol=1e-5, atol=1e-6)


def assert_goes_on_alike(name, tx):
    """From adamw to ``tx`` and back again, against the run that went on."""
    params, state = before(name)
    adopted = lo.adopt(tx, params, state)
    assert_is_a_state_of(tx, params, adopted)
    params, adopted, losses = train(tx, params, adopted, healthy())
    assert lo.metrics(adopted)["num_accepted"] == NUM_AFTER
    released = lo.adopt(PLAIN[name], params, adopted)
    assert_is_a_state_of(PLAIN[name], params, released)
    run = params, released, losses
    assert_same_run(run, go_on(name))


@pytest.mark.parametrize("name", PLAIN)
def test_adamw_goes_on_as_lalerg_with_the_same_steps_and_back(name):
    assert_goes_on_alike(name, LALERG[name])


def test_adamw_goes_on_within_error_regulate_with_the_same_steps_and_back():
    assert_goes_on_alike("adamw", lo.error_regulate(PLAIN["adamw"]))


@pytest.mark.parametrize("name", PLAIN)
def test_there_and_back_again_is_the_state_bit_for_bit(name):
    params, state = before(name)
    adopted = lo.adopt(LALERG[name], params, state)
    chex.assert_trees_all_equal(lo.adopt(PLAIN[name], params, adopted), state)


def test_a_schedule_that_is_new_begins_where_the_moments_are():
    params, state = before("adam")
    assert lo.adopt(LALERG["adamw"], params, state).inner_state[-1].count == NUM_BEFORE


def test_a_schedule_that_is_new_begins_where_the_moments_in_a_partition_are():
    params = init_params()
    plain = optax.contrib.muon(DECAY)
    tx = lo.lalerg(DECAY, micro=optax.contrib.muon(1.0), search=False)
    _, state = plain.update(params, plain.init(params), params)
    state = jax.tree.map(lambda x: x + 6 if x.dtype == jnp.int32 else x, state)
    assert lo.adopt(tx, params, state).inner_state[-1].count == 7


def test_a_schedule_begins_at_the_largest_count_where_there_are_no_moments():
    params = {"w": jnp.ones(3)}
    old = optax.chain(optax.apply_every(2), optax.sgd(DECAY))
    new = lo.lalerg(DECAY, micro=optax.apply_every(2), search=False)
    state = old.init(params)
    for _ in range(5):
        _, state = old.update(params, state, params)
    assert state[0].count == 1  # it begins again
    assert lo.adopt(new, params, state).inner_state[-1].count == 5


@pytest.mark.parametrize("wrap", [lambda tx: tx, lambda tx: optax.chain(tx)])
def test_the_rate_that_is_told_is_that_of_the_next_step(wrap):
    params, state = before("adamw")
    adopted = lo.adopt(wrap(LALERG["adamw"]), params, state)
    rate = lo.metrics(adopted)["learning_rate"]
    np.testing.assert_allclose(rate, DECAY(NUM_BEFORE), rtol=1e-6)
    _, told, _ = train(wrap(LALERG["adamw"]), params, adopted, healthy(0, 1))
    np.testing.assert_array_equal(lo.metrics(told)["learning_rate"], rate)


@pytest.mark.parametrize("rate", [0.25, lambda count: 0.25], ids=["number", "schedule"])
def test_between_protected_optimizers_the_rate_is_that_of_the_new_one(rate):
    params, (first, new) = init_params(), (optax.sgd(0.5), optax.sgd(rate))
    _, state, _ = train(
        lo.error_regulate(first),
        params,
        lo.error_regulate(first).init(params),
        healthy(0, 3),
    )
    assert lo.metrics(state)["learning_rate"] == 0.5
    adopted = lo.adopt(lo.error_regulate(new), params, state)
    assert lo.metrics(adopted)["learning_rate"] == 0.25


def test_a_rate_that_is_out_of_reach_is_not_told_as_that_of_a_new_run():
    params = init_params()
    groups = {"hidden": "a", "out": "a"}
    plain = optax.partition({"a": PLAIN["adamw"]}, groups)
    tx = optax.partition({"a": LALERG["adamw"]}, groups)
    adopted = lo.adopt(tx, params, used(plain.init(params)))
    assert lo.metrics(adopted)["learning_rate"] == -1.0


@pytest.mark.parametrize("search", [False, True])
def test_what_is_adopted_can_be_donated(search):
    """What it shares with the old state goes with that; nothing is in it twice."""
    params, state = before("adam")  # which has no schedule, and so no count for one
    for tx in (
        lo.lalerg(DECAY, search=search),
        lo.error_regulate(optax.adamw(DECAY), local=True),
    ):
        assert shared_buffers((params, lo.adopt(tx, params, state))) == []


FAULTS = {  # first step that is bad, how many, factor of the inputs
    "the first batch": (0, 1, np.nan),
    "the first batches": (0, 10, np.nan),
    "the second batch": (1, 1, 1e6),
    "the second and third": (1, 2, 1e6),
    "many, later": (16, 10, 1e6),
}


@pytest.mark.parametrize(("first", "num_bad", "factor"), FAULTS.values(), ids=FAULTS)
def test_a_fault_right_after_adoption_is_survived(first, num_bad, factor):
    """One healthy step tells the size of a gradient; none, what is a number."""
    params, state = before("adamw")
    tx, data = LALERG["adamw"], healthy(NUM_BEFORE, NUM_BEFORE + 40)
    data[0][first : first + num_bad] *= factor
    _, state, losses = train(tx, params, lo.adopt(tx, params, state), data)
    report = lo.metrics(state)
    num_rejected = report["num_skipped"] + report["num_revert_steps"]
    assert num_rejected + report["num_bounded"] >= num_bad
    assert num_rejected <= num_bad + 4
    _, _, plain = go_on("adamw")
    assert np.mean(losses[-5:]) < np.mean(plain[:10])


def test_a_revert_after_adoption_goes_no_further_back_and_keeps_the_moments():
    """With an audit the regulator would take the run for one that begins badly."""
    params, state = before("adamw")
    tx = SEARCHING
    adopted = lo.adopt(tx, params, state)
    data = healthy(NUM_BEFORE, NUM_BEFORE + 3)
    data[0][1:] = np.nan
    _, adopted, _ = train(tx, params, adopted, data)
    assert adopted.verdict == Verdict.REVERT
    micro = adopted.inner_state[0]
    assert micro.micro_count == NUM_BEFORE + 1
    assert min(float(jnp.max(n)) for n in jax.tree.leaves(micro.nu)) > 0.0
    _, adopted, _ = train(tx, params, adopted, healthy(NUM_BEFORE, NUM_BEFORE + 2))
    assert adopted.num_harmful == 1
    assert adopted.damping_factor == 0.5
    # what was not finite alone says nothing of the rate
    assert lo.metrics(adopted)["macro_rate"] == 1.0


def test_a_macro_level_that_adopts_steers_and_does_not_leap():
    """By at most 1.5^(2 * 8 n / t) in n steps after t, with alignments up to 3/8."""
    params, (adam, *others) = before("adamw")
    state = (adam._replace(count=jnp.int32(3000)), *others)
    tx = SEARCHING
    _, adopted, _ = train(tx, params, lo.adopt(tx, params, state), healthy())
    report = lo.metrics(adopted)
    assert not report["is_searching"]
    assert report["num_audits_passed"] > 2
    assert report["alignment"] < 3.0 / 8.0
    assert 1.0 < report["macro_rate"] < 1.5 ** (2 * 8 * NUM_AFTER / 3000)


WRAPPERS = {
    "chain": lambda tx: optax.chain(optax.clip_by_global_norm(9.0), tx),
    "masked": lambda tx: optax.masked(tx, {"hidden": True, "out": False}),
    "partition": lambda tx: optax.partition(
        {"a": tx, "b": optax.sgd(1e-3, momentum=0.9)}, {"hidden": "a", "out": "b"}
    ),
    "MultiSteps": lambda tx: optax.MultiSteps(tx, 2).gradient_transformation(),
}
AROUND = {
    "nothing": lambda tx: tx,
    "MultiSteps": WRAPPERS["MultiSteps"],
    "accumulate": lambda tx: lo.accumulate(tx, 2),
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
@pytest.mark.parametrize("is_outside", [True, False])
def test_adopting_inside_of_wrappers_and_around_them(wrap, is_outside):
    params = init_params()
    plain = wrap(optax.adam(3e-3))
    tx = lo.error_regulate(plain) if is_outside else wrap(LALERG["adam"])
    state = used(plain.init(params))
    adopted = lo.adopt(tx, params, state)
    assert_is_a_state_of(tx, params, adopted)
    for name in ("mu", "nu"):
        chex.assert_trees_all_equal(
            optax.tree.get(adopted, name), optax.tree.get(state, name)
        )
    back = lo.adopt(plain, params, adopted)
    chex.assert_trees_all_equal(back, state)


@pytest.mark.parametrize("before", AROUND)
@pytest.mark.parametrize("after", AROUND)
@pytest.mark.parametrize("is_regulated", [True, False])
def test_accumulation_may_come_and_go(before, after, is_regulated):
    params = init_params()
    plain, tx = AROUND[before](optax.adam(3e-3)), optax.adam(3e-3)
    tx = AROUND[after](LALERG["adam"] if is_regulated else tx)
    state = used(plain.init(params))
    adopted = lo.adopt(tx, params, state)
    assert_is_a_state_of(tx, params, adopted)
    for name in ("mu", "nu"):
        chex.assert_trees_all_equal(
            optax.tree.get(adopted, name), optax.tree.get(state, name)
        )
    if before == after == "accumulate":
        chex.assert_trees_all_equal(adopted.mean_grads, state.mean_grads)
    elif after == "accumulate":
        assert adopted.micro_step == adopted.num_groups == 0


def test_injected_hyperparameters_are_kept():
    params = init_params()
    plain = optax.inject_hyperparams(optax.adamw)(learning_rate=3e-3)
    chosen = {"learning_rate": 1.0, "b2": 0.99, "search": False}
    tx = optax.inject_hyperparams(lo.lalerg)(**chosen)
    state = used(plain.init(params))
    adopted = lo.adopt(tx, params, state)
    assert_is_a_state_of(tx, params, adopted)
    for name in ("learning_rate", "b2"):
        assert adopted.hyperparams[name] == state.hyperparams[name]
    assert adopted.count == state.count


OTHERS = {
    "sgd": optax.sgd(1e-2, momentum=0.9),
    "lion": optax.lion(1e-3),
    "adafactor": optax.adafactor(1e-3),
    "schedule-free": schedule_free_adamw(1e-3),
    "two of a kind": optax.chain(optax.trace(0.9), optax.trace(0.5), optax.sgd(0.1)),
}


@pytest.mark.parametrize("plain", OTHERS.values(), ids=OTHERS)
def test_any_optimizer_goes_on_within_error_regulate(plain):
    params = init_params()
    state = used(plain.init(params))
    adopted = lo.adopt(lo.error_regulate(plain), params, state)
    chex.assert_trees_all_equal(adopted.inner_state, state)
    chex.assert_trees_all_equal(lo.adopt(plain, params, adopted), state)


def test_a_random_key_goes_on():
    params, key = init_params(), jax.random.key(3)
    plain = optax.chain(optax.sgd(1e-3), optax.add_noise(0.1, 0.5, key))
    _, state = plain.update(params, plain.init(params), params)
    adopted = lo.adopt(lo.error_regulate(plain), params, state)
    taken = adopted.inner_state[-1].rng_key
    assert taken == state[-1].rng_key
    assert taken != key


@pytest.mark.parametrize("memory", ["pinned_host", "device"])
def test_an_anchor_goes_on_in_the_memory_of_the_new_optimizer(memory):
    params = init_params()
    (other,) = {"pinned_host", "device"} - {memory}
    old, new = (lo.lalerg(anchor_memory=m) for m in (other, memory))
    state = old.init(params)
    adopted = lo.adopt(new, params, state)
    kinds = {a.sharding.memory_kind for a in jax.tree.leaves(adopted.anchor)}
    assert kinds == {memory}
    chex.assert_trees_all_equal(
        *(jax.tree.map(np.asarray, s.anchor) for s in (adopted, state))
    )


def test_another_second_level_goes_on():
    params = init_params()
    plain = optax.lion(1e-3)
    tx = lo.lalerg(1e-3, micro=optax.scale_by_lion(), search=False)
    state = used(plain.init(params))
    adopted = lo.adopt(tx, params, state)
    chex.assert_trees_all_equal(adopted.inner_state[0], state[0])


def test_between_two_protected_optimizers_history_anchor_and_rate_are_kept():
    params = init_params()
    old, new = lo.lalerg(1e-4), lo.lalerg(DECAY, anchor_dtype="bfloat16")
    state = used(old.init(params))
    adopted = lo.adopt(new, params, state)
    assert_is_a_state_of(new, params, adopted)
    told, before = lo.metrics(adopted), lo.metrics(state)
    assert told.pop("learning_rate") != before.pop("learning_rate")  # it is the new one
    chex.assert_trees_all_equal(told, before)
    chex.assert_trees_all_equal(adopted.history, state.history)
    rounded = jax.tree.map(lambda a: a.astype(jnp.bfloat16), state.anchor)
    chex.assert_trees_all_equal(adopted.anchor, rounded)


def test_moments_take_the_dtypes_of_the_new_optimizer():
    params = jax.tree.map(lambda p: jnp.asarray(p, jnp.bfloat16), init_params())
    plain, tx = optax.adam(1e-3), LALERG["adam"]
    grads = jax.tree.map(lambda p: p / 3, params)
    _, state = plain.update(grads, plain.init(params), params)
    adopted = lo.adopt(tx, params, state)
    assert_is_a_state_of(tx, params, adopted)
    assert_is_a_state_of(plain, params, lo.adopt(plain, params, adopted))


def test_complex_params_are_adopted_too():
    params = {"z": jnp.array([1.0 + 2.0j, -1.0j])}
    plain, tx = optax.adam(1e-3), LALERG["adam"]
    _, state = plain.update(params, plain.init(params), params)
    adopted = lo.adopt(tx, params, state)
    assert_is_a_state_of(tx, params, adopted)
    np.testing.assert_array_equal(adopted.inner_state[0].nu["z"], state[0].nu["z"])


def test_adopting_can_be_jitted_and_keeps_shardings():
    specs = SHARDINGS["tensor sharded"]
    params = put(init_params(), make_mesh(), specs)
    plain, tx = PLAIN["adamw"], LALERG["adamw"]
    state = plain.init(params)
    for adopt in (lo.adopt, jax.jit(lo.adopt, static_argnums=0)):
        adopted = adopt(tx, params, state)
        micro = adopted.inner_state[0]
        for tree in (adopted.anchor, micro.mu, micro.nu):
            for key, leaf in tree.items():
                assert leaf.sharding.is_equivalent_to(params[key].sharding, leaf.ndim)


MISMATCHES = {
    "momentum": (optax.sgd(1e-2, momentum=0.9), "has nothing for ScaleByMicroRate"),
    "two of them": (
        optax.chain(optax.adam(1.0), optax.trace(0.9)),
        "no place for TraceState",
    ),
    "nothing": (optax.sgd(1e-2), "has nothing for ScaleByMicroRateState"),
}


@pytest.mark.parametrize(("plain", "message"), MISMATCHES.values(), ids=MISMATCHES)
def test_what_has_no_counterpart_is_an_error(plain, message):
    params = init_params()
    with pytest.raises(ValueError, match=message):
        lo.adopt(LALERG["adam"], params, plain.init(params))


OTHER_PARAMS = {
    "one more": {**init_params(), "bias": np.zeros(3, np.float32)},
    "fewer": {"hidden": init_params()["hidden"]},
    "shapes": jax.tree.map(lambda p: p[:-1], init_params()),
    "a list": list(init_params().values()),
    "a tuple": tuple(init_params().values()),
}


@pytest.mark.parametrize("other", OTHER_PARAMS.values(), ids=OTHER_PARAMS)
@pytest.mark.parametrize(
    "tx", [LALERG["adam"], lo.error_regulate(PLAIN["adam"]), PLAIN["adam"]]
)
def test_a_state_of_other_params_is_an_error(tx, other):
    state = PLAIN["adam"].init(other)
    with pytest.raises(ValueError, match="is that of other params"):
        lo.adopt(tx, init_params(), state)


def test_what_is_no_transformation_is_an_error():
    with pytest.raises(TypeError, match="tx must be an Optax gradient transformation"):
        lo.adopt(init_params(), optax.sgd(0.1), optax.EmptyState())


@pytest.mark.slow  # the docs do the same
def test_an_optimizer_of_nnx_goes_on_as_it_would_have():
    nnx = pytest.importorskip("flax.nnx")
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    plain = nnx.Optimizer(model, optax.adamw(0.1), wrt=nnx.Param)
    grads = jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param))
    for _ in range(3):
        plain.update(model, grads)
    tx = lo.error_regulate(optax.adamw(0.1))
    with pytest.raises(ValueError, match="With Flax NNX, put both through"):
        lo.adopt(tx, nnx.state(model, nnx.Param), plain.opt_state)

    protected = nnx.Optimizer(model, tx, wrt=nnx.Param)
    params, state = nnx.as_pure((nnx.state(model, nnx.Param), plain.opt_state))
    nnx.update(protected.opt_state, nnx.state(lo.adopt(tx, params, state)))
    expected = nnx.clone(model)
    plain.update(expected, grads)
    protected.update(model, grads, value=1.0)
    assert int(protected.opt_state.inner_state[0].count[...]) == 4
    np.testing.assert_allclose(model.kernel[...], expected.kernel[...], rtol=1e-6)
