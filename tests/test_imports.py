"""An import brings along what it needs and nothing else."""

import subprocess
import sys

import pytest

EXTRAS = {"chex", "flax", "matplotlib", "orbax", "sklearn", "tensorboardX"}


@pytest.mark.parametrize(
    ("script", "present", "absent"),
    [
        ("import lalerg_optax as lo; lo.Recorder().history()", "optax", EXTRAS),
        ("import lalerg_optax.flax", "flax", {"matplotlib", "sklearn"}),
        ("import lalerg_optax.plot", "matplotlib", {"flax", "matplotlib.pyplot"}),
    ],
    ids=["the core", "flax", "plot"],
)
def test_nothing_is_imported_that_was_not_asked_for(script, present, absent):
    seen = {present, *absent}
    report = f"import sys; print(sorted({seen!r} & sys.modules.keys()))"
    done = subprocess.run(
        [sys.executable, "-c", f"{script}\n{report}"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == f"[{present!r}]"
