"""The report's page: what it holds, how large it gets, and that nothing in data becomes markup."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from report_helpers import HOSTILE, block, rewrite

from phi3v.cli import main
from phi3v.report import gallery as gallery_module
from phi3v.report.gallery import Thumbnails, class_scores, gallery
from phi3v.report.page import build_page
from phi3v.report.report import report
from phi3v.report.run_files import read_run
from report_page import make_run

TEMPLATES = Path(gallery_module.__file__).parent / "templates"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A made-up run. Read only."""
    return make_run(tmp_path_factory.mktemp("report") / "run", questions=200, pictures=40)


def test_the_page_holds_the_run(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    told = report([run], out=out)
    assert told["bytes"] == out.stat().st_size
    assert told["runs"][0]["predictions"] == 200
    [held] = block(out, "runs")["runs"]
    assert held["status"] == "finished"
    assert held["config"]["training.learning_rate"] == 4e-5
    assert held["environment"]["command"] == "phi3v train"
    measured = json.loads((run / "eval_after.json").read_text())
    assert measured["num_cut"] > 0
    for key in ("num_cut", "max_new_tokens", "most_frequent_answer", "scores"):
        assert held["evaluations"]["after"][key] == measured[key]
    data = block(out, "predictions")
    [columns] = data["galleries"]
    single = {"texts", "probabilities"}
    assert (
        len({len(column) for name, column in columns.items() if isinstance(column, list) and name not in single}) == 1
    )
    assert columns["images_note"] is None
    assert len(data["thumbnails"][0]) == 40


def test_columns_say_what_the_lines_say(run: Path) -> None:
    read = read_run(run)
    columns = gallery(read, Thumbnails(0))
    assert columns is not None
    texts = columns["texts"]
    for index, (after, before) in enumerate(zip(read.predictions["after"], read.predictions["before"], strict=True)):
        assert texts[columns["answers"][index]] == after["prediction"]
        assert texts[columns["before"][index]] == before["prediction"]
        assert [texts[number] for number in columns["references"][index]] == after["references"]
        assert columns["right"][index] == after["correct"]
        assert columns["right_before"][index] == before["correct"]
        assert columns["cut"][index] == after["cut"]


def test_images_stay_in_their_budget_and_are_drawn_from_every_kind(run: Path) -> None:
    read = read_run(run)
    whole = Thumbnails(10**9)
    gallery(read, whole)
    budget = whole.bytes // 4
    some = Thumbnails(budget)
    columns = gallery(read, some)
    assert columns is not None
    assert 0 < some.bytes <= budget
    assert "as its budget of bytes allows" in columns["images_note"]
    shown = [index for index, places in enumerate(columns["images"]) if places[0] >= 0]
    kinds = {(columns["right"][index], columns["right_before"][index]) for index in shown}
    assert kinds == {(0, 0), (0, 1), (1, 0), (1, 1)}


def test_images_outside_of_the_data_are_not_read(run: Path, tmp_path: Path) -> None:
    copy = make_run(tmp_path / "copy", questions=12, pictures=2)
    (copy / "secret.png").write_bytes((copy / "data" / "images" / "0.png").read_bytes())
    rewrite(copy / "predictions_after.jsonl", images=["../../secret.png", "missing.png"])
    thumbnails = Thumbnails(10**6)
    columns = gallery(read_run(copy), thumbnails)
    assert columns is not None
    assert thumbnails.encoded == []
    assert "2 images could not be read" in columns["images_note"]


def test_answers_that_are_few_make_a_confusion_matrix(run: Path) -> None:
    confusion = class_scores(read_run(run))["after"]
    assert sum(map(sum, confusion["counts"])) == 200
    assert confusion["columns"] == [*confusion["rows"], "other"]


def test_a_measured_confusion_matrix_is_taken_and_a_broken_one_is_not(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", questions=4, pictures=1)  # too few for classes of their own
    assert class_scores(read_run(folder)) == {}
    summary = json.loads((folder / "eval_after.json").read_text())
    whole = {"rows": ["a"], "columns": ["a", "other"], "counts": [[3, 1]]}
    for matrix, expected in ((whole, {"after": whole}), (whole | {"counts": [[3]]}, {}), ("x", {})):
        summary["scores"]["per_class_accuracy"] = {"value": 0.5, "confusion": matrix}
        (folder / "eval_after.json").write_text(json.dumps(summary))
        assert class_scores(read_run(folder)) == expected


def test_nothing_in_data_becomes_markup(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "<b>run", questions=12, pictures=2)
    rewrite(folder / "predictions_after.jsonl", id=HOSTILE, prompt=HOSTILE, prediction=HOSTILE, references=[HOSTILE])
    (folder / "log.txt").write_text(HOSTILE)
    (folder / "environment.json").write_text(json.dumps({HOSTILE: "\ud800" + HOSTILE}))
    out = tmp_path / "page.html"
    report([folder], out=out)
    text = out.read_text(encoding="utf-8")
    assert text.count("<script") == text.count("</script>") == 3
    assert "hacked" not in text
    assert "<b>" not in text
    assert "&lt;b&gt;run" in text


def test_pages_load_nothing_and_parse_no_text_as_html() -> None:
    page = build_page("x", ("page", "charts", "scores", "gallery", "report"), {"runs": {}})
    assert re.search(r"(?:src|href)=[\"']?https?:", page) is None
    assert "default-src 'none'" in page
    for script in TEMPLATES.glob("*.js"):
        source = script.read_text()
        for way in (
            "innerHTML",
            "outerHTML",
            "insertAdjacentHTML",
            "document.write",
            "eval(",
            "new Function",
            "fetch(",
        ):
            assert way not in source, f"{script.name} uses {way}"
        assert set(re.findall(r"https?://[^'\"]+", source)) <= {"http://www.w3.org/2000/svg"}


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    one, two = (make_run(tmp_path / name / "run", questions=5, pictures=1, seed=s) for s, name in enumerate("ab"))
    out = tmp_path / "both.html"
    report([one, two], out=out)
    assert [held["name"] for held in block(out, "runs")["runs"]] == ["a/run", "b/run"]


def test_the_command_line(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "page.html"
    assert main(["report", str(run), "--out", str(out), "--images", "0.01", "--json"]) == 0
    told: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert told["report"] == str(out)
    assert told["runs"][0]["after"] > told["runs"][0]["before"]
    assert sum(map(len, block(out, "predictions")["thumbnails"][0])) <= 10_000
    assert main(["report", str(run), str(run)]) == 2
    assert "is named twice" in capsys.readouterr().err
    assert main(["report", str(tmp_path / "none")]) == 2
    assert main(["report", str(run), "--out", "/dev/null/page.html"]) == 2
    assert "cannot be written" in capsys.readouterr().err
