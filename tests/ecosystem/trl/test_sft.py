"""SFT sees the tokens, labels and loss that our own training sees, and its adapters are ours to use."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling
from trl_records import LORA, as_theirs, last_answer, our_loss, our_sample, settings

from phi3v import Phi3VForCausalLM, Phi3VProcessor
from phi3v.cli import main
from phi3v.data.collate import Sample
from phi3v.data.table import RecordTable
from phi3v.processing.conversation import ChatTurn, encode_conversation


def make_trainer(model: Path, data: Dataset, out: Path, **more: Any) -> SFTTrainer:
    config = SFTConfig(**settings(out, **{"max_length": None, "assistant_only_loss": True} | more))
    return SFTTrainer(str(model), config, train_dataset=data, peft_config=LORA)


def in_two_parts(data: Dataset) -> Dataset:
    """Conversations as prompts and completions."""
    return Dataset.from_list(
        [{"images": row["images"], "prompt": row["messages"][:-1], "completion": row["messages"][-1:]} for row in data]
    )


@pytest.fixture(params=["tiny", "official"])
def processor(request: pytest.FixtureRequest, model_dir: Path) -> Phi3VProcessor:
    official = request.param == "official"
    return Phi3VProcessor.from_pretrained(request.getfixturevalue("real_tokenizer_dir") if official else model_dir)


@pytest.mark.parametrize("form", ["messages", "prompt and completion"])
def test_tokens_and_labels_are_ours(
    form: str, processor: Phi3VProcessor, table: RecordTable, as_messages: Dataset
) -> None:
    """Of messages the targets are all answers, of prompt and completion the last."""
    whole = form == "messages"
    collate = DataCollatorForVisionLanguageModeling(
        processor, assistant_only_loss=whole, completion_only_loss=not whole
    )
    rows = list(as_messages if whole else in_two_parts(as_messages))
    samples = [our_sample(table, record if whole else last_answer(record), processor) for record in table]
    for group in [[0], [1], [2], [3], [4], [0, 1, 2, 3, 4]]:
        theirs = collate([dict(rows[index]) for index in group])
        width = theirs["input_ids"].shape[1]
        for row, sample in enumerate(samples[index] for index in group):
            padding = width - len(sample.input_ids)
            assert theirs["attention_mask"][row].tolist() == [1] * len(sample.input_ids) + [0] * padding
            assert theirs["input_ids"][row, : width - padding].tolist() == as_theirs(sample, processor)
            assert theirs["labels"][row].tolist() == sample.labels + [-100] * padding
        sizes = [list(page.size) for index in group for page in samples[index].pages]
        assert ("image_sizes" in theirs) == bool(sizes)
        assert not sizes or theirs["image_sizes"].tolist() == sizes


def test_images_of_plain_text_come_before_the_first_question(
    processor: Phi3VProcessor, table: RecordTable, as_messages: Dataset
) -> None:
    collate = DataCollatorForVisionLanguageModeling(processor, assistant_only_loss=True)
    for index in (0, 1, 2, 4):
        row = as_messages[index]
        plain = [each | {"content": each["content"][-1]["text"]} for each in row["messages"]]
        theirs = collate([{"messages": plain, "images": row["images"]}])
        assert theirs["input_ids"][0].tolist() == as_theirs(our_sample(table, table[index], processor), processor)


def test_an_answer_that_was_cut_away_teaches_nothing(processor: Phi3VProcessor, as_messages: Dataset) -> None:
    collate = DataCollatorForVisionLanguageModeling(processor, assistant_only_loss=True)
    whole = collate([dict(as_messages[0])])
    start = int((whole["labels"][0] != -100).nonzero()[0])
    cut = replace(collate, max_length=start)([dict(as_messages[0])])
    assert torch.equal(cut["input_ids"], whole["input_ids"][:, :start])
    assert (cut["labels"] == -100).all()


def test_the_loss_is_ours_weighted_by_token(
    model_dir: Path, table: RecordTable, as_messages: Dataset, tmp_path: Path
) -> None:
    """A step of two micro-batches with answers of unlike lengths."""
    trainer = make_trainer(model_dir, as_messages.select(range(4)), tmp_path, gradient_accumulation_steps=2)
    trainer.train()
    processor = trainer.processing_class
    ours = our_loss(model_dir, processor, [our_sample(table, table[index], processor) for index in range(4)])
    # An adapter starts as zero. What is logged is a sum of float32 shares, in another order.
    assert trainer.state.log_history[0]["loss"] == pytest.approx(ours, rel=1e-5)


@pytest.mark.parametrize("packed", [{}, {"packing": True, "max_length": 256}], ids=["padded", "packed"])
def test_text_alone_has_our_loss_too(packed: dict[str, Any], model_dir: Path, tmp_path: Path) -> None:
    """Without a column of images TRL tokenises beforehand, and packs if asked to."""
    turns = [("The sky?", "blue"), ("Grass, in spring?", "green, mostly"), ("More words, please!", "here are more")]
    rows = [[{"role": "user", "content": user}, {"role": "assistant", "content": answer}] for user, answer in turns]
    data = Dataset.from_dict({"messages": rows})
    trainer = make_trainer(model_dir, data, tmp_path, per_device_train_batch_size=3, **packed)
    trainer.train()
    processor = trainer.processing_class
    streams = [encode_conversation(processor.backend_tokenizer, [ChatTurn(*turn)], []) for turn in turns]
    ours = our_loss(model_dir, processor, [Sample(stream.input_ids, stream.labels, []) for stream in streams])
    assert trainer.state.log_history[0]["loss"] == pytest.approx(ours, rel=1e-5)


def test_without_assistant_only_loss_prompts_are_learned_too(
    model_dir: Path, as_messages: Dataset, tmp_path: Path
) -> None:
    trainer = make_trainer(model_dir, as_messages, tmp_path, assistant_only_loss=False)
    batch = trainer.data_collator([dict(as_messages[0])])
    assert torch.equal(batch["labels"], batch["input_ids"])


def test_an_adapter_is_trained_saved_and_used(
    model_dir: Path,
    data_file: Path,
    as_messages: Dataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    trainer = make_trainer(model_dir, as_messages, tmp_path / "run", max_steps=6)
    assert trainer.args.gradient_checkpointing
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert losses[-1] < losses[0]
    saved = tmp_path / "adapter"
    trainer.save_model(str(saved))
    batch = trainer.data_collator([dict(as_messages[3])])
    with torch.no_grad():
        theirs = trainer.model.eval()(**batch).logits
        base = Phi3VForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
        untrained = base.eval()(**batch).logits
        loaded = PeftModel.from_pretrained(base, saved).eval()(**batch).logits
    torch.testing.assert_close(loaded, theirs, rtol=0, atol=1e-5)  # float32 sums
    assert not torch.allclose(loaded, untrained, atol=1e-2)
    monkeypatch.setenv("PHI3V_CACHE", str(tmp_path / "cache"))
    capsys.readouterr()
    assert main(["eval", str(saved), "--data", str(data_file), "--metrics", "exact_match", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("form", ["messages", "prompt and completion"])
def test_a_record_longer_than_max_length_says_so(
    form: str, model_dir: Path, as_messages: Dataset, tmp_path: Path
) -> None:
    whole = form == "messages"
    rows = as_messages.select([2]) if whole else in_two_parts(as_messages.select([2]))
    trainer = make_trainer(model_dir, rows, tmp_path, max_length=64, assistant_only_loss=whole)
    with pytest.raises(ValueError, match=r"set max_length=None|`max_length` \(64\) is too short"):
        trainer.train()


def test_the_documentation_s_script_trains(
    model_dir: Path, data_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (Path(__file__).parents[3] / "docs" / "trl.md").read_text(encoding="utf-8")
    (script,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    script = script.replace("microsoft/Phi-3.5-vision-instruct", str(model_dir))
    script = script.replace("SFTConfig(\n", "SFTConfig(\n        use_cpu=True, max_steps=1, report_to='none',\n")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").symlink_to(data_file.parent)
    exec(compile(script, "docs/trl.md", "exec"), {})
    PeftModel.from_pretrained(Phi3VForCausalLM.from_pretrained(model_dir), tmp_path / "output/sft/final")
