"""Builds the documentation: python -m sphinx -W -b html docs <out>."""

import importlib
import inspect
import pkgutil
from typing import Any

import lalerg_optax

PACKAGE = project = "lalerg_optax"
copyright = "the lalerg_optax authors"
release = lalerg_optax.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx-mathjax-offline"]
extensions += ["sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
templates_path: list[str] = []
html_theme = "furo"
html_favicon = "icon.svg"
html_title = f"lalerg_optax {release}"

myst_enable_extensions = ["dollarmath", "deflist"]
myst_heading_anchors = 3  # so that pages can link to headings
default_role = "py:obj"  # the docstrings write `lalerg` for a name
autodoc_typehints = "none"  # types stand in the signatures of the source
autodoc_member_order = "bysource"
napoleon_use_ivar = True
napoleon_use_rtype = False


def public_api() -> dict[str, dict[str, Any]]:
    """Returns what the package offers, and each of its public modules, by name.

    Of the package these are all names without underscore, of a module those that are
    defined there. Nothing has to be listed by hand.
    """
    api = {PACKAGE: vars(lalerg_optax)}
    for module in pkgutil.iter_modules(lalerg_optax.__path__, f"{PACKAGE}."):
        if not module.name.startswith(f"{PACKAGE}._"):
            api[module.name] = vars(importlib.import_module(module.name))
    return {
        path: {
            name: value
            for name, value in names.items()
            if not name.startswith("_")
            and str(getattr(value, "__module__", None)).startswith(
                f"{PACKAGE}." if path == PACKAGE else path
            )
        }
        for path, names in api.items()
    }


def write_api(app: Any, docname: str, source: list[str]) -> None:
    """Appends all public names to the page api."""
    if docname != "api":
        return
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


def setup(app: Any) -> None:
    """Connects the two functions above to the build."""
    app.connect("source-read", write_api)
    app.connect("autodoc-skip-member", skip_fields)
