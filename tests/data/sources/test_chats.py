"""What the formats of other tools say about a conversation: honoured, refused or named, never dropped silently."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from own_files import Convert, save_images
from PIL import Image
from sample_files import clip

from phi3v.data.sources.tags import Tag, split_tags


def llava(user: str, answer: Any = "A", **fields: Any) -> dict[str, Any]:
    return {"conversations": [{"from": "human", "value": user}, {"from": "gpt", "value": answer}]} | fields


def chat(*contents: Any, **fields: Any) -> dict[str, Any]:
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[k % 2], "content": content} for k, content in enumerate(contents)], **fields}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    save_images(folder, "a.png", "b.png", "c.png")
    Image.new("RGB", (64, 32)).save(folder / "64x32.png")
    return folder


def write(folder: Path, *rows: Any) -> Path:
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def source_of(row: dict[str, Any]) -> str:
    return "messages" if "messages" in row else "llava"


def a(text: str, number: int | None = None, path: str | None = None) -> Tag:
    return Tag("video" if "video" in text.lower() else "image", text, number, path)


PAD, FAKE = "<|image_pad|>", "<fake_token_around_image>"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("What?", ["What?"]),
        ("", []),
        ("  spaces <b> stay ", ["  spaces <b> stay "]),
        ("<image>\nWhat?", [a("<image>"), "\nWhat?"]),
        ("<image><image>", [a("<image>"), a("<image>")]),
        ("A: <IMAGE>B", ["A: ", a("<IMAGE>"), "B"]),
        ("<image1> <image 2> <Image_3>", [a("<image1>", 1), " ", a("<image 2>", 2), " ", a("<Image_3>", 3)]),
        ("<|image_1|>\n<|image_2|>", [a("<|image_1|>", 1), "\n", a("<|image_2|>", 2)]),
        ("<ImageHere>", [a("<ImageHere>")]),
        ("<image_placeholder>", [a("<image_placeholder>")]),
        ("<|image|><image/>", [a("<|image|>"), a("<image/>")]),
        (PAD * 2, [a(PAD), a(PAD)]),
        (f"<|vision_start|>{PAD * 3}<|vision_end|>x", [a(f"<|vision_start|>{PAD * 3}<|vision_end|>"), "x"]),
        ("<|vision_start|><|video_pad|><|vision_end|>", [a("<|vision_start|><|video_pad|><|vision_end|>")]),
        ("<start_of_image>x", [a("<start_of_image>"), "x"]),
        ("[IMG]x[IMG][IMG_BREAK][IMG][IMG_END]", [a("[IMG]"), "x", a("[IMG][IMG_BREAK][IMG][IMG_END]")]),
        ("<img></img><img><IMG_CONTEXT></img>", [a("<img></img>"), a("<img><IMG_CONTEXT></img>")]),
        ("<im_start><im_patch><im_patch><im_end>x", [a("<im_start><im_patch><im_patch><im_end>"), "x"]),
        (f"{FAKE}<image>{FAKE}", [a(f"{FAKE}<image>{FAKE}")]),
        ("<image_start><image><image_end>", [a("<image_start><image><image_end>")]),
        ("<img>a b.png</img>", [a("<img>a b.png</img>", path="a b.png")]),
        ("<video>", [a("<video>")]),
        ('<img src="a.png"> [img] <imageView x="1">', ['<img src="a.png"> [img] <imageView x="1">']),
    ],
)  # fmt: skip
def test_tags_are_found(text: str, expected: list[str | Tag]) -> None:
    assert split_tags(text) == expected


IMAGES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "interleaved": (
        llava("Picture A: <image>\nPicture B: <image>\nWhich one is red?", image=["a.png", "b.png"]),
        {
            "images": ["a.png", "b.png"],
            "image_offsets": [11, 23],
            "user": "Picture A: \nPicture B: \nWhich one is red?",
        },
    ),
    "behind": (
        llava("Which?\n<image>", image="a.png"),
        {"images": ["a.png"], "image_offsets": [7], "user": "Which?\n"},
    ),
    "leading, other marks": (
        llava(" <IMAGE>\n<image_placeholder> x", image=["a.png", "b.png"]),
        {"images": ["a.png", "b.png"], "user": "x"},
    ),
    "one leads": (
        llava("<image> or <image>?", image=["a.png", "b.png"]),
        {"images": ["a.png", "b.png"], "image_offsets": [0, 4], "user": " or ?"},
    ),
    "numbers": (
        llava("<image2> then <image1>", image=["a.png", "b.png"]),
        {"images": ["b.png", "a.png"], "image_offsets": [0, 6], "user": " then "},
    ),
    "numbers from 0": (
        llava("<image_00><image_01>x", image=["a.png", "b.png"]),
        {"images": ["a.png", "b.png"], "user": "x"},
    ),
    "named by their tags": (
        llava("<image_01> or <image_00>?", image={"<image_00>": "a.png", "<image_01>": "b.png"}),
        {"images": ["b.png", "a.png"], "image_offsets": [0, 4], "user": " or ?"},
    ),
    "pads": (
        llava("<|vision_start|><|image_pad|><|vision_end|>colour?", image="a.png"),
        {"images": ["a.png"], "user": "colour?"},
    ),
    "named in the text": (
        llava("Picture 1: <img>a.png</img>\nWhich colour?"),
        {"images": ["a.png"], "image_offsets": [11], "user": "Picture 1: \nWhich colour?"},
    ),
    "named twice": (llava("<img>a.png</img>Which?", image="a.png"), {"images": ["a.png"], "user": "Which?"}),
    "parts": (
        chat(
            [
                {"type": "text", "text": "Picture A: "},
                {"type": "image_url", "image_url": {"url": "a.png"}},
                {"type": "text", "text": "Picture B:"},
                {"type": "image"},
                {"type": "input_text", "text": "Which?"},
            ],
            "A",
            images=["b.png"],
        ),
        {"images": ["a.png", "b.png"], "image_offsets": [11, 23], "user": "Picture A: \nPicture B:\n\nWhich?"},
    ),
    "tags in parts": (
        chat([{"type": "text", "text": "<image>Who?"}], "A", images=["a.png"]),
        {"images": ["a.png"], "user": "Who?"},
    ),
    "of the message": (
        {"messages": [{"role": "user", "content": "Who?", "images": ["a.png"]}, {"role": "assistant", "content": "A"}]},
        {"images": ["a.png"], "user": "Who?"},
    ),
    "plain": (llava("What is 1 < 2 in <b>HTML</b>?"), {"user": "What is 1 < 2 in <b>HTML</b>?"}),
}


@pytest.mark.parametrize("source", ["llava", "messages"])
def test_images_keep_their_places(convert: Convert, data: Path, source: str) -> None:
    cases = [case for case in IMAGES.values() if source_of(case[0]) == source]
    result = convert(source, write(data, *(row for row, _ in cases)))
    assert result.code == 0, result.error
    assert result.turns() == [turn | {"assistant": "A"} for _, turn in cases]
    assert result.said["notes"] == []


def test_frames_of_a_clip_stand_at_one_place(convert: Convert, data: Path) -> None:
    clip(data / "a.mp4")
    result = convert("llava", write(data, llava("before <video> after", video="a.mp4")), "--frames", "2")
    assert result.turn()["image_offsets"] == [7, 7]
    assert result.turn()["user"] == "before  after"


def test_places_are_those_of_the_escaped_text(convert: Convert, data: Path) -> None:
    row = llava("<|end|> <image> </s>", image="a.png", system="<s>")
    result = convert("llava", write(data, row), "--special-text", "escape")
    assert result.records()[0]["system"] == "< s>"
    assert result.turn() == {"images": ["a.png"], "image_offsets": [9], "user": "< |end|>  < /s>", "assistant": "A"}


@pytest.mark.parametrize("role", ["system", "developer"])
def test_a_system_message_is_one(convert: Convert, data: Path, role: str) -> None:
    first = {"role": role, "content": [{"type": "text", "text": "Be brief."}]}
    messages = [first, *chat("<image>Who?", "A")["messages"]]
    rows = [
        chat("Who?", "A", system="Be brief."),
        {"messages": messages, "images": ["a.png"]},
        {"messages": messages, "images": ["a.png"], "system": "Be brief."},
        chat("Who?", "A", system=" "),
    ]
    result = convert("messages", write(data, *rows))
    assert [row.get("system") for row in result.records()] == ["Be brief."] * 3 + [None]
    assert [turn["user"] for turn in result.turns()] == ["Who?"] * 4
    sharegpt = llava("<image>Who?", image="a.png")
    sharegpt["conversations"].insert(0, {"from": "system", "value": "Antworte auf Deutsch."})
    (record,) = convert("llava", write(data, sharegpt), out="llava").records()
    assert record["system"] == "Antworte auf Deutsch."


@pytest.mark.parametrize(
    ("key", "no", "yes"),
    [("weight", 0, 1), ("weight", 0.0, None), ("train", False, True), ("loss", False, True), ("mask", True, False)],
)
def test_an_answer_that_is_not_trained_on_is_context(
    convert: Convert, data: Path, key: str, no: object, yes: object
) -> None:
    row = chat("<image>Which colour?", "WRONG GUESS", "Look again.", "red", images=["a.png"])
    for message, value in zip(row["messages"], (no, no, no, yes), strict=True):
        message[key] = value
    result = convert("messages", write(data, row))
    assert result.turns() == [
        {"images": ["a.png"], "user": "Which colour?", "assistant": "WRONG GUESS", "weight": 0},
        {"user": "Look again.", "assistant": "red"},
    ]
    assert result.said["notes"] == []


def test_keys_without_a_use_are_named_once(convert: Convert, data: Path) -> None:
    row = chat("<image>Which?", "red", images=["a.png"], chosen_by="Ann", tools=None, meta=[], weight=0.5)
    row["messages"][0] |= {"name": "Ann", "train": True}
    row["messages"][1] |= {"refusal": None, "loss_scale": [1.0]}
    parts = chat([{"type": "image_url", "image_url": {"url": "a.png", "detail": "low"}, "cache": 1}], "A", margin=2)
    result = convert("messages", write(data, row, row, parts))
    assert sorted(result.said["notes"]) == [
        "the key chosen_by is not used (2×)",
        "the key margin is not used (1×)",
        "the key messages[].content[].cache is not used (1×)",
        "the key messages[].content[].image_url.detail is not used (1×)",
        "the key messages[].loss_scale is not used (2×)",
        "the key messages[].name is not used (2×)",
        "the key messages[].train is not used (2×)",
        "the key weight is not used (2×)",
    ]


def test_either_source_takes_either_key_and_tables(convert: Convert, data: Path) -> None:
    rows = [chat("<image>Who?", "A", images=["a.png"]), llava("Q", "B")]
    for source in ("llava", "messages"):
        assert [turn["assistant"] for turn in convert(source, write(data, *rows), out=source).turns()] == ["A", "B"]
    datasets.Dataset.from_list([llava("<image>Who?", image="a.png", cut=None)]).to_parquet(data / "rows.parquet")
    result = convert("llava", data / "rows.parquet")
    assert result.turn() == {"images": ["a.png"], "user": "Who?", "assistant": "A"}
    assert result.said["notes"] == []


def test_boxes_are_filled_in(convert: Convert, data: Path) -> None:
    objects = {"ref": ["disc", "dot"], "bbox": [[16, 8, 48, 24.0], [32, 32]]}
    rows = [
        chat(
            "<image>Where is the <ref-object>?",
            "<bbox>",
            images=["64x32.png"],
            objects={"ref": ["disc"], "bbox": [[16, 8, 48, 24]]},
        ),
        chat(
            "<image>What is there?", "<ref-object><bbox> and <ref-object><bbox>", images=["64x32.png"], objects=objects
        ),
        chat("Q", "<bbox>", objects={"bbox": [[0.25, 0.5, 1, 1]], "bbox_type": "norm1"}),
        chat("<image><image><bbox>?", "A", images=["a.png", "64x32.png"], objects={"bbox": [[16, 8]], "image_id": [1]}),
        chat("<image>Q", "A", images=["a.png"], objects={"bbox": [[1, 2, 3, 4]]}),
    ]
    result = convert("messages", write(data, *rows))
    assert result.code == 0, result.error
    assert [(turn["user"], turn["assistant"]) for turn in result.turns()] == [
        ("Where is the disc?", "[(250,250),(750,750)]"),
        ("What is there?", "disc[(250,250),(750,750)] and dot[(500,1000)]"),
        ("Q", "[(250,500),(1000,1000)]"),
        ("[(250,250)]?", "A"),
        ("Q", "A"),
    ]
    assert result.said["notes"] == [
        "a <bbox> was filled in as [(x1,y1),(x2,y2)], in thousandths of the image's width and height (5×)",
        "the key objects is not used (1×)",
    ]


def test_text_that_is_no_image_is_said(convert: Convert, data: Path) -> None:
    rows = [
        llava("<image>\nAs Markdown.", "![fig](<image>)", image="a.png"),
        llava("What is wrong in ![x](y.png)?"),
        llava('<img src="a.png"> is what?'),
        llava("<image>What does <ImageView> do?", "<image_view></image_view>", image="a.png"),
    ]
    result = convert("llava", write(data, *rows))
    assert [turn["user"] for turn in result.turns()][3] == "What does <ImageView> do?"
    assert result.said["notes"] == [
        "an answer holds an image tag, which is trained on as plain text (1×)",
        "a record has no image and a question with one in Markdown or HTML, which stays text (2×)",
    ]


def with_system(row: dict[str, Any], text: str) -> dict[str, Any]:
    row["messages"].insert(0, {"role": "system", "content": text})
    return row


def with_weights(*weights: Any, key: str = "weight") -> dict[str, Any]:
    row = chat("Q", "A")
    for message, weight in zip(row["messages"], weights, strict=True):
        message[key] = weight
    return row


BOX = {"bbox": [[1, 2, 30, 30]]}
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "number": (llava("Q", 1), "conversations[1].value: must be a string, not a number"),
    "true": (llava("Q", True), "conversations[1].value: must be a string, not true"),
    "false": (chat("Q", False), "messages[1].content: must be a string, not false"),
    "null": (llava("Q", None), "conversations[1].value: must be a string, not null"),
    "object": (chat({"a": 1}, "A"), "messages[0].content: must be a string, not an object"),
    "list": (llava("Q", ["A"]), "conversations[1].value[0]: is no part of a message"),
    "image that is a number": (llava("<image>Q", image=[7]), "image[0]: must be a path, not a number"),
    "image that is an object": (llava("<image>Q", image={"a": "b"}), "image[0]: must be a path, not an object"),
    "role that is a number": (
        {"messages": [{"role": 1, "content": "Q"}]},
        "messages[0].role: is no role known here: a number",
    ),
    "no role": ({"messages": [{"content": "Q"}]}, "messages[0]: says neither role nor from"),
    "no list": ({"messages": "Q"}, "messages: must be a list, not a string"),
    "no object": ({"messages": [1]}, "messages[0]: must be an object, not a number"),
    "an unknown answer": (
        {"conversations": None, "prompt": "Q", "reply": "A"},
        "has neither messages nor conversations (is this the right source for the file? The record's keys are "
        "conversations, prompt, reply",
    ),
    "ours": (
        {"conversations": [{"user": "Q", "assistant": "A"}]},
        "conversations[0]: is a turn of the format that training reads",
    ),
    "two systems": (with_system(chat("Q", "A", system="One."), "Two."), "system: is another text than that of"),
    "system of a kind": (chat("Q", "A", system=1), "system: must be a string, not a number"),
    "image of the system": (
        with_system(chat("Q", "A", images=["a.png"]), "<image>"),
        "is a system message with an image",
    ),
    "half a weight": (with_weights(None, 0.5), "messages[1].weight: must be 0 or 1, not 0.5"),
    "nothing to train on": (with_weights(None, 0), "has only turns of weight 0: there is nothing to train on"),
    "masked whole": (with_weights(None, True, key="mask"), "has only turns of weight 0"),
    "not to be trained on": (chat("Q", "A", train=False), "train: the record is marked as not to be trained on"),
    "unknown token": (
        llava("<|vision_end|>x", image="a.png"),
        "holds an image token that is not known: '<|vision_end|>'",
    ),
    "unknown token beside an image": (
        llava("<image><begin_image>x", image="a.png"),
        "holds an image token that is not known: '<begin_image>'",
    ),
    "an end and no beginning": (
        llava("<image>\nx</image>", image="a.png"),
        "image token that is not known: '</image>'",
    ),
    "unknown token without an image": (llava("<|img_tok|>x"), "holds an image token that is not known"),
    "unknown tag": (
        llava("<myimage>x", image="a.png"),
        "conversations[0]: holds what may be an image tag and is not known",
    ),
    "unknown tag without an image": (
        llava("[Image 1] x"),
        "holds what may be an image tag and is not known: '[Image 1]'",
    ),
    "tag and no image": (llava("<|image_pad|>x"), "1 <image> tag for 0 images"),
    "a number too high": (llava("<image2>x", image="a.png"), "the tags <image2> do not name each of 1 images once"),
    "a number twice": (llava("<image1> <image1>", image=["a.png", "b.png"]), "do not name each of 2 images once"),
    "numbers and none": (llava("<image1> <image>", image=["a.png", "b.png"]), "do not name each of 2 images once"),
    "image only in the answer": (llava("Q", "<image>", image="a.png"), "the only image tag is in an answer"),
    "token in the answer": (
        llava("<image>Q", "<|image_pad|>", image="a.png"),
        "is an answer with an image: '<|image_pad|>'",
    ),
    "URL in the text": (llava("<img>https://a.org/b.png</img>Q"), "is a URL, and nothing is downloaded"),
    "named and missing": (llava("<img>no.png</img>Q"), "there is no such image: 'no.png'"),
    "another key": (llava("Q", image_path="a.png"), "image_path: the record has no image, and this key"),
    "box without objects": (
        chat("<image>Q", "<bbox>", images=["a.png"]),
        "messages[1].content: holds <bbox>, and the record has no objects",
    ),
    "object without a name": (
        chat("<ref-object>?", "A", objects=BOX),
        "holds <ref-object>, and objects has no list ref",
    ),
    "too few boxes": (
        chat("<image>Q", "<bbox><bbox>", images=["64x32.png"], objects=BOX),
        "holds more <bbox> than objects.bbox has items: 1",
    ),
    "too many boxes": (
        chat("<image>Q", "<bbox>", images=["64x32.png"], objects={"bbox": BOX["bbox"] * 2}),
        "objects.bbox: 2 are given and 1 stand in the text",
    ),
    "which image": (chat("<image><image>Q", "<bbox>", images=["a.png", "b.png"], objects=BOX), "which one is not said"),
    "outside": (
        chat("<image>Q", "<bbox>", images=["64x32.png"], objects={"bbox": [[0, 0, 65, 10]]}),
        "lies outside of the image, whose size is 64x32",
    ),
    "x, y, width, height": (
        chat("<image>Q", "<bbox>", images=["64x32.png"], objects={"bbox": [[30, 20, 10, 10]]}),
        "ends before it begins",
    ),
    "no box": (
        chat("<image>Q", "<bbox>", images=["a.png"], objects={"bbox": [["1", 2]]}),
        "objects.bbox[0]: is no box",
    ),
    "far away": (chat("<image>Q", "<bbox>", images=["a.png"], objects={"bbox": [[1, 10**400]]}), "[0]: is no box"),
    "a placeholder again": (
        chat("<ref-object>", "A", objects={"ref": ["<bbox>"]}),
        "is no name of an object: '<bbox>'",
    ),
    "box type": (
        chat("<image>Q", "<bbox>", images=["a.png"], objects=BOX | {"bbox_type": "norm999"}),
        "objects.bbox_type: is not known",
    ),
    "objects as a text": (chat("<image>Q", "<bbox>", images=["a.png"], objects="[]"), "objects has no list bbox"),
}


@pytest.mark.parametrize("source", ["llava", "messages"])
def test_what_is_not_certain_is_refused(convert: Convert, data: Path, source: str) -> None:
    cases = {name: case for name, case in BAD.items() if source_of(case[0]) == source}
    good = llava("Q") if source == "llava" else chat("Q", "A")
    file = write(data, *(row for row, _ in cases.values()), good)
    result = convert(source, file, "--on-bad", "skip")
    skipped = {unit["place"]: f"{unit['what']} ({unit['hint']})" for unit in result.said["skipped_units"]}
    assert len(result.turns()) == 1
    for line, (name, (_, what)) in enumerate(cases.items(), start=1):
        assert what in skipped[f"{file}:{line}"], name
    assert result.said["notes"] == []
    assert convert(source, file).code == 2
