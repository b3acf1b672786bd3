"""An import brings along what it needs and nothing else."""

import subprocess
import sys

import pytest

EXTRAS = {"chex", "flax", "matplotlib", "orbax", "sklearn", "tensorboardX"}


@pytest.mark.parametrize(
    ("script", "absent"),
    [
        ("import lalerg_optax as lo; lo.Recorder().history()", EXTRAS),
        ("import lalerg_optax.flax", {"matplotlib", "sklearn"}),
        ("import lalerg_optax.plot", {"flax", "matplotlib.pyplot"}),
    ],
    ids=["the core", "flax", "plot"],
)
def test_nothing_is_imported_that_was_not_asked_for(script, absent):
    report = f"import sys; print(sorted({absent!r} & sys.modules.keys()))"
    done = subprocess.run(
        [sys.executable, "-c", f"{script}\n{report}"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "[]"
