"""Builds the documentation: python -m sphinx -W -b html docs <out>."""

import importlib
import inspect
import pkgutil
import re
import shutil
from pathlib import Path
from typing import Any

import lalerg_optax

PACKAGE = project = "lalerg_optax"
copyright = "the lalerg_optax authors"
release = lalerg_optax.__version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx-mathjax-offline"]
extensions += ["sphinx.ext.napoleon", "sphinx_copybutton"]
exclude_patterns = ["_build"]
templates_path: list[str] = []
html_theme = "furo"
html_favicon = "icon.svg"
html_title = f"lalerg_optax {release}"

myst_enable_extensions = ["dollarmath", "deflist"]
myst_heading_anchors = 3  # so that pages can link to headings
nb_execution_mode = "off"  # notebooks are shown with the outputs that they have
copybutton_prompt_text = r">>> |\.\.\. "  # of a block with prompts, what stands there
copybutton_prompt_is_regexp = True
default_role = "py:obj"  # the docstrings write `lalerg` for a name
autodoc_typehints = "none"  # types stand in the signatures of the source
autodoc_member_order = "bysource"
napoleon_use_ivar = True
napoleon_use_rtype = False


HERE = Path(__file__).parent
NOTEBOOKS = HERE.parent / "notebooks"
FIRST = ("lalerg", "error_regulate", "apply_updates", "metrics", "Recorder", "Verdict")
FIRST += ("scale_by_macro_rate", "scale_by_micro_rate", "adopt", "rebase")


def public_api() -> dict[str, dict[str, Any]]:
    """Returns what the package offers, and each of its public modules, by name.

    Of the package these are all names without underscore, of a module those that are
    defined there. Nothing has to be listed by hand: what is in FIRST comes first, then
    the rest in the order of the source, and then the states.
    """

    def place(name: str) -> tuple[int, bool]:
        rank = FIRST.index(name) if name in FIRST else len(FIRST)
        return rank, name.endswith("State")

    api = {PACKAGE: vars(lalerg_optax)}
    for module in pkgutil.iter_modules(lalerg_optax.__path__, f"{PACKAGE}."):
        if not module.name.startswith(f"{PACKAGE}._"):
            api[module.name] = vars(importlib.import_module(module.name))
    return {
        path: {
            name: names[name]
            for name in sorted(names, key=place)
            if not name.startswith("_")
            and str(getattr(names[name], "__module__", None)).startswith(
                f"{PACKAGE}." if path == PACKAGE else path
            )
        }
        for path, names in api.items()
    }


def write_list() -> list[str]:
    """Returns a table with a line for each public name."""
    lines = [f".. py:currentmodule:: {PACKAGE}", "", ".. list-table::", ""]
    for path, names in public_api().items():
        for name, value in names.items():
            shown = f"{path}.{name}".removeprefix(f"{PACKAGE}.")
            about = (inspect.getdoc(value) or "").splitlines()[0]
            lines += [f"   * - :py:obj:`{shown} <{path}.{name}>`", f"     - {about}"]
    return [*lines, ""]


def write_api(app: Any, docname: str, source: list[str]) -> None:
    """Appends all public names to the page api."""
    if docname != "api":
        return
    source[0] += "\n".join(["", *write_list()])
    for path, names in public_api().items():
        lines = ["", path, "-" * len(path), ""]
        if path != PACKAGE:
            lines += [inspect.getdoc(importlib.import_module(path)) or "", ""]
        for name, value in names.items():
            kind = "class" if inspect.isclass(value) else "function"
            lines += [name, "^" * len(name), "", f".. py:currentmodule:: {path}", ""]
            lines += [f".. auto{kind}:: {path}.{name}"]
            lines += ["   :members:", ""] if kind == "class" else [""]
        source[0] += "\n".join(lines)


def skip_fields(app: Any, what: str, name: str, obj: Any, skip: bool, _: Any) -> bool:
    """Leaves out the fields of named tuples, which "Attributes" describes."""
    return skip or "Alias for field number" in (getattr(obj, "__doc__", None) or "")


def bring_notebooks(app: Any) -> None:
    """Copies the notebooks to where Sphinx looks for pages."""
    (HERE / NOTEBOOKS.name).mkdir(exist_ok=True)
    for notebook in NOTEBOOKS.glob("*.ipynb"):
        shutil.copy2(notebook, HERE / NOTEBOOKS.name)


def link_notebooks(app: Any, docname: str, source: list[str]) -> None:
    """Makes links to notebooks, as they are in the repository, links to their pages."""
    source[0] = re.sub(r"\]\(\.\./(notebooks/\w+\.ipynb\))", r"](\1", source[0])


def setup(app: Any) -> None:
    """Connects the functions above to the build."""
    app.connect("builder-inited", bring_notebooks)
    app.connect("source-read", link_notebooks)
    app.connect("source-read", write_api)
    app.connect("autodoc-skip-member", skip_fields)
