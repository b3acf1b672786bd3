"""An import brings along what it needs, and goes against no direction of the flow."""

import ast
import graphlib
import importlib.util
import pathlib
import subprocess
import sys

import pytest
from helpers.quick import OF_OPTAX, SPREAD

import lalerg_optax

SOURCES = sorted(pathlib.Path(lalerg_optax.__file__).parent.glob("*.py"))
MOST_LINES = 300

# The rooms, floor by floor: none imports from a floor above its own.
FLOORS = (
    # what all share
    "_numbers _scalars _verdict _checks _sums _history _find _mapped",
    # records, trees, windows
    "_judge_rule _search_rule _anchor _moments _windows _rise _warm_up",
    "_gate _local _rate _records _average",
    # one step, in the order in which data flow
    "_assess _decide _audit _learn _act",
    # the two levels, and whatever else is inside
    "_search _macro _micro _inner",
    "_regulate",
    "_second_level",
    "_lalerg",
    # around it
    "_accumulate _adapters _carry _adopt _rebase _apply _monitor _watch _record",
    "flax plot",
    "__init__",
)
FLOOR_OF = {name: i for i, floor in enumerate(FLOORS) for name in floor.split()}

EXTRAS = {"chex", "flax", "matplotlib", "orbax", "sklearn", "tensorboardX"}


@pytest.mark.parametrize(
    ("script", "present", "absent"),
    [
        ("import lalerg_optax as lo; lo.Recorder().history()", "optax", EXTRAS),
        ("import lalerg_optax.flax", "flax", {"matplotlib", "sklearn"}),
        ("import lalerg_optax.plot", "matplotlib", {"flax", "matplotlib.pyplot"}),
    ],
    ids=["the core", "flax", "plot"],
)
def test_nothing_is_imported_that_was_not_asked_for(script, present, absent):
    seen = {present, *absent}
    report = f"import sys; print(sorted({seen!r} & sys.modules.keys()))"
    done = subprocess.run(
        [sys.executable, "-c", f"{script}\n{report}"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == f"[{present!r}]"


def imports_of(source):
    """Returns which modules of the package another one imports."""
    tree = ast.parse(source.read_text())
    return {
        node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.level == 1 and node.module
    }


def test_every_file_has_its_floor():
    assert {source.stem for source in SOURCES} == FLOOR_OF.keys()


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)
def test_no_file_imports_from_a_floor_above(source):
    floor = FLOOR_OF[source.stem]
    assert [name for name in imports_of(source) if FLOOR_OF[name] > floor] == []


def test_no_imports_go_in_a_circle():
    graph = {source.stem: imports_of(source) for source in SOURCES}
    graphlib.TopologicalSorter(graph).prepare()  # or a CycleError


def test_a_circle_would_be_found():
    with pytest.raises(graphlib.CycleError):
        graphlib.TopologicalSorter({"_a": {"_b"}, "_b": {"_a"}}).prepare()


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)
def test_no_file_is_long(source):
    assert source.read_text().count("\n") <= MOST_LINES


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)
def test_no_function_is_long(source):
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.FunctionDef):
            docstring = ast.get_docstring(node, clean=False) or ""
            own = node.end_lineno - node.lineno - docstring.count("\n")
            assert own <= 130, node.name  # a factory and the two functions in it


def test_what_is_left_to_the_slow_run_is_there():
    tests = pathlib.Path(__file__).parents[1].rglob("test_*.py")
    defined = "\n".join(path.read_text() for path in tests)
    assert all(defined.count(f"def {name}(") == 1 for name in SPREAD)
    spec = importlib.util.find_spec("optax.contrib._common_test")
    theirs = pathlib.Path(spec.origin).read_text()
    assert all(theirs.count(f"def {name}(") == 1 for name in OF_OPTAX)
