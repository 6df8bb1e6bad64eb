"""The order of the rooms (ARCHITECTURE.md): a room imports only from those above it, and nothing goes in circles."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import trivisor

HOUSE = Path(trivisor.__file__).parent
ORDER = (
    "x86", "machine", "devices", "boot", "translation", "hardware", "paravirt",
    "pc", "guests", "monitor", "insight", "cli",
)  # fmt: skip
TECHNIQUES = {"translation", "hardware", "paravirt"}
ALLOWED_BETWEEN_TECHNIQUES = {("hardware.vmx", "translation")}
MODULES = {
    ".".join(path.relative_to(HOUSE.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(HOUSE.rglob("*.py"))
}


def imports(module: str, *, when_loaded: bool) -> Iterator[str]:
    """The modules of ours that `module` imports; `when_loaded` leaves out those in functions and for type checkers."""
    nodes: list[ast.AST] = [ast.parse(MODULES[module].read_text())]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "trivisor":
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in MODULES else node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)
        elif when_loaded and (isinstance(node, ast.FunctionDef) or _for_type_checkers(node)):
            continue
        nodes += ast.iter_child_nodes(node)


def _for_type_checkers(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


@pytest.mark.parametrize("module", [name for name in MODULES if room(name) in ORDER])
def test_a_room_imports_only_from_those_above_it(module: str) -> None:
    own = room(module)
    for imported in imports(module, when_loaded=False):
        other = room(imported)
        if other in ("", own):
            continue
        assert ORDER.index(other) < ORDER.index(own), f"{module} imports {imported}"
        if {own, other} <= TECHNIQUES:
            inner = ".".join(module.split(".")[1:3])
            assert (inner, other) in ALLOWED_BETWEEN_TECHNIQUES, f"{module} imports {imported}"


def test_every_room_has_its_place_in_the_order() -> None:
    assert {room(module) for module in MODULES} <= {*ORDER, "", "__main__"}


def test_no_import_goes_in_a_circle() -> None:
    graph = {module: set(imports(module, when_loaded=True)) - {module} for module in MODULES}
    TopologicalSorter(graph).prepare()  # raises CycleError
