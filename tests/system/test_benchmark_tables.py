"""The tables of the benchmarks say what was measured."""

import numpy as np
import pytest
from helpers.benchmarks import benchmark

DECADES = (1e-2, 1e-1, 1.0)


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
