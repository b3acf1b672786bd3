"""The documentation is true: every block of code on every page is run.

A block of Python is a doctest. All blocks of a page share their names, in their order.
"""

import doctest
import inspect
import io
import re
import runpy

import jax.numpy as jnp
import optax
import pytest
from helpers.paths import DOCS, ROOT

import lalerg_optax as lo

QUOTES = runpy.run_path(ROOT / "benchmarks" / "quotes.py")
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


FACTORIES = (
    *(lo.lalerg, lo.error_regulate, lo.scale_by_macro_rate, lo.scale_by_micro_rate),
    *(lo.without_value, lo.tracks_params, lo.value_from_gradient, lo.accumulate),
)


@pytest.mark.parametrize("factory", FACTORIES, ids=lambda factory: factory.__name__)
def test_a_docstring_begins_with_what_one_looks_up(factory):
    lines = inspect.getdoc(factory).splitlines()
    assert len(lines) < 60
    assert lines[1:3] == ["", "Args:"]
    sections = [x for x in lines if re.fullmatch(r"[A-Z][a-z]+:|\.\. math::", x)]
    usual = ["Args:", "Returns:", "Raises:", "Example:"]
    assert [x for x in sections if x in usual] == usual
    assert sections[3:4] == ["Example:"], "and then how it works"


FUNCTIONS = [value for value in vars(lo).values() if inspect.isfunction(value)]


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_arguments_come_before_the_first_equation(function):
    doc = inspect.getdoc(function)
    assert 0 < doc.index("Args:") < (doc + ".. math::").index(".. math::")


def test_an_equation_stands_once_and_pages_quote_it():
    sources = [path.read_text() for path in (ROOT / "lalerg_optax").glob("*.py")]
    found = [text for source in sources for _, text in QUOTES["MATH"].findall(source)]
    assert len(found) == sum(source.count(".. math::") for source in sources) > 20
    assert len({" ".join(text.split()) for text in found}) == len(found)
    for page in PAGES:
        text = page.read_text()
        rest, num_quoted = QUOTES["EQUATION"].subn("", text)
        assert "$$" not in rest, "an equation of its own"
        assert num_quoted > 15 or page.stem != "algorithm"


def test_an_equation_is_quoted_as_the_docstring_states_it():
    text = "<!--equation lalerg_optax._anchor.look_back 1-->old<!--/equation-->"
    found = QUOTES["quoted"](text)
    assert r"c_i = \frac{\langle g,\; a - p \rangle}" in found
    assert "old" not in found
    assert QUOTES["quoted"](found) == found


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


# ---- README --------------------------------------------------------------------------


def test_the_blocks_of_the_readme_run_one_after_the_other():
    text = (ROOT / "README.md").read_text()
    first, second = BLOCK.findall(text)
    assert len([line for line in first.splitlines() if line]) <= 15
    names = {"optax": optax, "schedule": optax.constant_schedule(1e-3)}
    exec(first, names)  # as it stands: it imports what it needs
    assert jnp.max(jnp.abs(names["params"] - names["target"])) < 0.1
    plain = optax.adamw(names["schedule"])
    names["adamw_state"] = plain.init(names["params"])
    exec(second, names)


def test_the_readme_is_short():
    assert (ROOT / "README.md").read_text().count("\n") <= 120


def test_what_installs_an_extra_keeps_an_editable_install():
    """``pip install ".[plot]"`` would put a copy in its place."""
    folders = ("lalerg_optax", "docs", "examples", "benchmarks", "notebooks")
    paths = [*ROOT.glob("*.md"), *(p for f in folders for p in (ROOT / f).glob("*.*"))]
    paths = [p for p in paths if p.suffix in (".md", ".py", ".ipynb", ".rst")]
    commands = [
        x for p in paths for x in re.findall(r"pip install [^`#]*", p.read_text())
    ]
    assert len(commands) > 15
    extras = [x for x in commands if "[" in x.splitlines()[0]]
    assert len(extras) > 10
    assert [x for x in extras if not x.startswith("pip install -e")] == []


def bullets(text):
    return [line for line in text.splitlines() if line.startswith("- ")]


def test_the_caveats_of_the_readme_are_the_first_limits():
    readme = (ROOT / "README.md").read_text().split("## Caveats")[1]
    caveats = bullets(readme.split("\n## ")[0])
    limits = bullets((DOCS / "limits.md").read_text())[: len(caveats)]
    assert len(caveats) == 10
    there = [line.replace("](docs/", "](") for line in caveats]
    assert limits == [line.replace("](examples/", "](../examples/") for line in there]


def test_what_the_readme_links_to_is_there():
    text = (ROOT / "README.md").read_text()
    links = re.findall(r"\]\((?!http)([^)#]+)\)", text)
    assert len(links) > 10
    assert not [link for link in links if not (ROOT / link).exists()]


# ---- Quotes --------------------------------------------------------------------------


@pytest.mark.parametrize("page", QUOTES["PAGES"], ids=lambda page: page.stem)
def test_what_a_page_quotes_is_what_is_stored(page):
    text = page.read_text()
    assert text.count("<!--quote") == len(QUOTES["QUOTE"].findall(text))
    assert QUOTES["quoted"](text) == text  # if not: python benchmarks/quotes.py


RESULT = """# Faults

| fault | lalerg | adamw |
| --- | --- | --- |
| **all** | **98.4** | 41.7 |
| one | 44 / 23 / +7 | 3 |
| one | 2 | 4 |
"""


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{made/Faults/all/lalerg} %", "98.4 %"),
        ("{made/Faults/one; 44 / 23 / +7/adamw}", None),  # parts are not keys
        ("{made/Faults/one; 2/2}", "4"),
        ("{made/Faults/one/lalerg}", None),  # of which there are two
        ("{made/Faults/none/lalerg}", None),
        ("{made/Other/all/lalerg}", None),
        ("{made/Faults/all/other}", None),
    ],
)
def test_a_quote_is_a_cell_of_a_table(tmp_path, template, expected):
    (tmp_path / "made.md").write_text(RESULT)
    page = f"text <!--quote {template}-->old<!--/quote--> text"
    if expected is None:
        with pytest.raises((KeyError, ValueError)):
            QUOTES["quoted"](page, tmp_path)
    else:
        expected = page.replace("old", expected)
        assert QUOTES["quoted"](page, tmp_path) == expected


def test_a_quote_may_be_a_part_of_a_cell(tmp_path):
    (tmp_path / "made.md").write_text("# A\n\n| x | y |\n| - | - |\n| a | 4 / 2 |\n")
    assert QUOTES["filled"]("{made/A/a/y/1}", tmp_path) == "2"


def test_results_that_are_missing_have_a_quote_of_their_own(tmp_path):
    assert "Nothing has been measured" in QUOTES["filled"]("{gpu}", tmp_path)
    (tmp_path / "gpu.md").write_text("# Nothing\n")
    with pytest.raises(KeyError):
        QUOTES["filled"]("{gpu}", tmp_path)
    with pytest.raises(FileNotFoundError):  # the others have none
        QUOTES["filled"]("{noise}", tmp_path)


def test_a_quote_may_be_a_table(tmp_path):
    (tmp_path / "made.md").write_text(RESULT)
    lines = QUOTES["filled"]("{made/Faults}", tmp_path).strip().splitlines()
    assert lines[0] == "| fault | lalerg | adamw |"
    assert lines[2] == "| all | 98.4 | 41.7 |"


# ---- Public names --------------------------------------------------------------------

CONF = runpy.run_path(DOCS / "conf.py")
PUBLIC = [
    pytest.param(value, id=f"{path}.{name}")
    for path, names in CONF["public_api"]().items()
    for name, value in names.items()
]


@pytest.mark.parametrize("value", PUBLIC)
def test_every_public_name_has_an_example(value):
    # --doctest-modules runs them
    assert ">>> " in inspect.getdoc(value)


def test_the_page_of_the_api_lists_every_public_name_once_and_lalerg_first():
    page = ["API"]
    CONF["write_api"](None, "api", page)
    listed = re.findall(r"\* - :py:obj:`\S+ <(\S+)>`\n     - \S+", page[0])
    described = re.findall(r"\.\. auto(?:class|function):: (\S+)", page[0])
    exported = re.findall(r"as (\w+)$", inspect.getsource(lo), re.MULTILINE)
    assert listed == described
    assert len(set(listed)) == len(listed) == len(PUBLIC)
    assert {f"lalerg_optax.{name}" for name in exported} < set(listed)
    assert listed[:2] == ["lalerg_optax.lalerg", "lalerg_optax.error_regulate"]


def test_notebooks_are_linked_to_where_the_site_has_them():
    page = ["see [a](../notebooks/anatomy.ipynb), [b](../examples/gan.py)"]
    CONF["link_notebooks"](None, "figures", page)
    assert page == ["see [a](notebooks/anatomy.ipynb), [b](../examples/gan.py)"]
    listed = (DOCS / "examples.md").read_text()
    for notebook in (ROOT / "notebooks").glob("*.ipynb"):
        assert f"\nnotebooks/{notebook.stem}\n" in listed, "the site leads there"
