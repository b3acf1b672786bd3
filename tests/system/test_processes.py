"""Processes joined by jax.distributed decide like one with all of the devices."""

import json
import socket
import subprocess
import sys

import numpy as np
import pytest
from helpers import joined_run
from helpers.digits_run import ALONE, BURST, batches
from helpers.paths import TESTS

from lalerg_optax import Verdict

NUM_PROCESSES = 2
COMMAND = [sys.executable, "-m", joined_run.__name__]


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def train_joined(layout):
    """Returns what each of two processes with four devices each was told."""
    port = str(free_port())
    processes = [
        subprocess.Popen(
            [*COMMAND, str(i), str(NUM_PROCESSES), port, layout],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=TESTS,
        )
        for i in range(NUM_PROCESSES)
    ]
    try:
        outputs = [process.communicate(timeout=400) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (_, errors) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, errors
    return [json.loads(output.splitlines()[-1]) for output, _ in outputs]


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["data parallel", "fully sharded"])
def test_two_processes_take_the_run_of_one(layout):
    """One of them alone sees a NaN, and both skip together."""
    (losses, verdicts, rates), _ = joined_run.train(layout, batches())
    assert verdicts[ALONE] == Verdict.SKIP
    expected = [Verdict.BOUND, Verdict.REVERT, Verdict.REVERT]
    assert verdicts[BURST : BURST + 3] == expected
    first, second = train_joined(layout)
    assert json.dumps(first) == json.dumps(second), "bit for bit, and NaN is NaN"
    told, _ = first
    assert told[1] == verdicts
    np.testing.assert_allclose(told[0], losses, rtol=1e-4)  # measured: 2e-6
    np.testing.assert_allclose(told[2], rates, rtol=1e-4)
