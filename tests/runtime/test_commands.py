"""Graphs under the commands that take a model."""

from __future__ import annotations

import itertools
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from phi3v import Phi3VProcessor
from phi3v.cli import main
from phi3v.config import EvaluationConfig
from phi3v.data.collate import QuestionDataset
from phi3v.data.table import open_table
from phi3v.errors import UserError
from phi3v.evaluate.evaluation import evaluate
from phi3v.model.modeling import Phi3VForCausalLM
from phi3v.runtime import load_runtime
from phi3v.serve.conversation import AnswerSettings, Chat, Turn
from phi3v.train.device import choose_device
from phi3v.train.finetuned import resolve_model


def run(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, str, str]:
    capsys.readouterr()
    code = main([str(argument) for argument in arguments])
    return code, *capsys.readouterr()


def test_eval_gives_the_answers_of_the_model(
    openvino_dir: Path, trained_dir: Path, easy_vqa: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the probabilities of words. Questions about one image share it, and some answers cross LongRoPE's switch."""
    data, words = easy_vqa / "test.jsonl", ["yes", "no"]
    lines = map(json.loads, data.read_text().splitlines())
    kept = [line for line in lines if line["conversations"][0]["assistant"] in words][:12]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in kept))
    (tmp_path / "images").symlink_to(easy_vqa / "images")
    out = tmp_path / "out"
    options = ("--metrics", "auroc", "accuracy", "--answer-words", *words, "--max-new-tokens", 6, "--out", out)
    code, _, err = run(capsys, "eval", openvino_dir, "--data", data, *options)
    assert code == 0, err
    predictions = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    processor = Phi3VProcessor.from_pretrained(trained_dir)
    questions = QuestionDataset(open_table(data), processor)
    config = EvaluationConfig(metrics=["auroc", "accuracy"], answer_words=words, max_new_tokens=6)
    expected = list(evaluate(Phi3VForCausalLM.from_pretrained(trained_dir), processor, questions, config).predictions())
    assert len({line["prediction"] for line in expected}) > 1
    for ours, theirs in zip(predictions, expected, strict=True):
        assert ours["prediction"] == theirs["prediction"]
        np.testing.assert_allclose(
            [*ours["probabilities"].values()], [*theirs["probabilities"].values()], rtol=0, atol=1e-4
        )


def test_chat_streams_what_the_model_says(
    openvino_dir: Path, trained_dir: Path, easy_vqa: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Greedy and drawn, beside the model that it was made from."""
    image = next((easy_vqa / "images").rglob("*.png"))
    ask = ("--prompt", "what color is the shape?", "--image", image, "--max-new-tokens", 6, "--json")
    for options in ((), ("--temperature", 1.5, "--top-p", 0.9, "--seed", 3)):
        code, out, err = run(capsys, "chat", openvino_dir, *ask, *options, "--compare", "--model", trained_dir)
        assert code == 0, err
        given = json.loads(out)
        assert given["answer"] == given["base_answer"] != ""
    assert "graphs: openvino" in err


def test_two_conversations_do_not_mix(openvino_dir: Path) -> None:
    """The page of the chat may stream two answers at once."""
    chat = Chat(resolve_model(str(openvino_dir)), choose_device("fp32"))
    settings = AnswerSettings(max_new_tokens=8)
    asked = ("what color is the shape?", "is there a circle?")
    alone = [[*chat.answer([Turn(text)], settings)] for text in asked]
    together = [chat.answer([Turn(text)], settings) for text in asked]
    mixed: list[list[str]] = [[], []]
    for step in range(20):
        for answer, seen in zip(together, mixed, strict=True):
            seen += itertools.islice(answer, 1 + step % 2)
    assert mixed == alone


def test_what_graphs_cannot_do_is_said(
    openvino_dir: Path, trained_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "train.jsonl"
    data.write_text('{"id": "a", "conversations": [{"user": "what?", "assistant": "this"}]}\n')
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model:\n  path: {openvino_dir}\ndata:\n  train: {data}\ntraining:\n  output_dir: out\n")
    for arguments in (
        ("train", recipe),
        ("export", openvino_dir, "--out", tmp_path / "out"),
        ("export", openvino_dir, "--out", tmp_path / "out", "--format", "openvino"),
    ):
        code, _, err = run(capsys, *arguments)
        assert code == 2
        assert "holds graphs of a model (openvino)" in err
    code, _, err = run(capsys, "export", trained_dir, "--out", tmp_path / "out", "--format", "openvino",
                       "--bits", 8, "--group-size", 32)  # fmt: skip
    assert code == 2
    assert "--group-size" in err


def test_damaged_graphs_are_named(openvino_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "graphs"
    shutil.copytree(openvino_dir, folder)
    (folder / "openvino_language_model.bin").write_bytes(b"short")
    with pytest.raises(UserError, match="copy all of the folder again"):
        load_runtime(folder)
    with pytest.raises(UserError, match="has no graphs"):
        load_runtime(tmp_path)


def test_openvino_is_missing(openvino_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(UserError, match=r"phi3v\[openvino\]"):
        load_runtime(openvino_dir)


def test_tags_and_images_that_do_not_fit(openvino_dir: Path) -> None:
    runtime = load_runtime(openvino_dir)
    image = Image.new("RGB", (40, 40))
    with pytest.raises(UserError, match="2 images were given"):
        runtime.answer("<|image_2|> and <|image_1|>?", [image, image])
    with pytest.raises(UserError, match=r"missing\.png"):
        runtime.answer("what?", ["missing.png"])
    pages = [runtime.page(image)]
    assert runtime.prompt("<|image_1|>\nwhat?", pages) == runtime.prompt("what?", pages)
    assert runtime.prompt("<|image|>\nwhat?", pages) == runtime.prompt("what?", pages)
    assert runtime.prompt("a <|end|>", []) == runtime.prompt("a < |end|>", [])
