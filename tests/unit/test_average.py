"""average=True and eval_params: the average of the params, and what is kept out."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import lalerg_optax as lo
from lalerg_optax._records import RegulatorScalars
from lalerg_optax._scalars import pack, unpack

PARAMS = {"a": jnp.linspace(1.0, 2.0, 24), "b": jnp.full((3, 5), 0.5, jnp.bfloat16)}


def loss_fn(params):
    return sum(jnp.sum(jnp.square(p.astype(jnp.float32))) for p in params.values())


def run(tx, num_steps, params=PARAMS, scale_at=lambda i: 1.0, tell=lambda i, x: x):
    """Returns the params before each step, those after the last, and all states."""

    @jax.jit
    def step(params, state, scale, i):
        loss, grads = jax.value_and_grad(loss_fn)(params)
        updates, state = tx.update(
            tell(i, grads), state, params, value=scale * tell(i, loss)
        )
        return lo.apply_updates(params, updates, state), state

    seen, states = [params], [tx.init(params)]
    for i in range(num_steps):
        params, state = step(seen[-1], states[-1], scale_at(i), i)
        seen.append(params)
        states.append(state)
    return seen, states


def weighted(points, exponent=8):
    """Returns the mean with weights (i + 1) ... (i + 8), in float64."""
    weights = [
        np.prod([i + j for j in range(1, exponent + 1)], dtype=np.float64)
        for i in range(len(points))
    ]
    points = [np.asarray(p, np.float64) for p in points]
    return np.average(points, axis=0, weights=weights)


@pytest.mark.parametrize(
    "tx",
    [lo.error_regulate(optax.sgd(0.01), average=True), lo.lalerg(0.01, average=True)],
    ids=["error_regulate", "lalerg"],
)
def test_every_fifth_step_is_a_point_and_its_weight_a_power_of_its_number(tx):
    seen, states = run(tx, 70)
    counts = [int(state.num_accepted) for state in states]  # a start may fail
    steps = zip(seen[:-1], counts[:-1], counts[1:], strict=True)
    points = [p for p, n, after in steps if n % 5 == 0 and after > n]
    average = states[-1].average
    assert average.num_points == len(points) == 1 + (counts[-1] - 1) // 5
    for name in PARAMS:
        expected = weighted([p[name] for p in points])
        np.testing.assert_allclose(average.points[name], expected, rtol=2e-6)


def test_without_average_nothing_is_kept_and_with_it_training_is_the_same():
    bare, states = run(lo.lalerg(0.01), 70)
    averaged, _ = run(lo.lalerg(0.01, average=True), 70)
    assert states[-1].average is None
    chex.assert_trees_all_equal(bare[-1], averaged[-1])


def test_of_narrow_params_it_is_wide_and_is_read_in_their_dtype():
    """In bfloat16 a weight of 9 / 3000 would add nothing."""
    params = {"w": jnp.ones(4, jnp.bfloat16)}
    tx = lo.error_regulate(optax.sgd(0.0), average=True)
    state = tx.init(params)
    long_ago = {"w": jnp.zeros(4)}
    average = state.average._replace(points=long_ago, num_points=jnp.int32(2999))
    state = state._replace(average=average)
    _, state = tx.update(params, state, params, value=1.0)
    np.testing.assert_allclose(state.average.points["w"], 9 / 3008, rtol=1e-6)
    assert lo.eval_params(state, params)["w"].dtype == jnp.bfloat16


@pytest.mark.parametrize("told", [jnp.nan, 1e6], ids=["NaN", "high loss"])
def test_params_in_doubt_are_no_points(told):
    tx = lo.error_regulate(optax.sgd(0.01), average=True)
    scale_at = [1.0] * 60 + [told, told]
    _, states = run(tx, 62, scale_at=lambda i: scale_at[i])
    before = states[60].average
    assert states[60].num_accepted % 5 == 0  # the next one would be a point
    assert states[61].verdict in (lo.Verdict.SKIP, lo.Verdict.BOUND)
    for state in states[61:]:
        chex.assert_trees_all_equal(state.average, before)


def test_an_entry_that_is_not_finite_does_not_enter():
    tx = lo.error_regulate(optax.sgd(0.01), average=True)
    params = {"w": jnp.array([1.0, 2.0])}
    state = tx.init(params)
    spoilt = {"w": jnp.array([jnp.inf, 3.0])}
    _, state = tx.update(params, state, spoilt, value=1.0)
    np.testing.assert_array_equal(state.average.points["w"], [1.0, 3.0])


@pytest.mark.parametrize("hit", [jnp.nan, jnp.inf, 1e38])
def test_an_entry_of_the_average_that_was_hit_begins_anew(hit):
    tx = lo.error_regulate(optax.sgd(0.01), average=True)
    params = {"w": jnp.array([1.0, 2.0])}
    state = tx.init(params)
    points = {"w": jnp.array([hit, 0.0])}
    average = state.average._replace(points=points, num_points=jnp.int32(9))
    _, state = tx.update(
        params, state._replace(average=average), params, value=jnp.ones(())
    )
    np.testing.assert_array_equal(state.average.points["w"], [1.0, 1.0])


def test_a_start_that_is_taken_back_is_no_point():
    tx = lo.lalerg(0.3, average=True)
    curvatures = jnp.array([1.0, 5.0, 50.0])

    @jax.jit
    def step(params, state):
        value = jnp.sum(curvatures * params**2) / 2
        updates, state = tx.update(curvatures * params, state, params, value=value)
        return lo.apply_updates(params, updates, state), state

    def failed(num_before):
        """Returns the states before and after the step where the start fails."""
        params, state = jnp.ones(3), tx.init(jnp.ones(3))
        known = unpack(RegulatorScalars, state.scalars)
        known = known._replace(num_accepted=num_before)
        state = state._replace(scalars=pack(known))
        while state.verdict != lo.Verdict.REVERT:
            before = state
            params, state = step(params, state)
        return before, state

    first, _ = failed(0)
    before, after = failed(-int(first.num_accepted) % 5)
    assert before.num_accepted % 5 == 0, "it would be a point"
    chex.assert_trees_all_equal(after.average, before.average)


@pytest.mark.parametrize("read", [lo.eval_params, lambda s, p: lo.healthy_params(p, s)])
def test_what_is_read_is_a_copy_and_stays_when_the_state_is_donated(read):
    tx = lo.error_regulate(optax.sgd(0.0), average=True)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state):
        updates, state = tx.update(params, state, params, value=1.0)
        return lo.apply_updates(params, updates, state), state

    params = jnp.array([1.0, 2.0])
    params, state = step(params, tx.init(params))
    kept, again = read(state, params), read(state, params)
    params, _ = step(again, state)  # both are donated
    assert kept.tolist() == params.tolist() == [1.0, 2.0]


def test_noise_averages_out():
    """Params that wander about 0: after 2,000 steps a tenth of the squared distance."""
    tx = lo.error_regulate(optax.sgd(0.1), average=True)

    def distances(key):
        def step(carry, key):
            params, state = carry
            noise = jax.random.normal(key, params.shape)
            value = jnp.mean(params**2)
            updates, state = tx.update(params + noise, state, params, value=value)
            return (lo.apply_updates(params, updates, state), state), None

        params = jnp.ones(64)
        keys = jax.random.split(key, 2000)
        (params, state), _ = jax.lax.scan(step, (params, tx.init(params)), keys)
        return jnp.mean(params**2), jnp.mean(lo.eval_params(state, params) ** 2)

    keys = jax.random.split(jax.random.key(0), 4)
    last, averaged = jax.jit(jax.vmap(distances))(keys)
    assert jnp.all(averaged < 0.2 * last)
    assert jnp.mean(averaged) < 0.12 * jnp.mean(last)


def test_an_oscillation_averages_out():
    """Points that are an even number of steps apart would all be on one side."""
    tx = lo.error_regulate(optax.sgd(1.0), average=True)

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(1.999 * params, state, params, value=1.0)
        return (lo.apply_updates(params, updates, state), state), None

    start = jnp.array([1.0, -2.0])
    carry, _ = jax.lax.scan(step, (start, tx.init(start)), None, 500)
    params, state = carry
    assert jnp.all(jnp.abs(lo.eval_params(state, params)) < 0.1 * jnp.abs(params))


def test_params_of_others_are_returned_as_they_are():
    label = {"a": "own", "b": "other"}
    own = lo.error_regulate(optax.sgd(0.01), average=True)
    other = lo.error_regulate(optax.sgd(0.01))
    tx = optax.with_extra_args_support(
        optax.partition({"own": own, "other": other}, label)
    )
    seen, states = run(tx, 30)
    read = jax.jit(lo.eval_params)(states[-1], seen[-1])
    np.testing.assert_array_equal(read["b"], seen[-1]["b"])
    np.testing.assert_allclose(
        read["a"], weighted([p["a"] for p in seen[:-1:5]]), rtol=2e-6
    )


def test_nnx_params():
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, lo.lalerg(1e-4, average=True), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        loss, grads = nnx.value_and_grad(lambda m: jnp.mean(m(jnp.ones((4, 3))) ** 2))(
            model
        )
        optimizer.update(model, grads, value=loss)

    kernels = []
    for _ in range(8):
        kernels.append(model.kernel[...])
        step(model, optimizer)
    read = lo.eval_params(optimizer.opt_state, nnx.state(model, nnx.Param))
    assert optimizer.opt_state.num_accepted[...] == 8
    expected = weighted(kernels[::5])
    np.testing.assert_allclose(read["kernel"][...], expected, rtol=1e-5, atol=1e-7)
    averaged = nnx.merge(nnx.graphdef(model), read)
    np.testing.assert_allclose(averaged.kernel[...], expected, rtol=1e-5, atol=1e-7)
    rebased = lo.rebase(nnx.state(model, nnx.Param), optimizer.opt_state)
    again = lo.eval_params(rebased, nnx.state(model, nnx.Param))
    np.testing.assert_array_equal(again["kernel"][...], model.kernel[...])


def test_rebase_begins_it_again():
    tx = lo.error_regulate(optax.sgd(0.01), average=True)
    seen, states = run(tx, 30)
    new = jax.tree.map(lambda p: p + 1, seen[-1])
    state = lo.rebase(new, states[-1])
    chex.assert_trees_all_equal(lo.eval_params(state, seen[-1]), new)
    assert state.average.num_points == 0
    chex.assert_trees_all_equal_shapes_and_dtypes(state, states[-1])


def test_adopt_takes_it_over_or_begins_it():
    averaged = lo.error_regulate(optax.sgd(0.01), average=True)
    plain = lo.error_regulate(optax.sgd(0.01))
    seen, states = run(averaged, 30)
    same = lo.adopt(averaged, seen[-1], states[-1])
    chex.assert_trees_all_equal(same.average, states[-1].average)
    without = lo.adopt(plain, seen[-1], states[-1])
    assert without.average is None
    begun = lo.adopt(averaged, seen[-1], without)
    chex.assert_trees_all_equal(lo.eval_params(begun, PARAMS), seen[-1])


def test_a_state_without_one_is_refused():
    tx = lo.error_regulate(optax.sgd(0.01), average=True)
    with pytest.raises(ValueError, match="average=True"):
        lo.eval_params(lo.error_regulate(optax.sgd(0.01)).init(PARAMS), PARAMS)
    with pytest.raises(ValueError, match=r"eval_params\(opt_state, params\)"):
        lo.eval_params(PARAMS, tx.init(PARAMS))
    with pytest.raises(ValueError, match="params do not fit"):
        lo.eval_params(tx.init(PARAMS), {"a": jnp.ones(3)})
