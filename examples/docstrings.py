"""Real text that is on every machine: the docstrings and the source code of Python's standard library."""

import ast
import sysconfig
from collections.abc import Iterator
from pathlib import Path

LIBRARY = Path(sysconfig.get_path("stdlib"))


def sources(*modules: str) -> Iterator[tuple[str, str]]:
    """Return the name and the source code of each file of ``modules`` and of the modules below them."""
    for module in modules:
        for file in sorted([*LIBRARY.glob(f"{module}.py"), *(LIBRARY / module).rglob("*.py")]):
            name = ".".join(file.relative_to(LIBRARY).with_suffix("").parts)
            yield name.removesuffix(".__init__"), file.read_text(encoding="utf-8")


def docstrings(*modules: str) -> dict[str, str]:
    """Return the docstrings of the functions and classes in ``modules``, by dotted name; each text once."""
    found: dict[str, str] = {}
    for name, source in sources(*modules):
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                text = ast.get_docstring(node)
                if text and not node.name.startswith("_"):
                    found.setdefault(text, f"{name}.{node.name}")
    return {name: text for text, name in found.items()}
