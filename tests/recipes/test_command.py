"""``phi3v recipes`` and ``phi3v quickstart``, and recipes by name."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from phi3v.cli import main, parse
from phi3v.config import load_config
from phi3v.grammar import RECIPES


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, which is empty."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_recipe_is_listed_with_its_first_comment(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)["recipes"]
    assert [recipe["name"] for recipe in listed] == list(RECIPES)
    for recipe in listed:
        assert Path(recipe["file"]).read_text(encoding="utf-8").startswith(f"# {recipe['about']}\n")
        assert recipe["about"].endswith((".", "?"))
    assert main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(RECIPES)
    assert any(line.endswith("  LoRA on DocVQA: questions about scanned pages, ANLS.") for line in lines)


def test_a_copy_is_the_recipe_with_its_own_commands(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "my own").mkdir()
    for option, file in (
        ([], "docvqa_lora.yaml"),
        (["--out", "x.yaml"], "x.yaml"),
        (["--out", "my own"], "my own/docvqa_lora.yaml"),
    ):
        assert main(["recipes", "copy", "docvqa_lora", *option]) == 0
        command = f"phi3v train '{file}'" if " " in file else f"phi3v train {file}"
        assert command in capsys.readouterr().out
        assert (here / file).read_text(encoding="utf-8").count(f"{command}\n") == 2  # alone, and of torchrun
        assert load_config(here / file) == load_config(RECIPES["docvqa_lora"])


def test_a_copy_overwrites_only_if_told(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "mine.yaml").write_text("precious")
    command = ["recipes", "copy", "docvqa_lora", "--out", "mine.yaml"]
    assert main(command) == 2
    assert "mine.yaml: is there already" in capsys.readouterr().err
    assert (here / "mine.yaml").read_text() == "precious"
    assert main([*command, "--overwrite"]) == 0
    assert (here / "mine.yaml").read_text() != "precious"
    assert main(["recipes", "copy", "docvqa_lora", "--out", "mine.yaml/x.yaml"]) == 2
    assert "cannot be written: mine.yaml is a file" in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["train", "plan", "doctor", "azure skus", "azure submit --sku S"])
def test_a_name_is_a_recipe_where_no_such_file_is(verb: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = verb.split()
    (here / "nlvr2_full").mkdir()  # no file
    assert parse([*words, "nlvr2_full"]).recipe == RECIPES["nlvr2_full"]
    (here / "docvqa_lora").write_text("model: {num_crops: 3}\n")
    assert parse([*words, "docvqa_lora"]).recipe == Path("docvqa_lora")
    for name in ("docvqa_lroa", "docvqa-lroa.yaml", "recipes/docvqa_lroa.yaml"):
        assert main([*words, name]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"error: {name}: no such file, and no recipe of that name")
        assert "did you mean docvqa_lora?" in error


def test_a_copy_with_the_name_is_not_passed_over(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Else changes to it would be lost in silence."""
    assert main(["recipes", "copy", "docvqa_lora"]) == 0
    assert main(["train", "docvqa_lora"]) == 2
    assert "→ name the file, docvqa_lora.yaml, or move it away" in capsys.readouterr().err
    assert parse(["train", "docvqa_lora.yaml"]).recipe == Path("docvqa_lora.yaml")


def test_a_name_is_no_copy_of_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(RECIPES["docvqa_lora"].parent)
    assert parse(["train", "docvqa_lora"]).recipe == RECIPES["docvqa_lora"]


def test_a_shell_completes_names_and_files(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "bash"]) == 0
    (here / "completion.sh").write_text(capsys.readouterr().out)
    (here / "docvqa_mine.yaml").touch()
    script = "source completion.sh; COMP_WORDS=(phi3v train docvqa); COMP_CWORD=2; _shtab_phi3v; echo ${COMPREPLY[*]}"
    result = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    names = {name for name in RECIPES if name.startswith("docvqa")}
    assert set(result.stdout.split()) == names | {"docvqa_mine.yaml"}


@pytest.fixture
def few(easy_vqa_source: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The quickstart with a little of its data, and keys that make it a moment."""
    monkeypatch.setattr("phi3v.data.sources.easy_vqa.package_data", lambda: easy_vqa_source)
    keys = {"training.max_steps": 2, "training.batch_size": 2, "training.micro_batch_size": 2}
    keys |= {"training.logging_steps": 1, "evaluation.max_questions": 3}
    return ["quickstart", *(f"--{key}={value}" for key, value in keys.items())]


def test_the_quickstart_shows_and_runs_its_commands(
    few: list[str], here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = here / "quickstart"
    assert main(few) == 0
    shown = [line for line in capsys.readouterr().out.splitlines() if line.startswith("$ ")]
    assert shown[:2] == [
        "$ phi3v model init --preset tiny --pretrained --out quickstart/model",
        "$ phi3v data convert easy-vqa --out quickstart/data",
    ]
    assert shown[2].startswith("$ phi3v train easy_vqa_tiny --training.overwrite=true --training.max_steps=2 ")
    assert len(shown) == 3
    assert (folder / "run" / "report.html").is_file()
    # Again, in a folder that is not the recipe's: the run is replaced, the model is kept.
    assert main([*few, "--out", str(folder), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert list(told) == ["data", "run"]
    assert told["run"]["folder"] == str(folder / "run")
    assert (folder / "run" / "metrics.jsonl").read_text().count("\n") == 2
    # What is not the quickstart's is left alone.
    (folder / "model" / "model.safetensors").write_bytes(b"mine")
    assert main(few) == 2
    assert "quickstart/model: there is a model already" in capsys.readouterr().err
    assert (folder / "model" / "model.safetensors").read_bytes() == b"mine"
