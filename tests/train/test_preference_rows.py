"""The loss of preferences and all its gradients do not depend on how answers share a row: each alone, in padded
batches, as branches below their prompt, as branches below a page that several records share.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from preference_data import write_pairs
from test_packed_rows import assert_same

from phi3v.config import ObjectiveConfig
from phi3v.data.batches import BatchPlan, RowPlan
from phi3v.data.collate import Collator
from phi3v.data.lengths import measure_table
from phi3v.data.preferences import AnswerSample, Preferences, lengths_at
from phi3v.data.rows import RowDataset
from phi3v.data.table import open_table
from phi3v.model.modeling import Phi3VForCausalLM
from phi3v.model.preference_loss import Answers, drift_sums, preference_loss
from phi3v.processing.processor import Phi3VProcessor
from phi3v.train.collectives import HostCollectives
from phi3v.train.objectives import make_objective

# LongRoPE's switch between the answers of a pair: these two cannot share their prefix.
SWITCH = 347

OBJECTIVES = [
    ObjectiveConfig(name="dpo", preference_weight=0.8, quality_weight=0.2, sft_weight=1.0),
    ObjectiveConfig(name="ipo"),
    ObjectiveConfig(name="orpo"),
    ObjectiveConfig(name="simpo", label_smoothing=0.1),
    ObjectiveConfig(name="kto", undesirable_weight=1.5),
]


@pytest.fixture(scope="module")
def data(easy_vqa: Path) -> Path:
    return write_pairs(easy_vqa, "pairs.jsonl")


class Step:
    """The loss and all gradients of one step over all records of a file."""

    def __init__(self, model_dir: Path, file: Path, objective: ObjectiveConfig) -> None:
        self.config = objective
        self.processor = Phi3VProcessor.from_pretrained(model_dir)
        self.table = open_table(file)
        self.model = Phi3VForCausalLM.from_pretrained(
            model_dir, attn_implementation="packed_segments", original_max_position_embeddings=SWITCH
        )
        self.model.train()  # as in training; nothing in it is random
        self.num_crops = self.processor.image_processor.num_crops
        answers = Preferences(self.table, objective).starts[-1]
        # Of no model: a loss at its own reference would have gradients that cancel.
        self.reference = -20 + 2 * torch.randn(answers, generator=torch.Generator().manual_seed(0))
        self.preferences = Preferences(self.table, objective, SWITCH, self.reference)

    def dataset(self, *, packed: bool) -> RowDataset:
        return RowDataset(self.table, self.processor, packed=packed, preferences=self.preferences)

    def rows(self, packing: Any, *, pack_tokens: int = 100_000, size: int = 1) -> list[dict[str, Any]]:
        lengths = lengths_at(measure_table(self.table, self.processor), self.config, self.num_crops, SWITCH)
        count = len(self.table)
        plan = BatchPlan(
            lengths,
            packing,
            batch_size=count,
            micro_batch_size=size,
            pack_tokens=pack_tokens,
            shared_image_max=count,
        )
        dataset = self.dataset(packed=plan.is_packed)
        ((rows,),) = plan.steps(0)
        made = [dataset[RowPlan(row, ends_step=False)] for row in rows]
        for row, batch in zip(rows, made, strict=True):
            records = [index for group in row for index in group]
            assert sorted(batch["counts"].records) == sorted(records)
            planned = plan.work(row) if plan.is_packed else sum(lengths.separate[records])
            # What is planned with is what is computed, but for questions of a page that begin alike.
            assert planned - (8 * len(records) if packing == "shared-image" else 0) <= batch["counts"].tokens <= planned
        return [{name: value for name, value in row.items() if name != "ends_step"} for row in made]

    def run(self, rows: list[dict[str, Any]]) -> tuple[float, dict[str, torch.Tensor]]:
        self.model.zero_grad()
        objective = make_objective(self.config)
        weight, loss = sum(row["counts"].weight for row in rows), 0.0
        inputs = [{name: value for name, value in row.items() if name != "counts"} for row in rows]
        objective.begin_step(self.forward, inputs, HostCollectives(1))
        for row in inputs:
            part, _ = objective.loss(self.forward, row, weight)
            part.backward()
            loss += part.item()
        return loss, self.gradients()

    def forward(self, inputs: Any) -> Any:
        return self.model(**inputs)

    def gradients(self) -> dict[str, torch.Tensor]:
        return {name: p.grad.clone() for name, p in self.model.named_parameters() if p.grad is not None}

    def apart(self) -> tuple[float, dict[str, torch.Tensor]]:
        """Each answer in a row of its own; their log-probabilities by the logits of all tokens, and the loss of all."""
        self.model.zero_grad()
        dataset = self.dataset(packed=False)
        collate = Collator(self.processor.tokenizer.pad_token_id)
        log_probs, lengths, signs, pairs, weights = [], [], [], [], []
        for index in range(len(self.table)):
            samples = dataset.samples((index,))
            first, rejected = len(log_probs), sum(sample.role == "rejected" for sample in samples)  # type: ignore[attr-defined]
            for sample in samples:
                assert isinstance(sample, AnswerSample)
                inputs = collate([replace(sample)])
                labels = inputs.pop("labels")
                for name in ("counts", "loss_weights", "target_positions"):
                    del inputs[name]
                logits = self.model(**inputs).logits
                chances = logits[0, :-1].log_softmax(-1).gather(1, labels[0, 1:, None].clamp(min=0))[:, 0]
                log_probs.append((chances * (labels[0, 1:] != -100)).sum())
                lengths.append(float((labels != -100).sum()))
                signs.append({"chosen": 1.0, "rejected": -1.0, "mismatched": 0.0}[sample.role])
                if sample.role == "rejected":
                    pairs.append((first, first + sample.place))
                    weights.append(1 / rejected)
        answers = Answers(
            torch.stack(log_probs),
            torch.tensor(lengths),
            self.reference if self.config.needs_reference else None,
            torch.tensor(signs),
            torch.ones(len(signs)),
            torch.tensor(pairs),
            torch.tensor(weights),
        )
        total, count = drift_sums(answers).tolist() if self.config.name == "kto" else (0.0, 1.0)
        loss = preference_loss(self.config, answers, max(0.0, total / count))
        loss = loss / (len(self.table) if self.config.takes_pairs else sum(sign != 0 for sign in signs))
        loss.backward()
        return loss.item(), self.gradients()


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda objective: objective.name)
def test_every_row_gives_the_same_gradients(small_model_dir: Path, data: Path, objective: ObjectiveConfig) -> None:
    step = Step(small_model_dir, data, objective)
    expected = step.apart()
    assert max(float(gradient.abs().max()) for gradient in expected[1].values()) > 0.01
    (shared,) = step.rows("shared-image")
    assert_same(step.run([shared]), expected, "shared pages")
    if objective.name == "dpo":
        assert_same(step.run(step.rows("none")), expected, "a record at a time")
        assert_same(step.run(step.rows("none", size=7)), expected, "one padded batch")
        (branches,) = step.rows("samples")
        assert_same(step.run([branches]), expected, "answers below their prompts")
        several = step.rows("shared-image", pack_tokens=800)
        assert len(several) > 1
        assert_same(step.run(several), expected, "several rows")
        tokens = [row["counts"].tokens for row in (shared, branches)]
        assert tokens[0] < tokens[1] < 0.6 * sum(len(ids) for ids in step.rows("none", size=7)[0]["input_ids"])


def test_answers_on_both_sides_of_the_switch_share_nothing(small_model_dir: Path, data: Path) -> None:
    """They are computed as alone, which the gradients above say, and the page is encoded once all the same."""
    step = Step(small_model_dir, data, OBJECTIVES[0])
    row = step.dataset(packed=True)[RowPlan(((0,),), ends_step=True)]
    lengths = [sum(group) for group in row["layout"]]
    assert min(lengths) <= SWITCH < max(lengths)
    assert len(row["image_sizes"]) == 1
    assert row["page_index"] == (0, 0)
