"""What the built wheel can do where it is installed without extras, away from the checkout."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import venv
import zipfile
from collections.abc import Iterable
from importlib.metadata import Distribution, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from sample_files import image_bytes

ROOT = Path(__file__).parents[1]
# In one process, as its start takes seconds: imports every module, then runs commands.
PROGRAM = """
import importlib, json, sys
modules, *commands = json.loads(sys.argv[1])
for name in modules:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError:
        print(name)
print("---")
from phi3v.cli import main
for command in commands:
    print("$", *command, file=sys.stderr)
    print("exit code", main(command), file=sys.stderr)
"""
# Loaded only by the command whose error names the extra.
NEED_AN_EXTRA = ["phi3v.serve.page", "phi3v.serve.server"]


def needed(requires: Iterable[str]) -> dict[str, frozenset[str]]:
    """The distributions that requirements bring, by their canonical names, with the extras that are asked of them."""
    found: dict[str, frozenset[str]] = {}
    rest = [(text, frozenset[str]()) for text in requires]
    while rest:
        text, of = rest.pop()
        requirement = Requirement(text)
        name, asked = canonicalize_name(requirement.name), frozenset(requirement.extras)
        if requirement.marker is not None and not any(requirement.marker.evaluate({"extra": e}) for e in {"", *of}):
            continue
        before = found.get(name)
        if before is None or not asked <= before:
            found[name] = asked | (before or frozenset())
            rest += [(each, found[name]) for each in distribution(name).requires or ()]
    return found


def files_of(folder: Path) -> set[str]:
    """By their paths in it, without what running leaves there."""
    files = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    left = ("__pycache__/", "recipes/data/", "recipes/output/")
    return {file for file in files if not any(name in file for name in left)}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built of a copy of the source, as building leaves files there."""
    folder = tmp_path_factory.mktemp("wheel")
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
    shutil.copytree(ROOT / "src", folder / "source" / "src", ignore=ignore)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "source")
    offline = ["--no-deps", "--no-index", "--no-build-isolation", "--disable-pip-version-check", "--quiet"]
    command = [sys.executable, "-m", "pip", "wheel", *offline, "--wheel-dir", str(folder), str(folder / "source")]
    subprocess.run(command, check=True)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the wheel and what it requires, linked from this one: no extras, no checkout."""
    environment = tmp_path_factory.mktemp("installed") / "venv"
    venv.create(environment, symlinks=True)
    command = [sys.executable, "-m", "pip", "--python", str(environment / "bin" / "python"), "install"]
    subprocess.run([*command, "--no-deps", "--no-index", "--quiet", str(wheel)], check=True)
    site = packages(environment)
    # As the wheel says, not the metadata of an editable installation, which may be older.
    for name in needed(Distribution.at(next(site.glob("phi3v-*.dist-info"))).requires or ()):
        files = distribution(name).files or []
        for top in {file.parts[0] for file in files} - {"..", "__pycache__"}:
            if not (site / top).exists():
                (site / top).symlink_to(str(distribution(name).locate_file(top)))
    return environment


def packages(environment: Path) -> Path:
    return environment / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"


def run(installed: Path, folder: Path, program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a program of the environment in a folder."""
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [str(installed / "bin" / program), *arguments]
    return subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, check=False)


def test_the_wheel_has_every_file_of_the_package(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert names == {f"phi3v/{name}" for name in files_of(ROOT / "src" / "phi3v")}


def test_the_environment_has_no_extras(installed: Path) -> None:
    there = {path.name for path in packages(installed).iterdir()}
    assert {"torch", "transformers", "accelerate", "peft", "PIL", "numpy"} <= there
    assert not {"deepspeed", "bitsandbytes", "gradio", "azure", "mlxtend", "pytest", "easy_vqa"} & there


def test_commands_and_scripts_of_the_recipe(installed: Path, tmp_path: Path) -> None:
    listed = json.loads(run(installed, tmp_path, "phi3v", "recipes", "--json").stdout)["recipes"]
    assert all(Path(recipe["file"]).is_relative_to(packages(installed)) for recipe in listed)
    script = run(installed, tmp_path, "python", "-m", "phi3v.recipes.finetune_hf_trainer_docvqa", "--help")
    assert "--use_flash_attention" in script.stdout


def test_the_first_steps(installed: Path, tmp_path: Path) -> None:
    """Every module is imported but those of extras, whose commands name them; an adapter is trained by a recipe."""
    (tmp_path / "page.png").write_bytes(image_bytes(0))
    rows = "".join(f"page.png,what is {number}?,{number}\n" for number in range(3))
    (tmp_path / "labels.csv").write_text(f"image,question,answer\n{rows}")
    keys = {"data.train": "data/train.jsonl", "data.eval": "data/train.jsonl", "model.path": "model"}
    keys |= {"training.max_steps": "1", "training.batch_size": "2", "training.micro_batch_size": "2"}
    options = [f"--{key}={value}" for key, value in keys.items()]
    source = packages(installed) / "phi3v"
    modules = [
        ".".join(("phi3v", *Path(name).with_suffix("").parts)).removesuffix(".__init__")
        for name in sorted(files_of(source))
        if name.endswith(".py") and name != "__main__.py"
    ]
    commands = [
        ["quickstart"],
        ["model", "init", "--preset", "tiny", "--pretrained", "--out", "model"],
        ["data", "convert", "csv", "--source", "labels.csv", "--out", "data"],
        ["doctor", "easy_vqa_tiny", *options],
        ["recipes", "copy", "easy_vqa_tiny", "--out", "mine.yaml"],
        ["train", "mine.yaml", *options, "--training.output_dir=run"],
        ["chat", "model"],
    ]
    result = run(installed, tmp_path, "python", "-c", PROGRAM, json.dumps([modules, *commands]))
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.split("---")[0].splitlines() == NEED_AN_EXTRA
    quickstart, *said, chat = result.stderr.split("$ ")[1:]
    for command, extra in ((quickstart, "easy-vqa"), (chat, "serve")):
        assert command.endswith("exit code 2\n")
        assert f'pip install "phi3v[{extra}]"' in command
        assert "Traceback" not in command
    for command in said:
        assert command.endswith("exit code 0\n"), command
    assert (tmp_path / "run" / "final" / "adapter_model.safetensors").is_file()
    assert (tmp_path / "run" / "report.html").is_file()
    assert not (tmp_path / "quickstart").exists()
