"""One of several processes that train together: its number, how many, port, layout.

Started by `test_processes.py`, with ``-m helpers.joined_run``. Prints what it was told,
as JSON.
"""

import hashlib
import json
import os
import signal
import sys

if __name__ == "__main__":
    signal.alarm(360)  # whoever is left alone in a collective would wait for ever
    process, num_processes, port = map(int, sys.argv[1:4])
    os.environ["XLA_FLAGS"] = (
        f"--xla_force_host_platform_device_count={8 // num_processes}"
    )

import jax
import numpy as np

import lalerg_optax as lo
from helpers.digits_run import BATCH, batches, train_sharded


def digest(tree):
    """Returns a hash of all that this process has of the leaves."""
    shards = [s.data for leaf in jax.tree.leaves(tree) for s in leaf.addressable_shards]
    return hashlib.sha256(b"".join(np.asarray(x).tobytes() for x in shards)).hexdigest()


def train(layout, data):
    """Returns losses, verdicts, rates, and a hash of what all devices have."""
    params, state, told = train_sharded(lo.lalerg(1.0), layout, data)
    common = state.scalars, state.history
    if layout == "data parallel":
        common = params, state
    return np.asarray(told).tolist(), digest(common)


if __name__ == "__main__":
    jax.distributed.initialize(
        f"127.0.0.1:{port}", num_processes, process, initialization_timeout=180
    )
    assert (jax.process_count(), jax.device_count()) == (num_processes, 8)
    # only the last process is fed the row that is poisoned
    poisoned = batches(BATCH - 1 if process == num_processes - 1 else None)
    print(json.dumps(train(sys.argv[4], poisoned)))
