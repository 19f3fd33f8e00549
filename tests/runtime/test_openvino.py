"""OpenVINO graphs of the trained tiny base against the model itself, and answering with them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image

from phi3v.errors import UserError
from phi3v.model.modeling import Phi3VForCausalLM
from phi3v.processing.hd_transform import flatten_pages
from phi3v.runtime import Runtime, load_runtime

Page = npt.NDArray[np.uint8]

# float32 on both sides, and logits reach 20: kernels add in other orders.
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def runtime(openvino_dir: Path) -> Runtime:
    return load_runtime(openvino_dir)


@pytest.fixture(scope="module")
def model(trained_dir: Path) -> Phi3VForCausalLM:
    loaded: Phi3VForCausalLM = Phi3VForCausalLM.from_pretrained(trained_dir, dtype=torch.float32).eval()
    return loaded


def page(rows: int, columns: int) -> Page:
    """Another colour in every crop."""
    colours = np.random.default_rng(rows).integers(0, 256, (rows, 1, columns, 1, 3), dtype=np.uint8)
    return colours.repeat(336, 1).repeat(336, 3).reshape(336 * rows, 336 * columns, 3)


def last_logits(model: Phi3VForCausalLM, ids: Sequence[int], pages: Sequence[Page], count: int) -> npt.NDArray[Any]:
    images: dict[str, Any] = {}
    if pages:
        images["pages"] = flatten_pages([torch.from_numpy(page) for page in pages])
        images["image_sizes"] = [page.shape[:2] for page in pages]
    with torch.no_grad():
        logits: npt.NDArray[Any] = model(torch.tensor([list(ids)]), logits_to_keep=count, **images).logits[0].numpy()
    return logits


@pytest.mark.parametrize(
    ("text", "grids"),
    [
        ("what is 2+2?", []),
        ("what color is the shape?", [(1, 1)]),
        ("what color is the shape?", [(1, 2)]),
        ("what color is the shape?", [(2, 1)]),
        ("what color is the shape?", [(4, 4)]),
        ("is <|image_1|> as <|image_2|>?", [(1, 2), (2, 1)]),
    ],
)
def test_the_graphs_compute_what_the_model_does(
    text: str, grids: list[tuple[int, int]], runtime: Runtime, model: Phi3VForCausalLM
) -> None:
    """A prompt on either side of LongRoPE's switch, and an answer after it token by token."""
    pages = [page(*grid) for grid in grids]
    ids, answer = runtime.prompt(text, pages), runtime.tokenizer.encode("a red circle", add_special_tokens=False).ids
    logits = [runtime.start(ids, pages), *(runtime.step(token) for token in answer)]
    expected = last_logits(model, [*ids, *answer], pages, len(answer) + 1)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=TOLERANCE)


def test_an_answer_that_crosses_the_switch_runs_again(
    runtime: Runtime, model: Phi3VForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And going on with keys of the short factors would have been seen."""
    pages, limit = [page(1, 1)], runtime.config.long_context_start
    ids = runtime.prompt("what color is the shape? " * 40, pages)
    ids = ids[: limit - 1 - 6] + ids[-6:]
    assert len(ids) == limit - 1

    def run() -> npt.NDArray[Any]:
        return np.array([runtime.start(ids, pages), *(runtime.step(token) for token in answer)])

    answer = ids[-20:-15]
    logits = run()
    short = last_logits(model, [*ids, answer[0]], pages, 2)
    long = last_logits(model, [*ids, *answer], pages, len(answer) - 1)
    np.testing.assert_allclose(logits, [*short, *long], rtol=0, atol=TOLERANCE)
    monkeypatch.setattr(runtime, "config", replace(runtime.config, long_context_start=10 * limit))
    assert np.abs(run()[2:] - long).max() > 100 * TOLERANCE


def test_neither_torch_nor_transformers_is_needed(openvino_dir: Path, runtime: Runtime, tmp_path: Path) -> None:
    """Nor is OpenVINO's telemetry imported, which would send that it is used."""
    Image.new("RGB", (90, 400), "red").save(tmp_path / "image.png")
    code = (
        "import sys; blocked = ('torch', 'transformers', 'openvino_telemetry')\n"
        "sys.modules.update(dict.fromkeys(blocked[:2]))\n"
        "from phi3v.runtime import load_runtime\n"
        "print(load_runtime(sys.argv[1]).answer('what color is the shape?', [sys.argv[2]], max_new_tokens=5))\n"
        "assert not any(sys.modules.get(name) for name in blocked)"
    )
    command = [sys.executable, "-c", code, str(openvino_dir), str(tmp_path / "image.png")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    expected = runtime.answer("what color is the shape?", [tmp_path / "image.png"], max_new_tokens=5)
    with pytest.raises(UserError, match="at least one token"):
        runtime.answer("what color is the shape?", max_new_tokens=0)
    assert done.stdout.strip() == expected != ""
