"""What other packages do is theirs: they may promote ranks."""

import jax
import pytest


@pytest.fixture(autouse=True)
def _rank_promotion_is_allowed():
    with jax.numpy_rank_promotion("allow"):
        yield
