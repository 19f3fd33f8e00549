"""The model in `transformers.Trainer`, with a collator of a few lines around the processor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from transformers import Trainer, TrainingArguments

from phi3v import Phi3VForCausalLM, Phi3VProcessor

RED = Image.new("RGB", (64, 64), "red")
QUESTIONS = [(0, "yes"), (1, "a red square, nothing else"), (2, "twice"), (1, "red")]
CHATS = [
    [
        {"role": "user", "content": [{"type": "image", "image": RED}] * images + [{"type": "text", "text": "what?"}]},
        {"role": "assistant", "content": answer},
    ]
    for images, answer in QUESTIONS
]


@pytest.fixture(scope="module")
def processor(small_model_dir: Path) -> Phi3VProcessor:
    return Phi3VProcessor.from_pretrained(small_model_dir, num_crops=1)


def collate(processor: Phi3VProcessor, chats: list[Any]) -> dict[str, Any]:
    options = {"padding": True}
    batch = processor.apply_chat_template(
        chats,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        return_assistant_tokens_mask=True,
        processor_kwargs=options,
    )
    answers = torch.as_tensor(batch.pop("assistant_masks"))
    return {**batch, "labels": batch["input_ids"].masked_fill(answers == 0, -100)}


def train(folder: Path, base: Path, processor: Phi3VProcessor, *, resume: bool = False, **options: Any) -> Any:
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=2,
        save_steps=1,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        remove_unused_columns=False,
        learning_rate=0.01,
        optim="sgd",
        **options,
    )
    trainer = Trainer(
        model=Phi3VForCausalLM.from_pretrained(base),
        args=arguments,
        train_dataset=CHATS,
        data_collator=lambda chats: collate(processor, chats),
        processing_class=processor,
    )
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-1") if resume else None)
    return trainer


def test_a_step_is_the_same_however_it_is_split(
    small_model_dir: Path, processor: Phi3VProcessor, tmp_path: Path
) -> None:
    """With answers of different lengths, recomputed, resumed; 1e-5 is float32's rounding in sums of other orders."""
    whole = train(tmp_path / "whole", small_model_dir, processor, per_device_train_batch_size=4)
    split = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, "gradient_checkpointing": True}
    in_parts = train(tmp_path / "split", small_model_dir, processor, **split)
    resumed = train(tmp_path / "split", small_model_dir, processor, resume=True, **split)
    expected = whole.model.state_dict()
    for trainer in (in_parts, resumed):
        for name, value in trainer.model.state_dict().items():
            torch.testing.assert_close(value, expected[name], atol=1e-5, rtol=0, msg=name)
    losses = [[entry["loss"] for entry in run.state.log_history if "loss" in entry] for run in (whole, in_parts)]
    assert losses[1] == pytest.approx(losses[0], abs=1e-4)
    whole.save_model(str(tmp_path / "final"))
    batch = collate(Phi3VProcessor.from_pretrained(tmp_path / "final"), CHATS)
    with torch.no_grad():
        loaded = Phi3VForCausalLM.from_pretrained(tmp_path / "final")
        assert loaded(**batch).logits.equal(whole.model.eval()(**batch).logits)


@pytest.mark.parametrize("reentrant", [True, False])
def test_every_adapter_gets_a_gradient(reentrant: bool, small_model_dir: Path, processor: Phi3VProcessor) -> None:
    """Of the vision part, too, as PEFT prepares quantised models: frozen layers, recomputed reentrantly by default."""
    model = Phi3VForCausalLM.from_pretrained(small_model_dir).requires_grad_(False)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    adapted = get_peft_model(model, LoraConfig(target_modules="all-linear")).train()
    adapted(**collate(processor, CHATS[1:2])).loss.backward()
    unused = {name for name, _ in model.unused_parameters()}
    for name, parameter in model.named_parameters():
        if "lora_B" in name and name not in unused:
            assert parameter.grad is not None, name
            assert parameter.grad.any(), name
