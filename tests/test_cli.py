"""The command line as a person meets it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from phi3v.cli import main

COMMANDS = {
    "quickstart": ("easy-vqa", "default: quickstart"),
    "recipes copy": ("--overwrite", "default: NAME.yaml"),
    "model init": ("--preset", "default: 0"),
    "data convert": ("easy-vqa", "ucf101", "--on-bad", "default: stop", "default: 8", "image-folder", "--image-column"),
    "data check": ("--max-errors", "default: 20"),
    "chat": ("--prompt", "--video", "default: 256", "default: 7860", "default: $PHI3V_PASSWORD"),
    "eval": ("--metrics", "per_class_accuracy", "default: as the run was evaluated"),
    "plan": ("--gpu", "--sku", "default: this machine", "default: 1"),
    "doctor": ("RECIPE", "overrides"),
    "train": ("--training.learning_rate", "default: 4e-05"),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_defaults_and_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command.split(), "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert f"example: phi3v {command}" in shown
    for words in COMMANDS[command]:
        assert words in shown


def test_every_key_of_the_configuration_has_a_help_text(capsys: pytest.CaptureFixture[str]) -> None:
    from phi3v.config import build_parser

    main(["train", "--help"])
    shown = capsys.readouterr().out
    keys = build_parser()._actions
    assert len(keys) > 50
    for key in keys:
        assert f"--{key.dest} " in shown
        assert not (key.help or "").startswith(" (default")


def test_help_fits_a_screen_and_imports_no_heavy_library() -> None:
    script = """
import sys
from phi3v.cli import main
main(["--help"])
assert not {"numpy", "PIL", "torch", "transformers"} & sys.modules.keys()
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert len(result.stdout.splitlines()) <= 24


def test_a_closed_pipe_ends_no_command(tmp_path: Path) -> None:
    """Nor does an encoding that lacks a character; in a process of its own, whose output is the pipe."""
    script = """
import sys
from phi3v.cli import run_command
def work(console):
    for _ in range(20_000):
        console.print("× line")
        print("more ×")
    open(sys.argv[1], "w").write("done")
    return {"exit_code": 2}
sys.exit(run_command(work))
"""
    done = tmp_path / "done"
    with subprocess.Popen(
        [sys.executable, "-c", script, str(done)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"},
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == b"? line\n"
        process.stdout.close()
        errors = process.stderr.read()
        assert process.wait(60) == 2, errors
    assert b"Traceback" not in errors
    assert done.read_text() == "done"


def test_json_is_alone_on_standard_output(tmp_path: Path) -> None:
    """In a process of its own: libraries print at import and while they load."""
    command = [
        sys.executable,
        "-m",
        "phi3v",
        "model",
        "init",
        "--preset",
        "tiny",
        "--out",
        str(tmp_path / "m"),
        "--json",
    ]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    answer = json.loads(result.stdout)
    assert answer["preset"] == "tiny"
    assert answer["parameters"] > 1_000_000
    assert (tmp_path / "m" / "model.safetensors").exists()


def test_unknown_commands_and_missing_options_exit_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, said in {
        "": "the command comes first",
        "--json plan": "the command comes first",
        "trian": "did you mean train?",
        "model": "choose from init",
        "model int": "did you mean init?",
        "model init": "required: --preset, --out",
        "model init --preset tny --out x": "did you mean tiny?",
        "data convert easy-vqa": "required: --out",
    }.items():
        assert main(arguments.split()) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert said in error


def test_a_user_error_is_one_message_without_traceback(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "model")
    assert main(["model", "init", "--preset", "tiny", "--out", out]) == 0
    assert main(["model", "init", "--preset", "tiny", "--out", out]) == 2
    error = capsys.readouterr().err
    assert "error: " in error
    assert "there is a model already" in error
    assert "Traceback" not in error


def test_the_pretrained_base_is_copied_by_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["model", "init", "--preset", "tiny", "--pretrained", "--out", str(tmp_path / "base"), "--json"]
    assert main(command) == 0
    assert json.loads(capsys.readouterr().out)["parameters"] == 1_467_136
    assert (tmp_path / "base" / "README.md").is_file()
    assert main([*command, "--dtype", "float16"]) == 2
    assert "--dtype: the pretrained base is copied as it is" in capsys.readouterr().err


def test_convert_and_check_easy_vqa(
    easy_vqa_source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PHI3V_CACHE", str(tmp_path / "cache"))
    command = ["data", "convert", "easy-vqa", "--source", str(easy_vqa_source), "--out", str(tmp_path / "data")]
    assert main([*command, "--json"]) == 0
    files = json.loads(capsys.readouterr().out)["files"]
    assert main(["data", "check", files["test"], "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["questions"] == len(json.loads((easy_vqa_source / "test" / "questions.json").read_text()))
    assert report["images"] == 8


@pytest.mark.parametrize("rank", ["0", "1"])
def test_an_error_is_never_lost_on_a_rank(
    rank: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others leave rank 0 the time to speak, and speak themselves if they are still there after it."""
    waited: list[float] = []
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr("phi3v.cli.time.sleep", waited.append)
    assert main(["train", "nowhere.yaml"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: nowhere" if rank == "0" else "error on rank 1: nowhere")
    assert waited == ([] if rank == "0" else [10.0])


def test_convert_lists_bad_records_and_skips_them_if_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = tmp_path / "source", str(tmp_path / "out")
    (source / "img").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(source / "img" / "1.png")
    memes = [{"id": k, "img": f"img/{k}.png", "label": k % 2, "text": "x"} for k in (1, 2)]
    (source / "train.jsonl").write_text("".join(json.dumps(meme) + "\n" for meme in memes))
    command = ["data", "convert", "hateful-memes", "--source", str(source), "--out", out]
    assert main([*command, "--json"]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "error: hateful-memes: 1 of 2 units cannot be converted" in shown.err
    assert f"{source / 'train.jsonl'}:2: " in shown.err
    assert "--on-bad skip" in shown.err
    assert main([*command, "--on-bad", "skip", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["records"], answer["skipped"]) == ({"train": 1}, 1)
    assert answer["skipped_units"][0]["place"] == f"{source / 'train.jsonl'}:2"
    assert main([*command, "--workers", "0"]) == 2


@pytest.mark.parametrize(
    "command",
    [
        ["export", "run", "--out", "out"],
        ["report", "run"],
        ["chat", "model", "--prompt", "what?"],
        ["data", "check", "data.jsonl"],
        ["data", "convert", "easy-vqa", "--out", "data"],
        ["model", "init", "--preset", "tiny", "--out", "out"],
        ["plan", "--gpu", "h100-80gb"],
        ["doctor"],
        ["bench", "preprocess"],
    ],
)
def test_one_process_alone_does_what_is_not_divided(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Several would write over each other's files, or wait for ranks that never come."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert main(command) == 2
    assert "this is the work of one process, and 2 were started" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
