"""What README and documentation quote is what is stored, and what docstrings state.

A quote is a comment with a template, what it comes to, and a comment that ends it:

    <!--quote {noise/Tasks not chosen on/lalerg/batch size 64/0} %-->94 %<!--/quote-->

In braces stands a cell of ``results/noise.md``: the heading of its table, the row by
its first column (or as many as tell it apart, with "; " between them), the column by
its heading or number, and which of the parts of the cell, if these have a " / ".
``{methods/Methods}`` is a whole table, ``{headline}`` that of this name in
``tables.md``. Where ``tables.md`` has *gpu, not measured* beside *gpu*, that is quoted
as long as there is no ``results/gpu.md``.

An equation stands in the docstring of the function that computes it. Where a page
explains it, it is quoted from there by the path of the function, and which one it is:

    <!--equation lalerg_optax._decide.decide 2--> ... <!--/equation-->

    python benchmarks/quotes.py          # writes all quotes anew
    python benchmarks/quotes.py --check  # fails where one is not what is stored
"""

import argparse
import inspect
import pkgutil
import re
import sys
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
TEMPLATES = ROOT / "benchmarks" / "tables.md"
PAGES = (
    ROOT / "README.md",
    ROOT / "benchmarks" / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
)
QUOTE = re.compile(r"<!--quote (.*?)-->(.*?)<!--/quote-->", re.DOTALL)
CELL = re.compile(r"\{([^{}]+)\}")
EQUATION = re.compile(r"<!--equation (\S+) (\d)-->.*?<!--/equation-->", re.DOTALL)
MATH = re.compile(r"^( *)\.\. math::\n\n((?:\1 .*\n|\n)+)", re.MULTILINE)


def cells_of(line: str) -> list[str]:
    """Returns the cells of a line of a table."""
    return [cell.strip().strip("*") for cell in line.strip().strip("|").split("|")]


@cache
def tables_of(path: Path) -> dict[str, list[list[str]]]:
    """Returns the tables of a file by the headings that they stand under."""
    tables: dict[str, list[list[str]]] = {}
    heading = ""
    for line in path.read_text().splitlines():
        if line.startswith("#"):
            heading = line.lstrip("# ").rstrip(".")
        elif line.startswith("|") and not line.startswith("| ---"):
            tables.setdefault(heading, []).append(cells_of(line))
    return tables


@cache
def templates() -> dict[str, str]:
    """Returns the tables that are quoted, by name, with references for cells."""
    parts = re.split(r"^# (.+)$", TEMPLATES.read_text(), flags=re.MULTILINE)[1:]
    return dict(zip(parts[::2], parts[1::2], strict=True))


def lookup(reference: str, results: Path = RESULTS) -> str:
    """Returns the cell, or the table, that a reference names.

    Raises:
      KeyError: if there is no such table or cell, or more than one such row.
    """
    name, heading, *place = reference.split("/")
    tables = tables_of(results / f"{name}.md")
    if heading not in tables:
        raise KeyError(f"{reference}: no table under {heading!r} in {name}.md")
    header, *lines = tables[heading]
    if not place:
        rows = [header, ["---"] * len(header), *lines]
        return "\n".join(["\n", *(f"| {' | '.join(row)} |" for row in rows), "\n"])
    row, column, *part = place
    key = row.split("; ")
    found = [line for line in lines if line[: len(key)] == key]
    if len(found) != 1:
        raise KeyError(f"{reference}: {len(found)} rows {row!r}")
    index = int(column) if column.isdecimal() else header.index(column)
    cell = found[0][index]
    return cell.split(" / ")[int(part[0])] if part else cell


def template_of(name: str, results: Path = RESULTS) -> str:
    """Returns a template; another one as long as its results are missing."""
    missing = f"{name}, not measured"
    is_there = (results / f"{name}.md").exists()
    return templates()[missing if missing in templates() and not is_there else name]


def filled(template: str, results: Path = RESULTS) -> str:
    """Returns a template with the cells and tables that it names."""

    def told(reference: re.Match[str]) -> str:
        if "/" in reference[1]:
            return lookup(reference[1], results)
        return filled(template_of(reference[1], results), results)

    return CELL.sub(told, template)


def equation(path: str, number: int) -> str:
    """Returns an equation of a docstring, from 1 on."""
    stated = MATH.findall(f"{inspect.getdoc(pkgutil.resolve_name(path))}\n")
    return inspect.cleandoc(stated[number - 1][1])


def quoted(text: str, results: Path = RESULTS) -> str:
    """Returns a page with all its quotes as they are stored."""

    def written(quote: re.Match[str]) -> str:
        return f"<!--quote {quote[1]}-->{filled(quote[1], results)}<!--/quote-->"

    def stated(place: re.Match[str]) -> str:
        path, number = place[1], int(place[2])
        lines = f"\n\n$$\n{equation(path, number)}\n$$\n\n"
        return f"<!--equation {path} {number}-->{lines}<!--/equation-->"

    return EQUATION.sub(stated, QUOTE.sub(written, text))


def main() -> None:
    """Writes the quotes, or checks them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing")
    options = parser.parse_args()
    stale = [page for page in PAGES if quoted(page.read_text()) != page.read_text()]
    if not options.check:
        for page in stale:
            page.write_text(quoted(page.read_text()))
    for page in stale:
        print(f"{page.relative_to(ROOT)}: {'stale' if options.check else 'written'}")
    sys.exit(bool(stale and options.check))


if __name__ == "__main__":
    main()
