"""Figures: what was recorded is what is drawn, and no global state changes."""

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.figure import Figure

from lalerg_optax import Verdict, plot

NUM_STEPS = 50


def make_history():
    """Returns a run with a skip at 10, not finite, and a revert at 20 and 21."""
    ones = np.ones(NUM_STEPS)
    verdict = np.zeros(NUM_STEPS, int)
    verdict[10], verdict[20:22] = Verdict.SKIP, Verdict.REVERT
    loss = np.geomspace(2.0, 0.1, NUM_STEPS)
    loss[10], loss[20] = np.nan, 30.0
    error = 0.1 * np.sin(np.arange(NUM_STEPS))
    error[10], error[20] = 1e37, 4.0
    leaf = np.where(verdict == Verdict.ACCEPT, 1e-3, 0.0)
    return {
        "step": np.arange(100, 100 + NUM_STEPS),
        "loss": loss,
        "avg_value": np.geomspace(2.0, 0.1, NUM_STEPS),
        "verdict": verdict,
        "macro_rate": 4.0 * ones,
        "damping_factor": np.where(np.arange(NUM_STEPS) < 20, 1.0, 0.5),
        "scaled_error": error,
        "scaled_norm_error": 0.5 * error,
        "update_ratio/params/hidden/kernel": leaf,
        "update_ratio/params/out/kernel": 10.0 * leaf,
        "predicted_decrease/params/out/kernel": leaf * np.linspace(-1, 1, NUM_STEPS),
        "predicted_decrease/params/hidden/kernel": leaf,
    }


def lines(axes):
    return {line.get_label().split(":")[0]: line for line in axes.get_lines()}


def test_verdicts_are_marked_at_their_steps_on_the_loss():
    history = make_history()
    axes = plot.run(history).axes[0]
    drawn = axes.get_lines()[0]
    np.testing.assert_array_equal(drawn.get_xdata(), history["step"])
    np.testing.assert_array_equal(drawn.get_ydata(), history["loss"])
    skipped, reverted = lines(axes)["skipped"], lines(axes)["reverted"]
    assert skipped.get_xdata().tolist() == [110]
    assert reverted.get_xdata().tolist() == [120, 121]
    np.testing.assert_array_equal(reverted.get_ydata(), history["loss"][20:22])
    assert 10.0 < skipped.get_ydata()[0] < axes.get_ylim()[1], "near the top"
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    counts = {text.split(":")[0].split()[0]: text for text in labels}
    assert counts["bounded"].endswith("(0)")
    assert counts["skipped"].endswith("(1)")
    assert counts["reverted"].endswith("(2)")
    assert labels[-1] == "at the top: not finite (1)"


def test_rates_are_drawn_with_their_product():
    history = make_history()
    drawn = lines(plot.run(history).axes[1])
    np.testing.assert_array_equal(
        drawn["both together"].get_ydata(),
        history["macro_rate"] * history["damping_factor"],
    )
    np.testing.assert_array_equal(
        drawn["macro rate (search)"].get_ydata(), history["macro_rate"]
    )
    np.testing.assert_array_equal(
        drawn["damping (after reverts)"].get_ydata(), history["damping_factor"]
    )


def test_errors_are_drawn_against_the_threshold_and_clipped_with_a_mark():
    axes = plot.run(make_history()).axes[2]
    drawn = lines(axes)
    assert set(drawn["above"].get_ydata()) == {1.0}
    error = drawn["loss"].get_ydata()
    assert error[20] == 4.0
    assert error[10] == axes.get_ylim()[1] == 10.0
    marks = [line for line in axes.get_lines() if line.get_marker() == "^"]
    assert marks[0].get_xdata().tolist() == [110]


def test_every_axis_says_what_it_shows():
    figure = plot.run(make_history())
    assert all(axes.get_ylabel() for axes in figure.axes)
    assert figure.axes[-1].get_xlabel() == "step"
    assert all(axes.get_legend() for axes in figure.axes)


def test_without_a_loss_the_average_is_drawn():
    history = make_history()
    del history["loss"]
    axes = plot.run(history).axes[0]
    assert axes.get_ylabel() == "average loss"
    np.testing.assert_array_equal(axes.get_lines()[0].get_ydata(), history["avg_value"])


def test_a_value_that_stands_for_infinity_is_marked_at_the_top():
    history = make_history()
    del history["loss"]
    history["avg_value"][10] = 1e37
    axes = plot.run(history).axes[0]
    assert axes.get_ylim()[1] < 10.0
    assert 1.0 < lines(axes)["skipped"].get_ydata()[0] < axes.get_ylim()[1]
    assert "at the top" in lines(axes)


def test_one_group_of_several_is_drawn_by_its_name():
    history = make_history()
    shared = {"step", "loss"}
    grouped = {k if k in shared else f"encoder/{k}": x for k, x in history.items()}
    axes = plot.run(grouped, group="encoder").axes[0]
    assert lines(axes)["skipped"].get_xdata().tolist() == [110]
    heat = plot.layers(grouped, group="encoder").axes[0]
    assert len(heat.get_yticklabels()) == 2
    with pytest.raises(ValueError, match="history has no verdict"):
        plot.run(grouped)


def test_negative_and_constant_losses_are_drawn_on_a_linear_axis():
    for loss in (np.linspace(-1.0, -2.0, NUM_STEPS), np.zeros(NUM_STEPS)):
        axes = plot.run(make_history() | {"loss": loss}).axes[0]
        assert axes.get_yscale() == "linear"


def test_layers_are_rows_and_steps_are_columns():
    figure = plot.layers(make_history(), "update_ratio")
    axes, bar = figure.axes
    (image,) = axes.get_images()
    table = image.get_array()
    assert table.shape == (2, NUM_STEPS)
    assert [t.get_text() for t in axes.get_yticklabels()] == [
        "hidden/kernel",
        "out/kernel",
    ]
    np.testing.assert_allclose(table[1, 5] / table[0, 5], 10.0)
    assert table.mask[:, [10, 20, 21]].all(), "grey where rejected"
    assert not table.mask[:, :10].any()
    assert image.get_extent()[:2] == [99.5, 149.5]
    assert "|u| / |p|" in bar.get_ylabel()


def test_what_is_not_finite_in_a_leaf_is_grey_and_sets_no_scale():
    norms = np.linspace(1.0, 2.0, NUM_STEPS)
    norms[10] = 1e37
    figure = plot.layers({"grad_norm/w": norms}, "grad_norm")
    (image,) = figure.axes[0].get_images()
    assert np.flatnonzero(image.get_array().mask[0]).tolist() == [10]
    assert image.norm.vmax < 2.1


@pytest.mark.parametrize("group", ["", "encoder"])
def test_params_that_are_one_array_are_one_row(group):
    prefix = f"{group}/" if group else ""
    history = {f"{prefix}update_ratio": np.full(3, 1e-3), f"{prefix}grad_norm": [1.0]}
    axes = plot.layers(history, group=group).axes[0]
    assert [t.get_text() for t in axes.get_yticklabels()] == ["update_ratio"]
    assert axes.get_images()[0].get_array().shape == (1, 3)


def test_a_few_extremes_do_not_set_the_scale():
    ratios = np.full(1000, 1e-3)
    ratios[500] = 1e6
    (image,) = plot.layers({"update_ratio/w": ratios}).axes[0].get_images()
    assert image.norm.vmax < 2e-3


@pytest.mark.parametrize("num_leaves", [1, 60, 61, 130])
def test_labels_stand_beside_their_own_leaves(num_leaves):
    ratio = np.full(3, 1e-3)
    history = {f"update_ratio/layers/{i}": ratio for i in range(num_leaves)}
    axes = plot.layers(history).axes[0]
    assert 1 <= len(axes.get_yticks()) <= 60
    for place, label in zip(axes.get_yticks(), axes.get_yticklabels(), strict=True):
        assert label.get_text().removeprefix("layers/") == str(place)


def test_the_sign_of_a_predicted_decrease_is_seen():
    image = plot.layers(make_history(), "predicted_decrease").axes[0].get_images()[0]
    assert image.norm.vmin == -image.norm.vmax
    assert image.norm(0.0) == pytest.approx(0.5)


@pytest.mark.parametrize("name", ["update_ratio", "grad_norm"])
def test_what_was_not_recorded_is_a_value_error(name):
    history = {"loss": np.ones(3), "grad_norm": np.ones(3)}  # of no leaf
    with pytest.raises(ValueError, match="local=True"):
        plot.layers(history, name)


@pytest.mark.parametrize("draw", [plot.run, plot.layers])
def test_a_figure_is_saved_and_leaves_no_trace(draw, tmp_path):
    before = dict(mpl.rcParams)
    figure = draw(make_history())
    assert isinstance(figure, Figure)
    figure.savefig(tmp_path / "figure.png", dpi=40)
    assert (tmp_path / "figure.png").stat().st_size > 1000
    assert dict(mpl.rcParams) == before


@pytest.mark.parametrize("verdicts", [[], [10], [10, 20]])
def test_panels_fill_the_figure_whatever_there_is_to_mark(verdicts):
    history = make_history()
    history["verdict"] = np.isin(np.arange(NUM_STEPS), verdicts).astype(int)
    history["loss"] = history["avg_value"]
    figure = plot.run(history)
    figure.draw_without_rendering()
    heights = [axes.get_position().height for axes in figure.axes]
    assert sum(heights) > 0.7


def test_a_verdict_that_is_held_is_drawn_once():
    history = make_history()
    held = {name: np.repeat(x, 3) for name, x in history.items()}
    held["has_updated"] = np.arange(3 * NUM_STEPS) % 3 == 0
    axes = plot.run(held).axes[0]
    assert len(axes.get_lines()[0].get_xdata()) == 3 * NUM_STEPS
    assert lines(axes)["skipped"].get_xdata().tolist() == [110]
    assert lines(axes)["reverted"].get_xdata().tolist() == [120, 121]
