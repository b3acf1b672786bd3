"""Does the host wait: what a queue of steps and a profile of it show.

A step is enqueued by the host and taken by the device. As long as the host need not
know anything of a step, it runs ahead, and the device is never idle. Three figures tell
whether it has to:

- *enqueued, share*: the time until all of a short queue of steps is enqueued, as a
  share of the time until it is done. Near 1, something waits in every step, or the
  device is no slower than the host; on a CPU it means little.
- *copies to the host* a step, in the profile of the device. A conditional whose
  predicate the host has to know is one such copy.
- *waits* a step: calls of the driver by which the host waits for the device
  (``cuStreamSynchronize`` and the like). One at the end of each queue is ours.
- *idle*: the share of the time in which no kernel and no copy ran, from the first of
  them to the last.

A profile of a CPU has no such events: all but the first are None there. What is called
often, and the names of the lines of the profile, are stored as well, should a driver
have other names for the same.
"""

import re
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from timing import PERIOD, Step, losses, warm_up

QUEUE = 16  # steps; JAX itself lets no more than 32 of them wait
TO_HOST = re.compile(r"D2H|DtoH|DeviceToHost", re.IGNORECASE)
WAIT = re.compile(r"^(cu|hip)(da)?(Stream|Event|Ctx|Context|Device)Synchronize")
DRIVER = re.compile(r"^(cu|hip)[A-Z]|BlockHost|Conditional|CommandBuffer")


def queued(step: Step, num: int = QUEUE) -> tuple[float, float]:
    """Takes steps in a queue; returns seconds a step until enqueued, and until done."""
    given = [jax.block_until_ready(jnp.float32(loss)) for loss in losses(num)]
    jax.block_until_ready(step.carry)
    started = time.perf_counter()
    for loss in given:
        step.begin(loss)
    enqueued = time.perf_counter() - started
    jax.block_until_ready(step.carry)
    return enqueued / num, (time.perf_counter() - started) / num


def queued_in_turn(steps: Sequence[Step], seconds: float) -> np.ndarray:
    """Returns seconds a step of short queues in turn, [repeat, step, enqueued or done].

    For so long, and one period of the anchor at least.
    """
    times: list[list[tuple[float, float]]] = []
    started = time.perf_counter()
    while len(times) * QUEUE < PERIOD or time.perf_counter() - started < seconds:
        times.append([queued(step) for step in steps])
    return np.asarray(times)


def busy_time(intervals: list[tuple[float, float]]) -> float:
    """Returns how long at least one of the intervals lasts."""
    busy, end = 0.0, -np.inf
    for start, stop in sorted(intervals):
        busy += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return float(busy)


def summary_of(planes: Any, num_steps: int) -> dict[str, Any]:
    """Returns what a profile says of each of so many steps.

    Args:
      planes: of a ``jax.profiler.ProfileData``; each has a name and lines, these a name
        and events, these a name, ``start_ns`` and ``duration_ns``.
      num_steps: that were taken.
    """
    names: Counter[str] = Counter()
    lines: set[str] = set()
    intervals, num_copies, num_waits, num_kernels = [], 0, 0, 0
    for plane in planes:
        is_device = plane.name.startswith("/device:")
        for line in plane.lines:
            lines.add(f"{plane.name}, {line.name}")
            if is_device and not line.name.startswith("Stream"):
                continue  # the same events once more, by other criteria
            for event in line.events:
                name = event.name
                if is_device:
                    start = event.start_ns
                    intervals.append((start, start + event.duration_ns))
                    num_copies += bool(TO_HOST.search(name))
                    num_kernels += not re.match("mem(cpy|set)", name, re.IGNORECASE)
                else:
                    num_waits += bool(WAIT.match(name))
                    names[name] += bool(DRIVER.search(name))
    if not intervals:
        nothing = dict.fromkeys(("kernels", "host_copies", "host_waits", "idle"))
        return {**nothing, "lines": sorted(lines)}
    span = max(stop for _, stop in intervals) - min(start for start, _ in intervals)
    common = {name: n / num_steps for name, n in names.most_common(12) if n}
    return {
        "kernels": num_kernels / num_steps,
        "host_copies": num_copies / num_steps,
        "host_waits": num_waits / num_steps,
        "idle": 1.0 - busy_time(intervals) / span,
        "calls": common,
        "lines": sorted(lines),
    }


def profiled(step: Step, num: int) -> dict[str, Any]:
    """Returns what a profile of so many steps, in short queues, says of each."""
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    with tempfile.TemporaryDirectory() as folder:
        queued(step)
        jax.profiler.start_trace(folder, profiler_options=options)
        try:
            for _ in range(num // QUEUE):
                queued(step)
        finally:
            jax.profiler.stop_trace()
        paths = list(Path(folder).rglob("*.xplane.pb"))
        profile = jax.profiler.ProfileData.from_file(str(paths[0]))
        return summary_of(profile.planes, num // QUEUE * QUEUE)


def compare_waits(
    base: Step, own: Step, seconds: float, num_profiled: int = 2 * PERIOD
) -> dict[str, Any]:
    """Measures whether the host waits for a step, next to the one it is compared with.

    Args:
      base: what it is compared with.
      own: the step.
      seconds: of warm-up at most, and of queues.
      num_profiled: steps of which a profile is made, whole periods of the anchor.
    """
    steps = (base, own)
    warm_up(steps, seconds)
    times = queued_in_turn(steps, seconds)
    enqueued, done = times[..., 0], times[..., 1]
    before, after = (profiled(step, num_profiled) for step in steps)
    base_seconds, own_seconds = np.median(done, axis=0)
    total = done.sum(axis=0)
    base_share, share = np.median(enqueued / done, axis=0)
    more: float | str = "unknown"
    if after["kernels"] is not None and before["kernels"] is not None:
        more = sum(after[n] - before[n] for n in ("host_copies", "host_waits"))
    return {
        "ratio": float(np.median(done[:, 1] / done[:, 0])),
        "mean_ratio": float(total[1] / total[0]),
        "milliseconds": 1e3 * float(own_seconds),
        "base_milliseconds": 1e3 * float(base_seconds),
        "enqueued": float(share),
        "base_enqueued": float(base_share),
        "more_waits": more,
        **after,
        **{f"base_{name}": value for name, value in before.items()},
        "conditionals": own.counts()["conditionals"],
    }
