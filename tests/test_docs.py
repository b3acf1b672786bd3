"""The documentation is true: every block of code on every page is run.

A block of Python is a doctest. All blocks of a page share their names, in their order.
"""

import doctest
import inspect
import io
import pathlib
import re
import runpy

import pytest

DOCS = pathlib.Path(__file__).parent.parent / "docs"
PAGES = sorted(DOCS.glob("*.md"))
PAGES_WITH_CODE = [page for page in PAGES if "```python" in page.read_text()]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def failures(text, name):
    """Returns what went wrong in the blocks of a page; lines keep their numbers."""
    lines = [""] * (text.count("\n") + 1)
    for block in BLOCK.finditer(text):
        first = text.count("\n", 0, block.start(1))
        for number, line in enumerate(block[1].splitlines(), start=first):
            lines[number] = line
    test = doctest.DocTestParser().get_doctest("\n".join(lines), {}, name, name, 0)
    report = io.StringIO()
    runner = doctest.DocTestRunner(verbose=False, optionflags=doctest.ELLIPSIS)
    runner.run(test, out=report.write)
    return report.getvalue()


@pytest.mark.parametrize("page", PAGES_WITH_CODE, ids=lambda page: page.stem)
def test_every_block_of_a_page_prints_what_it_says(page):
    text = page.read_text()
    assert not [b for b in BLOCK.findall(text) if not b.startswith(">>>")]
    report = failures(text, page.name)
    if report:
        pytest.fail(report, pytrace=False)


@pytest.mark.parametrize(
    ("text", "is_true"),
    [
        ("# A page\n\n```python\n>>> x = 1\n>>> x + 1\n2\n```\ntext\n", True),
        ("```python\n>>> x = 1\n```\n\nand\n\n```python\n>>> x\n1\n```\n", True),
        ("```python\n>>> 1 + 1\n3\n```\n", False),
        ("```python\n>>> unknown\n```\n", False),
    ],
)
def test_an_output_that_is_wrong_is_found(text, is_true):
    assert (failures(text, "page") == "") == is_true


def test_the_report_has_the_line_of_the_page_and_what_came_instead():
    report = failures("# A page\n\n```python\n>>> 1 + 1\n3\n```\n", "page.md")
    assert 'File "page.md", line 4' in report
    assert report.endswith("Got:\n    2\n")


PUBLIC = [
    pytest.param(value, id=f"{path}.{name}")
    for path, names in runpy.run_path(DOCS / "conf.py")["public_api"]().items()
    for name, value in names.items()
]


@pytest.mark.parametrize("value", PUBLIC)
def test_every_public_name_has_an_example(value):
    # --doctest-modules runs them
    assert ">>> " in inspect.getdoc(value)
