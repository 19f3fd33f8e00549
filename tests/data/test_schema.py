from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from phi3v.data.faults import Fault
from phi3v.data.image_paths import image_path_fault
from phi3v.data.jsonl import MAX_LINE_BYTES
from phi3v.data.schema import Record, SpecialText, Turn, read_line

FILE = Path("data/train.jsonl")
TURN = {"user": "what shape?", "assistant": "circle"}


def line_of(turn: dict[str, Any] | None = None, **keys: Any) -> str:
    return json.dumps({"id": "a", "conversations": [TURN if turn is None else turn], **keys})


def pair(rejected: Any, second: dict[str, Any] | None = None, **keys: Any) -> str:
    turn = TURN | {"rejected": rejected} | keys
    return line_of(conversations=[turn] if second is None else [turn, second])


def placed(offsets: Any) -> dict[str, Any]:
    return TURN | {"images": ["a.png", "b.png"], "image_offsets": offsets}


def parse_line(text: str | bytes, line: int = 1, special_text: SpecialText = "refuse") -> Record:
    """The record of a line without a fault."""
    read = read_line(text, file=FILE, line=line, special_text=special_text)
    assert read.record is not None, read.faults
    return read.record


def faults_of(text: str | bytes, line: int = 7, **options: Any) -> list[Fault]:
    return list(read_line(text, file=FILE, line=line, **options).faults)


def test_a_record_of_several_turns_is_read_whole() -> None:
    text = json.dumps(
        {
            "id": "val-0300",
            "source": "ucf101",
            "conversations": [
                {"images": ["val/a.jpg", "val/b.jpg"], "user": "Who?", "assistant": "Zoë ☂", "answers": ["Zoë", "Z"]},
                {"user": "Sure?", "assistant": "yes", "images": None},
                {"user": "", "assistant": "a cat", "images": ["c.png"]},
            ],
        }
    )
    assert parse_line(text, line=3) == Record(
        "val-0300",
        "ucf101",
        (
            Turn("Who?", "Zoë ☂", ("val/a.jpg", "val/b.jpg"), ("Zoë", "Z")),
            Turn("Sure?", "yes", (), ()),
            Turn("", "a cat", ("c.png",), ()),
        ),
        3,
    )


def test_what_is_optional_may_be_null() -> None:
    keys = {"source": None, "system": None}
    turn = TURN | {"images": None, "image_offsets": None, "weight": None, "answers": None}
    for line in (line_of(), line_of(turn, **keys)):
        assert parse_line(line) == Record("a", None, (Turn("what shape?", "circle"),), 1)


def test_a_system_message_images_within_a_text_and_a_turn_of_weight_0() -> None:
    turns = [placed([0, 11]), TURN | {"weight": 0}, TURN | {"weight": 1.0}]
    record = parse_line(line_of(system="Be brief.", conversations=turns))
    assert record.system == "Be brief."
    assert [turn.image_offsets for turn in record.turns] == [(0, 11), None, None]
    assert [turn.weight for turn in record.turns] == [1, 0, 1]
    assert record.num_questions == 2


def test_how_good_the_last_answer_is() -> None:
    judged = TURN | {"rejected": "square", "scores": [1, 0.5]}
    record = parse_line(line_of(conversations=[TURN, judged]))
    assert record.rejected == ("square",)
    assert record.turns[-1].scores == (1.0, 0.5)
    assert record.answered("square").turns == (Turn("what shape?", "circle"), Turn("what shape?", "square"))
    several = TURN | {"rejected": ["square", "a <s> circle"], "label": None, "answers": ["a circle"]}
    assert parse_line(line_of(several), special_text="escape").rejected == ("square", "a < s> circle")
    assert [parse_line(line_of(TURN | {"label": label})).label for label in (True, False, None)] == [True, False, None]


def test_images_keep_their_places_beside_escaped_text() -> None:
    user = "<|end|> is <s>: "
    turn = {"user": user, "assistant": "A", "images": list("abcdef"), "image_offsets": [0, 3, 7, 11, 14, 16]}
    (read,) = parse_line(line_of(turn), special_text="escape").turns
    assert read.user == "< |end|> is < s>: "
    assert read.image_offsets == (0, 4, 8, 12, 16, 18)


@pytest.mark.parametrize(
    ("text", "field", "what", "hint"),
    [
        ('{"id": "a", "conversations": [}', "", "is not valid JSON: Expecting value (column 31)", "look near"),
        ("{'id': 'a'}", "", "is not valid JSON", 'quotes with "'),
        ("{", "", "is not valid JSON", "may not be spread over lines"),
        ('{"id": "a", "conver', "", "is not valid JSON", "look near"),
        ("[{", "", "is not valid JSON", "one object a line"),
        ("[]", "", "must be an object, not a list", "one object a line"),
        ("NaN", "", "must be an object, not NaN", ""),
        ("[" * 100_000, "", "is not usable JSON", ""),
        ("9" * 5_000, "", "is not usable JSON", ""),
        (line_of(id=7), "id", "must be a string, not a number", 'quote it: "id": "7"'),
        (line_of(id=None), "id", "must be a string, not null", ""),
        (line_of(id=" "), "id", "is empty", ""),
        (json.dumps({"conversations": [TURN]}), "id", "is missing", 'add "id"'),
        (line_of(source=3), "source", "must be a string, not a number", ""),
        (line_of(source=float("nan")), "source", "must be a string, not NaN", ""),
        (line_of(source=float("-inf")), "source", "must be a string, not -Infinity", ""),
        ('{"id": "a"}', "conversations", "is missing", ""),
        (line_of(conversations={}), "conversations", "must be a list, not an object", ""),
        (line_of(conversations=[]), "conversations", "has no turn", ""),
        (line_of(conversations=["hello"]), "conversations[0]", "must be an object, not a string", ""),
        (line_of({"assistant": "x"}), "conversations[0].user", "is missing", ""),
        (line_of({"user": "x"}), "conversations[0].assistant", "is missing", ""),
        (line_of(TURN | {"user": " "}), "conversations[0].user", "is empty and the turn has no images", ""),
        (line_of(TURN | {"user": True}), "conversations[0].user", "must be a string, not true", ""),
        (line_of(TURN | {"assistant": " \n"}), "conversations[0].assistant", "is empty: there is nothing", ""),
        (line_of(TURN | {"assistant": 3}), "conversations[0].assistant", "must be a string, not a number", ""),
        (line_of(TURN | {"images": "a.png"}), "conversations[0].images", "must be a list", '["a.png"]'),
        (line_of(TURN | {"images": ["a", 1]}), "conversations[0].images[1]", "must be a string", ""),
        (line_of(TURN | {"answers": "x"}), "conversations[0].answers", "must be a list, not a string", ""),
        (line_of(TURN | {"answers": []}), "conversations[0].answers", "is an empty list", ""),
        (line_of(TURN | {"answers": ["x", ""]}), "conversations[0].answers[1]", "is empty", ""),
        (line_of(TURN | {"answers": [None]}), "conversations[0].answers[0]", "must be a string, not null", ""),
        (line_of(sorce="x"), "sorce", "is an unknown key", 'did you mean "source"?'),
        (line_of(TURN | {"Images": []}), "conversations[0].Images", "is an unknown key", '"images"'),
        (line_of(TURN | {"xyz": 1}), "conversations[0].xyz", "is an unknown key", "the keys here are images, image"),
        (line_of(system=[]), "system", "must be a string, not a list", "leave"),
        (line_of(system=" "), "system", "is empty", "leave"),
        (line_of(system="</s>"), "system", "reads as a special token: </s>", ""),
        (line_of(TURN | {"weight": 0.5}), "conversations[0].weight", "must be 0 or 1", "context"),
        (line_of(TURN | {"weight": False}), "conversations[0].weight", "must be 0 or 1", "context"),
        (line_of(TURN | {"weight": 0}), "conversations", "has only turns of weight 0", "weight 1"),
        (line_of(TURN | {"image_offsets": [0]}), "conversations[0].image_offsets", "1 given, images: 0", ""),
        (line_of(placed([2, 1])), "conversations[0].image_offsets", "must not decrease: images are listed in", ""),
        (line_of(placed([1])), "conversations[0].image_offsets", "1 given, images: 2", ""),
        (line_of(placed([0, 12])), "conversations[0].image_offsets", "is beyond the end of the question", ""),
        *[
            (line_of(placed(value)), "conversations[0].image_offsets", "must be a list of whole numbers from 0", "")
            for value in ("1", 1, [True, 1], [0, 1.5], [-1, 2], [None, 2], [1, None], ["1", "2"])
        ],
        (pair("circle"), "conversations[0].rejected", "the same text as assistant: there is nothing to prefer", ""),
        (pair([" circle\n"]), "conversations[0].rejected[0]", "the same text as assistant", "white space does not"),
        (pair(["a  b", "c", "a\tb"]), "conversations[0].rejected[2]", "the same text as rejected[0]", ""),
        (pair("disc", answers=["disc"]), "conversations[0].rejected", "the same text as answers[0]", ""),
        (pair(""), "conversations[0].rejected", "is empty", "write the worse answer"),
        (pair(["x", " "]), "conversations[0].rejected[1]", "is empty", ""),
        (pair([]), "conversations[0].rejected", "is an empty list", "leave"),
        (pair(3), "conversations[0].rejected", "must be a list, not a number", "in quotes"),
        (pair(["x", None]), "conversations[0].rejected[1]", "must be a string, not null", ""),
        (pair("x <|end|>"), "conversations[0].rejected", "reads as a special token: <|end|>", ""),
        (line_of({"user": "x", "rejected": "y"}), "conversations[0].assistant", "is missing", ""),
        (pair("x", second=TURN), "conversations[0].rejected", "is not the last", "end the record"),
        (line_of(conversations=[TURN | {"label": True}, TURN]), "conversations[0].label", "is not the last", ""),
        (line_of(conversations=[TURN, TURN | {"label": True, "weight": 0}]), "conversations[1].label", "weight 0", ""),
        (pair("x", label=True), "conversations[0].label", 'and "rejected" stand in one turn', "keep one"),
        (line_of(TURN | {"label": 1}), "conversations[0].label", "must be true or false, not a number", ""),
        (line_of(TURN | {"scores": [1, 0]}), "conversations[0].scores", 'is of no use without "rejected"', ""),
        (pair("x", scores=1), "conversations[0].scores", "must be a list of numbers, not a number", ""),
        (pair("x", scores=[1]), "conversations[0].scores", "must have 2 numbers, not 1", "in this order"),
        (pair("x", scores=[1, float("nan")]), "conversations[0].scores[1]", "must be a finite number, not NaN", ""),
        (pair("x", scores=[10**400, 1]), "conversations[0].scores[0]", "must be a finite number, not infinity", ""),
        (pair("x", scores=[True, 0]), "conversations[0].scores[0]", "must be a finite number, not true", ""),
        (pair("x", scores=[0.5, 1]), "conversations[0].scores", "rejected is better: 1 against 0.5", "swap"),
        ('{"prompt": "x", "chosen": "a", "rejected": "b"}', "", "preferences in TRL's format", "data convert messages"),
        (line_of(rejected="x"), "rejected", "is a key of a turn", "conversations"),
        (line_of().replace('"id": "a"', '"id": "a", "id": "b"'), "id", "is there twice", ""),
        (line_of().replace('"user"', '"user": "", "user"'), "conversations[0].user", "is there twice", ""),
        (line_of(TURN | {"user": "\ud800"}), "conversations[0].user", "half of a surrogate pair", ""),
        (line_of(TURN | {"images": [""]}), "conversations[0].images[0]", "is an empty path", ""),
        (line_of(TURN | {"images": ["/etc/a.png"]}), "conversations[0].images[0]", "is an absolute path", "images/"),
        (line_of(TURN | {"images": ["a.png", "../b.png"]}), "conversations[0].images[1]", "leaves the data", ""),
    ],
)  # fmt: skip
def test_a_fault_names_its_field_and_what_to_do(text: str, field: str, what: str, hint: str) -> None:
    faults = faults_of(text)
    assert [fault.field for fault in faults] == [field]
    fault = faults[0]
    assert (fault.file, fault.line) == (FILE, 7)
    assert what in fault.what
    assert fault.hint
    assert hint in fault.hint


def test_all_faults_of_a_line_are_found() -> None:
    text = '{"id": 1, "sauce": NaN, "conversations": [{"user": "x", "assistant": ""}, {"images": ["C:\\\\a.png"]}]}'
    fields = [fault.field for fault in faults_of(text)]
    assert fields == [
        "sauce",
        "id",
        "conversations[0].assistant",
        "conversations[1].images[0]",
        "conversations[1].user",
        "conversations[1].assistant",
    ]


def test_a_fault_prints_as_one_line_and_its_hint() -> None:
    fault = Fault(FILE, 7, "conversations[2].images[0]", "is an empty path", "name the file")
    assert str(fault) == "data/train.jsonl:7: conversations[2].images[0]: is an empty path\n  → name the file"


def test_control_characters_of_the_data_never_reach_the_terminal() -> None:
    for fault in faults_of(line_of(TURN | {"images": ["/\x1b[31mred"], "\x1b]0;x": 1})):
        assert "\x1b" not in str(fault)


@pytest.mark.parametrize(
    ("path", "what"),
    [
        ("", "is an empty path"),
        ("  ", "is an empty path"),
        ("/a.png", "is an absolute path"),
        ("C:/a.png", "is an absolute path"),
        ("c:\\a.png", "is an absolute path"),
        ("\\\\server\\a.png", "is an absolute path"),
        ("train\\a.png", "has a backslash"),
        ("..", "leaves the data root"),
        ("a/../../b.png", "leaves the data root"),
        ("a/./../../a/b.png", "leaves the data root"),
        ("https://example.org/a.png", "is a URL"),
        ("file:///a.png", "is a URL"),
        ("data:image/png;base64,AAAA", "is a URL"),
        ("a\0.png", "has a NUL"),
    ],
)
def test_a_path_that_cannot_be_inside_the_data_folder(path: str, what: str) -> None:
    fault = image_path_fault(path)
    assert fault is not None
    assert fault[0].startswith(what)


@pytest.mark.parametrize("path", ["a.png", "a/b/../c.png", "./a.png", "a b/ü…x.png", "..a/b..png", "v:2/a.png"])
def test_a_path_inside_the_data_folder_is_fine(path: str) -> None:
    assert image_path_fault(path) is None


@pytest.mark.parametrize("token", ["<|end|>", "<|user|>", "<|image_1|>", "<|endoftext|>", "</s>"])
def test_special_text_is_refused_with_its_field(token: str) -> None:
    text = line_of({"user": f"a {token}", "assistant": f"{token} b", "answers": ["c", token]})
    faults = faults_of(text)
    assert [fault.field.removeprefix("conversations[0].") for fault in faults] == ["user", "assistant", "answers[1]"]
    assert all(token in fault.what for fault in faults)


def test_special_text_is_escaped_if_asked() -> None:
    text = line_of({"user": "a <|end|> <b>", "assistant": "<|user|>", "answers": ["</s>"]})
    (turn,) = parse_line(text, special_text="escape").turns
    assert turn == Turn("a < |end|> <b>", "< |user|>", (), ("< /s>",))


def test_text_that_only_looks_special_is_left_alone() -> None:
    turn = {"user": "is 3 < 4? <|nothing|> <b>", "assistant": "a <- b"}
    assert parse_line(line_of(turn)).turns == (Turn(**turn),)


def test_invalid_utf8_names_the_byte() -> None:
    (fault,) = faults_of(line_of().encode().replace(b"circle", b"caf\xe9"))
    assert "not UTF-8: byte 0xe9 at byte" in fault.what
    (fault,) = faults_of(line_of().encode("utf-16"), line=1)
    assert "iconv -f UTF-16" in fault.hint


def test_a_byte_order_mark_is_tolerated_on_the_first_line_only() -> None:
    text = "\ufeff" + line_of()
    assert parse_line(text.encode()).id == "a"
    assert parse_line(text).id == "a"
    assert faults_of(text, line=2)


def test_a_line_without_end_is_refused() -> None:
    (fault,) = faults_of(b'["' + b"x" * MAX_LINE_BYTES)
    assert fault.what == "the line is longer than 64 MiB"


def test_what_can_be_read_of_a_faulty_line_is_kept() -> None:
    line = read_line(line_of({"user": "x", "assistant": "", "images": ["a.png", "/b.png", "c.png"]}), file=FILE, line=1)
    assert line.record is None
    assert line.id == "a"
    assert line.images == [("conversations[0].images[0]", "a.png"), ("conversations[0].images[2]", "c.png")]
