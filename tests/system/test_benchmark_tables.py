"""The tables of the benchmarks say what was measured."""

from functools import partial

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.benchmarks import benchmark

DECADES = (1e-2, 1e-1, 1.0)
BROKEN = optax.sgd(float("nan"))


def swept(tmp_path):
    """Returns made-up results: AdamW goes from 100 to 2, and ends at 8 next to that."""
    made = benchmark("decades_tables").Results(tmp_path / "made.json")
    made.starts["mlp"] = [100.0]
    for name, losses in (
        ("adamw", [[8.0], [2.0], [None]]),
        ("lalerg", [[2.1], [2.3], [5.0]]),
    ):
        made.runs["mlp", name] = {"rates": DECADES, "train_loss": losses}
    return made


def test_the_ratio_is_strict_where_a_share_of_the_drop_is_not(tmp_path):
    made, sweeps = swept(tmp_path), benchmark("sweeps")
    ratios = made.ratios("mlp", "lalerg")
    np.testing.assert_allclose(ratios, [[1.05], [1.15], [2.5]])
    assert sweeps.ratio_shares(ratios) == ["33", "67", "1.15"]
    assert sweeps.shares(made.excess("mlp", "lalerg")) == ["100", "67", "0"]


def test_a_run_that_diverged_has_no_ratio(tmp_path):
    made, sweeps = swept(tmp_path), benchmark("sweeps")
    ratios = made.ratios("mlp", "adamw")
    np.testing.assert_allclose(ratios, [[4.0], [1.0], [np.inf]])
    assert sweeps.times(ratios.max()) == "diverged"


def test_a_peer_of_which_nothing_is_left_is_told_as_diverged(tmp_path):
    decades, tables = benchmark("decades"), benchmark("decades_tables")
    peer = decades.peers.ADAMW._replace(name="momo_adam", make=lambda rate, n: BROKEN)
    row = decades.ADAMW._replace(peer=peer, has_curve=False)
    data = (jnp.ones((4, 1)),)
    task = benchmark("tasks").Task(
        init=lambda key: (jnp.ones(1), ()),
        loss=lambda params, rest, *batch: ((params**2).sum(), rest),
        train=data,
        test=data,
        batch_size=1,
        num_steps=2,
    )
    made = swept(tmp_path)
    for (name, optimizer), run in made.runs.items():
        run |= {"task": name, "optimizer": optimizer, "seconds": 1.0}
    cells = {"rates": [1e-2, 1.0], "num_seeds": 2, "num_steps": 2}
    measured = partial(decades.measure, task, row, **cells)
    made.measure(("mlp", "momo_adam"), cells, measured, force=False)

    stored = tables.Results(made.path)
    stored.load()
    assert stored.runs["mlp", "momo_adam"]["train_loss"] == [[None, None]] * 2
    text = tables.report(stored, [decades.ADAMW, row])
    assert "| momo_adam | 0 | 0 | 0 | diverged | diverged (mlp) | 1 |" in text
    assert "| momo_adam | 0 | 0 | diverged |" in text  # by the ratio of losses
    tables.draw(stored, tmp_path / "made.png")


def test_a_row_at_its_best_rate_is_a_mean_of_its_seeds(tmp_path):
    tables, sweeps = benchmark("decades_tables"), benchmark("sweeps")
    made = swept(tmp_path)
    own = benchmark("decades").LALERG
    # 2.1 at the best of three rates, 0.1 above AdamW, which went from 100 to 2
    (line,) = tables.best_table(made, [own])[2:-1]
    excess = sweeps.percent(100 * 0.1 / 98)
    assert line == f"| lalerg | 100 | 100 | 0 | {excess} | {excess} (mlp) | 1 |"


@pytest.mark.parametrize("name", ["decades", "families"])
def test_what_is_stored_gives_the_same_ratios(name):
    stored = benchmark(f"{name}_tables")
    results = stored.Results(benchmark("store").RESULTS / f"{name}.json")
    results.load()
    base = "adamw" if name == "decades" else stored.bare("AdaGrad")
    own = "lalerg" if name == "decades" else "AdaGrad"
    losses = np.asarray(results.runs["photo", own]["train_loss"])
    tuned = np.asarray(results.runs["photo", base]["train_loss"], float).mean(axis=1)
    args = ("photo", own) if name == "decades" else ("photo", own, own)
    np.testing.assert_allclose(results.ratios(*args), losses / np.nanmin(tuned))


def held_out(tmp_path, metric):
    """Returns made-up results on a task with an error; AdamW's is 10 % +- 2 %."""
    made = benchmark("heldout_tables").Results(tmp_path / "made.json")
    common = {"num_held_out": 200, "start_loss": [2.0] * 3, "rate": 0.1, "num_seeds": 3}
    losses = {"train_loss": [[1.0] * 3, [0.2] * 3, [None] * 3]}
    tuned = {"metric": [[50.0] * 3, [8.0, 10.0, 12.0], [90.0] * 3]}
    made.runs["mlp", "adamw"] = common | losses | tuned
    made.runs["mlp", "lalerg"] = common | losses | {"metric": [metric] * 3}
    return made


def test_less_of_an_error_is_a_gain_in_deviations_of_the_seeds(tmp_path):
    made = held_out(tmp_path, [9.0, 10.0, 14.0])
    np.testing.assert_allclose(made.gains("mlp", "lalerg", 1.0), [0.5, 0.0, -2.0])
    np.testing.assert_allclose(made.gains("mlp", "adamw", 1e-3), [-20.0] * 3)
    assert (made.gains("mlp", "lalerg", 1e3) == -np.inf).all(), "its loss is not finite"
    np.testing.assert_allclose(made.ratio("mlp", "lalerg", 1e-3), 5.0)
    np.testing.assert_allclose(made.excess("mlp", "lalerg", 1e-3), 100 * 0.8 / 1.8)


def test_seeds_that_agree_are_not_told_apart_by_less_than_an_example(tmp_path):
    made = held_out(tmp_path, [10.0, 10.5, 11.0])
    made.runs["mlp", "adamw"]["metric"][1] = [10.0] * 3
    np.testing.assert_allclose(made.gains("mlp", "lalerg", 1.0), [0.0, -1.0, -2.0])


@pytest.mark.parametrize(
    ("name", "out", "target", "expected"),
    [
        ("mlp", [[2.0, 1.0], [0.0, 3.0]], [0, 0], 50.0),
        ("logistic", [[2.0], [-1.0], [0.5], [-0.1]], [1.0, 0.0, 0.0, 0.0], 25.0),
        ("regression", [[1.0], [2.0]], [1.0, 0.0], 2.0**0.5),
        ("photo", [[0.1, 0.1]], [[0.0, 0.2]], 20.0),
    ],
)
def test_a_metric_is_what_it_says(name, out, target, expected):
    metric = benchmark("heldout_tables").METRICS[name]
    found = metric.of(np.asarray(out), np.asarray(target))
    np.testing.assert_allclose(found, expected, rtol=1e-5)
