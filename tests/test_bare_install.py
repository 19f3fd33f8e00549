"""What an installation without extras can do: import every module, train an adapter, measure, report."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import distribution, packages_distributions
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import phi3v

SOURCE = Path(phi3v.__file__).parent
HIDE = """
import sys
for name in {hidden!r}:
    sys.modules[name] = None  # to find_spec and to import as if it were not installed
"""

# In one process, as its start takes seconds: imports every module, then runs commands.
PROGRAM = """
import importlib, json
modules, *commands = json.loads(sys.argv[1])
for name in modules:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError:
        print(name)
print("---")
from phi3v.cli import main
for command in commands:
    print("exit code", main(command), file=sys.stderr)
"""
# Loaded only by the command whose error names the extra.
NEED_AN_EXTRA = ["phi3v.serve.page", "phi3v.serve.server"]


def needed(name: str, extras: frozenset[str] = frozenset(), seen: set[tuple[str, str]] | None = None) -> set[str]:
    """The distributions that ``pip install NAME`` brings, by their canonical names."""
    seen = set() if seen is None else seen
    for extra in {"", *extras}:
        if (name, extra) in seen:
            continue
        seen.add((name, extra))
        for text in distribution(name).requires or ():
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                needed(canonicalize_name(requirement.name), frozenset(requirement.extras), seen)
    return {each for each, _ in seen}


def hidden() -> list[str]:
    """The names that are importable here but would not be without extras."""
    kept = needed("phi3v") | {"pip", "setuptools"}
    return sorted(
        module
        for module, distributions in packages_distributions().items()
        if not {canonicalize_name(each) for each in distributions} & kept and module.isidentifier()
    )


def test_what_is_hidden() -> None:
    names = hidden()
    assert {"deepspeed", "bitsandbytes", "gradio", "azure", "mlxtend", "pytest"} <= set(names)
    assert not {"torch", "transformers", "accelerate", "peft", "PIL", "numpy"} & set(names)


def test_modules_training_and_chat_without_extras(small_model_dir: Path, easy_vqa: Path, tmp_path: Path) -> None:
    """Every module is imported but those of extras, an adapter is trained, and the chat page names its extra."""
    modules = [
        ".".join(("phi3v", *path.relative_to(SOURCE).with_suffix("").parts)).removesuffix(".__init__")
        for path in sorted(SOURCE.rglob("*.py"))
        if path.name != "__main__.py"
    ]
    out = tmp_path / "run"
    settings = {
        "model.path": small_model_dir,
        "data.train": easy_vqa / "train.jsonl",
        "data.eval": easy_vqa / "test.jsonl",
        "method.name": "lora",
        "training.max_steps": 1,
        "training.batch_size": 2,
        "training.output_dir": out,
        "evaluation.max_questions": 2,
        "evaluation.max_new_tokens": 2,
    }
    train = ["train", *(part for key, value in settings.items() for part in (f"--{key}", str(value)))]
    program = HIDE.format(hidden=hidden()) + PROGRAM
    arguments = json.dumps([modules, train, ["chat", str(small_model_dir)]])
    result = subprocess.run([sys.executable, "-c", program, arguments], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.split("---")[0].splitlines() == NEED_AN_EXTRA
    trained, chat = result.stderr.split("exit code 0\n")
    assert (out / "final" / "adapter_model.safetensors").is_file(), trained
    assert (out / "report.html").is_file()
    assert chat.endswith("exit code 2\n")
    assert "serve" in chat
    assert "Traceback" not in chat
