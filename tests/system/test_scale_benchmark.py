"""The benchmark of larger models: what it reads, and that it may be interrupted."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.benchmarks import benchmark

decoder, scale, scale_tables, texts = (
    benchmark(name) for name in ("decoder", "scale", "scale_tables", "texts")
)
TINY = decoder.SIZES["tiny"]


def test_what_is_held_out_is_not_learnt_from():
    text = texts.text_of()
    assert 0.02 < len(text.held_out) / len(text.train) < 0.1
    assert text.digest == texts.text_of().digest
    learnt, held_out = text.train.tobytes(), text.held_out.tobytes()
    windows = [held_out[i : i + 200] for i in range(0, len(held_out) - 200, 2000)]
    # licences are in many files
    assert np.mean([window in learnt for window in windows[:100]]) < 0.05


def test_a_text_that_is_not_known_is_refused():
    with pytest.raises(ValueError, match="got 'novel'"):
        texts.text_of("novel")


@pytest.mark.parametrize(
    ("name", "millions"),
    [("250k", 0.25), ("1m", 1), ("4m", 4), ("12m", 12), ("30m", 30), ("124m", 124)],
)
def test_a_size_is_as_large_as_its_name_says(name, millions):
    assert scale.num_params_of(name) == pytest.approx(1e6 * millions, rel=0.05)
    assert scale.steps_of(name) % scale.PIECE == 0


def test_a_byte_does_not_see_what_follows_and_sees_what_was_before():
    params = decoder.init(jax.random.key(0), TINY)
    tokens = jax.random.randint(jax.random.key(1), (1, 16), 0, 256)
    logits = decoder.logits_of(params, tokens, TINY)
    after = decoder.logits_of(params, tokens.at[0, 9].add(1), TINY)
    same = jnp.all(logits == after, axis=-1)[0]
    assert same.tolist() == [i < 9 for i in range(16)]


def test_places_are_told_apart():
    size = TINY._replace(depth=1)  # a second layer sees it by what was before
    params = decoder.init(jax.random.key(0), size)
    tokens = jnp.array([[1, 2, 3, 4], [2, 1, 3, 4]])  # the same bytes in another order
    first, second = decoder.logits_of(params, tokens, size)[:, -1]
    assert jnp.max(jnp.abs(first - second)) > 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["lalerg", "muon"])
def test_a_run_that_was_interrupted_ends_as_if_it_had_not_been(tmp_path, optimizer):
    run = scale.Run("tiny", optimizer, 1e-3, 0, 3 * scale.PIECE)
    text, steps = texts.text_of(), []

    def told(run, now):
        steps.append(now.step)

    whole = scale.train_run(run, text, told=told)
    saver = scale.Saver(tmp_path / "run")
    first = scale.train_run(run, text, lambda: True, saver, told)
    assert (first["stopped"], first["steps"]) == (True, scale.PIECE)
    second = scale.train_run(run, text, saver=scale.Saver(tmp_path / "run"), told=told)
    assert steps == [20, 40, 60, 20, 40, 60], "what was saved is not run again"
    for name in ("held_out_loss", "train_loss", "seen", "stopped"):
        assert second[name] == whole[name], name
    # another run does not take it
    other = run._replace(rate=1e-2)
    scale.train_run(other, text, lambda: True, scale.Saver(tmp_path / "run"), told)
    assert steps[-1] == 20


def test_a_run_with_faults_is_struck_by_each_of_them():
    plan = scale.plan_of(200)
    struck = {"grad_term": 40, "grad_factor": 60, "flip": 100, "update_factor": 120}
    for name, first in (struck | {"poison": 140}).items():
        field = getattr(plan, name)
        assert np.flatnonzero(field != field[0])[0] == first, name
    # a leaf that every byte goes through
    params = decoder.init(jax.random.key(0), TINY)
    hit = scale.HOOKS.strike(params, (), jax.tree.map(lambda a: a[100], plan))[0]
    assert jnp.all(hit["embedding"] == params["embedding"])
    changed = jax.tree.map(lambda a, b: int(jnp.sum(a != b)), hit, params)
    assert sum(jax.tree.leaves(changed)) == 1


def entry(optimizer, rate, loss, seed=0, macro_rate=1.0, **more):
    run = {"optimizer": optimizer, "rate": rate, "seed": seed, "held_out_loss": loss}
    told = {"size": "tiny", "steps": 40, "num_params": 9, "stopped": False}
    seen = [[step, loss, loss, macro_rate] for step in (20, 40)]
    extra = {"has_faults": False, "seen": seen, "step_milliseconds": 7.0}
    return run | told | extra | more


def counts(**more):
    return {"num_skipped": 1, "num_bounded": 0, "num_reverts": 2} | more


def test_runs_are_compared_with_adamw_at_its_best_rate():
    start = float(np.log(256.0))
    best = start - 4.0
    found = [
        entry("adamw", 1e-3, best + 0.2),
        entry("adamw", 1e-2, best - 0.1, seed=0),
        entry("adamw", 1e-2, best + 0.1, seed=1),
        entry("adamw", 1e-1, None),  # not finite: as stored
        entry("lalerg", 1e-6, best + 0.04, macro_rate=4e3, **counts()),
        entry("no_search", 1e-2, best - 0.08, **counts(has_faults=True)),
    ]
    assert scale_tables.tuned_of(found) == (1e-2, pytest.approx(best))
    lines = scale_tables.size_table(found)[2:-1]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    rows = {(row[0], row[1]): row for row in rows}
    assert rows["lalerg", "1e-06"][4:9] == ["+1.00", "4.0e-03", "1", "0", "2"]
    assert rows["no_search, faults", "0.01"][4:6] == ["-2.00", ""]
    assert rows["adamw", "0.01"][2:5] == ["2", f"{best:.3f}", "+0.00 +- 3.54"]
    assert rows["adamw", "0.1"][4] == "dead"


def test_runs_of_other_lengths_stand_in_tables_of_their_own(tmp_path):
    results = scale_tables.Runs(tmp_path / "scale.json")
    some = [
        entry("adamw", 1e-2, 2.0) | {"steps": 80},
        entry("lalerg", 1e-6, 2.5, macro_rate=1e3, **counts()),
        entry("adamw", 1e-2, 3.0),
        entry("adamw", 1e-3, 4.0, seed=1) | {"stopped": True},
    ]
    results.runs = {(i,): run for i, run in enumerate(some)}
    groups = results.groups()
    assert {key: len(runs) for key, runs in groups.items()} == {
        ("tiny", 40): 2,
        ("tiny", 80): 1,
    }
    (short, long) = scale_tables.transfer_table(results)[2:-1]
    assert "| 1.0e-03 to 1.0e-03 | -19.64 |" in short
    assert long.startswith("| tiny | 9 | 80 | 0.01 | 2.000 |  |  |")
    scale_tables.draw(results, tmp_path / "scale.png")
    assert (tmp_path / "scale.png").stat().st_size > 10_000
