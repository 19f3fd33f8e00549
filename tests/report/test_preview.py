"""The preview of a data file: what it measures, shows and warns of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageDraw
from report_helpers import HOSTILE, OpenPage, block

from phi3v.cli import main
from phi3v.config import DataConfig, ModelConfig, RunConfig
from phi3v.data.check import check_file
from phi3v.processing.conversation import ChatTurn, encode_conversation
from phi3v.processing.processor import Phi3VProcessor
from phi3v.report import preview as preview_module
from phi3v.report.preview import preview
from phi3v.report.samples import IMAGE, SPECIAL, SUPERVISED, image_block, pieces


def write_data(folder: Path, records: list[dict[str, Any]]) -> Path:
    """A data file with two images: a wide one in two colours and a tall one."""
    images = folder / "images"
    images.mkdir(parents=True)
    wide = Image.new("RGB", (600, 300), "red")
    ImageDraw.Draw(wide).rectangle((300, 0, 600, 300), fill="blue")
    wide.save(images / "wide.png")
    Image.new("RGB", (200, 500), "green").save(images / "tall.png")
    file = folder / "data.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return file


def record(name: str, *turns: dict[str, Any]) -> dict[str, Any]:
    return {"id": name, "source": "test", "conversations": list(turns)}


def turn(user: str, assistant: str, *images: str) -> dict[str, Any]:
    return {"user": user, "assistant": assistant, **({"images": list(images)} if images else {})}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write_data(
        tmp_path / "data",
        [
            record("a", turn("Left colour?", "red", "wide.png"), turn("Right colour?", "blue")),
            record("b", turn("Which?", "green", "tall.png", "wide.png")),
            record("c", turn("No picture ✓", "red")),
            record("d", turn("Again?", "red", "tall.png")),
        ],
    )


def test_what_is_counted_and_measured(file: Path, tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    told = preview(file, out, samples=3, num_crops=4)
    held = block(out, "preview")
    assert told["records"] == told["measured"] == 4
    assert dict(held["answers"]) == {"red": 3, "blue": 1, "green": 1}
    assert held["images_of_records"] == [[0, 1], [1, 2], [2, 1]]
    assert dict(held["crops"]) == {"1 × 2": 2, "2 × 1": 2}
    tokens = next(histogram for histogram in held["histograms"] if histogram["title"] == "Tokens of a record")
    assert sum(tokens["counts"]) == 4
    assert (held["samples"][0]["id"], held["samples"][0]["longest"]) == ("b", True)
    assert "built-in tokenizer" in told["tokenizer"]
    assert any("60% of all answers are 'red'" in note for note in held["notes"])


def test_tokens_and_mask_are_those_of_training(tiny_model_dir: Path) -> None:
    processor = Phi3VProcessor.from_pretrained(tiny_model_dir, num_crops=4)
    turns = [ChatTurn("Grün?\n✓", "Ja, ✓✓", 1), ChatTurn("And\nnow?", "no")]
    stream = encode_conversation(processor.backend_tokenizer, turns, [757])
    found = pieces(processor, stream)
    assert sum(count for _, _, count, _ in found) == len(stream.input_ids)
    assert [piece[:3] for piece in found if piece[1] & IMAGE] == [["image 1", IMAGE, 757]]
    supervised = "".join(text for text, bits, _, _ in found if bits & SUPERVISED)
    assert supervised == " Ja, ✓✓<|end|> \n no<|end|> \n<|endoftext|>"
    assert sum(count for _, bits, count, _ in found if bits & SUPERVISED) == sum(
        label != -100 for label in stream.labels
    )
    special = {text for text, bits, _, _ in found if bits & SPECIAL}
    assert special == {"<s>", "<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>"}
    assert "Grün?" in "".join(text for text, _, _, _ in found)


def test_answers_are_shown_with_what_differs(tmp_path: Path) -> None:
    pair = turn("What is it?", "It is a small dog.") | {"rejected": "It is a cat.  It is a dog."}
    judged = [record("a", pair), record("b", turn("No?", "no") | {"label": False}), record("c", turn("No?", "no"))]
    preview(write_data(tmp_path / "data", judged), tmp_path / "page.html")
    held = block(tmp_path / "page.html", "preview")
    of = {sample["id"]: sample["judged"] for sample in held["samples"]}
    assert [answer["verdict"] for answer in of["a"]] == ["chosen", "rejected"]
    for answer, text in zip(of["a"], (pair["assistant"], pair["rejected"]), strict=True):
        assert "".join(part for part, _ in answer["parts"]) == text
        assert answer["score"] is None
    common = ["".join(part for part, differs in answer["parts"] if not differs) for answer in of["a"]]
    assert common[0] == common[1] != ""
    assert [(answer["verdict"], answer["parts"]) for answer in of["b"]] == [("bad", [["no", False]])]
    assert of["c"] == []
    assert (held["counts"]["with rejected answers"], held["counts"]["labelled bad"]) == (1, 1)
    assert any("what is learned may be the length" in note for note in held["notes"])


def test_an_image_is_shown_as_it_is_cut() -> None:
    from phi3v.processing.image_processor import Phi3VImageProcessor

    held = image_block("x", Image.new("RGB", (600, 300), "red"), Phi3VImageProcessor(num_crops=4), 500)
    assert (held["rows"], held["columns"], held["resized"], held["tokens"]) == (1, 2, (672, 336), 457)


def test_faults_are_shown_and_the_rest_is_too(file: Path, tmp_path: Path) -> None:
    with file.open("a", encoding="utf-8") as opened:
        opened.write('{"id": "e"}\n')
        opened.write(json.dumps(record("f", turn("Where?", "here", "gone.png"))) + "\n")
    out = tmp_path / "page.html"
    told = preview(file, out, samples=10)
    assert told["faults"] == 2
    held = block(out, "preview")
    assert [sample["id"] for sample in held["samples"]] == ["b", "a", "c", "d", "f"]
    assert "gone.png" in held["samples"][-1]["error"]
    assert any("conversations: is missing" in fault for fault in held["faults"])


def test_of_many_records_a_fair_part_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preview_module, "MEASURED", 30)
    file = write_data(tmp_path / "data", [record(str(k), turn(f"{k}?", str(k % 7))) for k in range(400)])
    contents = preview_module.Contents(preview_module.Random(1))
    check_file(file, image_level="off", on_record=contents.add)
    assert len(contents.records) == 30
    assert sum(record.line > 200 for record in contents.records) in range(6, 25)
    assert sum(contents.answers.values()) == 400


def test_the_command_line(file: Path, tmp_path: Path, tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "page.html"
    command = ["data", "preview", str(file), "--out", str(out), "--model.path", str(tiny_model_dir)]
    command += ["--model.num_crops", "2"]
    assert main([*command, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["bytes"] == out.stat().st_size
    assert block(out, "preview")["num_crops"] == 2
    assert main([*command, "--samples", "0"]) == 2
    assert main(["data", "preview", str(tmp_path / "none.jsonl"), "--out", str(out)]) == 2
    assert "no such file" in capsys.readouterr().err


def test_the_page_in_a_browser(tmp_path: Path, open_page: OpenPage) -> None:
    # Special tokens in texts are faults, so the hostile text has none of those; it has everything HTML knows.
    file = write_data(
        tmp_path / "data",
        [
            record(HOSTILE, turn(HOSTILE, HOSTILE, "wide.png") | {"rejected": "<b>No</b>"}),
            record("tall", turn("Which?", "green", "tall.png")),
            record(
                "pair", turn("Which?", "It is green.") | {"rejected": ["It is red.", "Blue"], "scores": [1, 0.25, 0]}
            ),
        ],
    )
    out = tmp_path / "page.html"
    preview(file, out, num_crops=2)
    page = open_page(out)
    assert page.evaluate("window.hacked") is None
    assert page.locator("h3 .mono").first.inner_text() == HOSTILE
    crops = page.locator(".sample").first.locator(".crop canvas")
    assert crops.count() == 2
    page.wait_for_selector(".crop canvas[width='336']")
    middle = "canvas => [...canvas.getContext('2d').getImageData(canvas.width / 2, canvas.height / 2, 1, 1).data]"
    left, right = crops.nth(0).evaluate(middle), crops.nth(1).evaluate(middle)
    assert left[0] > 200 > 60 > left[2]  # red and blue, but for what WebP loses
    assert right[2] > 200 > 60 > right[0]
    assert page.locator(".tokens .supervised").count() > 3
    answers = page.locator(".sample").nth(2).locator(".judged")
    heads = answers.locator("dt").all_inner_texts()
    assert [head.partition(" · ")[0] for head in heads] == ["chosen", "rejected", "rejected"]
    assert [head.rpartition(" · ")[2] for head in heads] == ["score 1", "score 0.25", "score 0"]
    assert answers.locator("dd").nth(1).inner_text() == "It is red."
    assert answers.locator("dd").nth(1).locator("mark").all_inner_texts() == ["red"]
    assert page.locator(".judged").count() == 2
    assert page.locator(".tokens .image").first.inner_text() == "image 1: 457 tokens"
    assert open_page(out, width=360).evaluate("document.documentElement.scrollWidth") == 360


@pytest.mark.parametrize("applied", [True, False])
def test_images_are_shown_as_the_run_reads_them(tmp_path: Path, small_model_dir: Path, applied: bool) -> None:
    file = write_data(tmp_path / "data", [record("a", turn("what?", "that", "turned.jpg"))])
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (60, 40)).save(file.parent / "images" / "turned.jpg", exif=exif)
    run = tmp_path / "run"
    run.mkdir()
    (run / "final").symlink_to(small_model_dir)
    config = RunConfig(model=ModelConfig(str(small_model_dir)), data=DataConfig(exif_orientation=applied))
    (run / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
    preview(file, tmp_path / "page.html", model=str(run))
    held = block(tmp_path / "page.html", "preview")
    assert held["samples"][0]["images"][0]["size"] == ([40, 60] if applied else [60, 40])
    kind = "turned by the EXIF orientation" if applied else "with an EXIF orientation that is not applied"
    assert f"Of the images 1 {kind}." in held["notes"]
