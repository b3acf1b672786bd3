"""The benchmark for a GPU: it runs, keeps its time limit, and loses nothing."""

import json
import os
import runpy
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from helpers.benchmarks import BENCHMARKS, benchmark
from helpers.paths import ROOT

gpu, timing, traces = (benchmark(name) for name in ("gpu", "timing", "traces"))
QUOTES = runpy.run_path(BENCHMARKS / "quotes.py")


def run(*options, before=""):
    """Runs the command; ``before`` is code that runs before its ``main``."""
    path = BENCHMARKS / "gpu.py"
    code = f"import sys; sys.path.insert(0, {str(BENCHMARKS)!r})\nimport gpu\n{before}"
    command = ["-c", f"{code}\ngpu.main()"] if before else [str(path)]
    return subprocess.run(
        [sys.executable, *command, *map(str, options)],
        capture_output=True,
        text=True,
        timeout=1000,
        env=os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
    )


def stored(path):
    return json.loads(path.with_suffix(".json").read_text())


# ---- The command ---------------------------------------------------------------------


@pytest.mark.slow
def test_a_quick_run_measures_all_that_the_tables_quote(tmp_path):
    options = ("--quick", "--device", "cpu", "--out", tmp_path / "gpu")
    done = run(*options, "--seconds", "3000")  # however busy the machine is
    assert done.returncode == 0, done.stderr
    found = stored(tmp_path / "gpu")
    assert found["ended"] == "complete"
    assert {entry["part"] for entry in found["runs"]} == set(gpu.PARTS)
    assert not [entry["error"] for entry in found["runs"] if entry["error"]]
    table = QUOTES["filled"]("{gpu}", tmp_path)
    assert "Nothing has been measured" not in table
    assert table.count("|\n") == 7
    again = run(*options)
    assert "step 20 of 20" not in again.stdout, "what is stored is not run again"
    assert stored(tmp_path / "gpu")["runs"] == found["runs"]


@pytest.mark.slow
def test_without_a_gpu_it_says_so_and_stops(tmp_path):
    done = run("--out", tmp_path / "gpu")
    assert done.returncode == 1
    assert done.stderr.startswith("There is no GPU, and nothing was measured")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_run_without_time_ends_with_results_that_can_be_read(tmp_path):
    options = ("--quick", "--device", "cpu", "--out", tmp_path / "gpu")
    done = run(*options, "--seconds", "1")
    assert done.returncode == 0, done.stderr
    found = stored(tmp_path / "gpu")
    assert found["ended"] == "stopped by the time limit in steps"
    assert len(found["runs"]) <= 1


@pytest.mark.slow
def test_a_row_that_does_not_end_is_ended(tmp_path):
    hang = "import time; gpu.GRACE = 0.0; gpu.measure_all = lambda *a: time.sleep(60)"
    options = ("--quick", "--device", "cpu", "--out", tmp_path / "gpu")
    done = run(*options, "--seconds", "1", before=hang)
    assert done.returncode == 3, done.stderr


# ---- Its time and its rows -----------------------------------------------------------


def test_no_row_begins_that_would_end_too_late():
    clock = gpu.Clock(10.0)
    assert clock.allows("steps")
    clock.took("steps", 8.0)
    assert clock.allows("steps")
    clock.took("waits", 12.0)
    assert clock.allows("steps")
    assert not clock.allows("waits")
    assert not clock.allows("half"), "nothing is known of it: it may take as long"
    assert not gpu.Clock(-1.0).allows("steps")


def bench_of(path, *rows):
    """Returns a bench, and parts with rows that call a function each."""
    clock = gpu.Clock(60.0)
    results = timing.Timings(path, "a test")
    results.load()
    row = timing.Row(gpu.peers.LALERG)
    jobs = [timing.Job(row, f"row {i}", {}, made) for i, made in enumerate(rows)]

    def steps(bench):
        """Rows."""
        yield from jobs

    return gpu.Bench(results, clock, True), {"steps": steps}


def test_rows_are_stored_one_by_one_and_one_that_fails_is_told(tmp_path, monkeypatch):
    path, seen = tmp_path / "gpu.json", []

    def measure(**entry):
        seen.append(stored(path)["runs"] if path.exists() else [])
        return {"ratio": 1.5} | entry

    def fail():
        raise MemoryError("none is left")

    bench, parts = bench_of(path, measure, fail, measure)
    monkeypatch.setattr(gpu, "PARTS", parts)
    assert gpu.measure_all(bench, ["steps"], False) == "complete"
    assert [len(runs) for runs in seen] == [0, 2]
    errors = [entry["error"] for entry in stored(path)["runs"]]
    assert errors == [None, "MemoryError: none is left", None]
    assert "none is left" in path.with_suffix(".md").read_text()

    bench, parts = bench_of(path, fail, measure, fail)  # only the second is run again
    monkeypatch.setattr(gpu, "PARTS", parts)
    gpu.measure_all(bench, ["steps"], False)
    assert [entry["error"] for entry in stored(path)["runs"]] == [None] * 3


def test_the_limit_ends_a_run_between_two_rows(tmp_path, monkeypatch):
    bench, parts = bench_of(tmp_path / "gpu.json", *[lambda: time.sleep(0.2) or {}] * 9)
    bench.clock.end = time.monotonic() + 0.5
    monkeypatch.setattr(gpu, "PARTS", parts)
    ended = gpu.measure_all(bench, ["steps"], False)
    assert ended == "stopped by the time limit in steps"
    assert 1 <= len(stored(bench.results.path)["runs"]) <= 2


# ---- What a profile says -------------------------------------------------------------


def event(name, start=0.0, duration=1.0):
    return SimpleNamespace(name=name, start_ns=start, duration_ns=duration)


def plane(name, **lines):
    made = [
        SimpleNamespace(name=n.replace("_", " "), events=e) for n, e in lines.items()
    ]
    return SimpleNamespace(name=name, lines=made)


def test_copies_to_the_host_waits_and_idle_time_are_counted_by_step():
    device = plane(
        "/device:GPU:0",
        Stream_1=[
            event("loop_add_fusion", 0.0, 4.0),
            event("MemcpyD2H", 4.0, 1.0),
            event("loop_add_fusion", 7.0, 3.0),
            event("MemcpyD2D", 8.0, 2.0),
            event("MemcpyD2D", 8.5, 0.5),
        ],
        Stream_2=[event("loop_multiply_fusion", 1.0, 1.0)],
        XLA_Ops=[event("the same once more", 0.0, 100.0)],
    )
    host = plane(
        "/host:CPU",
        a_thread=[event("cuStreamSynchronize"), event("cuLaunchKernel"), event("f")],
    )
    found = traces.summary_of([device, host], num_steps=2)
    assert found["kernels"] == 1.5
    assert found["host_copies"] == found["host_waits"] == 0.5
    assert found["idle"] == pytest.approx(0.2)
    assert found["calls"] == {"cuStreamSynchronize": 0.5, "cuLaunchKernel": 0.5}


def test_without_a_device_nothing_is_known():
    found = traces.summary_of([plane("/host:CPU", a=[event("cuLaunchKernel")])], 2)
    assert found["kernels"] is None
    assert found["host_waits"] is None


@pytest.mark.slow
def test_a_conditional_that_is_mapped_is_a_select():
    params = timing.make_params(256, 1)
    forms = [timing.Step(gpu.peers.LALERG, params, is_select=s) for s in (False, True)]
    assert [step.counts()["conditionals"] for step in forms] == [1, 0]
    for step in forms:
        step(1.0)
    assert timing.optax.tree.size(forms[0].carry) == timing.optax.tree.size(
        forms[1].carry
    )
