"""What benchmarks have in common: runs that are kept in a file, and how they are told.

A run that is stored is not run again, so that a benchmark may be stopped and goes on
later.
"""

import argparse
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import flax
import jax
import numpy as np
import optax

RESULTS = Path(__file__).parent / "results"


class Store:
    """What has been measured, and the file that it is stored in.

    Attributes:
      path: the file.
      about: the command, the machine and the versions that runs were made with.
      now: the same of this process.
      notes: what else stands in the file, by name.
      runs: what was measured, by the fields that tell runs apart.
    """

    identity: tuple[str, ...] = ("task", "optimizer")

    def __init__(self, path: Path, command: str = "") -> None:
        self.path = path
        self.now: dict[str, Any] = {
            "command": command,
            "machine": {
                "platform": f"{platform.system()} {platform.machine()}",
                "cores": os.cpu_count(),
            },
            "versions": {
                "python": platform.python_version(),
                **{m.__name__: m.__version__ for m in (jax, optax, np, flax)},
            },
        }
        self.about = self.now
        self.notes: dict[str, Any] = {}
        self.runs: dict[tuple[Any, ...], dict[str, Any]] = {}

    def load(self) -> None:
        """Reads what is stored."""
        if not self.path.exists():
            return
        stored = json.loads(self.path.read_text())
        about, runs = stored.pop("about"), stored.pop("runs")
        self.notes = stored
        self.runs = {tuple(r[name] for name in self.identity): r for r in runs}
        self.about = about

    def save(self) -> None:
        """Writes everything, a line for each run; all of it or nothing."""
        head = json.dumps({"about": self.about} | self.notes)[:-1]
        lines = ",\n".join(json.dumps(entry) for entry in self.runs.values())
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_suffix(".part")
        part.write_text(f'{head},\n"runs": [\n{lines}\n]}}\n')
        part.replace(self.path)

    def measure(
        self,
        key: tuple[Any, ...],
        cells: dict[str, Any],
        measured: Callable[[], dict[str, Any]],
        force: bool,
    ) -> None:
        """Measures and stores a run, unless one with the same cells is stored."""
        stored = self.runs.get(key, {})
        if not force and all(stored.get(name) == cells[name] for name in cells):
            return
        started = time.perf_counter()
        entry = measured()
        seconds = round(time.perf_counter() - started, 1)
        names = dict(zip(self.identity, key, strict=True))
        self.runs[key] = names | {"seconds": seconds} | cells | entry
        self.about = self.now
        self.save()

    def made(self) -> str:
        """Returns with what all this was made, and on what."""
        minutes = sum(entry["seconds"] for entry in self.runs.values()) / 60
        versions = ", ".join(f"{k} {v}" for k, v in self.about["versions"].items())
        machine = self.about["machine"]
        return (
            f"Made with `{self.about['command']}` in {minutes:.0f} minutes on "
            f"{machine['platform']}, {machine['cores']} cores; {versions}."
        )


def rounded(x: Any) -> Any:
    """Returns an array as lists of numbers of five digits; None if not finite."""
    if np.ndim(x):
        return [rounded(entry) for entry in x]
    return float(f"{x:.5g}") if np.isfinite(x) else None


def table(header: list[str], rows: Iterable[Iterable[str]]) -> list[str]:
    """Returns the lines of a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return [*(f"| {' | '.join(line)} |" for line in lines), ""]


def options_of(
    doc: str,
    only: Sequence[str],
    tasks: Sequence[str] = (),
    all_tasks: Sequence[str] = (),
    more: Callable[[argparse.ArgumentParser], None] = lambda parser: None,
    device: str = "cpu",
) -> argparse.Namespace:
    """Returns the options of the command line, and chooses the device.

    Args:
      doc: of the benchmark; its first line is the help's.
      only: what ``--only`` may choose from, by default all of it; there is no such
        option if empty.
      tasks: names of the tasks that are run by default.
      all_tasks: what ``--tasks`` may choose from; there is no such option if empty.
      more: adds further options.
      device: on which it runs by default.
    """
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--device", default=device, help="cpu, cuda, rocm or tpu")
    if only:
        parser.add_argument("--only", nargs="+", choices=only, default=list(only))
    if all_tasks:
        parser.add_argument(
            "--tasks", nargs="+", choices=all_tasks, default=list(tasks)
        )
    parser.add_argument("--quick", action="store_true", help="small and rough")
    parser.add_argument("--force", action="store_true", help="run what is stored, too")
    parser.add_argument("--report-only", action="store_true", help="run nothing")
    parser.add_argument("--out", type=Path, help="path of the results, no ending")
    more(parser)
    options = parser.parse_args()
    jax.config.update("jax_platforms", options.device)
    return options


def opened(
    kind: type[Store], name: str, options: argparse.Namespace, device: str = "cpu"
) -> Any:
    """Returns the store of a benchmark, with what it holds.

    A quick run is not to be mistaken for the full one, nor kept; nor is one on another
    device than the default.
    """
    here = Path(tempfile.mkdtemp()) if options.quick else RESULTS
    command = f"python benchmarks/{name}.py" + " --quick" * options.quick
    if options.device != device:
        name += f"-{options.device}"
        command += f" --device {options.device}"
    stem = options.out or here / name
    store = kind(stem.with_suffix(".json"), command)
    store.load()
    return store


def publish(
    store: Store, text: str, draw: Callable[[Any, Path], None] | None = None
) -> None:
    """Prints the tables, and writes them and the figure beside the store."""
    print(text)
    files = [store.path.with_suffix(".md")]
    files[0].write_text(text + "\n")
    if draw is not None:
        files.append(store.path.with_suffix(".png"))
        draw(store, files[1])
    print(f"\nWritten: {', '.join(map(str, files))}.")
