"""The report as a person uses it, in a real browser."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from report_helpers import HOSTILE, OpenPage, rewrite

from phi3v.report.report import report, write_report
from phi3v.report.run_files import read_run
from report_page import make_run


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two made-up runs of 200 questions. Read only."""
    folder = tmp_path_factory.mktemp("runs")
    names = ("first", "second")
    return [make_run(folder / name, questions=200, pictures=20, seed=seed) for seed, name in enumerate(names)]


@pytest.fixture(scope="module")
def page_file(runs: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("page") / "report.html"
    report(runs[:1], out=out)
    return out


def cards(page: Any) -> list[str]:
    return page.locator(".prediction").evaluate_all("cards => cards.map(card => card.dataset.id)")


def count(page: Any) -> int:
    return int(page.locator("#predictions [role=status]").inner_text().split(" of ")[0].replace(",", ""))


def test_predictions_are_filtered_sorted_and_searched(runs: list[Path], page_file: Path, open_page: OpenPage) -> None:
    page = open_page(page_file)
    read = read_run(runs[0]).predictions
    was = {line["id"]: line["correct"] for line in read["before"]}
    right = {line["id"] for line in read["after"] if line["correct"]}
    expected = {
        "right": right,
        "wrong": set(was) - right,
        "changed": {name for name in was if was[name] != (name in right)},
        "gained": {name for name in right if not was[name]},
        "lost": {name for name in was if was[name] and name not in right},
        "cut": {line["id"] for line in read["after"] if line["cut"]},
    }
    assert count(page) == 200
    assert page.locator("#scores").get_by_text("always “").count() == 1
    assert page.locator("#scores").get_by_text("were cut at 64 tokens").count() == 2
    assert not {"null", "undefined", "NaN"} & set(page.locator("main").inner_text().split())
    tabs = page.get_by_role("group", name="which predictions")
    for name, ids in expected.items():
        tabs.locator(f"[data-value={name}]").click()
        assert count(page) == len(ids), name
        assert set(cards(page)) <= ids, name
    tabs.locator("[data-value=all]").click()
    page.get_by_label("sort predictions").select_option("worst")
    assert not set(cards(page)) & right
    page.get_by_label("sort predictions").select_option("up")
    assert set(cards(page)) <= expected["gained"]
    page.get_by_label("search predictions").fill("TEST-000123")
    page.locator("#predictions [role=status]").get_by_text("1 of 200").wait_for()
    assert cards(page) == ["test-000123"]
    page.get_by_label("search predictions").fill("nothing like this")
    page.get_by_text("No prediction fits these filters.").wait_for()


def test_only_one_page_of_cards_exists_and_pages_turn(page_file: Path, open_page: OpenPage) -> None:
    page = open_page(page_file)
    first = cards(page)
    assert len(first) == 48
    page.get_by_role("button", name="Next").click()
    assert cards(page)[0] == "test-000048"
    page.get_by_role("button", name="last page").click()
    assert len(cards(page)) == 200 % 48
    assert page.get_by_role("button", name="Next").is_disabled()


def test_a_prediction_opens_and_the_keyboard_goes_on(page_file: Path, open_page: OpenPage) -> None:
    page = open_page(page_file)
    page.locator(".prediction").first.focus()
    page.keyboard.press("Enter")
    dialog = page.get_by_role("dialog")
    dialog.get_by_text("test-000000").wait_for()
    assert dialog.locator("img").evaluate("image => image.decode().then(() => image.naturalWidth)") > 0
    page.keyboard.press("ArrowRight")
    dialog.get_by_text("test-000001").wait_for()
    page.keyboard.press("Escape")
    assert not dialog.is_visible()


def test_a_cell_of_the_confusion_matrix_shows_its_questions(page_file: Path, open_page: OpenPage) -> None:
    page = open_page(page_file)
    cell = page.locator("table.matrix td:not(:empty)").first
    wanted = int(cell.inner_text())
    cell.click()
    assert count(page) == wanted
    page.get_by_role("button", name="show all", exact=True).click()
    assert count(page) == 200


def test_colours_follow_the_system_and_the_button(page_file: Path, open_page: OpenPage) -> None:
    ground = "getComputedStyle(document.body).backgroundColor"
    light = open_page(page_file).evaluate(ground)
    page = open_page(page_file, scheme="dark")
    dark = page.evaluate(ground)
    assert light != dark
    button = page.get_by_label("colour theme")
    button.click()
    assert (button.inner_text(), page.evaluate(ground)) == ("☀ light", light)
    button.click()
    assert (button.inner_text(), page.evaluate(ground)) == ("☾ dark", dark)
    page.reload()
    page.wait_for_selector("html[data-ready]")
    assert button.inner_text() == "☾ dark"


def test_curves_zoom_read_out_and_smooth(page_file: Path, open_page: OpenPage) -> None:
    page = open_page(page_file)
    chart = page.locator("#curves .chart").first
    plot, reset = chart.locator("svg"), page.get_by_role("button", name="Show all", exact=True)
    before = chart.locator("path").first.get_attribute("d")
    plot.scroll_into_view_if_needed()
    box = plot.bounding_box()
    page.mouse.move(box["x"] + box["width"] * 0.4, box["y"] + 80)
    assert "step" in chart.locator(".tip").inner_text()
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.6, box["y"] + 80, steps=4)
    page.mouse.up()
    assert chart.locator("path").first.get_attribute("d") != before
    low, high = (int(step) for step in page.locator("output").inner_text().removeprefix("steps ").split(" to "))
    assert 50 < low < high < 150
    assert reset.is_enabled()
    plot.dblclick()
    assert chart.locator("path").first.get_attribute("d") == before
    page.mouse.move(2, 2)
    plot.focus()
    page.keyboard.press("ArrowRight")
    assert chart.locator(".tip").inner_text().startswith("step 1\n")
    page.keyboard.press("+")
    assert reset.is_enabled()
    page.keyboard.press("0")
    assert reset.is_disabled()
    assert chart.locator("path").count() == 1
    page.get_by_label("smooth", exact=True).check()
    assert chart.locator("path").count() == 2
    page.get_by_role("button", name="Time", exact=True).click()
    plot.focus()
    page.keyboard.press("ArrowLeft")
    assert "min" in chart.locator(".tip").inner_text()


def test_runs_are_compared(runs: list[Path], tmp_path: Path, open_page: OpenPage) -> None:
    out = tmp_path / "both.html"
    report(runs, out=out)
    page = open_page(out)
    assert page.locator("#compared tbody tr").count() == 2
    differences = page.locator("#differences tbody th").all_inner_texts()
    assert "training.learning_rate" in differences
    assert "training.seed" not in differences
    loss = page.locator("#curves .chart").first
    assert loss.locator("path").count() == 2
    page.locator("#curves").get_by_label("second").uncheck()
    assert loss.locator("path").count() == 1
    answers = page.locator(".prediction").first.inner_text()
    page.get_by_role("group", name="which run").get_by_text("second").click()
    assert page.locator(".prediction").first.inner_text() != answers


def test_hostile_texts_stay_texts(tmp_path: Path, open_page: OpenPage) -> None:
    folder = make_run(tmp_path / "<img src=x onerror=hacked=1>", questions=12, pictures=2, metric="<b>score</b>")
    rewrite(folder / "predictions_after.jsonl", prompt=HOSTILE, prediction=HOSTILE, references=[HOSTILE])
    rewrite(folder / "predictions_after.jsonl", images=[HOSTILE], probabilities={HOSTILE: 0.5})
    (folder / "log.txt").write_text(HOSTILE)
    report([folder], out=tmp_path / "page.html")
    page = open_page(tmp_path / "page.html")
    assert page.evaluate("window.hacked") is None
    assert page.locator(".prompt").first.inner_text() == HOSTILE
    page.locator(".prediction").first.click()
    assert page.get_by_role("dialog").locator(".prompt").inner_text() == HOSTILE
    assert page.evaluate("window.hacked") is None
    assert page.locator("main b").count() == 0


def test_a_partial_report_says_so_and_one_of_a_running_run_too(tmp_path: Path, open_page: OpenPage) -> None:
    folder = make_run(tmp_path / "run", questions=12, pictures=2)
    for name in ("eval_before.json", "eval_after.json", "predictions_before.jsonl", "predictions_after.jsonl"):
        (folder / name).unlink()
    (folder / "config.yaml").write_text("[")
    run = read_run(folder)
    run.status = "running"
    write_report([run], tmp_path / "page.html")
    page = open_page(tmp_path / "page.html")
    assert "config.yaml is damaged" in page.locator(".note").first.inner_text()
    assert page.get_by_role("button", name="Reload").is_visible()
    assert "once the run has ended" in page.locator("#predictions").inner_text()


def test_it_fits_a_phone(page_file: Path, open_page: OpenPage) -> None:
    page = open_page(page_file, width=360)
    assert page.evaluate("document.documentElement.scrollWidth") == 360


def test_fifty_thousand_predictions(tmp_path: Path, open_page: OpenPage) -> None:
    folder = make_run(tmp_path / "run", questions=50_000, pictures=50)
    report([folder], out=tmp_path / "page.html", image_budget=100_000)
    assert (tmp_path / "page.html").stat().st_size < 5_000_000  # measured: 2.2 MB
    page = open_page(tmp_path / "page.html")
    assert count(page) == 50_000
    assert len(cards(page)) == 48
    page.get_by_label("search predictions").fill("test-049999")
    page.locator("#predictions [role=status]").get_by_text("1 of 50,000").wait_for()
    assert cards(page) == ["test-049999"]
