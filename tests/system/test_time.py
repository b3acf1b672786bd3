"""Tests that do not begin in time are told as skipped, and not as passed."""

import os
import pathlib
import subprocess
import sys
import time

import pytest

ONE = "tests/unit/test_numbers.py"


@pytest.mark.parametrize(("seconds", "is_run"), [(-1.0, False), (600.0, True)])
def test_a_test_that_begins_too_late_is_skipped(seconds, is_run):
    until = os.environ | {"TESTS_UNTIL": str(time.time() + seconds)}
    command = [sys.executable, "-m", "pytest", "-n", "0", ONE]
    root = pathlib.Path(__file__).parents[2]
    told = subprocess.run(command, env=until, cwd=root, capture_output=True, text=True)
    summary = told.stdout.splitlines()[-1]
    assert ("skipped" in summary, "passed" in summary) == (not is_run, is_run), summary
