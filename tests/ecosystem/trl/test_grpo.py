"""GRPO asks with our prompts, gives every micro-batch its own images, samples what we would answer, and trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from trl import GRPOConfig, GRPOTrainer
from trl_records import LORA, as_theirs, settings

from phi3v import Phi3VForCausalLM, Phi3VProcessor
from phi3v.data.collate import PageReader, make_sample
from phi3v.data.table import RecordTable
from phi3v.model.presets import copy_pretrained

NEW_TOKENS = 6
COPIES = 2  # completions of a prompt


def make_trainer(model_dir: Path, as_messages: Dataset, out: Path, reward: Any, **more: Any) -> GRPOTrainer:
    """Of all records in one step: generated together, trained on two at a time, of which some have no image."""
    data = Dataset.from_list([{"images": row["images"], "prompt": row["messages"][:-1]} for row in as_messages])
    common = {
        "num_generations": COPIES,
        "max_completion_length": NEW_TOKENS,
        "gradient_accumulation_steps": len(data) * COPIES // 2,
        "shuffle_dataset": False,
    }
    config = GRPOConfig(**settings(out, **common | more))
    return GRPOTrainer(str(model_dir), reward, args=config, train_dataset=data, peft_config=LORA)


def test_prompts_images_and_answers_are_ours(
    model_dir: Path, as_messages: Dataset, table: RecordTable, tmp_path: Path
) -> None:
    answers: list[list[int]] = []
    seen: list[dict[str, Any]] = []

    def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
        answers.extend(completion_ids)
        return [float(len(answers) % 2)] * len(completion_ids)

    trainer = make_trainer(model_dir, as_messages, tmp_path, reward, temperature=1e-6)  # greedy
    hook = trainer.model.get_base_model().model.register_forward_pre_hook(
        lambda _, arguments, inputs: seen.append(inputs), with_kwargs=True
    )
    trainer.train()
    hook.remove()

    processor = trainer.processing_class
    model = Phi3VForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    prompts, pixels, expected = [], [], []
    for record, row in zip(table, as_messages, strict=True):
        reader = PageReader(table, processor.image_processor)
        sample = make_sample(reader, record, processor, question=len(record.turns) - 1)
        inputs = processor.image_processor(row["images"]) if row["images"] else {"pixel_values": torch.zeros(0)}
        prompts.append(as_theirs(sample, processor))
        pixels.append(inputs["pixel_values"])
        images = {name: inputs[name] for name in ("pixel_values", "image_sizes") if row["images"]}
        ids = torch.tensor([sample.input_ids])
        inputs = {"attention_mask": torch.ones_like(ids), **images}
        whole = model.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False, **inputs)
        expected += [whole[0, ids.shape[1] :].tolist()] * COPIES
    assert answers == expected

    trained = [
        inputs for inputs in seen if inputs["attention_mask"].shape == getattr(inputs["input_ids"], "shape", None)
    ]
    assert len(trained) == len(table)
    for inputs in trained:
        which = []
        for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True):
            row = ids[mask.bool()].tolist()
            which.append(next(index for index, prompt in enumerate(prompts) if row[: len(prompt)] == prompt))
        theirs = [] if inputs.get("pixel_values") is None else inputs["pixel_values"].unbind()
        ours = [image for index in which for image in pixels[index]]
        assert len(theirs) == len(ours)
        assert all(map(torch.equal, theirs, ours))


def test_what_is_rewarded_comes_more_often(as_messages: Dataset, tmp_path: Path) -> None:
    model_dir = tmp_path / "model"
    copy_pretrained("tiny", model_dir)  # random weights would have far to go
    Phi3VProcessor.from_pretrained(model_dir, num_crops=1).save_pretrained(model_dir)

    def reward(completions: list[Any], **_: Any) -> list[float]:
        return [float("circle" in message[0]["content"]) for message in completions]

    more = {"num_generations": 8, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 4, "max_steps": 8}
    trainer = make_trainer(model_dir, as_messages.select([0]), tmp_path / "run", reward, **more)
    assert trainer.args.gradient_checkpointing
    trainer.train()
    rewards = [line["reward"] for line in trainer.state.log_history if "reward" in line]
    assert sum(rewards[-3:]) > 1.3 * sum(rewards[:3])
    trainer.save_model(str(tmp_path / "adapter"))
    PeftModel.from_pretrained(Phi3VForCausalLM.from_pretrained(model_dir), tmp_path / "adapter")
