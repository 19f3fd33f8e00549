"""The hardware table: complete, consistent, and what a quota request must say."""

from __future__ import annotations

import pytest

from phi3v.errors import UserError
from phi3v.plan.hardware import GIB, azure_skus, find_gpu, find_machine, known_gpus, this_machine
from phi3v.train.device import choose_precision

WANTED = {
    "rtx-8000",
    "v100-16gb",
    "v100-32gb",
    "t4",
    "rtx-3090",
    "rtx-4090",
    "l40s",
    "a10",
    "a100-40gb",
    "a100-80gb",
    "h100",
    "h200",
    "b200",
    "mi300x",
}


def test_every_gpu_has_its_figures_and_their_source() -> None:
    gpus = known_gpus()
    assert set(gpus) >= WANTED
    for gpu in gpus.values():
        assert 10 < gpu.memory_bytes / GIB < 200
        assert gpu.tflops > 60
        assert gpu.bandwidth_gb_s > 300
        assert len(gpu.source) > 10


def test_fp16_on_cards_without_bf16_and_no_flash_attention_there() -> None:
    old = {key for key, gpu in known_gpus().items() if not gpu.bf16}
    assert old == {"rtx-8000", "v100-16gb", "v100-32gb", "t4"}
    for key in old:
        assert not known_gpus()[key].flash_attention
        assert choose_precision("auto", known_gpus()[key])[0] == "fp16"
    assert not known_gpus()["v100-32gb"].four_bit  # "QLoRA on Turing and newer"
    assert known_gpus()["t4"].four_bit


def test_azure_sizes_name_what_a_quota_request_must() -> None:
    series = {sku.series for sku in azure_skus().values()}
    assert series == {
        "ND A100 v4",
        "NDm A100 v4",
        "ND H100 v5",
        "ND H200 v5",
        "NC A100 v4",
        "NC H100 v5",
        "NDv2",
        "NCv3",
        "NCasT4 v3",
        "NVadsA10 v5",
    }
    for sku in azure_skus().values():
        assert sku.gpu in known_gpus()
        assert "family" in sku.family.lower()
        assert sku.vcpus >= 4
    machine = find_machine(None, None, "standard_nd96asr_v4", nodes=2)
    assert (machine.gpu.key, machine.gpus) == ("a100-40gb", 16)
    assert machine.quota is not None
    assert "'Standard NDASv4_A100 Family'" in machine.quota
    assert "192 for 2 nodes" in machine.quota


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"gpu": "a100-80"}, "a100-80gb"),
        ({"gpu": "8xh100", "gpus": 2}, "how many already"),
        ({"gpu": "0xh100"}, "at least one"),
        ({"gpu": None, "gpus": 2, "sku": "Standard_ND40rs_v2"}, "names its GPUs itself"),
        ({"gpu": None, "sku": "Standard_ND96asr_v5"}, "Standard_ND96asr_v4"),
    ],
)
def test_unknown_names_are_errors_that_say_the_nearest(arguments: dict[str, object], words: str) -> None:
    with pytest.raises(UserError, match=words):
        find_machine(**({"gpus": None} | arguments))  # type: ignore[arg-type]


def test_counts_and_this_machine() -> None:
    assert find_machine("8xA100-80GB", None).label == "8x NVIDIA A100 80 GB"
    assert find_machine("h100", 4).gpus == 4
    assert this_machine().gpu.memory_bytes > GIB
    assert choose_precision("auto", find_gpu("cpu"))[0] == "fp32"
