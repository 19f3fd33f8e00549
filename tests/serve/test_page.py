"""The chat page over HTTP: what it gives, and what it keeps."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from sample_files import image_bytes

from phi3v.serve.address import Address
from phi3v.serve.conversation import AnswerSettings, Chat, Turn
from phi3v.serve.examples import find_examples
from phi3v.serve.limits import LIMITS
from phi3v.serve.server import ServedPage, serve

pytest.importorskip("gradio", reason="needs the extra serve")

from phi3v.serve.page import Session


@pytest.fixture(scope="module")
def page(chat: Chat) -> Iterator[ServedPage]:
    """The page of the run, open to this machine."""
    chat.limits = replace(LIMITS, file_mb=0.1)
    settings = AnswerSettings(max_new_tokens=6)
    examples = find_examples(chat.tuned)
    with serve(chat, Address(), title="a run", settings=settings, frames=4, examples=examples) as served:
        yield served
    chat.limits = LIMITS


@pytest.fixture
def client(page: ServedPage) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=page.urls[0], timeout=30) as client:
        yield client


def upload(client: httpx.Client, content: bytes, name: str = "a.png") -> httpx.Response:
    return client.post("/gradio_api/upload", files={"files": (name, content)})


def submit(client: httpx.Client, question: dict[str, Any]) -> dict[str, Any]:
    """What the page's first event says to a question, as the browser would send it; the last message of its stream."""
    config = client.get("/config").json()
    event = next(each for each in config["dependencies"] if [target[1] for target in each["targets"]] == ["submit"])
    joined = {"data": [question, None, 4], "fn_index": event["id"], "session_hash": "test"}
    assert client.post("/gradio_api/queue/join", json=joined).status_code == 200
    with client.stream("GET", "/gradio_api/queue/data", params={"session_hash": "test"}) as stream:
        for line in stream.iter_lines():
            message = json.loads(line.removeprefix("data: ")) if line.startswith("data: ") else {}
            if message.get("msg") == "process_completed":
                return dict(message)
    raise AssertionError("no answer")


def test_no_path_of_the_server_is_readable(client: httpx.Client, tuned_run: Path, easy_vqa: Path) -> None:
    secrets = [
        Path("/etc/passwd"),
        tuned_run / "config.yaml",
        tuned_run / "final" / "adapter_model.safetensors",
        next((easy_vqa / "images").rglob("*.png")),
        Path(__file__),
    ]
    for path in secrets:
        assert path.exists()
        for url in (
            f"/gradio_api/file={path}",
            f"/gradio_api/file=//{path}",
            f"/gradio_api/file/{path}",
            f"/file={path}",
            f"/gradio_api/file={tempfile.gettempdir()}/phi3v-chat-x/../../{path}",
            f"/gradio_api/file=%2e%2e%2f%2e%2e{path}",
            f"/static/..%2f..%2f..{path}",
            f"/assets/../../../../../../../../..{path}",
            f"/gradio_api/custom_component/1/client/component/..%2f..%2f{path}",
        ):
            assert client.get(url).status_code in (403, 404, 405, 422), url


def test_it_fetches_nothing_and_answers_to_its_own_name_alone(client: httpx.Client, page: ServedPage) -> None:
    assert client.get("/").status_code == 200
    assert client.get("/", headers={"Host": f"localhost:{page.port}"}).status_code == 200
    for url in ("file=http://127.0.0.1/", "file=https://example.com/a.png", "proxy=https://example.com/"):
        assert client.get(f"/gradio_api/{url}").status_code == 403
    assert client.get("/", headers={"Host": f"example.com:{page.port}"}).status_code == 403
    assert client.get("/monitoring").status_code in (403, 404)


def test_a_question_cannot_name_a_file_that_was_not_uploaded(client: httpx.Client, tuned_run: Path) -> None:
    for path in ("/etc/passwd", str(tuned_run / "config.yaml"), "../../etc/passwd"):
        file = {"path": path, "meta": {"_type": "gradio.FileData"}}
        done = submit(client, {"text": "what is this?", "files": [file]})
        assert done["success"] is False
        assert "root:" not in json.dumps(done)


def test_an_upload_is_limited_and_read_as_what_it_is(client: httpx.Client) -> None:
    assert upload(client, b"0" * 200_000).status_code == 413
    for content, words in ((b"no picture", "is not an image"), (image_bytes(1)[:60], "is truncated")):
        response = upload(client, content)
        assert response.status_code == 200
        file = {"path": response.json()[0], "meta": {"_type": "gradio.FileData"}}
        done = submit(client, {"text": "what is this?", "files": [file]})
        assert done["success"] is False
        assert words in done["output"]["error"]
        assert "Traceback" not in json.dumps(done)


def test_the_examples_are_copies(client: httpx.Client, page: ServedPage, tuned_run: Path, easy_vqa: Path) -> None:
    text = client.get("/config").text
    prompts = {json.loads(line)["prompt"] for line in (tuned_run / "predictions_after.jsonl").read_text().splitlines()}
    assert any(prompt in text for prompt in prompts)
    assert str(easy_vqa) not in text
    assert str(tuned_run) not in text


def test_a_password_is_asked_for_before_anything(chat: Chat) -> None:
    before = set(Path(tempfile.gettempdir()).glob("phi3v-chat-*"))
    settings = AnswerSettings(max_new_tokens=4)
    address = Address("0.0.0.0", password="long enough")
    with (
        serve(chat, address, title="a run", settings=settings, frames=4) as served,
        httpx.Client(base_url=f"http://127.0.0.1:{served.port}", timeout=30) as client,
    ):
        (own,) = set(Path(tempfile.gettempdir()).glob("phi3v-chat-*")) - before
        (own / "note.txt").write_text("a picture that somebody uploaded")
        closed = ["/config", "/gradio_api/info", f"/gradio_api/file={own}/note.txt", "/gradio_api/queue/data"]
        for url in closed:
            assert client.get(url).status_code == 401, url
        assert upload(client, image_bytes(1)).status_code == 401
        wrong = {"username": "phi3v", "password": "wrong"}
        assert client.post("/login", data=wrong).status_code == 400
        assert client.get("/config").status_code == 401
        assert client.post("/login", data=wrong | {"password": "long enough"}).status_code == 200
        assert client.get("/config").status_code == 200
        assert client.get(f"/gradio_api/file={own}/note.txt").status_code == 200
    assert not own.exists()


def test_an_answer_that_was_cut_is_marked() -> None:
    turns = [Turn("a", answers={"tuned": "x", "base": "y"}, cut={"tuned": 6})]
    shown = {which: Session(turns, [[]]).messages(which)[-1]["content"] for which in ("tuned", "base")}
    assert [part["text"] for part in shown["tuned"]] == ["x", "(cut at 6 tokens; Settings allow more)"]
    assert [part["text"] for part in shown["base"]] == ["y"]
