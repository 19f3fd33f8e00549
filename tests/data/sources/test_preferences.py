"""Answers that are better or worse than others, in the forms of TRL, LLaMA-Factory, ms-swift, RLAIF-V and RLHF-V."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from own_files import Convert, save_images
from sample_files import image_bytes

Q, GOOD, BAD = "What is this?", "A dog.", "A cat."
PAIR = {"user": Q, "assistant": GOOD, "rejected": [BAD]}
SEEN = {"images": ["a.png"], **PAIR}
HH = "\n\nHuman: What is this?\n\nAssistant:"


def user(content: Any = Q) -> dict[str, Any]:
    return {"role": "user", "content": content}


def said(content: Any = GOOD) -> dict[str, Any]:
    return {"role": "assistant", "content": content}


def gpt(value: str) -> dict[str, str]:
    return {"from": "gpt", "value": value}


def part(text: str) -> list[dict[str, Any]]:
    return [{"type": "text", "text": text}]


BEFORE = [user("Hello"), said("Hi")]
HUMAN = {"from": "human", "value": "<image>" + Q}
# A row, and the last turn that it becomes.
FORMS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "TRL, plain": ({"prompt": Q, "chosen": " " + GOOD, "rejected": " " + BAD}, PAIR),
    "TRL, messages": ({"prompt": [user()], "chosen": [said()], "rejected": [said(BAD)]}, PAIR),
    "TRL, messages with the prompt in them": (
        {"prompt": [user()], "chosen": [user(), said()], "rejected": [user(), said(BAD)]},
        PAIR,
    ),
    "TRL, no prompt": ({"chosen": [user(), said()], "rejected": [user(), said(BAD)]}, PAIR),
    "TRL, images": (
        {
            "prompt": [user([{"type": "image", "text": None}, {"type": "text", "text": Q}])],
            "chosen": [said(part(GOOD))],
            "rejected": [said(part(BAD))],
            "images": ["a.png"],
        },
        SEEN,
    ),
    "TRL, plain without a prompt": (
        {"chosen": "What is this? A dog.", "rejected": "What is this? A dot."},
        {"user": "What is this? A", "assistant": "dog.", "rejected": ["dot."]},
    ),
    "hh-rlhf": ({"chosen": f"{HH} {GOOD}", "rejected": f"{HH} {BAD}"}, PAIR),
    "hh-rlhf, its prompt apart": ({"prompt": HH, "chosen": f" {GOOD}", "rejected": f" {BAD}"}, PAIR),
    "hh-rlhf, its prompt too": ({"prompt": HH, "chosen": f"{HH} {GOOD}", "rejected": f"{HH} {BAD}"}, PAIR),
    "UltraFeedback": (
        {
            "prompt": Q,
            "messages": [user(), said()],
            "chosen": [user(), said()],
            "rejected": [user(), said(BAD)],
            "score_chosen": 8.5,
            "score_rejected": 3,
        },
        PAIR | {"scores": [8.5, 3.0]},
    ),
    "UltraFeedback without messages": (
        {"prompt": Q, "chosen": [user(), said()], "rejected": [user(), said(BAD)]},
        PAIR,
    ),
    "several": ({"prompt": Q, "chosen": GOOD, "rejected": [BAD, "A cow."]}, PAIR | {"rejected": [BAD, "A cow."]}),
    "LLaMA-Factory, messages": (
        {"conversations": [HUMAN], "chosen": gpt(GOOD), "rejected": gpt(BAD), "images": ["a.png"]},
        SEEN,
    ),
    "LLaMA-Factory, texts": ({"conversations": [HUMAN], "chosen": GOOD, "rejected": BAD, "images": ["a.png"]}, SEEN),
    "LLaMA-Factory, alpaca": (
        {"instruction": "What is", "input": "this?", "chosen": GOOD, "rejected": BAD},
        PAIR | {"user": "What is\nthis?"},
    ),
    "ms-swift": ({"messages": [*BEFORE, user(), said()], "rejected_response": BAD}, PAIR),
    "ms-swift, images": (
        {"messages": [user("<image>" + Q), said()], "rejected_response": BAD, "images": ["a.png"]},
        SEEN,
    ),
    "ms-swift, messages": (
        {"messages": [*BEFORE, user(), said()], "rejected_messages": [*BEFORE, user(), said(BAD)]},
        PAIR,
    ),
    "ms-swift, query": ({"query": Q, "response": GOOD, "rejected_response": BAD, "history": [["Hello", "Hi"]]}, PAIR),
    "MMPR": ({"image": "a.png", "question": "<image>\n" + Q, "chosen": GOOD, "rejected": BAD}, SEEN),
    "RLHF-V": ({"image": "a.png", "text": json.dumps({"question": Q, "chosen": GOOD, "rejected": BAD})}, SEEN),
    "KTO, plain": ({"prompt": Q, "completion": GOOD, "label": True}, {"user": Q, "assistant": GOOD, "label": True}),
    "KTO, messages": (
        {"prompt": [user()], "completion": [said(BAD)], "label": False},
        {"user": Q, "assistant": BAD, "label": False},
    ),
    "KTO, ms-swift": ({"messages": [user(), said(BAD)], "label": False}, {"user": Q, "assistant": BAD, "label": False}),
    "KTO, LLaMA-Factory": (
        {"instruction": Q, "input": "", "output": GOOD, "kto_tag": True},
        {"user": Q, "assistant": GOOD, "label": True},
    ),
    "a label of something else": (
        {"messages": [user(), said()], "label": 3},
        {"user": Q, "assistant": GOOD},
    ),
}
BAD_ROWS: dict[str, tuple[dict[str, Any], str]] = {
    "no rejected": ({"prompt": Q, "chosen": GOOD, "rejected": None}, "rejected: is missing: chosen stands alone"),
    "no chosen": ({"prompt": Q, "rejected": BAD}, "chosen: is missing: rejected stands alone"),
    "the same": ({"prompt": Q, "chosen": GOOD, "rejected": GOOD + "\n"}, "rejected[0]: is the same text as assistant"),
    "empty": ({"prompt": Q, "chosen": GOOD, "rejected": " "}, "rejected[0]: is empty"),
    "empty list": ({"prompt": Q, "chosen": GOOD, "rejected": []}, "rejected: is an empty list"),
    "empty chosen": ({"prompt": Q, "chosen": "", "rejected": BAD}, "assistant: is empty"),
    "special": ({"prompt": Q, "chosen": GOOD, "rejected": "<|end|>"}, "holds text that the tokenizer reads"),
    "a number": ({"prompt": Q, "chosen": GOOD, "rejected": 3}, "rejected: must be a text or messages, not a number"),
    "two chosen": ({"prompt": Q, "chosen": [GOOD, "Dog"], "rejected": BAD}, "chosen: has 2 answers"),
    "no question": ({"chosen": "Yes.", "rejected": "No."}, "have no prompt, and begin with different words"),
    "prompt of a kind": ({"prompt": 7, "chosen": GOOD, "rejected": BAD}, "prompt: must be a text, not a number"),
    "other question": (
        {"chosen": [user(), said()], "rejected": [user("Who?"), said(BAD)]},
        "rejected: differs from the chosen conversation before its last answer",
    ),
    "other prompt": (
        {"prompt": "Who?", "chosen": [user(), said()], "rejected": [user(), said(BAD)]},
        "prompt: is not in the conversation of chosen",
    ),
    "goes on": (
        {"prompt": [user()], "chosen": [said()], "rejected": [user(), said(BAD), user("Sure?"), said("Yes.")]},
        "rejected: must have one answer after the question, not 3 messages",
    ),
    "other turns": (
        {"prompt": HH, "chosen": f"{HH} {GOOD}", "rejected": f"{HH.replace('this', 'that')} {BAD}"},
        "rejected: differs from the chosen conversation",
    ),
    "by the user": ({"prompt": [user()], "chosen": [said()], "rejected": user(BAD)}, "is a message of the user"),
    "two answers": (
        {"messages": [user(), said()], "chosen": "A fox.", "rejected": BAD},
        "chosen: is another answer than the last of messages",
    ),
    "other images": (
        {"messages": [user(), said()], "rejected_response": BAD, "images": ["a.png"], "rejected_images": ["b.png"]},
        "rejected_images: are other images",
    ),
    "scores": (
        {"prompt": Q, "chosen": GOOD, "rejected": BAD, "chosen_score": 1, "rejected_score": 2},
        "scores: says that rejected is better: 2 against 1",
    ),
    "label": ({"prompt": Q, "completion": GOOD, "label": 1}, "label: must be true or false, not a number"),
    "no JSON": ({"text": '{"chosen": '}, "text: is not valid JSON"),
    "history": (
        {"query": Q, "response": GOOD, "rejected_response": BAD, "history": ["a"]},
        "history: must be a list of",
    ),
}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    save_images(folder, "a.png", "b.png")
    return folder


def test_every_form_becomes_a_pair_or_a_label(convert: Convert, data: Path) -> None:
    file = data / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row, _ in FORMS.values()))
    result = convert("messages", file)
    made = [record["conversations"][-1] for record in result.records()]
    assert dict(zip(FORMS, made, strict=True)) == {name: turn for name, (_, turn) in FORMS.items()}
    assert sorted(result.said["notes"]) == [
        "a label that is true or false was taken to say whether the answer is a good one (1×)",
        "a record had images and no tag; they are in its first turn (1×)",
        "a record had no prompt: what chosen and rejected have in common at their beginning is its question (1×)",
        "the key label is not used (1×)",
    ]
    assert [len(record["conversations"]) for record in result.records()].count(2) == 3  # with earlier turns


def test_what_is_no_pair_is_refused_with_its_place(convert: Convert, data: Path) -> None:
    file = data / "rows.jsonl"
    rows = [*(row for row, _ in BAD_ROWS.values()), FORMS["MMPR"][0]]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = convert("messages", file, "--on-bad", "skip")
    skipped = {unit["place"]: unit["what"] for unit in result.said["skipped_units"]}
    assert len(result.turns()) == 1
    for line, (name, (_, what)) in enumerate(BAD_ROWS.items(), start=1):
        assert what in skipped.get(f"{file}:{line}", ""), name


@pytest.mark.parametrize("source", ["messages", "csv"])
def test_rlaif_v_as_its_parquet_files_hold_it(convert: Convert, tmp_path: Path, source: str) -> None:
    rows = {
        "ds_name": ["RLAIF-V"] * 2,
        "image": [{"bytes": image_bytes(k), "path": f"{k}.jpg"} for k in range(2)],
        "question": [Q, "How many?"],
        "chosen": [GOOD, "Two."],
        "rejected": [BAD, "Three."],
        "origin_dataset": ["LCS-558K"] * 2,
        "origin_split": ['{"model": "llava15-7b", "type": "detailed_description"}'] * 2,
        "idx": ["0", "1"],
        "image_path": ["a/0.jpg", "a/1.jpg"],
    }
    features = datasets.Features(
        {name: datasets.Image() if name == "image" else datasets.Value("string") for name in rows}
    )
    file = tmp_path / "RLAIF-V-Dataset_000.parquet"
    datasets.Dataset.from_dict(rows, features=features).to_parquet(file)
    turns = convert(source, file).turns()
    assert [turn | {"images": None} for turn in turns] == [
        PAIR | {"images": None},
        {"images": None, "user": "How many?", "assistant": "Two.", "rejected": ["Three."]},
    ]
    assert len({name for turn in turns for name in turn["images"]}) == 2


def test_a_table_of_pairs_or_of_judged_answers(convert: Convert, data: Path) -> None:
    file = data / "pairs.csv"
    file.write_text("image,question,chosen,rejected,worst\na.png,What is this?,A dog.,A cat.,A cow.\n")
    assert convert("csv", file).turn() == SEEN
    both = ("--rejected-column", "rejected", "worst")
    assert convert("csv", file, *both, out="both").turn() == SEEN | {"rejected": ["A cat.", "A cow."]}
    file.write_text("image,prompt,completion,label\na.png,What is this?,A cat.,False\na.png,What is this?,A dog.,1\n")
    assert [turn["label"] for turn in convert("csv", file, out="kto").turns()] == [False, True]
    file.write_text("image,question,chosen,rejected\na.png,What is this?,A dog.,\na.png,What is this?,A dog.,A cat.\n")
    result = convert("csv", file, "--on-bad", "skip", out="skip")
    assert [unit["what"] for unit in result.said["skipped_units"]] == ["conversations[0].rejected[0]: is empty"]
    file.write_text("image,prompt,completion,label\na.png,What is this?,A cat.,maybe\na.png,What is this?,A dog.,1\n")
    result = convert("csv", file, "--on-bad", "skip", out="maybe")
    assert ["is neither true nor false: 'maybe'" in unit["what"] for unit in result.said["skipped_units"]] == [True]
    file.write_text("image,question,answer,label\na.png,What is this?,A dog.,1\n")
    assert "label" not in convert("csv", file, out="class").turn()  # of something else, unless it is named
    assert convert("csv", file, "--label-column", "label", out="named").turn()["label"] is True
    file.write_text("image,question,answer,rejected\na.png,What is this?,A dog.,False\na.png,What is this?,A cat.,1\n")
    refused = convert("csv", file, out="marked")
    assert refused.code == 2
    assert "'False' looks like a mark that the row was rejected, not like a rejected answer" in refused.error
    file.write_text("image,question,chosen,rejected\na.png,Is this a dog?,True,False\n")
    assert convert("csv", file, out="truth").turn()["rejected"] == ["False"]
