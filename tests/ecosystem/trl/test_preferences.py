"""Our losses of preferences and every gradient of them are TRL's, for a policy that has left its reference.

Ours come from packed rows, in which answers share page and prompt; TRL computes each answer in a padded row of its own.
TRL's DPO and KTO take images, its ORPO and CPO (SimPO) take text alone.
"""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import Any

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"

import pytest
import torch
from datasets import Dataset
from torch.nn.utils.rnn import pad_sequence
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer
from trl_records import RECORDS, settings

from phi3v import Phi3VForCausalLM, Phi3VProcessor
from phi3v.config import ObjectiveConfig
from phi3v.data.batches import BatchPlan, RowPlan
from phi3v.data.lengths import measure_table
from phi3v.data.preferences import Preferences, lengths_at
from phi3v.data.rows import RowDataset
from phi3v.data.table import RecordTable, open_table
from phi3v.train.collectives import HostCollectives
from phi3v.train.objectives import PreferenceObjective

REJECTED = ["none of these, as far as can be seen", "no", "It cannot be told.", "purple", "blue, but green at night"]
LABELS = [True, False, True, True, False]
# Of the loss and of the whole gradient as one vector: float32 (resolution 1.2e-7) sums in another order.
TOLERANCE = 1e-6
Result = tuple[float, dict[str, torch.Tensor]]


def write(folder: Path, name: str, *, labels: bool = False, images: bool = True) -> RecordTable:
    """The records with a rejected answer, or a label, in our format."""
    lines = []
    for record, rejected, label in zip(RECORDS, REJECTED, LABELS, strict=True):
        line = copy.deepcopy(record)
        line["conversations"][-1] |= {"label": label} if labels else {"rejected": rejected}
        for turn in line["conversations"] if not images else ():
            turn["images"] = []
        lines.append(json.dumps(line) + "\n")
    (folder / name).write_text("".join(lines))
    return open_table(folder / name, progress=False)


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.setenv("PHI3V_CACHE", str(tmp_path_factory.getbasetemp() / "phi3v-cache"))


def load(model_dir: Path) -> Any:
    model = Phi3VForCausalLM.from_pretrained(model_dir, dtype=torch.float32, attn_implementation="packed_segments")
    return model.train()


def moved(model_dir: Path) -> Any:
    """A policy some way from the reference."""
    model = load(model_dir)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * parameter.std() * torch.randn(parameter.shape, generator=generator)
    return model


def gradients(model: Any) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def ours(model_dir: Path, table: RecordTable, objective: ObjectiveConfig) -> Result:
    """One step over all records in one packed row."""
    policy, reference = moved(model_dir), load(model_dir)
    processor = Phi3VProcessor.from_pretrained(model_dir)
    lengths = lengths_at(measure_table(table, processor), objective, processor.image_processor.num_crops)
    plan = BatchPlan(lengths, "shared-image", batch_size=len(table), pack_tokens=100_000, shared_image_max=8)
    ((rows,),) = plan.steps(0)
    dataset = RowDataset(table, processor, packed=True, preferences=Preferences(table, objective))
    (row,) = (dataset[RowPlan(row, ends_step=False)] for row in rows)
    weight = row.pop("counts").weight
    del row["ends_step"]
    learns = PreferenceObjective(objective)
    if objective.needs_reference:
        with torch.no_grad():
            row["reference"] = learns.answers(lambda inputs: reference(**inputs), row, at_start=True).log_probs

    def forward(inputs: Any) -> Any:
        return policy(**inputs)

    learns.begin_step(forward, [row], HostCollectives(1))
    assert (learns.drift > 0) == (objective.name == "kto")  # an estimate below 0 counts as 0 and would show nothing
    loss, _ = learns.loss(forward, row, weight)
    loss.backward()
    return loss.item(), gradients(policy)


def assert_same(got: Result, expected: Result) -> None:
    assert got[0] == pytest.approx(expected[0], rel=TOLERANCE)
    assert got[1].keys() == {name for name, gradient in expected[1].items() if gradient.any()} | got[1].keys()
    differences, norms = [], []
    for name, gradient in got[1].items():
        theirs = expected[1].get(name, torch.zeros_like(gradient))
        differences.append((gradient - theirs).norm())
        norms.append(theirs.norm())
        # Deep in the vision tower sums go over every token; + 1e-8 for biases of keys, whose gradient is rounding.
        assert float((gradient - theirs).abs().max()) <= 1e-5 * float(theirs.abs().max()) + 1e-8, name
    assert float(torch.stack(norms).norm()) > 1e-3
    assert float(torch.stack(differences).norm() / torch.stack(norms).norm()) <= TOLERANCE


@pytest.mark.parametrize(
    ("theirs", "keys"),
    [
        ({"loss_type": "sigmoid"}, {"name": "dpo"}),
        ({"loss_type": "sigmoid_norm", "beta": 2.0}, {"name": "dpo", "beta": 2.0, "length_normalised": True}),
        (
            {"loss_type": ["sigmoid", "bco_pair"], "loss_weights": [0.8, 0.2]},
            {"name": "dpo", "preference_weight": 0.8, "quality_weight": 0.2},
        ),
        ({"loss_type": "ipo", "beta": 0.2}, {"name": "ipo", "beta": 0.2}),
    ],
    ids=["dpo", "dpo-per-token", "dpo-and-quality", "ipo"],
)
def test_dpo_and_ipo(
    theirs: dict[str, Any],
    keys: dict[str, Any],
    model_dir: Path,
    data_file: Path,
    as_messages: Dataset,
    tmp_path: Path,
) -> None:
    rows = [
        {
            "images": row["images"],
            "prompt": row["messages"][:-1],
            "chosen": row["messages"][-1:],
            "rejected": [{"role": "assistant", "content": [{"type": "text", "text": rejected}]}],
        }
        for row, rejected in zip(as_messages, REJECTED, strict=True)
    ]
    more = {"max_length": None, "gradient_checkpointing": False} | theirs
    trainer = DPOTrainer(
        moved(model_dir),
        load(model_dir).eval(),
        DPOConfig(**settings(tmp_path, **more)),
        train_dataset=Dataset.from_list(rows),
        processing_class=Phi3VProcessor.from_pretrained(model_dir),
    )
    loss = trainer.compute_loss(trainer.model, trainer.data_collator(rows))
    loss.backward()
    table = write(data_file.parent, "pairs.jsonl")
    assert_same(ours(model_dir, table, ObjectiveConfig(**keys)), (loss.item(), gradients(trainer.model)))


def test_kto(model_dir: Path, data_file: Path, as_messages: Dataset, tmp_path: Path) -> None:
    """The mismatched answers, in a batch of all records, are those of the record before."""
    rows = [
        {"images": row["images"], "prompt": row["messages"][:-1], "completion": row["messages"][-1:], "label": label}
        for row, label in zip(as_messages, LABELS, strict=True)
    ]
    more = {"max_length": None, "gradient_checkpointing": False, "per_device_train_batch_size": len(rows)}
    weights = {"desirable_weight": 1.2, "undesirable_weight": 0.8}
    trainer = KTOTrainer(
        moved(model_dir),
        load(model_dir).eval(),
        KTOConfig(**settings(tmp_path, **more, **weights)),
        train_dataset=Dataset.from_list(rows),
        processing_class=Phi3VProcessor.from_pretrained(model_dir),
    )
    loss = trainer.compute_loss(trainer.model, trainer.data_collator([dict(row) for row in rows]))
    loss.backward()
    table = write(data_file.parent, "labels.jsonl", labels=True)
    objective = ObjectiveConfig(name="kto", **weights)
    assert_same(ours(model_dir, table, objective), (loss.item(), gradients(trainer.model)))


def their_batch(table: RecordTable, processor: Phi3VProcessor) -> dict[str, torch.Tensor]:
    """Our tokens and labels of both answers as ORPO and CPO take them."""
    dataset = RowDataset(table, processor, preferences=Preferences(table, ObjectiveConfig(name="orpo")))
    samples = [dataset.samples((index,)) for index in range(len(table))]
    batch = {}
    for place, side in enumerate(("chosen", "rejected")):
        ids = [torch.tensor(each[place].input_ids) for each in samples]
        labels = [torch.tensor(each[place].labels) for each in samples]
        batch[f"{side}_input_ids"] = pad_sequence(ids, batch_first=True)
        batch[f"{side}_attention_mask"] = pad_sequence([torch.ones_like(row) for row in ids], batch_first=True)
        batch[f"{side}_labels"] = pad_sequence(labels, batch_first=True, padding_value=-100)
    return batch


def make_text_trainer(kind: Any, config: Any, model_dir: Path) -> Any:
    row = {"prompt": "Which colour is the sky?", "chosen": "blue", "rejected": "purple"}
    processor = Phi3VProcessor.from_pretrained(model_dir)
    data = Dataset.from_list([row])
    return kind(moved(model_dir), config, train_dataset=data, processing_class=processor.tokenizer)


def test_orpo(model_dir: Path, data_file: Path, tmp_path: Path) -> None:
    """TRL's odds ratio, beside the supervised loss of the answers; its own is of the prompts' tokens as well."""
    config = ORPOConfig(**settings(tmp_path, gradient_checkpointing=False))
    trainer = make_text_trainer(ORPOTrainer, config, model_dir)
    table = write(data_file.parent, "text.jsonl", images=False)
    batch = their_batch(table, Phi3VProcessor.from_pretrained(model_dir))
    chosen, rejected, *_ = trainer.concatenated_forward(trainer.model, batch)  # means over an answer's tokens
    losses, *_ = trainer.odds_ratio_loss(chosen, rejected)
    loss = -chosen.mean() - losses.mean()
    loss.backward()
    assert_same(ours(model_dir, table, ObjectiveConfig(name="orpo")), (loss.item(), gradients(trainer.model)))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_simpo(smoothing: float, model_dir: Path, data_file: Path, tmp_path: Path) -> None:
    more = {"loss_type": "simpo", "cpo_alpha": 0.0, "beta": 2.0, "simpo_gamma": 1.0, "label_smoothing": smoothing}
    config = CPOConfig(**settings(tmp_path, gradient_checkpointing=False, **more))
    trainer = make_text_trainer(CPOTrainer, config, model_dir)
    table = write(data_file.parent, "text.jsonl", images=False)
    loss, _ = trainer.get_batch_loss_metrics(
        trainer.model, their_batch(table, Phi3VProcessor.from_pretrained(model_dir))
    )
    loss.backward()
    objective = ObjectiveConfig(name="simpo", label_smoothing=smoothing)
    assert_same(ours(model_dir, table, objective), (loss.item(), gradients(trainer.model)))
