"""A directive that shows an equation, from the docstring that states it."""

import inspect
import pkgutil
import re
from typing import Any

from sphinx.directives.patches import MathDirective


def equations(obj: Any) -> list[str]:
    """Returns the contents of the math blocks of a docstring."""
    block = re.compile(r"^\.\. math::\n\n((?:(?: .*)?\n)+)", re.MULTILINE)
    text = (inspect.getdoc(obj) or "") + "\n"
    return [inspect.cleandoc(lines) for lines in block.findall(text)]


class Equation(MathDirective):
    """Shows an equation where a page explains it, from the docstring that states it.

    Its arguments are the path of an object, and which of its equations, from 1 on.
    """

    optional_arguments = 1
    required_arguments = 1
    has_content = False

    def run(self) -> list[Any]:
        """Returns the equation as a node."""
        path, number = [*self.arguments, "1"][:2]
        self.arguments = [equations(pkgutil.resolve_name(path))[int(number) - 1]]
        return super().run()


def setup(app: Any) -> dict[str, Any]:
    """Adds the directive."""
    app.add_directive("equation", Equation)
    return {"parallel_read_safe": True}
