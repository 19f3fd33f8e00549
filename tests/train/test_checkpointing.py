"""Recomputed activations: which, when, and that they change no number."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from ranks import run_ranks
from rich.console import Console
from run_helpers import Train, load
from torch.utils._python_dispatch import TorchDispatchMode

from phi3v.config import LoraConfig, MethodConfig, RunConfig, load_config
from phi3v.data.collate import Collator
from phi3v.data.rows import RowDataset
from phi3v.data.table import open_table
from phi3v.model.presets import preset_config
from phi3v.model.shape import ModelShape
from phi3v.processing.processor import Phi3VProcessor
from phi3v.train import prepare as run_setup
from phi3v.train.collectives import HostCollectives
from phi3v.train.compute.activations import Activations, Gradients, MicroBatch, Policy
from phi3v.train.compute.checkpointing import apply_checkpointing, choose_checkpointing
from phi3v.train.device import choose_device
from phi3v.train.engines import data_parallel

POLICIES: tuple[Policy, ...] = get_args(Policy)


@pytest.fixture
def batch(easy_vqa: Path, small_model_dir: Path) -> dict[str, Any]:
    processor = Phi3VProcessor.from_pretrained(small_model_dir)
    dataset = RowDataset(open_table(easy_vqa / "train.jsonl"), processor)
    batch = Collator(processor.tokenizer.pad_token_id)([dataset.samples((0,))[0], dataset.samples((1,))[0]])
    del batch["counts"]
    return batch


class Operations(TorchDispatchMode):
    """Counts what runs."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count[str(func.overloadpacket)] += 1
        return func(*args, **(kwargs or {}))


def gradients(model: Any, batch: dict[str, Any], policy: Any) -> tuple[float, dict[str, torch.Tensor], Counter[str]]:
    apply_checkpointing(model, policy)
    model.zero_grad()
    torch.manual_seed(3)  # LoRA's dropout
    loss = model(**batch, logits_to_keep=None, use_cache=False).loss
    with Operations() as seen:
        loss.backward()
    return loss.item(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}, seen.count


@pytest.mark.parametrize("name", ["full", "lora", "qlora"])
def test_every_policy_gives_the_same_loss_and_gradients(
    small_model_dir: Path, batch: dict[str, Any], name: Any
) -> None:
    """1e-6 of the largest entry: the same float32 operations run again on the same numbers."""
    model = load(small_model_dir, MethodConfig(name, lora=LoraConfig(rank=4, dropout=0.1))).train()
    if name != "full":  # LoRA's B starts at zero, which would hide A's gradients
        for parameter in (p for n, p in model.named_parameters() if ".lora_B." in n):
            torch.nn.init.normal_(parameter, std=0.02)
    loss, expected, plain = gradients(model, batch, "none")
    assert len(expected) == sum(p.requires_grad for p in model.parameters())
    forward_products: dict[str, int] = {}
    found = {}
    for policy in POLICIES[1:]:
        own_loss, own, ran = gradients(model, batch, policy)
        assert own_loss == pytest.approx(loss, rel=1e-6)
        assert own.keys() == expected.keys()
        for key, gradient in expected.items():
            atol = 1e-6 * float(gradient.abs().max()) + 1e-9
            torch.testing.assert_close(own[key], gradient, atol=atol, rtol=0, msg=f"{policy}: {key}")
        forward_products[policy] = (ran - plain)["aten.mm"] + (ran - plain)["aten.addmm"]
        found[policy] = own_loss, own, ran
    # Bit-equal. Back come the inputs of all layers but the last, which is still there, and an adapted tower's first,
    # which gets no gradient.
    (loss, full, ran), (own_loss, own, moved) = found["full"], found["offload"]
    assert own_loss == loss
    assert all(torch.equal(own[key], gradient) for key, gradient in full.items())
    shape = ModelShape.of(model.config)
    assert (moved - ran)["aten.copy_"] == shape.layers + shape.tower_layers - (1 if name == "full" else 2)
    # Of the decoder's products selective runs adapters' second ones again, which are narrow, and full all of them.
    narrow = sum("model.layers." in key and ".lora_B." in key for key in expected)
    assert 0 <= forward_products["selective"] - forward_products["vision"] <= narrow
    assert forward_products["full"] > forward_products["selective"] > 0


PAGE = MicroBatch(rows=1, tokens=2509, image_tokens=2480, crops=17, answer_tokens=20)


def activations(**settings: Any) -> Activations:
    return Activations(
        ModelShape.of(preset_config("phi-3.5-vision")),
        **{
            "gradients": Gradients(tower_trained=True, norms_trained=True, adapters=(0, 0)),
            "compute_bytes": 2,
            "residual_bytes": 4,
            "attention": "flash_attention_2",
            "packing": "none",
            "adapter_rank": None,
        }
        | settings,
    )


def test_recomputing_more_needs_less() -> None:
    needs = [activations().peak(policy, PAGE) for policy in POLICIES]
    assert needs == sorted(needs, reverse=True)
    assert needs[0] > 2 * needs[2] > 4 * needs[3] > 4 * needs[4]
    frozen = activations(gradients=Gradients(tower_trained=False, norms_trained=True, adapters=(0, 0)))
    assert frozen.peak("none", PAGE) < needs[0] < activations(attention="eager").peak("none", PAGE)


def test_shared_prefixes_need_a_mask_where_no_kernel_takes_layouts() -> None:
    batch = MicroBatch(1, 3000, 2000, 17, 40, branch_pairs=500 * 2800)
    for attention, packing, expected in (
        ("sdpa", "shared-image", 500 * 2800),
        ("flash_attention_2", "shared-image", 0),
        ("eager", "shared-image", 3000**2),
        ("sdpa", "none", 0),
    ):
        assert activations(attention=attention, packing=packing).mask_elements(batch) == expected


@pytest.mark.parametrize(
    ("free", "pinned", "expected"),
    [
        (200e9, 0, "none"),
        (4e9, 0, "full"),
        (-5e9, 0, "full"),
        (0, 0, "full"),
        (200e9, 90e9, "none"),
        (4e9, 90e9, "full"),
        (2.5e9, 90e9, "offload"),
        (0, 90e9, "offload"),
        (0, 1e9, "full"),
    ],
)
def test_the_policy_that_fits_is_chosen(free: float, pinned: float, expected: str) -> None:
    """Moved to the host where nothing else fits, if the host has room."""
    policy, reason = choose_checkpointing(activations(), PAGE, int(free), pinned=int(pinned))
    assert policy == expected
    assert "2,509 tokens and 17 crops at a time need about" in reason
    assert f"{max(free, 0) / 1e9:.2f} GB are free" in reason


def test_between_the_ends_as_little_as_possible_is_recomputed() -> None:
    for policy in ("vision", "selective"):
        free = int(activations().peak(policy, PAGE) / 0.79)
        assert choose_checkpointing(activations(), PAGE, free)[0] == policy


def _prepare(arguments: list[str], folder: Path) -> None:
    rank = int(os.environ["RANK"])
    run_setup.free_bytes = lambda *args: 10**12 if rank == 0 else 1000
    config = load_config(None, arguments)
    device = choose_device("fp32")
    prepared = run_setup.prepare(config, Console(quiet=True), device, HostCollectives(device.world_size))
    (folder / str(rank)).write_text(prepared.checkpointing)


def test_ranks_recompute_alike(small_model_dir: Path, easy_vqa: Path, tmp_path: Path) -> None:
    """Also where one has less memory left than the others."""
    keys = ("--model.path", str(small_model_dir), "--data.train", str(easy_vqa / "train.jsonl"))
    keys += ("--distributed.engine", "ddp", "--training.output_dir", str(tmp_path / "run"))
    run_ranks(2, _prepare, list(keys), tmp_path, folder=tmp_path / "printed")
    policies = [(tmp_path / rank).read_text() for rank in "01"]
    assert policies[0] == policies[1]
    assert policies[0].startswith("full (")


def test_a_run_on_a_cpu_plans_what_it_keeps_and_copies_only_while_it_trains(
    train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`auto` keeps all where memory is free; and a copy of the last checkpoint would be for nothing."""
    planned: list[str] = []
    copied: list[bool] = []

    def forecast(config: RunConfig, *rest: Any) -> None:
        planned.append(config.training.activation_checkpointing)

    whole = data_parallel.to_host

    def to_host(value: Any, *, copy: bool = True) -> Any:
        copied.append(copy)
        return whole(value, copy=copy)

    monkeypatch.setattr("phi3v.report.live.forecast", forecast)
    monkeypatch.setattr(data_parallel, "to_host", to_host)
    never = ("evaluation.before", "false", "evaluation.after", "false")
    code, _ = train("training.max_steps", 2, "checkpoint.save_steps", 1, *never)
    assert code == 0
    assert planned == ["none"]
    assert copied == [True, False]
