"""The rooms of the house: imports run down the README's list only."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "phi3v"
# From the top down; a file may import from its own room and from those after it. A room's command.py is a room of its
# own, just below the command line: what a command does may need rooms above the one that it belongs to.
ROOMS = [
    "__main__",
    "cli",
    "*/command.py",
    "azure",
    "report",
    "serve",
    "bench",
    "doctor",
    "export",
    "plan",
    "train",
    "evaluate",
    "data",
    "auto",
    "model",
    "processing",
    "config",
    "paths",
    "grammar",
    "machine",
    "findings",
    "terminal",
    "json_files",
    "errors",
]
FILES = sorted(path for path in SOURCE.rglob("*.py") if path != SOURCE / "__init__.py")


def room(parts: tuple[str, ...]) -> str:
    return "*/command.py" if parts[-1].removesuffix(".py") == "command" else parts[0].removesuffix(".py")


@pytest.mark.parametrize("file", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_run_down(file: Path) -> None:
    own = ROOMS.index(room(file.relative_to(SOURCE).parts))
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        for name in names:
            parts = tuple(name.split("."))
            if parts[0] == "phi3v" and len(parts) > 1:
                assert ROOMS.index(room(parts[1:])) >= own, f"{file.name}:{node.lineno} imports {name}"


def test_the_readme_shows_every_room() -> None:
    readme = (SOURCE.parents[1] / "README.md").read_text(encoding="utf-8")
    tree = readme.split("## Where things are")[1]
    for name in ROOMS[1:]:
        assert f"  {name}" in tree
