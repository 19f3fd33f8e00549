"""The chat page in a real browser."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sample_files import clip

from phi3v.serve.address import Address
from phi3v.serve.conversation import AnswerSettings, Chat
from phi3v.serve.examples import find_examples
from phi3v.serve.server import serve

pytest.importorskip("gradio", reason="needs the extra serve")

SUBMIT, STOP = '[data-testid="submit-button"]', "#question .stop-button"

EMPTY = "document.querySelectorAll('[data-testid=bot]').length == 0"


@pytest.fixture(scope="module")
def url(chat: Chat) -> Iterator[str]:
    examples = find_examples(chat.tuned)
    settings = AnswerSettings(max_new_tokens=12)
    with serve(chat, Address(), title="a run", settings=settings, frames=4, examples=examples) as served:
        yield served.urls[0]


@pytest.fixture(scope="module")
def opened(chromium: Any, url: str) -> Iterator[Any]:
    """The page, opened; it may ask no other server for anything and may meet no error of its own."""
    page = chromium.new_page()
    page.set_default_timeout(30_000)
    asked: set[str] = set()
    errors: list[str] = []
    page.on("request", lambda request: asked.add(request.url))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(url)
    page.wait_for_selector("#question textarea")
    yield page
    page.close()
    assert [address for address in asked if not address.startswith((url, "data:", "blob:"))] == []
    assert errors == []


@pytest.fixture
def page(opened: Any) -> Iterator[Any]:
    """The page with nothing asked. Opening it anew would cost seconds."""
    yield opened
    opened.fill("#question textarea", "")
    for file in range(opened.locator("#question .delete-button").count()):
        opened.locator("#question .delete-button").nth(file).click()
    if opened.is_checked("#compare input"):
        opened.uncheck("#compare input")  # which clears too
    elif answers(opened):
        opened.click('#tuned [aria-label="Clear"]')
    opened.wait_for_function(EMPTY)


CUT = "(cut at 12 tokens"


def clear(page: Any) -> None:
    page.click('#tuned [aria-label="Clear"]')
    page.wait_for_function(EMPTY)


def ask(page: Any, text: str, *files: Path) -> None:
    if files:
        page.set_input_files("#question input[type=file]", [str(file) for file in files])
        page.wait_for_function(
            f"document.querySelectorAll('#question .thumbnail-item').length == {len(files)}"
            " && !document.querySelector('#question .uploading')"
        )
    page.fill("#question textarea", text)
    page.click(SUBMIT)


def answers(page: Any, which: str = "tuned") -> list[str]:
    """What is said, without the marks of answers that were cut."""
    texts = [text.strip() for text in page.locator(f"#{which} [data-testid=bot]").all_inner_texts()]
    return [text for text in texts if CUT not in text]


def finished(page: Any, turns: int, which: str = "tuned") -> list[str]:
    """The answers once there are so many and nothing is being written."""
    bubbles = f"[...document.querySelectorAll('#{which} [data-testid=bot]')]"
    page.wait_for_function(f"{bubbles}.filter(bubble => !bubble.innerText.includes('{CUT}')).length == {turns}")
    page.wait_for_selector(SUBMIT)
    return answers(page, which)


def test_a_conversation_about_a_picture(page: Any, easy_vqa: Path) -> None:
    ask(page, "what is in the picture?", next((easy_vqa / "images").rglob("*.png")))
    (first,) = finished(page, 1)
    assert first
    assert CUT in page.inner_text("#tuned")
    assert page.locator("#tuned [data-testid=user] img").count() == 1
    ask(page, "and its color?")
    assert finished(page, 2)[0] == first
    assert not page.is_visible("#base")
    clear(page)
    page.locator("#offers button.gallery-item").first.click()
    page.wait_for_selector("#question .thumbnail-item")
    page.click(SUBMIT)
    finished(page, 1)


def test_side_by_side_about_a_clip(page: Any, tmp_path: Path) -> None:
    page.check("#compare input")
    page.wait_for_selector("#base")
    ask(page, "what happens?", clip(tmp_path / "film.mp4"))
    (tuned,), (base,) = finished(page, 1), finished(page, 1, "base")
    assert tuned != base
    frames = page.locator("#base [data-testid=user] img")
    assert frames.count() == 1
    assert frames.evaluate("image => image.naturalWidth") > 4 * 48


def test_an_answer_streams_in_and_can_be_stopped(page: Any, chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    def slowly(turns: Any, settings: AnswerSettings, which: str = "tuned") -> Iterator[str]:
        for number in range(1, 2000):
            time.sleep(0.02)
            yield " ".join(map(str, range(1, number)))

    monkeypatch.setattr(chat, "answer", slowly)
    ask(page, "count")
    for reached in (" 10", " 20"):  # it is seen while it grows
        page.wait_for_function(
            "words => document.querySelector('#tuned [data-testid=bot]')?.innerText.includes(words)", arg=reached
        )
    page.click(STOP)
    page.wait_for_selector(SUBMIT)
    (stopped,) = answers(page)
    monkeypatch.undo()
    ask(page, "and now?")
    later = finished(page, 2)
    assert later[0].startswith(stopped[:20])
    assert len(later[0].split()) < 1000


def test_what_goes_wrong_is_said_kindly(page: Any, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"no picture")
    ask(page, "what is this?", tmp_path / "broken.png")
    said = page.locator(".toast-body").first
    said.wait_for()
    assert "is not an image" in said.inner_text()
    assert "Traceback" not in page.content()
    assert answers(page) == []
    assert page.input_value("#question textarea") == "what is this?"
