"""Where things lie."""

import pathlib

TESTS = pathlib.Path(__file__).parents[1]
ROOT = TESTS.parent
DOCS = ROOT / "docs"
