"""The recorder: what went in comes out, nothing waits, and pile-ups are told."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import lalerg_optax as lo
from lalerg_optax import Verdict

TX = lo.error_regulate(optax.sgd(0.1), local=True)
PARAMS = {"a": jnp.array([1.0, -2.0]), "b": jnp.array([0.5])}
ACCEPT, SKIP, REVERT, BOUND = map(int, Verdict)


@jax.jit
def step(params, state, value):
    updates, state = TX.update(params, state, params, value=value)
    return lo.apply_updates(params, updates, state), state, value


LOSSES = (3.0, 2.0, jnp.nan, 1.5, 1.0)


def run(recorder, one_step=step, losses=LOSSES):
    params, state = jax.tree.map(jnp.copy, (PARAMS, TX.init(PARAMS)))
    for loss in losses:
        params, state, told = one_step(params, state, jnp.float32(loss))
        recorder.record(state, loss=told)
    return state


class Written:
    """A writer that remembers."""

    def __init__(self):
        self.scalars = []

    def add_scalar(self, tag, scalar_value, global_step):
        self.scalars.append((tag, scalar_value, global_step))


# ---- what goes in comes out ---------------------------------------------------------


@pytest.mark.parametrize("fetch_every", [1, 2, 100])
def test_history_has_the_metrics_of_every_step_in_order(fetch_every):
    recorder = lo.Recorder(fetch_every=fetch_every)
    last = run(recorder)
    history = recorder.history()
    assert set(history) == {"step", "loss", *lo.metrics(last)}
    assert all(type(x) is np.ndarray and x.shape == (5,) for x in history.values())
    np.testing.assert_array_equal(history["step"], range(5))
    np.testing.assert_array_equal(history["loss"], LOSSES)
    assert history["verdict"].tolist() == [ACCEPT, ACCEPT, SKIP, ACCEPT, ACCEPT]
    assert history["num_accepted"].tolist() == [1, 2, 2, 3, 4]
    for name, x in lo.metrics(last).items():
        np.testing.assert_array_equal(history[name][-1], x)
        assert history[name].dtype == x.dtype


def test_stacked_metrics_of_a_scan_are_those_of_a_loop():
    def body(carry, value):
        params, state, _ = step(*carry, value)
        return (params, state), lo.metrics(state)

    losses = jnp.array(LOSSES)
    _, stacked = jax.lax.scan(body, (PARAMS, TX.init(PARAMS)), losses)
    loop, scan = lo.Recorder(), lo.Recorder()
    run(loop)
    scan.extend(jax.tree.map(lambda x: x[:2], stacked), loss=losses[:2])
    scan.extend(jax.tree.map(lambda x: x[2:], stacked), loss=losses[2:])
    wanted, told = loop.history(), scan.history()
    assert wanted.keys() == told.keys()
    for name, x in wanted.items():
        np.testing.assert_allclose(told[name], x, rtol=1e-6, err_msg=name)


def test_metrics_that_the_step_returned_can_be_recorded_as_they_are():
    state = TX.init(PARAMS)
    recorder, other = lo.Recorder(), lo.Recorder()
    recorder.record(loss=1.0, **lo.metrics(state))
    other.record(state, loss=1.0)
    assert recorder.history() == other.history()


def test_what_is_recorded_now_and_then_has_nan_in_the_gaps():
    recorder = lo.Recorder(first_step=7)
    for i in range(4):
        recorder.record(loss=i, **({"accuracy": 0.5} if i == 2 else {}))
    history = recorder.history()
    np.testing.assert_array_equal(history["accuracy"], [np.nan, np.nan, 0.5, np.nan])
    assert history["step"].tolist() == [7, 8, 9, 10]
    assert history["loss"].dtype.kind == "i"


def test_history_may_be_asked_for_at_any_time_and_is_empty_at_first():
    recorder = lo.Recorder()
    assert recorder.history()["step"].shape == (0,)
    recorder.record(loss=1.0)
    assert recorder.history()["loss"].tolist() == [1.0]
    recorder.record(loss=2.0)
    assert recorder.history()["loss"].tolist() == [1.0, 2.0]
    assert recorder.history()["step"].tolist() == [0, 1]


def test_donated_states_are_no_loss():
    donating = jax.jit(step, donate_argnums=(0, 1))
    recorder, wanted = lo.Recorder(), lo.Recorder()
    run(wanted)
    old = run(recorder, donating)
    donating(jax.tree.map(jnp.copy, PARAMS), old, jnp.float32(0.0))
    assert old.scalars.floats.is_deleted()
    for name, x in wanted.history().items():
        np.testing.assert_array_equal(recorder.history()[name], x, err_msg=name)


def test_a_donated_loss_is_no_loss():
    recorder, loss = lo.Recorder(), jnp.float32(2.5)
    recorder.record(loss=loss)
    jax.jit(lambda x: x + 1.0, donate_argnums=0)(loss)
    assert loss.is_deleted()
    assert recorder.history()["loss"].tolist() == [2.5]


def test_a_micro_level_whose_count_is_its_own_array_survives_donation():
    tx = lo.scale_by_micro_rate()
    update = jax.jit(lambda g, s: tx.update(g, s, g)[1], donate_argnums=1)
    state, recorder = tx.init(jnp.ones(2)), lo.Recorder()
    for _ in range(3):
        state = update(jnp.full(2, jnp.nan), state)
        recorder.record(state)
    assert recorder.history()["num_micro_held"].tolist() == [1, 2, 3]


def test_the_state_of_an_nnx_optimizer_is_recorded_as_it_is():
    model = nnx.Linear(3, 1, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, lo.lalerg(local=True), wrt=nnx.Param)
    grads = nnx.grad(lambda m: jnp.sum(m(jnp.ones((1, 3)))))(model)
    recorder = lo.Recorder()
    optimizer.update(model, grads, value=jnp.asarray(2.5))
    recorder.record(optimizer.opt_state)
    assert recorder.history()["avg_value"].tolist() == [2.5]
    assert recorder.history()["update_ratio/kernel"] > 0.0


def test_nothing_is_fetched_before_a_batch_is_old(monkeypatch):
    fetched = []
    real = jax.device_get
    monkeypatch.setattr(jax, "device_get", lambda x: fetched.append(len(x)) or real(x))
    recorder = lo.Recorder(fetch_every=3)
    for i in range(11):
        recorder.record(loss=jnp.float32(i))
        assert sum(fetched) == max(0, i // 3 * 3 - 3) + (
            3 if i % 3 == 2 and i > 2 else 0
        )
    assert fetched == [3, 3]
    assert recorder.history()["loss"].tolist() == list(range(11))


def test_history_survives_a_file(tmp_path):
    recorder = lo.Recorder()
    run(recorder)
    history = recorder.history()
    np.savez(tmp_path / "run.npz", **history)
    read = dict(np.load(tmp_path / "run.npz"))
    assert read.keys() == history.keys()
    for name, x in history.items():
        np.testing.assert_array_equal(read[name], x)


# ---- bad use ------------------------------------------------------------------------


def test_a_vector_is_no_loss():
    with pytest.raises(ValueError, match=r"loss must be a scalar, got shape \(3,\)"):
        lo.Recorder().record(loss=jnp.ones(3))
    with pytest.raises(ValueError, match=r"loss must be an array over steps"):
        lo.Recorder().extend(loss=1.0)
    with pytest.raises(ValueError, match="must have one length"):
        lo.Recorder().extend(loss=np.ones(3), rate=np.ones(2))
    with pytest.raises(ValueError, match="must have one length"):
        lo.Recorder().extend()


def test_inside_of_jit_it_says_what_to_do_instead():
    recorder = lo.Recorder()
    with pytest.raises(TypeError, match="loss is a tracer: a Recorder works outside"):
        jax.jit(lambda x: recorder.record(loss=x))(1.0)


@pytest.mark.parametrize("name", ["fetch_every", "window", "max_skips", "max_reverts"])
def test_bounds_out_of_range_are_a_value_error(name):
    with pytest.raises(ValueError, match=f"{name} must be in the range"):
        lo.Recorder(**{name: -1})


# ---- writers ------------------------------------------------------------------------


def test_a_writer_gets_every_scalar_once_with_its_step():
    writer = Written()
    recorder = lo.Recorder(writer, first_step=10, fetch_every=2)
    run(recorder)
    recorder.flush()
    recorder.flush()
    losses = [(x, i) for tag, x, i in writer.scalars if tag == "loss"]
    np.testing.assert_array_equal(losses, list(zip(LOSSES, range(10, 15), strict=True)))
    names = set(recorder.history()) - {"step"}
    assert {tag for tag, _, _ in writer.scalars} == names
    assert len(writer.scalars) == 5 * len(names)


def test_tensorboardx_writes_a_file(tmp_path):
    tensorboardx = pytest.importorskip("tensorboardX")
    with tensorboardx.SummaryWriter(str(tmp_path)) as writer:
        recorder = lo.Recorder(writer)
        run(recorder)
        recorder.flush()
    (file,) = tmp_path.iterdir()
    content = file.read_bytes()
    assert content.count(b"update_ratio/a") == 5
    assert content.count(b"scaled_norm_error") == 5


FETCHING = {
    "record": lambda recorder: recorder.record(verdict=ACCEPT),
    "extend": lambda recorder: recorder.extend(verdict=np.zeros(1, int)),
    "flush": lambda recorder: recorder.flush(),
    "history": lambda recorder: recorder.history(),
}


@pytest.mark.parametrize("fetch", FETCHING.values(), ids=FETCHING)
def test_a_warning_names_the_line_that_called_the_recorder(fetch):
    recorder = lo.Recorder(fetch_every=1)
    recorder.extend(verdict=np.full(12, SKIP))  # the last batch is left
    with pytest.warns(lo.InterventionWarning) as caught:
        fetch(recorder)
    (warning,) = caught
    assert warning.filename == __file__
    assert warning.lineno == fetch.__code__.co_firstlineno


def test_a_real_run_of_bad_batches_warns():
    recorder = lo.Recorder()
    run(recorder, losses=[1.0] * 5 + [float("nan")] * 20)
    with pytest.warns(lo.InterventionWarning, match="look at what is not finite"):
        recorder.flush()


# ---- Stopping, and populations -------------------------------------------------------


def skipped(num_steps, state=None):
    state = TX.init(PARAMS) if state is None else state
    for _ in range(num_steps):
        _, state = TX.update(PARAMS, state, PARAMS, value=jnp.nan)
    return state


def test_a_run_that_is_stuck_is_stopped_at_the_next_fetch():
    recorder, state = lo.Recorder(stop_after=4, fetch_every=1), TX.init(PARAMS)
    for _ in range(4):
        recorder.flush()
        state = skipped(1, state)
        recorder.record(state)
    with pytest.raises(lo.TooManyRejections, match=r"4 steps in a row were rejected"):
        recorder.flush()


def test_it_is_not_stopped_before():
    recorder, state = lo.Recorder(stop_after=4), TX.init(PARAMS)
    for value in [jnp.nan, jnp.nan, jnp.nan, 1.0] * 3:
        _, state = TX.update(PARAMS, state, PARAMS, value=value)
        recorder.record(state)
    assert len(recorder.history()["step"]) == 12


def test_is_stuck_tells_inside_a_compiled_loop():
    def not_stuck(carry):
        return ~lo.is_stuck(carry, after=6)

    def step(state):
        return TX.update(PARAMS, state, PARAMS, value=jnp.nan)[1]

    end = jax.jit(lambda state: jax.lax.while_loop(not_stuck, step, state))
    assert end(TX.init(PARAMS)).num_rejected_in_a_row == 6
    with pytest.raises(ValueError, match="after must be in the range"):
        lo.is_stuck(TX.init(PARAMS), after=0)


def population(values):
    def run(value):
        state = TX.init(PARAMS)
        _, state = TX.update(PARAMS, state, PARAMS, value=value)
        return state

    return jax.vmap(run)(jnp.asarray(values))


def test_a_population_is_recorded_member_by_member():
    recorder = lo.Recorder()
    for _ in range(3):
        recorder.record(population([1.0, jnp.nan, 3.0]), loss=jnp.arange(3.0), lr=0.1)
    history = recorder.history()
    assert history["verdict"].tolist() == [[0, 1, 0]] * 3
    assert history["loss"].shape == (3, 3)
    assert history["lr"].shape == (3,)


def test_a_scan_over_a_population_is_recorded_like_a_loop():
    loop, scan = lo.Recorder(), lo.Recorder()
    states = [population([1.0, jnp.nan]), population([2.0, 3.0])]
    for state in states:
        loop.record(state, loss=jnp.ones(2), lr=0.1)
    reports = map(lo.metrics, states)
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *reports)
    scan.extend(stacked, loss=jnp.ones((2, 2)), lr=jnp.full(2, 0.1))
    wanted, told = loop.history(), scan.history()
    assert told["verdict"].tolist() == [[0, 1], [0, 0]]
    assert wanted.keys() == told.keys()
    for name, x in wanted.items():
        np.testing.assert_allclose(told[name], x, err_msg=name)


def test_shapes_that_change_are_refused_at_once():
    recorder = lo.Recorder()
    recorder.record(population([1.0, 2.0]), loss=jnp.ones(2))
    message = r"loss had the shape \(2,\) at earlier steps, and has \(\) now"
    with pytest.raises(ValueError, match=message):
        recorder.record(population([1.0, 2.0]), loss=1.0)
    with pytest.raises(ValueError, match=message):
        recorder.record(loss=1.0)
    with pytest.raises(ValueError, match=message):
        recorder.extend(loss=np.ones(4))
    with pytest.raises(ValueError, match=r"had the shape \(2,\) .* has \(3,\) now"):
        recorder.record(population([1.0, 2.0, 3.0]))
    recorder.record(population([1.0, 2.0]), loss=jnp.ones(2))
    assert recorder.history()["loss"].tolist() == [[1.0, 1.0]] * 2
    with pytest.raises(ValueError, match=r"members of a population, got {'a': 2, 'b"):
        recorder.extend(a=np.ones((4, 2)), b=np.ones((4, 3)))
    with pytest.raises(ValueError, match=r"or over steps and members"):
        recorder.extend(a=np.ones((4, 2, 2)))


def test_the_worst_member_is_told():
    recorder = lo.Recorder(window=10, max_skips=2)
    for _ in range(5):
        recorder.record(population([1.0, jnp.nan, jnp.nan]))
    with pytest.warns(lo.InterventionWarning, match=r"member 1 \(and 1 more\): 0 rev"):
        recorder.flush()


def test_a_writer_gets_prefixed_tags_and_the_mean_of_members():
    written = []

    class Writer:
        def add_scalar(self, tag, value, step):
            written.append((tag, value, step))

    recorder = lo.Recorder(Writer(), prefix="run/")
    recorder.record(population([1.0, 1.0]), loss=jnp.array([1.0, 3.0]))
    recorder.flush()
    assert ("run/loss", 2.0, 0) in written
    assert {tag.startswith("run/") for tag, *_ in written} == {True}


def test_a_path_is_no_writer():
    with pytest.raises(TypeError, match=r"np\.savez\(path, \*\*recorder\.history"):
        lo.Recorder("runs/1")


def test_a_metric_is_not_overwritten():
    with pytest.raises(ValueError, match="verdict of opt_state would be overwritten"):
        lo.Recorder().record(TX.init(PARAMS), verdict=3)


def test_a_state_inside_jit_is_refused():
    recorder = lo.Recorder()
    with pytest.raises(TypeError, match="opt_state is a tracer"):
        jax.jit(recorder.record)(TX.init(PARAMS))


def test_a_streak_stops_a_run_once_and_the_record_stays_available():
    recorder = lo.Recorder(stop_after=4)
    recorder.record(skipped(5))
    with pytest.raises(lo.TooManyRejections):
        recorder.flush()
    recorder.record(skipped(6))
    assert recorder.history()["num_rejected_in_a_row"].tolist() == [5, 6]
