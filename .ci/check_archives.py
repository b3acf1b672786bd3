"""Says what is missing from the wheel and the sdist, and what ought not to be there."""

import subprocess
import sys
import tarfile
import zipfile

SHOWN = "docs", "notebooks", "benchmarks"  # what README and documentation link to


def main(wheel: str, sdist: str) -> None:
    """Exits with a message unless the archives hold what they should."""
    with zipfile.ZipFile(wheel) as archive:
        in_wheel = {name for name in archive.namelist() if ".dist-info/" not in name}
    with tarfile.open(sdist) as archive:
        files = [member.name for member in archive.getmembers() if member.isfile()]
    in_sdist = {name.partition("/")[2] for name in files}
    tracked = set(
        subprocess.run(
            ["git", "ls-files", "lalerg_optax", "tests", "examples", *SHOWN],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.split()
    )
    package = {name for name in tracked if name.startswith("lalerg_optax/")}
    assert "lalerg_optax/py.typed" in package
    needed = tracked | {"pyproject.toml", "README.md", "CHANGELOG.md", "LICENSE"}
    needed |= {"CONTRIBUTING.md", "CITATION.cff"}
    problems = {
        "missing from the wheel": package - in_wheel,
        "in the wheel without need": in_wheel - package,
        "missing from the sdist": needed - in_sdist,
    }
    if any(problems.values()):
        sys.exit("\n".join(f"{k}: {sorted(v)}" for k, v in problems.items() if v))
    print(f"{len(in_wheel)} files in the wheel, {len(in_sdist)} in the sdist")


if __name__ == "__main__":
    main(*sys.argv[1:])
