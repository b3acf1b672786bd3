"""The recorder: what went in comes out, nothing waits, and pile-ups are told."""

import warnings

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


# ---- warnings -----------------------------------------------------------------------


def told_of(verdicts, fetch_every=100, **others):
    """Returns the warnings of a run with such verdicts."""
    recorder = lo.Recorder(fetch_every=fetch_every)
    verdicts = np.asarray(verdicts)
    stacked = {"verdict": verdicts, **others}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for first in range(0, len(verdicts), 100):
            recorder.extend({k: x[first : first + 100] for k, x in stacked.items()})
        recorder.flush()
    assert all(w.category is lo.InterventionWarning for w in caught)
    return [str(w.message) for w in caught]


def verdicts_with(num_steps, steps, verdict):
    verdicts = np.zeros(num_steps, int)
    verdicts[steps] = verdict
    return verdicts


def test_chance_alone_never_warns():
    """A million steps with the false alarms that the README has, and at three times."""
    rng = np.random.default_rng(0)
    for rate in (3e-4, 9e-4):
        verdicts = np.where(rng.uniform(size=1_000_000) < rate, SKIP, ACCEPT)
        recorder = lo.Recorder()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for part in np.split(verdicts, 1000):
                recorder.extend(verdict=part)
            recorder.flush()


@pytest.mark.parametrize(
    ("num_skips", "num_reverts", "is_many"),
    [(10, 0, False), (11, 0, True), (0, 5, False), (0, 6, True), (10, 5, False)],
)
@pytest.mark.parametrize("start", [0, 730])
def test_the_bounds_are_those_of_the_docstring(num_skips, num_reverts, is_many, start):
    places = start + 10 + 30 * np.arange(16)
    verdicts = verdicts_with(1500, places[:num_skips], SKIP)
    for place in places[num_skips:][:num_reverts]:
        verdicts[place : place + 2] = REVERT
    messages = told_of(verdicts)
    assert len(messages) == is_many
    if is_many:
        assert f"{num_reverts} reverts and {num_skips} skips in " in messages[0]


@pytest.mark.parametrize("fetch_every", [1, 100, 1000])
@pytest.mark.parametrize(
    "steps",
    [range(300, 311), [*range(210, 215), *range(700, 706)]],
    ids=["together", "a window apart"],
)
def test_a_pile_up_is_told_however_many_steps_are_fetched_at_once(steps, fetch_every):
    (message,) = told_of(verdicts_with(2000, steps, SKIP), fetch_every)
    assert f"11 skips in {min(500, steps[-1] + 1)} steps" in message
    assert f"(up to step {steps[-1]})" in message


def test_a_revert_counts_from_its_first_step_on():
    steps = [*range(100, 110), 300]
    assert not told_of(verdicts_with(301, steps[:-1], REVERT))
    (message,) = told_of(verdicts_with(301, steps, REVERT))
    assert "6 reverts and 0 skips in 301 steps" in message


def test_interventions_that_are_spread_out_do_not_warn():
    assert not told_of(verdicts_with(10_000, np.arange(0, 10_000, 50), SKIP))


def test_a_run_that_never_gets_well_warns_once_a_window():
    messages = told_of(verdicts_with(3000, np.arange(0, 3000, 10), SKIP))
    assert 5 <= len(messages) <= 7
    assert "skips in 500 steps" in messages[-1]


def test_a_warning_says_who_objected_and_where():
    steps = np.arange(300, 312)
    verdicts = verdicts_with(600, steps, SKIP)
    error, norm, kernel, head = np.zeros((4, 600))
    error[steps[:7]] = 5.0
    error[100] = 5.0  # accepted, as a new level is in the end
    norm[steps[6:9]] = 2.0
    norm[steps[9:]] = 1e37
    kernel[steps] = 30.0
    kernel[steps[-1]] = 1e37
    head[299] = 0.4
    (message,) = told_of(
        verdicts,
        scaled_error=error,
        scaled_norm_error=norm,
        **{"grad_norm/encoder/kernel": kernel, "grad_norm/head": kernel / 2.0},
        **{
            "predicted_decrease/encoder/kernel": head / 2.0,
            "predicted_decrease/head": head,
        },
    )
    assert "12 skips in " in message
    assert "protection can hide a bug" in message
    assert "the loss (7 steps)" in message
    assert "the gradient norm (3 steps)" in message
    assert "what is not finite (3 steps)" in message
    assert "largest gradient was that of encoder/kernel (one that is not" in message
    assert "the leaf that moved the loss most was head." in message


def test_each_regulator_of_a_partition_is_counted_by_itself():
    recorder = lo.Recorder()
    bad = verdicts_with(100, np.arange(20), SKIP)
    recorder.extend({"encoder/verdict": bad, "head/verdict": 0 * bad})
    with pytest.warns(lo.InterventionWarning, match="of encoder: 0 reverts and 20 s"):
        recorder.flush()


def test_batches_that_are_bounded_are_no_interventions():
    assert not told_of(verdicts_with(1000, np.arange(0, 1000, 3), BOUND))


def test_bounded_batches_are_not_told_as_a_cause_of_skips():
    verdicts = verdicts_with(600, np.arange(300, 312), SKIP)
    verdicts[100:180] = BOUND
    error, norm = np.zeros((2, 600))
    error[100:180], norm[300:312] = 5.0, 5.0
    (message,) = told_of(verdicts, scaled_error=error, scaled_norm_error=norm)
    assert "the gradient norm (12 steps)" in message
    assert "the loss" not in message


def test_a_revert_without_an_outlier_has_its_own_cause():
    verdicts = verdicts_with(100, range(50, 62), REVERT)
    (message,) = told_of(verdicts, damping=np.full(100, 2.0))
    assert message.endswith("look at the learning rate: the search went back.")


def test_each_regulator_warns_of_its_own_signals_and_leaves():
    bad = verdicts_with(100, np.arange(20), SKIP)
    error, norm = np.full(100, 5.0), np.full(100, 30.0)
    others = {
        "encoder/scaled_error": error,
        "head/scaled_norm_error": error,
        "head/grad_norm/out/kernel": norm,
    }
    recorder = lo.Recorder()
    recorder.extend({"encoder/verdict": bad, "head/verdict": bad, **others})
    with pytest.warns(lo.InterventionWarning) as caught:
        recorder.flush()
    encoder, head = (str(w.message) for w in caught)
    assert encoder.startswith("of encoder: ")
    assert encoder.endswith("look at the loss (20 steps).")
    assert head.startswith("of head: ")
    assert "look at the gradient norm (20 steps)." in head
    assert head.endswith("was that of out/kernel (up to 3.0e+01).")


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


# ---- what recurs --------------------------------------------------------------------


def recurring(**columns):
    """Returns the warnings of a run of 10,000 steps of which all are accepted."""
    recorder = lo.Recorder()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for first in range(0, 10_000, 1000):
            part = {name: x[first : first + 1000] for name, x in columns.items()}
            recorder.extend(verdict=np.zeros(1000, np.int32), **part)
        recorder.flush()
    return [str(w.message) for w in caught]


def test_odd_norms_that_use_up_their_skips_are_told_once_however_far_apart():
    skips_left = np.float32(5 - np.arange(10_000) // 1500)
    (text,) = recurring(skips_left=np.maximum(skips_left, 0.5))
    assert "come again and again" in text
    assert not recurring(skips_left=np.full(10_000, 1.5, np.float32))


def test_harm_that_recurs_is_told_once_however_far_apart():
    (text,) = recurring(num_harmful=np.arange(10_000) // 600)
    assert text.startswith("updates did harm 1")
    assert not recurring(num_harmful=np.arange(10_000) // 1000)
