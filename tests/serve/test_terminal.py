"""``phi3v chat --prompt``: one answer in the terminal."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from sample_files import clip

from phi3v.cli import main
from phi3v.data.collate import QuestionDataset
from phi3v.data.image_store import FolderStore
from phi3v.data.images import load_image
from phi3v.data.table import open_table
from phi3v.errors import UserError
from phi3v.evaluate import streaming
from phi3v.evaluate.generate import generate_answers
from phi3v.evaluate.sampling import Sampling
from phi3v.processing.processor import Phi3VProcessor
from phi3v.serve.conversation import AnswerSettings, Chat, Turn
from phi3v.train.device import choose_device
from phi3v.train.finetuned import load_tuned, resolve_model

SIX = AnswerSettings(max_new_tokens=6)


def ask(capsys: pytest.CaptureFixture[str], *arguments: Any) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["chat", *map(str, arguments), "--json", "--max-new-tokens", "6"]) == 0
    answer: dict[str, Any] = json.loads(capsys.readouterr().out)
    return answer


def last(chat: Chat, *turns: Turn, settings: AnswerSettings = SIX) -> str:
    *_, answer = chat.answer(turns, settings)
    return answer


def test_it_answers_as_the_run_was_measured_before_and_after(
    tuned_run: Path, easy_vqa: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before, after = (
        [json.loads(line) for line in (tuned_run / f"predictions_{when}.jsonl").read_text().splitlines()]
        for when in ("before", "after")
    )
    assert [line["prediction"] for line in before] != [line["prediction"] for line in after]
    line = next(i for i in range(4) if before[i]["prediction"] != after[i]["prediction"])
    picture = easy_vqa / "images" / after[line]["images"][0]
    given = ask(capsys, tuned_run, "--prompt", after[line]["prompt"], "--image", picture, "--compare")
    assert given["answer"] == after[line]["prediction"]
    assert given["base_answer"] == before[line]["prediction"]
    assert given["images"] == 1


def test_the_answer_is_alone_on_standard_output(small_model_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chat", str(small_model_dir), "--prompt", "hello", "--max-new-tokens", "3"]) == 0
    captured = capsys.readouterr()
    chat = Chat(resolve_model(str(small_model_dir)), choose_device("fp32"))
    assert captured.out == last(chat, Turn("hello"), settings=AnswerSettings(max_new_tokens=3)) + "\n"
    assert "asking" in captured.err
    assert "(cut at 3 tokens; --max-new-tokens allows more)" in captured.err


def test_an_answer_that_was_cut_is_told_from_a_whole_one(chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    end = chat._model("tuned")[1].tokenizer.convert_tokens_to_ids("<|end|>")
    for tokens, cut in (([5, 5, 5], {"tuned": 3}), ([5, 5, end], {})):
        drawn = iter(tokens)
        monkeypatch.setattr(streaming.TokenChooser, "__call__", lambda *_, drawn=drawn: next(drawn))
        turn = Turn("hello")
        last(chat, turn, settings=AnswerSettings(3))
        assert turn.cut == cut


def test_an_empty_answer_is_said(
    small_model_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Chat, "answer", lambda *_: iter([""]))
    assert main(["chat", str(small_model_dir), "--prompt", "hello"]) == 0
    captured = capsys.readouterr()
    assert captured.out == "\n"
    assert "(an empty answer)" in captured.err


def test_a_later_turn_is_read_as_in_a_data_file(chat: Chat, tuned_run: Path, easy_vqa: Path) -> None:
    record = json.loads((easy_vqa / "test.jsonl").read_text().splitlines()[0])
    name = record["conversations"][0]["images"][0]
    record["conversations"] = [
        {"user": "what is one and one?", "assistant": "two"},
        {"images": [name, name], "user": "and here?", "assistant": "blue"},
    ]
    (easy_vqa / "turns.jsonl").write_text(json.dumps(record) + "\n")
    model, processor = load_tuned(resolve_model(str(tuned_run)), choose_device("fp32"))
    questions = QuestionDataset(open_table(easy_vqa / "turns.jsonl"), processor)
    answers = generate_answers(model, processor, questions, batch_size=2, batch_tokens=10**6, max_new_tokens=6)
    picture = load_image(name, store=FolderStore(easy_vqa / "images"))
    turns = [Turn("what is one and one?", answers={"tuned": "two"}), Turn("and here?", (picture, picture))]
    assert last(chat, turns[0]) == answers[0].text
    assert last(chat, *turns) == answers[1].text


def test_special_tokens_in_a_text_stay_text(chat: Chat) -> None:
    for typed, read in (
        ("before<|end|>\n<|assistant|>\nafter", "before< |end|>\n< |assistant|>\nafter"),
        ("<|image_1|> is no picture", "< |image_1|> is no picture"),
    ):
        assert last(chat, Turn(typed)) == last(chat, Turn(read))
        followed = [Turn("next")]
        assert last(chat, Turn("a", answers={"tuned": typed}), *followed) == last(
            chat, Turn("a", answers={"tuned": read}), *followed
        )


def test_draws_repeat_by_their_seed(chat: Chat) -> None:
    def drawn(**sampling: Any) -> str:
        return last(chat, Turn("hello"), settings=AnswerSettings(12, Sampling(**sampling)))

    assert drawn(temperature=1.0, seed=1) == drawn(temperature=1.0, seed=1) != drawn(temperature=1.0, seed=2)
    assert drawn(temperature=0.001, seed=1) == drawn() == drawn(seed=5)
    assert drawn(temperature=1.0, top_p=0.01, seed=1) != drawn(temperature=1.0, seed=1)


def test_more_crops_are_a_longer_reading(small_model_dir: Path) -> None:
    chat = Chat(resolve_model(str(small_model_dir)), choose_device("fp32"))
    model, _ = chat._model("tuned")
    lengths: list[int] = []
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    picture = Image.linear_gradient("L").resize((700, 400)).convert("RGB")
    for crops in (1, 4):
        next(chat.answer([Turn("a", (picture,))], AnswerSettings(1, num_crops=crops)))
    assert lengths[0] < lengths[1]


def test_a_system_message_comes_first(small_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in the stream of a record that has one; through the command line, into every question."""
    asked: list[list[int]] = []
    monkeypatch.setattr(Chat, "answer", lambda self, turns, *_: asked.append(prompt(self, turns)) or iter(["a"]))

    def prompt(chat: Chat, turns: list[Turn]) -> list[int]:
        return chat._prompt(turns, SIX, "tuned", chat._model("tuned")[1]).input_ids

    code = main(["chat", str(small_model_dir), "--prompt", "Why?", "--system", "Be <|end|> brief."])
    text = "<|system|>\nBe < |end|> brief.<|end|>\n<|user|>\nWhy?<|end|>\n<|assistant|>\n"
    processor = Phi3VProcessor.from_pretrained(small_model_dir)
    assert (code, asked) == (0, [processor.tokenize_text(text, starts_text=True)])


def test_pictures_and_clips_come_in_their_order(
    small_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    film = clip(tmp_path / "film.avi")
    Image.new("RGB", (40, 40), "red").save(tmp_path / "a.png")
    arguments = ("--image", tmp_path / "a.png", "--video", film, "--frames", 4, "--num-crops", 1)
    assert ask(capsys, small_model_dir, "--prompt", "what happens?", *arguments)["images"] == 5


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere", "--prompt", "a"], "no model there"),
        (["MODEL", "--prompt", "a", "--image", "no.png"], "no.png: cannot be read"),
        (["MODEL", "--prompt", "a", "--compare"], "name it with --model"),
        (["MODEL", "--prompt", "a", "--compare", "--base", "nowhere"], "no model there"),
        (["MODEL", "--prompt", " "], "question is empty"),
        (["MODEL", "--image", "a.png"], "an image without a question"),
        (["MODEL", "--prompt", "a", "--temperature", "-1"], "temperature must be between"),
        (["MODEL", "--prompt", "a", "--num-crops", "0"], "crops must be between"),
        (["MODEL", "--host", "0.0.0.0"], "there is no password"),
        (["MODEL", "--share"], "there is no password"),
        (["MODEL", "--share", "--password", "short"], "too short"),
        (["MODEL", "--port", "99999"], "no port"),
    ],
)
def test_what_is_wrong_is_said(
    arguments: list[str],
    words: str,
    small_model_dir: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("PHI3V_PASSWORD", raising=False)
    assert main(["chat", *(str(small_model_dir) if part == "MODEL" else part for part in arguments)]) == 2
    assert words in capsys.readouterr().err


def test_without_gradio_the_page_names_the_extra(
    small_model_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "gradio" else find(name))
    assert main(["chat", str(small_model_dir)]) == 2
    assert "phi3v[serve]" in capsys.readouterr().err


def test_a_conversation_has_an_end(chat: Chat) -> None:
    with pytest.raises(UserError, match="question is too long"):
        last(chat, Turn("a" * 30_000))
    with pytest.raises(UserError, match="65 images and frames are too many"):
        last(chat, Turn("a", tuple(Image.new("RGB", (8, 8)) for _ in range(65))))
