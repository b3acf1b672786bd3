"""What the default run leaves to the slow one, because it shows the same again."""

import pytest


def some(names, *quick):
    """Returns all names, those but the quick ones marked as slow."""
    assert set(quick) <= set(names), "a quick one has another name"
    return [n if n in quick else pytest.param(n, marks=pytest.mark.slow) for n in names]
