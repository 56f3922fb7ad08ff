# SPDX-License-Identifier: Apache-2.0
"""The house as docs/design.md draws it: imports go down, without a circle; no module is missing, none too long."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "berdiff_fast"
DESIGN = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")

#: Modules of more than 400 lines, and why.
LONG: dict[str, str] = {}


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in (ROOT / PACKAGE).rglob("*.py")}


def imports(path: Path) -> set[str]:
    """The package's modules that a module imports anywhere, but for the type checker alone."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for_types = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for statement in node.body
        for inner in ast.walk(statement)
    }
    found: set[str] = set()
    for node in set(ast.walk(tree)) - for_types:
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == PACKAGE:
            # What is imported from a package may be a module in it, else it is a name in its __init__.
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else str(node.module) for name in names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.split(".")[0] == PACKAGE}
    return found


def room(module: str) -> str:
    return [*module.split("."), ""][1]


def floors() -> dict[str, int]:
    """Rooms by the number of their line in the map, the highest one first."""
    (drawn,) = re.findall(r"```rooms\n(.*?)```", DESIGN, re.DOTALL)
    return {name: number for number, line in enumerate(drawn.splitlines()) for name in line.split()}


def test_the_map_has_every_room():
    rooms = {room(module) for module in MODULES} - {""}
    assert set(floors()) == rooms


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_go_down(module):
    """From rooms on lines below, or from the room itself; the front door (``berdiff_fast``) is for ``bench`` alone."""
    floor = floors()
    if module == PACKAGE:
        return  # opens onto every room, at first use
    for imported in imports(MODULES[module]):
        other = room(imported)
        if other == room(module) or other in ("_cpu", "_cuda"):
            continue
        if other == "":
            assert room(module) == "bench", f"{module} imports {imported}"
            continue
        assert floor[other] > floor[room(module)], f"{module} imports {imported}, which does not lie below it"


def test_no_circle():
    """Between modules, of the same room too."""
    edges = {module: imports(path) & MODULES.keys() for module, path in MODULES.items() if module != PACKAGE}
    state: dict[str, int] = {}

    def visit(module: str, way: tuple[str, ...]) -> None:
        if state.get(module) == 2 or module == PACKAGE:
            return
        assert state.get(module) != 1, f"a circle: {' -> '.join((*way, module))}"
        state[module] = 1
        for imported in sorted(edges[module] - {module}):
            visit(imported, (*way, module))
        state[module] = 2

    for module in sorted(edges):
        visit(module, ())


@pytest.mark.parametrize("module", sorted(MODULES))
def test_the_map_names_it(module):
    path = MODULES[module]
    if not path.name.startswith("__"):
        assert re.search(rf"(?<![\w.]){re.escape(path.name)}", DESIGN), f"docs/design.md does not name {path.name}"


@pytest.mark.parametrize("module", sorted(MODULES))
def test_no_module_is_too_long(module):
    lines = len(MODULES[module].read_text(encoding="utf-8").splitlines())
    assert lines <= 400 or module in LONG, f"{module} has {lines} lines"


def test_no_test_file_is_too_long():
    long = {p.name: n for p in (ROOT / "tests").rglob("*.py") if (n := len(p.read_text().splitlines())) > 600}
    assert not long
