"""The rooms of the house: imports run down the README's list only."""

from __future__ import annotations

import ast
import importlib
import inspect
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "phi3v"
# From the top down; a file may import from its own room and from those after it. A room's command.py is a room of its
# own, just below the command line: what a command does may need rooms above the one that it belongs to.
ROOMS = [
    "__main__",
    "recipes",
    "cli",
    "*/command.py",
    "azure",
    "report",
    "serve",
    "bench",
    "doctor",
    "evaluators",
    "export",
    "plan",
    "train",
    "evaluate",
    "data",
    "auto",
    "model",
    "runtime",
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


# Rooms and files of train/, from the top down.
TRAIN = [
    "command",
    "run",
    "reference",
    "pairs",
    "evaluate_finetuned",
    "result",
    "header",
    "loop",
    "checkpoints",
    "observers",
    "prepare",
    "open_data",
    "selfcheck",
    "checks",
    "data_facts",
    "run_folder",
    "card",
    "finetuned",
    "assemble",
    "checkpoint_folder",
    "engines",
    "pieces",
    "objectives",
    "state",
    "collectives",
    "compute",
    "methods",
    "schedule",
    "device",
]


def modules() -> dict[str, Path]:
    names = (".".join(path.relative_to(SOURCE.parent).with_suffix("").parts) for path in FILES)
    return {name.removesuffix(".__init__"): path for name, path in zip(names, FILES, strict=True)}


def imports_of(file: Path, known: dict[str, Path]) -> set[str]:
    """The files that one imports, under ``TYPE_CHECKING`` and within functions too."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                found.add(whole if whole in known else node.module)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found & known.keys()


def test_no_files_import_each_other() -> None:
    known = modules()
    graph = {name: imports_of(path, known) - {name} for name, path in known.items()}
    TopologicalSorter(graph).prepare()  # raises with the circle if there is one


def test_imports_run_down_within_train() -> None:
    known = {name: path for name, path in modules().items() if name.startswith("phi3v.train.")}
    for name, path in known.items():
        own = TRAIN.index(name.split(".")[2])
        for other in imports_of(path, known):
            assert TRAIN.index(other.split(".")[2]) >= own, f"{name} imports {other}"


# Attributes of transformers and accelerate that are private and nevertheless set by us; each has its reason beside it.
PRIVATE = {
    "bench/recipe.py": {"_attn_implementation"},
    "model/modeling.py": {"_weight_conversions"},
    "train/compute/checkpointing.py": {"_gradient_checkpointing_func"},
}
# What the library's documentation on new models asks a model to declare.
DECLARED = {
    "_init_weights",
    "_keys_to_ignore_on_load_unexpected",
    "_no_split_modules",
    "_skip_keys_device_placement",
    "_supports_attention_backend",
    "_supports_flash_attn",
    "_supports_flex_attn",
    "_supports_sdpa",
}


def test_nothing_private_of_the_libraries_is_set() -> None:
    found: dict[str, set[str]] = {}
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            targets = node.targets if isinstance(node, ast.Assign) else []
            targets = [node.target] if isinstance(node, ast.AnnAssign | ast.AugAssign) else targets
            for target in targets:
                if not isinstance(target, ast.Attribute) or not target.attr.startswith("_"):
                    continue
                is_ours = ast.unparse(target.value) in ("self", "cls", "processor")
                if not is_ours and not target.attr.startswith("__"):
                    found.setdefault(file.relative_to(SOURCE).as_posix(), set()).add(target.attr)
    assert found == PRIVATE


def test_nothing_private_of_the_libraries_is_overridden() -> None:
    overridden = set()
    for name in modules():
        if name == "phi3v.__main__":
            continue
        for cls in vars(importlib.import_module(name)).values():
            if inspect.isclass(cls) and cls.__module__ == name:
                bases = [base for base in cls.__mro__ if base.__module__.startswith(("transformers.", "accelerate."))]
                own = {key for key in vars(cls) if key.startswith("_") and not key.startswith("__")}
                overridden |= {key for key in own if any(key in vars(base) for base in bases)}
    assert overridden == DECLARED


def test_no_file_is_long() -> None:
    assert not [path.name for path in FILES if path.read_text(encoding="utf-8").count("\n") > 450]


def test_the_readme_shows_every_room() -> None:
    readme = (SOURCE.parents[1] / "README.md").read_text(encoding="utf-8")
    tree = readme.split("## Where things are")[1]
    for name in ROOMS[1:]:
        assert f"  {name}" in tree
