"""What tests take from ``benchmarks/``, whose files import each other by name."""

import sys

import pytest

from .paths import ROOT

BENCHMARKS = ROOT / "benchmarks"


def benchmark(name):
    """Returns a file of the benchmarks as a module; without them, skips."""
    if str(BENCHMARKS) not in sys.path:
        sys.path.append(str(BENCHMARKS))
    return pytest.importorskip(name, reason="needs the benchmarks beside it")
