"""DPO sees our tokens of both answers, their likelihoods are our losses, and it learns to prefer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from trl import DPOConfig, DPOTrainer
from trl_records import LORA, as_theirs, last_answer, our_loss, our_sample, settings

from phi3v import Phi3VForCausalLM
from phi3v.data.table import RecordTable

REJECTED = "none of these, as far as can be seen"


def test_dpo(model_dir: Path, as_messages: Dataset, table: RecordTable, tmp_path: Path) -> None:
    rejected = [{"role": "assistant", "content": [{"type": "text", "text": REJECTED}]}]
    data = Dataset.from_list(
        [
            {
                "images": row["images"],
                "prompt": row["messages"][:-1],
                "chosen": row["messages"][-1:],
                "rejected": rejected,
            }
            for row in as_messages
        ]
    )
    config = DPOConfig(**settings(tmp_path / "run", max_steps=3, per_device_train_batch_size=5, max_length=None))
    model = Phi3VForCausalLM.from_pretrained(model_dir, dtype=torch.float32)  # in the other tests, by its path
    trainer = DPOTrainer(model, args=config, train_dataset=data, peft_config=LORA)
    assert trainer.args.gradient_checkpointing
    processor = trainer.processing_class

    chosen = [our_sample(table, last_answer(record), processor) for record in table]
    rejected = [our_sample(table, last_answer(record, REJECTED), processor) for record in table]
    batch = trainer.data_collator([dict(row) for row in data])
    for row, sample in enumerate([*chosen, *rejected]):
        length = len(sample.input_ids)
        assert batch["attention_mask"][row].sum() == length
        assert batch["input_ids"][row, :length].tolist() == as_theirs(sample, processor)
        assert batch["completion_mask"][row, :length].tolist() == [int(label != -100) for label in sample.labels]

    trainer.train()
    first, *_, last = [line for line in trainer.state.log_history if "loss" in line]
    for name, samples in (("chosen", chosen), ("rejected", rejected)):
        targets = sum(label != -100 for sample in samples for label in sample.labels)
        ours = -our_loss(model_dir, processor, samples) * targets / len(samples)
        assert first[f"logps/{name}"] == pytest.approx(ours, rel=1e-5)  # float32 sums in another order
    assert last["rewards/margins"] > first["rewards/margins"] == 0

    trainer.save_model(str(tmp_path / "adapter"))
    PeftModel.from_pretrained(Phi3VForCausalLM.from_pretrained(model_dir), tmp_path / "adapter")
