"""The house: a room uses only rooms below it, and no module imports in a circle, not even inside a function."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# From the top floor down. Rooms of one floor do not know each other.
FLOORS = [
    {"commands"},
    {"studies", "app"},
    {"training"},
    {"inference"},
    {"learning", "export", "evaluation"},
    {"data"},
    {"proposals", "runtime"},
    {"model"},
    {"ops"},
    {"kernels", "files"},
]
BELOW = {room: set().union(*FLOORS[number + 1 :]) for number, floor in enumerate(FLOORS) for room in floor}


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name; `kernels/` and `model/` are installed inside it."""
    found = {}
    for folder, name in (
        (ROOT / "dmm_fast", "dmm_fast"),
        (ROOT / "kernels", "dmm_fast.kernels"),
        (ROOT / "model", "dmm_fast.model"),
    ):
        for path in folder.rglob("*.py"):
            parts = [name, *path.relative_to(folder).with_suffix("").parts]
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(module: str, path: Path, known: dict[str, Path]) -> set[str]:
    """What a module imports of the package, anywhere in it."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                outer = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*outer, *([base] if base else [])])
            named = {f"{base}.{alias.name}" for alias in node.names}
            found |= {name for name in named if name in known} or {base}
    return {name for name in found if name in known} - {module}


def test_a_room_uses_only_rooms_below_it():
    known = modules()
    wrong = []
    for module, path in known.items():
        if module in ("dmm_fast", "dmm_fast.__main__"):  # the door: public names, and the command
            continue
        room = module.split(".")[1]
        for other in imports(module, path, known):
            if other == "dmm_fast" or other.split(".")[1] == room:
                continue
            if other.split(".")[1] not in BELOW[room]:
                wrong.append(f"{module} imports {other}")
    assert not wrong, "\n".join(sorted(wrong))


def test_no_circle():
    known = modules()
    graph = {module: imports(module, path, known) for module, path in known.items() if module != "dmm_fast"}
    list(TopologicalSorter(graph).static_order())


def test_every_room_is_on_a_floor():
    rooms = {name.split(".")[1] for name in modules() if name.count(".")} - {"__main__"}
    assert rooms == set(BELOW)
