"""Builds the documentation: python -m sphinx -W -b html docs <out>."""

import inspect
import pkgutil
from types import ModuleType
from typing import Any

import lalerg_optax

project = "lalerg_optax"
copyright = "the lalerg_optax authors"
release = lalerg_optax.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.mathjax"]
extensions += ["sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
templates_path: list[str] = []
html_theme = "furo"
html_title = f"lalerg_optax {release}"

myst_enable_extensions = ["dollarmath", "deflist"]
myst_heading_anchors = 3  # so that pages can link to headings
default_role = "py:obj"  # the docstrings write `lalerg` for a name
autodoc_typehints = "none"  # types stand in the signatures of the source
autodoc_member_order = "bysource"
napoleon_use_ivar = True
napoleon_use_rtype = False


def public_names(module: ModuleType) -> dict[str, Any]:
    """Returns what a module offers: all of its own names without underscore."""
    return {
        name: value
        for name, value in vars(module).items()
        if not name.startswith("_")
        and getattr(value, "__module__", "").startswith("lalerg_optax")
    }


def write_api(app: Any, docname: str, source: list[str]) -> None:
    """Appends all public names to the page api, in the order of their modules.

    Nothing has to be listed by hand: a name that is new in ``__init__`` is there.
    """
    if docname != "api":
        return
    own = [m.name for m in pkgutil.iter_modules(lalerg_optax.__path__)]
    modules = [f"lalerg_optax.{name}" for name in own if not name.startswith("_")]
    for path in ("lalerg_optax", *modules):
        module = __import__(path, fromlist=["_"])
        lines = ["", path, "-" * len(path), ""]
        if path != "lalerg_optax":
            lines += [inspect.getdoc(module) or "", ""]
        for name, value in public_names(module).items():
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
