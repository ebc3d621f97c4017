"""The shape of the source, which is itself part of the tutorial: who may import what from whom."""

import ast
import re
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ORDER = (  # a module imports only from those before it: this is also the order in which to read
    "startup config files figures machine command_line model training shards scenes text pixart "
    "data teacher latents pretrained sample trajectories metrics evaluate distill gan"
).split()
MODULES = sorted(path.stem for path in ROOT.glob("*.py"))
FILES = sorted([*ROOT.glob("*.py"), *ROOT.glob("experiments/*.py")])


def imports(path: Path):
    """(module, name) for each name that a file imports from the project's modules; the name is None
    where it imports a module as a whole."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module in MODULES:
            for alias in node.names:
                yield node.module, alias.name
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name in MODULES:
                    yield alias.name, None


def test_every_module_has_its_place():
    assert set(MODULES) <= set(ORDER)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports(path):
    taken = set(imports(path))
    earlier = ORDER[: ORDER.index(path.stem)] if path.stem in ORDER else ORDER
    assert {module for module, _ in taken} <= set(earlier)
    assert max(Counter(module for module, _ in taken).values(), default=0) <= 8
    assert "main" not in {name for _, name in taken}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_explains_itself_and_fits_the_page(path):
    text = path.read_text()
    assert ast.get_docstring(ast.parse(text)), "no docstring at the top"
    assert [line for line in text.splitlines() if len(line) > 100] == []
    assert not re.search(r"\b(TODO|FIXME|XXX)\b", text)
