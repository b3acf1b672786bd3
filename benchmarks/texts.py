"""Text to learn from, by bytes: source code that is on every machine of a benchmark.

``stdlib`` is Python's standard library and the topics of its help, in English;
``installed`` adds the packages without which no benchmark runs. Nothing is downloaded.
Files differ with their versions, so that losses are comparable where the digest is the
same. One file in twenty is held out, whole, by a checksum of its name.
"""

import hashlib
import importlib.util
import sysconfig
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

# Parts of the standard library that no distribution splits off, without tables
FOLDERS = (
    *("asyncio", "collections", "concurrent", "ctypes", "curses", "dbm", "email"),
    *("html", "http", "importlib", "json", "logging", "multiprocessing", "pydoc_data"),
    *("re", "sqlite3", "tomllib", "unittest", "urllib", "venv", "wsgiref", "xml"),
    *("xmlrpc", "zipfile", "zoneinfo"),
)
PACKAGES = ("flax", "jax", "numpy", "optax", "scipy")
SOURCES = ("stdlib", "installed")
ONE_IN = 20  # files is held out


class Text(NamedTuple):
    """What is read.

    Attributes:
      train: bytes to learn from.
      held_out: bytes of other files.
      digest: of all of it; equal where the text is.
    """

    train: np.ndarray
    held_out: np.ndarray
    digest: str


def files_of(source: str) -> Iterator[tuple[str, Path]]:
    """Yields names and paths, in the order of the names."""
    home = Path(sysconfig.get_path("stdlib"))
    roots = {folder: home / folder for folder in FOLDERS}
    if source == "installed":
        specs = {name: importlib.util.find_spec(name) for name in PACKAGES}
        roots |= {n: Path(str(s.origin)).parent for n, s in specs.items() if s}
    found = {path.name: path for path in home.glob("[a-z]*.py")}
    for name, root in roots.items():
        for path in root.rglob("*.py"):
            inside = path.relative_to(root)
            if not {"test", "tests"} & set(inside.parts):
                found[f"{name}/{inside.as_posix()}"] = path
    yield from sorted(found.items())


def text_of(source: str = "stdlib") -> Text:
    """Returns a text.

    Raises:
      ValueError: if there is no such source.
    """
    if source not in SOURCES:
        raise ValueError(f"source must be one of {SOURCES}, got {source!r}")
    parts: tuple[list[bytes], list[bytes]] = ([], [])
    for name, path in files_of(source):
        is_held_out = zlib.crc32(name.encode()) % ONE_IN == 0
        parts[is_held_out].append(path.read_bytes())
    train, held_out = (b"\n".join(part) for part in parts)
    digest = hashlib.sha256(train + b"\0" + held_out).hexdigest()[:16]
    return Text(np.frombuffer(train, "u1"), np.frombuffer(held_out, "u1"), digest)
