"""Exports in compressed-tensors' layout in the real vLLM.

Its CPU build runs fp8. Of w4a16 it has a kernel where the CPU has AVX-512, of w8a16 none: those are loaded only, into
vLLM's own model, which is what names, shapes and the choice of layers depend on.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from phi3v.export.formats import FormatOptions
from phi3v.export.formats.compressed import is_quantised, make
from phi3v.export.serving import ask, drawn_conversations, find_vllm, own_answers, running_server
from phi3v.model.checkpoint import stored_tensors
from phi3v.processing.processor import Phi3VProcessor

# vLLM and our model sum in another order, and an input near the middle between two 8-bit floats is then rounded to
# the other one, an eighth away.
FP8_TOLERANCE = 5e-2


def made(model_dir: Path, folder: Path, name: str) -> Path:
    folder.mkdir()
    make(model_dir, folder, FormatOptions(name))
    return folder


@pytest.fixture(scope="module")
def one_rank() -> None:
    from vllm.distributed import init_distributed_environment
    from vllm.utils.network_utils import get_open_port

    init_distributed_environment(1, 0, f"tcp://127.0.0.1:{get_open_port()}", 0, backend="gloo")


@pytest.mark.parametrize("model_dir", ["small"], indirect=True)
@pytest.mark.parametrize("name", ["fp8", "w8a16", "w4a16"])
@pytest.mark.usefixtures("one_rank")
def test_vllm_loads_what_is_stored(name: str, model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every quantised tensor to the last bit, in fused layers too, and no layer of the tower is taken for quantised."""
    from vllm.config import set_current_vllm_config
    from vllm.distributed import ensure_model_parallel_initialized
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.kernels.linear.mixed_precision.cpu import CPUWNA16LinearKernel
    from vllm.model_executor.layers.quantization.compressed_tensors.schemes import compressed_tensors_wNa16
    from vllm.model_executor.model_loader.utils import initialize_model

    # Whether it has a kernel for 8 bits, which is asked when a layer is made, does not matter to loading.
    monkeypatch.setattr(compressed_tensors_wNa16, "choose_mp_linear_kernel", lambda config: CPUWNA16LinearKernel)
    # vLLM calls our plugin in this process, which is not for ours.
    monkeypatch.setattr(Phi3VProcessor, "default_chat_template", Phi3VProcessor.default_chat_template)
    folder = made(model_dir, tmp_path / name, name)
    config = EngineArgs(str(folder), dtype="float32", enforce_eager=True, max_model_len=4096).create_engine_config()
    stored = {name: tensor for _, name, tensor in stored_tensors(folder)}
    with set_current_vllm_config(config):
        ensure_model_parallel_initialized(1, 1)
        model = initialize_model(vllm_config=config)
        loaded = model.load_weights(stored.items())
    parameters = dict(model.named_parameters())
    layers = {name.rpartition(".")[0] for name in stored if is_quantised(f"{name.rpartition('.')[0]}.weight")}
    assert len(layers) == 8
    decoder = {
        name: f"language_model.{name}" for name in stored if name.startswith(("model.layers.", "lm_head", "model.norm"))
    }
    assert set(decoder.values()) <= loaded
    for name_here, name_there in decoder.items():
        there = parameters[name_there].data
        assert there.dtype == stored[name_here].dtype
        assert torch.equal(_bytes(there), _bytes(stored[name_here])), name_there
    schemes = {name for name, module in model.named_modules() if getattr(module, "scheme", None) is not None}
    assert schemes == {f"language_model.{layer}" for layer in layers}


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


@pytest.mark.parametrize("model_dir", ["small"], indirect=True)
def test_fp8_answers_as_our_own_model_does(model_dir: Path, pages: Path, tmp_path: Path) -> None:
    """Text alone and a wide page; both round weights, and inputs token by token."""
    folder = made(model_dir, tmp_path / "fp8", "fp8")
    conversations = drawn_conversations(pages)[:2]
    own: list[Any] = own_answers(folder, conversations)
    with running_server(find_vllm(None), folder, pages / "log", 4096) as url:
        served = [ask(url, messages) for messages in conversations]
    for ours, theirs in zip(own, served, strict=True):
        assert theirs.prompt == ours.prompt
        assert theirs.tokens == ours.tokens
        assert max(abs(a - b) for a, b in zip(theirs.logprobs, ours.logprobs, strict=True)) < FP8_TOLERANCE
