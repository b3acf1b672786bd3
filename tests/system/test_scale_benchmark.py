"""The benchmark of larger models: what it reads, and that it may be interrupted."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.benchmarks import benchmark

decoder, scale, texts = (benchmark(name) for name in ("decoder", "scale", "texts"))
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
    [("1m", 1), ("4m", 4), ("12m", 12), ("30m", 30), ("124m", 124)],
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
