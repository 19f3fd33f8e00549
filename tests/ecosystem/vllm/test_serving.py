"""The real `vllm serve` answers over HTTP as our own model does: the same prompts, tokens and log-probabilities."""

from __future__ import annotations

import json
from pathlib import Path

import openai
import pytest

from phi3v.cli import main
from phi3v.export.proof import NEW_TOKENS
from phi3v.export.serving import (
    TOLERANCE,
    Answer,
    ask,
    data_url,
    drawn_conversations,
    find_vllm,
    own_answers,
    running_server,
)


@pytest.mark.parametrize("model_dir", ["official", "small"], indirect=True)
def test_serve_check(model_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """None, one and two images, wide and tall pages, two turns."""
    assert main(["export", "--verify", str(model_dir), "--serve-check", "--json"]) == 0
    served = json.loads(capsys.readouterr().out)["served"]
    assert served["version"].startswith("0.")
    assert served["equal"] == served["questions"] == 5
    # The order of float32 sums.
    assert served["worst"] < 2e-5


@pytest.mark.parametrize("model_dir", ["small"], indirect=True)
def test_a_client_of_openai_gets_our_answer(model_dir: Path, pages: Path) -> None:
    messages = drawn_conversations(pages)[1]
    (own,) = own_answers(model_dir, [messages])
    assert own is not None
    path, text = messages[0]["content"][0]["path"], messages[0]["content"][1]
    with running_server(find_vllm(None), model_dir, pages / "log", 4096) as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
        found = client.chat.completions.create(
            model=str(model_dir),
            messages=[
                {"role": "user", "content": [{"type": "image_url", "image_url": {"url": data_url(Path(path))}}, text]}
            ],
            temperature=0,
            max_completion_tokens=NEW_TOKENS,
            extra_body={"return_token_ids": True},
        )
    assert found.choices[0].token_ids == own.tokens


@pytest.mark.parametrize("model_dir", ["small"], indirect=True)
def test_above_4096_all_answers_change(model_dir: Path, pages: Path) -> None:
    """vLLM then takes LongRoPE's long factors for every prompt."""
    messages = drawn_conversations(pages)[0]
    (own,) = own_answers(model_dir, [messages])
    assert own is not None
    with running_server(find_vllm(None), model_dir, pages / "log", 8192) as url:
        served: Answer = ask(url, messages)
    assert served.prompt == own.prompt
    assert abs(served.logprobs[0] - own.logprobs[0]) > TOLERANCE
