"""Mutation check: breaks the rules one at a time, and says which tests notice.

    python tests/mutants.py                 # all of them, about half an hour
    python tests/mutants.py search rise     # those whose file has such a name

Each mutant is one change to a copy of the package, after which the tests of that file
and the comparison with the reference run until one fails. A mutant that survives is a
rule that nobody would miss, or a test that is missing: the command then fails.
"""

import argparse
import functools
import os
import pathlib
import queue
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

ROOT = pathlib.Path(__file__).resolve().parent.parent
REFERENCE = "contract/test_reference.py"
MOMENTS = "unit/test_moments.py"
NUM_AT_A_TIME = 2


class Mutant(NamedTuple):
    """One change.

    Attributes:
      file: module of the package, without its underscore.
      old: what stands there, once.
      new: what shall stand there.
      tests: files below ``tests``; by default those of the module, and the reference.
    """

    file: str
    old: str
    new: str
    tests: tuple[str, ...] = ()


MUTANTS = (
    # assess: how loss and norm compare with those before
    Mutant("assess", "is_usable & (error > 1.0)", "is_usable & (error > 2.0)"),
    Mutant("assess", "jnp.clip(value, -LARGEST, LARGEST), value)", "value, value)"),
    Mutant("assess", "rule.progress_fraction * progress", "0.0 * progress"),
    Mutant(
        "assess",
        "is_recorded &= last.conduct <= Conduct.SUSPECT",
        "is_recorded &= last.conduct <= Conduct.REWINDING",
    ),
    Mutant("assess", "known & (rises > 1.0)", "known & (rises > 1e9)"),
    # decide: what becomes of a step
    Mutant(
        "decide",
        "Verdict.SKIP,\n                jnp.where(",
        "Verdict.BOUND,\n                jnp.where(",
    ),
    Mutant(
        "decide", "jnp.clip(error, 0.0, 1.0), 1.0)", "jnp.clip(error, 0.0, 1.0), 0.0)"
    ),
    Mutant("decide", "2.0 * last.harmless_doubt", "0.0 * last.harmless_doubt"),
    Mutant(
        "decide",
        "(conduct == Conduct.TRIAL) & is_fine & ~is_long",
        "(conduct == Conduct.TRIAL) & ~is_fine & ~is_long",
    ),
    Mutant("decide", "is_rewind = is_episode & has_ended", "is_rewind = is_episode"),
    # learn: what is remembered
    Mutant("learn", "last.skips_left - 1.0", "last.skips_left"),
    Mutant(
        "learn", "decision.is_harmful & is_started, cut", "decision.is_harmful, cut"
    ),
    Mutant(
        "learn",
        "jnp.where(starts_anew, 0, history",
        "jnp.where(starts_anew & False, 0, history",
    ),
    Mutant(
        "learn",
        "decision.is_new_level, seen.signals",
        "decision.is_new_level, seen.recorded",
    ),
    # audit and anchor: the way back
    Mutant("audit", "(readiness > 0) & ~is_failed", "readiness > 0"),
    Mutant(
        "audit",
        "decision.conduct == Conduct.HEALTHY",
        "decision.conduct <= Conduct.SUSPECT",
    ),
    Mutant("audit", "RULE.bad_errors * error)", "error)"),
    Mutant("audit", "(rest, 0.0) / (unit**2", "(rest, 0.0) / (2.0 * unit**2"),
    Mutant("anchor", "is_moved & is_representable(p)", "is_moved"),
    Mutant("anchor", "copy=True", "copy=False"),
    Mutant("anchor", "g * (a - p)", "g * (p - a)"),
    Mutant("anchor", "lax.reduce_precision(param, info.nexp, info.nmant)", "param"),
    # search, rise and windows: the rate for all
    Mutant("search", "rule.growth_factor),\n    )", "rule.slow_growth_factor),\n    )"),
    Mutant("search", "(room >= 1.0)", "(room >= 100.0)"),
    Mutant(
        "search", "jnp.where(is_begun, jnp.minimum(octaves, room), octaves)", "octaves"
    ),
    Mutant("search", "is_bad |= loss.is_undone", "is_bad |= loss.is_undone & False"),
    Mutant("rise", "rise *= state.macro_rate**2", "rise *= 1.0"),
    Mutant("rise", "jnp.minimum(mean, calm)", "mean"),
    Mutant("rise", "rule.waste * jnp.sqrt(part)", "rule.waste * part"),
    Mutant(
        "windows",
        "state = choose(is_without, start_window(state), state)",
        "del is_without",
    ),
    Mutant("windows", "jnp.where(is_due, start, known.start_loss)", "known.start_loss"),
    # warm_up: a schedule that grows on
    Mutant("warm_up", "jnp.maximum(state.top_rate, base_rate)", "base_rate"),
    Mutant("warm_up", "state.macro_rate * factor", "state.macro_rate"),
    Mutant("warm_up", "state.avg_rise * growth**2", "state.avg_rise"),
    Mutant("warm_up", "is_found & (state.top_rate > 0.0)", "state.top_rate > 0.0"),
    # moments and the micro level: a rate for each entry
    Mutant("moments", "jnp.exp(\n        before", "jnp.exp(\n        2.0 * before"),
    Mutant(
        "moments",
        "view(kind)\n    return lax",
        "view(kind)\n    infinity += 1\n    return lax",
    ),
    Mutant("micro", "jnp.where(is_impossible, 0, u)", "u", (MOMENTS,)),
    Mutant("micro", "jnp.where(is_open, b1, 1.0)", "b1"),
    Mutant("micro", "jnp.where(verdict == Verdict.REVERT, 0.0, keep1)", "keep1"),
    Mutant("micro", "is_kept &= ~is_restart", "is_kept &= True", (MOMENTS,)),
    # act, apply and inner: what is done to trees
    Mutant("act", "jnp.where(is_open, g, 0)", "g"),
    Mutant("act", "jnp.where(is_safe, step, jnp.zeros((), p.dtype))", "step"),
    Mutant("apply", "pred | ~is_representable(p)", "pred"),
    Mutant("inner", "jnp.where(jnp.isfinite(new), new, old)", "new"),
    Mutant("history", "(19 * last + 19) // 20", "(18 * last + 19) // 20"),
    # accumulate: means over micro-batches
    Mutant("accumulate", "jnp.where(num_averaged > 0, mean, 0)", "mean"),
    Mutant("accumulate", "is_usable &= jnp.isfinite(loss)", "pass"),
    Mutant(
        "accumulate",
        "count_if(is_usable, before)",
        "count_if(is_usable | True, before)",
    ),
    Mutant("accumulate", "is_complete & is_seen", "is_complete"),
    Mutant("accumulate", "is_complete if has_regulator(state) else ", ""),
    Mutant("accumulate", "jnp.where(is_seen, mean_value, jnp.nan)", "mean_value"),
    Mutant("accumulate", "if loss is None:  #", "if True:  #"),
    Mutant("accumulate", " | jnp.asarray(is_last, jnp.bool_)", ""),
    Mutant("watch", "np.asarray(has_updated) != 0", "np.asarray(has_updated) >= 0"),
    Mutant(
        "sums", "lax.optimization_barrier(leaves)", "leaves", ("contract/test_cost.py",)
    ),
)


def tests_of(mutant: Mutant) -> list[str]:
    """Returns the files to run, those most likely to notice first."""
    own = f"unit/test_{mutant.file}.py"
    own = [own] if (ROOT / "tests" / own).exists() else []
    return [*dict.fromkeys([*mutant.tests, *own, REFERENCE])]


def check(mutant: Mutant, copies: queue.Queue[pathlib.Path], cache: str) -> str:
    """Returns the test that failed with a mutant in place; "" if it survived."""
    source = (ROOT / "lalerg_optax" / f"_{mutant.file}.py").read_text()
    if source.count(mutant.old) != 1:
        raise ValueError(f"_{mutant.file}.py has not just one {mutant.old!r}")
    copy = copies.get()
    file = copy / "lalerg_optax" / f"_{mutant.file}.py"
    file.write_text(source.replace(mutant.old, mutant.new))
    environment = {"PYTHONPATH": str(copy), "JAX_COMPILATION_CACHE_DIR": cache}
    tests = [f"tests/{name}" for name in tests_of(mutant)]
    try:
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-x", "-n", "0", *tests],
            cwd=copy,
            env=os.environ | environment,
            capture_output=True,
            text=True,
        )
    finally:
        file.write_text(source)
        copies.put(copy)
    if done.returncode not in (0, 1, 2):  # neither passed nor failed
        raise RuntimeError(done.stdout + done.stderr)
    failed = [x for x in done.stdout.splitlines() if x.startswith(("FAILED", "ERROR"))]
    if failed:
        return failed[0].partition(" - ")[0]
    return "ended early" if done.returncode else ""


def copy_to(folder: pathlib.Path) -> pathlib.Path:
    """Copies what the tests need."""
    for name in ("lalerg_optax", "tests", "benchmarks"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


def main() -> None:
    """Checks the mutants that were asked for; fails if one survived."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("files", nargs="*", help="modules whose mutants to check")
    chosen = parser.parse_args().files
    if not {m.file for m in MUTANTS} >= set(chosen):
        parser.error("there are mutants of " + ", ".join({m.file: 0 for m in MUTANTS}))
    mutants = [m for m in MUTANTS if not chosen or m.file in chosen]
    num_survivors = 0
    with (
        tempfile.TemporaryDirectory() as name,
        ThreadPoolExecutor(NUM_AT_A_TIME) as pool,
    ):
        folder = pathlib.Path(name)
        copies: queue.Queue[pathlib.Path] = queue.Queue()
        for i in range(NUM_AT_A_TIME):
            copies.put(copy_to(folder / str(i)))
        look = functools.partial(check, copies=copies, cache=str(folder / "compiled"))
        for mutant, failed in zip(mutants, pool.map(look, mutants), strict=True):
            what = f"{mutant.file}: {mutant.old.strip()!r} -> {mutant.new.strip()!r}"
            how = f"killed by {failed}" if failed else "survived"
            print(f"{what}\n    {how}", flush=True)
            num_survivors += not failed
    print(f"{len(mutants)} mutants, {num_survivors} survived")
    sys.exit(num_survivors > 0)


if __name__ == "__main__":
    main()
