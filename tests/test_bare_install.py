"""What an installation without extras can do: import every module, train an adapter, measure, report."""

from __future__ import annotations

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

IMPORT_EACH = """
import importlib
for name in sys.argv[1:]:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError:
        print(name)
"""
COMMAND = "from phi3v.cli import main\nraise SystemExit(main())"
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


def run(program: str, *arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    program = HIDE.format(hidden=hidden()) + program
    result = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=False)
    assert result.returncode == code, result.stderr[-3000:]
    return result


def test_what_is_hidden() -> None:
    names = hidden()
    assert {"deepspeed", "bitsandbytes", "gradio", "azure", "mlxtend", "pytest"} <= set(names)
    assert not {"torch", "transformers", "accelerate", "peft", "PIL", "numpy"} & set(names)


def test_every_module_is_imported_without_extras() -> None:
    modules = [
        ".".join(("phi3v", *path.relative_to(SOURCE).with_suffix("").parts)).removesuffix(".__init__")
        for path in sorted(SOURCE.rglob("*.py"))
        if path.name != "__main__.py"
    ]
    assert run(IMPORT_EACH, *modules).stdout.splitlines() == NEED_AN_EXTRA


def test_an_adapter_is_trained_without_extras(small_model_dir: Path, easy_vqa: Path, tmp_path: Path) -> None:
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
    options = [part for key, value in settings.items() for part in (f"--{key}", str(value))]
    run(COMMAND, "train", *options)
    assert (out / "final" / "adapter_model.safetensors").is_file()
    assert (out / "report.html").is_file()


def test_the_chat_page_names_its_extra(small_model_dir: Path) -> None:
    said = run(COMMAND, "chat", str(small_model_dir), code=2).stderr
    assert "serve" in said
    assert "Traceback" not in said
