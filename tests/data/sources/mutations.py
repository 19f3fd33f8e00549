"""Small sources of every form, and ways to break one of their files; the same seed breaks the same thing.

By hand, with as many as there is time for::

    PYTHONPATH=src:tests/data:tests/data/sources python tests/data/sources/mutations.py 20000
"""

from __future__ import annotations

import csv
import datetime
import decimal
import io
import json
import os
import random
import shutil
import sys
import tarfile
import tempfile
import traceback
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from hub_files import DOCVQA_1200, cauldron_row, docvqa_row, write_parquet
from rich.console import Console
from sample_files import clip, image_bytes

from phi3v.data.check import check_file
from phi3v.data.sources import OWN_DATA, SOURCE_OPTIONS, SOURCES
from phi3v.data.sources.records import OwnDataOptions
from phi3v.errors import UserError

DEEP, LONG = "@deep@", "@long@"  # written as brackets without end and as a number of thousands of digits
NASTY: list[Any] = [
    *(None, True, False, 0, -1, 7, 10**30, 2.5, 1e308, float("nan"), float("inf"), -0.0, DEEP, LONG),
    *("", " ", "\0", "a\0b", "\ud800", "x\udcff.png", "\U0001f600", "\u202e", "\ufeff", "a" * 300, "a" * 70_000),
    *("..", "../a.png", "/etc/passwd", "/", ".", "C:\\a.png", "\\\\host\\a.png", "a\\b.png", "~", "-", "con", "img"),
    *("file://[", "file:///%00", "http://[::1", "%zz", "%00", "data:", "data:,", "data:image/png;base64,@", "//h/p"),
    *("iVBORw0KGgo" * 9, "/9j/" * 40, "<image>", "<|image_1|>", "<|end|>", "</s>", "True", "dev-1-0-0", "a,b;c\td|e"),
    *([], {}, [[]], [{}], [None], {"a": {}}, {"": None}, ["a.png"], {"bytes": 7}, {"path": []}, {"url": {"url": 1}}),
]
VALUES = [image_bytes(number) for number in range(3)]


def _write(folder: Path, files: dict[str, bytes | str]) -> None:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())


def _lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


@cache
def _clip() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        return clip(Path(folder) / "a.avi", length=3).read_bytes()


def easy_vqa(folder: Path) -> None:
    for split in ("train", "test"):
        questions = json.dumps([["which?", "blue", 0], ["what?", "red", 1]])
        images = {f"{split}/images/{k}.png": VALUES[k] for k in range(2)}
        _write(folder, {f"{split}/questions.json": questions, **images})


def docvqa(folder: Path) -> None:
    entries = [
        {"questionId": k, "question": "who?", "image": f"documents/{k // 2}.png", "answers": ["me", "I"]}
        for k in range(4)
    ]
    images = {f"documents/{k}.png": VALUES[k] for k in range(2)}
    for split in ("train", "val"):
        _write(folder, {f"{split}_v1.0.json": json.dumps({"data": entries, "dataset_name": "docvqa"}), **images})


@cache
def _rows_as_parquet() -> bytes:
    rows = [docvqa_row(VALUES[k // 2], f"q{k}", ["a", "b"]) for k in range(3)]
    with tempfile.TemporaryDirectory() as folder:
        return write_parquet(Path(folder) / "a.parquet", rows, DOCVQA_1200).read_bytes()


@cache
def _cauldron_as_parquet() -> bytes:
    rows = [cauldron_row([VALUES[k]], [("q", "a"), ("r", "b")]) for k in range(3)]
    with tempfile.TemporaryDirectory() as folder:
        return write_parquet(Path(folder) / "a.parquet", rows).read_bytes()


def docvqa_tables(folder: Path) -> None:
    _write(folder, {"train-0.parquet": _rows_as_parquet()})


def docvqa_cauldron(folder: Path) -> None:
    _write(folder, {"train-0.parquet": _cauldron_as_parquet()})


def hateful_memes(folder: Path) -> None:
    rows = [{"id": k, "img": f"img/{k}.png", "label": k % 2, "text": "x"} for k in range(3)]
    images = {f"img/{k}.png": VALUES[k] for k in range(3)}
    _write(folder, {"train.jsonl": _lines(rows), "dev_seen.jsonl": _lines(rows[:1]), **images})


def nlvr2(folder: Path) -> None:
    rows = [
        {"identifier": f"dev-{k // 2}-0-{k}", "sentence": "Both.", "label": "True", "directory": 3, "extra": [1]}
        for k in range(3)
    ]
    images = {f"images/dev/3/dev-{k}-0-img{side}.png": VALUES[side] for k in range(2) for side in range(2)}
    _write(folder, {"dev.json": _lines(rows), **images})


def ucf101(folder: Path) -> None:
    names = [f"Biking/v_Biking_g0{k}_c01.avi" for k in range(3)] + ["Archery/v_Archery_g01_c01.avi"]
    lists = {"trainlist01.txt": "\n".join(f"{name} 1" for name in names[:2]), "testlist01.txt": "\n".join(names[2:])}
    _write(folder, {**dict.fromkeys(names, _clip()), **lists})


def ucf101_tar(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(folder / "ucf.tar.gz", "w:gz") as tar:
        for name in ("train/Biking/a.avi", "train/Archery/b.avi", "test/Biking/c.avi"):
            member = tarfile.TarInfo(name)
            member.size = len(_clip())
            tar.addfile(member, io.BytesIO(_clip()))


def _llava_rows() -> list[dict[str, Any]]:
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A dog."}]
    rows: list[dict[str, Any]] = [
        {"id": "7", "image": "0.png", "conversations": [{"from": "system", "value": "Be kind."}, *turns]},
        {
            "id": 8,
            "image": ["0.png", "sub/1.png"],
            "conversations": [{**turns[0], "value": "<image><image>\nA?"}, turns[1]],
        },
        {"video": "a.avi", "conversations": [{**turns[0], "value": "<video> What?"}, turns[1], *turns[:0]]},
    ]
    return rows


_MEDIA: dict[str, bytes | str] = {"0.png": VALUES[0], "sub/1.png": VALUES[1]}


def llava_array(folder: Path) -> None:
    _write(folder, {"a.json": json.dumps(_llava_rows(), indent=1), "a.avi": _clip(), **_MEDIA})


def llava_lines(folder: Path) -> None:
    _write(
        folder,
        {"train.jsonl": _lines(_llava_rows()), "val.jsonl": _lines(_llava_rows()[:1]), "a.avi": _clip(), **_MEDIA},
    )


def llava_container(folder: Path) -> None:
    _write(folder, {"a.json": json.dumps({"version": 1, "data": _llava_rows()[:2]}), **_MEDIA})


def _messages() -> list[dict[str, Any]]:
    parts = [{"type": "image"}, {"type": "text", "text": "What?"}]
    chat = [{"role": "user", "content": parts}, {"role": "assistant", "content": "A dog."}]
    named = [{"type": "image_url", "image_url": {"url": "sub/1.png"}}, {"type": "text", "text": "And?"}]
    return [
        {"messages": [{"role": "system", "content": "Be kind."}, *chat], "images": ["0.png"]},
        {"id": "x", "messages": [{"role": "user", "content": named}, chat[1]]},
    ]


def messages(folder: Path) -> None:
    _write(folder, {"a.jsonl": _lines(_messages()), **_MEDIA})


def messages_spread(folder: Path) -> None:
    _write(folder, {"a.json": "\n".join(json.dumps(row, indent=2) for row in _messages()), **_MEDIA})


def messages_table(folder: Path) -> None:
    chat = [{"role": "user", "content": "<image>What?"}, {"role": "assistant", "content": "A dog."}]
    rows = [{"messages": chat, "images": [{"bytes": VALUES[k], "path": None}]} for k in range(2)]
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), folder / "a.parquet")


def preferences(folder: Path) -> None:
    asked = [{"role": "user", "content": "<image>What?"}]
    good, bad = ({"role": "assistant", "content": text} for text in ("A dog.", "A cat."))
    texts = {"chosen": "A dog.", "rejected": "A cat."}
    rows: list[dict[str, Any]] = [
        {"prompt": asked, "chosen": [good], "rejected": [bad], "images": ["0.png"]},
        {"chosen": [*asked, good], "rejected": [*asked, bad], "image": "0.png", "chosen_score": 2, "rejected_score": 1},
        {"conversations": asked, "chosen": good, "rejected": bad, "images": ["0.png"]},
        {"messages": [*asked, good], "rejected_response": ["A cat.", "A cow."], "images": ["sub/1.png"]},
        {"messages": [*asked, good], "rejected_messages": [*asked, bad], "images": ["sub/1.png"]},
        {"query": "And?", "response": "No.", "rejected_response": "Yes.", "history": [["What?", "A dog."]]},
        {"image": "0.png", "text": json.dumps({"question": "What?", **texts})},
        {"chosen": "Human: What?\n\nAssistant: A dog.", "rejected": "Human: What?\n\nAssistant: A cat."},
        {"chosen": "It is a dog.", "rejected": "It is a cat."},
        {"instruction": "What", "input": "is it?", "output": "A dog.", "kto_tag": True},
        {"prompt": "What?", "completion": "A dog.", "label": False},
    ]
    _write(folder, {"a.jsonl": _lines(rows), **_MEDIA})


def csv_pairs(folder: Path) -> None:
    _write(folder, {"a.csv": "image,question,chosen,rejected\n0.png,Which?,cat,dog\n,Why?,no,yes\n", **_MEDIA})


def csv_labels(folder: Path) -> None:
    table = {"prompt": ["a?", "b?"], "completion": ["c", "d"], "label": [True, False], "image": ["0.png", None]}
    _write(folder, _MEDIA)
    pq.write_table(pa.table(table), folder / "a.parquet")


def csv_text(folder: Path) -> None:
    table = 'id,image,question,answer\na,0.png,Which?,cat\nb,sub/1.png,"Two\nlines?",dog\nc,,None?,no\n'
    _write(folder, {"a.csv": table, **_MEDIA})


def csv_split(folder: Path) -> None:
    table = "sep=;\nimage;question;answer;split\n0.png;Which?;cat;train\nsub/1.png;Why?;dog;dev\n"
    _write(folder, {"a.csv": table, **_MEDIA})


def csv_table(folder: Path) -> None:
    _write(folder, _MEDIA)
    table = {
        "image": ["0.png", "sub/1.png", None],
        "question": ["a?", "b?", "c?"],
        "answer": [3.0, None, 4.0],
        "id": [1, 2, 3],
        "other": [datetime.datetime(2024, 1, 1)] * 3,
    }
    metadata = {"huggingface": json.dumps({"info": {"features": {"id": {"_type": "Value", "dtype": "int64"}}}})}
    pq.write_table(pa.table(table).replace_schema_metadata(metadata), folder / "a.parquet")


def csv_arrow(folder: Path) -> None:
    csv_table(folder)
    table = pq.read_table(folder / "a.parquet")
    (folder / "a.parquet").unlink()
    with pa.OSFile(str(folder / "a.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)


def image_folder(folder: Path) -> None:
    _write(folder, {"cat/0.png": VALUES[0], "cat/1.jpg": image_bytes(5, "JPEG"), "dog/2.png": VALUES[2]})


def image_captions(folder: Path) -> None:
    _write(folder, {"train/0.png": VALUES[0], "train/0.txt": "A dog.", "val/1.png": VALUES[1], "val/1.txt": "A cat."})


def video_folder(folder: Path) -> None:
    _write(folder, {"run/0.avi": _clip(), "walk/1.avi": _clip()})


FORMS: dict[Callable[[Path], None], str] = {
    easy_vqa: "easy-vqa",
    docvqa: "docvqa",
    docvqa_tables: "docvqa",
    docvqa_cauldron: "docvqa",
    hateful_memes: "hateful-memes",
    nlvr2: "nlvr2",
    ucf101: "ucf101",
    ucf101_tar: "ucf101",
    llava_array: "llava",
    llava_lines: "llava",
    llava_container: "llava",
    messages: "messages",
    messages_spread: "messages",
    messages_table: "messages",
    preferences: "messages",
    csv_pairs: "csv",
    csv_labels: "csv",
    csv_text: "csv",
    csv_split: "csv",
    csv_table: "csv",
    csv_arrow: "csv",
    image_folder: "image-folder",
    image_captions: "image-folder",
    video_folder: "video-folder",
}


def break_bytes(rng: random.Random, data: bytes) -> bytes:
    """A text or an image with a few bytes wrong."""
    place, width = rng.randrange(len(data) + 1), rng.choice([1, 1, 2, 8, 100])
    return rng.choice(
        [
            lambda: data[:place],
            lambda: data[:place] + rng.randbytes(width) + data[place:],
            lambda: data[:place] + rng.randbytes(width) + data[place + width :],
            lambda: data[:place] + data[place + width :],
            lambda: data[:place] + data[place : place + width] * 3 + data[place:],
            lambda: (
                data[:place] + rng.choice([b"{", b"[", b'"', b"\\", b",", b"\n", b"\r", b"\0", b";"]) + data[place:]
            ),
            lambda: data.decode("utf-8", "replace").encode(rng.choice(["utf-16", "utf-16-le", "utf-8-sig", "utf-32"])),
            lambda: b"",
        ]
    )()


def _nodes(value: Any) -> list[tuple[Any, Any]]:
    """(container, key) of everything in a JSON value."""
    keys: Any = value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    return [pair for key in list(keys) for pair in [(value, key), *_nodes(value[key])]]


def _deep_copy(value: Any) -> Any:
    return json.loads(json.dumps(value))


def break_json(rng: random.Random, text: str) -> bytes:
    """JSON, or lines of it, with a few values replaced, removed or repeated."""
    try:
        values = [json.loads(text)]
    except ValueError:
        try:
            values = [json.loads(line) for line in text.splitlines()]
        except ValueError:
            return break_bytes(rng, text.encode())
    for _ in range(rng.choice([1, 1, 1, 2, 5])):
        place = rng.choice(_nodes(values))
        container, key = place
        how = rng.choice(["nasty"] * 6 + ["delete", "wrap", "other", "rename", "twice"])
        if how == "delete":
            del container[key]
        elif how == "wrap":
            container[key] = rng.choice([[container[key]], {"a": container[key]}])
        elif how == "other":
            other, other_key = rng.choice(_nodes(values))
            container[key] = _deep_copy(other[other_key])
        elif how == "rename" and isinstance(container, dict):
            container[str(rng.choice(NASTY))] = container.pop(key)
        elif how == "twice" and isinstance(container, list):
            container.insert(key, container[key])
        else:
            container[key] = rng.choice(NASTY)
        if not _nodes(values):
            break
    plain = rng.random() < 0.5
    written = "\n".join(json.dumps(value, ensure_ascii=plain) for value in values)
    depth = rng.choice([50, 300, 900, 990, 5000, 200_000])
    written = written.replace(f'"{DEEP}"', "[" * depth + "]" * depth).replace(f'"{LONG}"', "9" * 5000)
    if rng.random() < 0.1:  # a key twice
        written = written.replace("{", '{"id": 1, "id": 2, "image": "0.png",', 1)
    return written.encode("utf-8", "surrogatepass")


def break_csv(rng: random.Random, text: str) -> bytes:
    """A table of text with a cell, a row or the quoting wrong."""
    rows = list(csv.reader(io.StringIO(text)))
    row = rng.choice(rows)
    row[rng.randrange(len(row))] = str(rng.choice(NASTY))
    buffer = io.StringIO()
    csv.writer(buffer, quoting=rng.choice([csv.QUOTE_MINIMAL, csv.QUOTE_ALL])).writerows(rows)
    return buffer.getvalue().encode("utf-8", "surrogatepass")


_ARRAYS: list[Callable[[int], pa.Array]] = [
    lambda n: pa.nulls(n),
    lambda n: pa.array([1] * n),
    lambda n: pa.array([float("nan")] * n, pa.float16()),
    lambda n: pa.array([float("inf")] * n),
    lambda n: pa.array([1e300] * n),
    lambda n: pa.array([True] * n),
    lambda n: pa.array([b"\xff\xfe"] * n),
    lambda n: pa.array(["\ufeff"] * n, pa.large_string()),
    lambda n: pa.array(["a"] * n).dictionary_encode(),
    lambda n: pa.array([[None]] * n, pa.list_(pa.string())),
    lambda n: pa.array([["a", None]] * n),
    lambda n: pa.array([{"bytes": None, "path": None}] * n, pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
    lambda n: pa.array([{"bytes": b"x", "path": "0.png"}] * n),
    lambda n: pa.array([[{"role": "user", "content": None}]] * n),
    lambda n: pa.array([2**62] * n, pa.timestamp("us")),
    lambda n: pa.array([1500000001] * n, pa.timestamp("ns")),
    lambda n: pa.array([-(2**31)] * n, pa.date32()),
    lambda n: pa.array([2**62] * n, pa.duration("us")),
    lambda n: pa.array([decimal.Decimal("1E+5")] * n),
    lambda n: pa.array([datetime.time(1)] * n),
    lambda n: pa.array([[("a", 1)]] * n, pa.map_(pa.string(), pa.int64())),
]


def break_table(rng: random.Random, file: Path) -> None:
    """A parquet file with a column of another kind, gone, renamed or with other metadata."""
    table = pq.read_table(file)
    column = rng.randrange(table.num_columns)
    how = rng.choice(["type"] * 6 + ["drop", "rename", "empty", "metadata"])
    if how == "type":
        name = table.column_names[column]
        table = table.set_column(column, name, rng.choice(_ARRAYS)(table.num_rows))
    elif how == "drop":
        table = table.remove_column(column)
    elif how == "rename":
        names = [*table.column_names]
        names[column] = str(rng.choice([name for name in NASTY if isinstance(name, str) and name.isascii()]))
        table = table.rename_columns(names)
    elif how == "empty":
        table = table.slice(0, 0)
    else:
        features = {
            name: rng.choice([{"_type": "ClassLabel", "names": rng.choice([["a"], "a", 7, None])}, 7])
            for name in table.column_names
        }
        info = rng.choice(["{", "[]", "{}", "null", '{"info": 7}', json.dumps({"info": {"features": features}})])
        table = table.replace_schema_metadata({"huggingface": info})
    pq.write_table(table, file)


def break_files(rng: random.Random, folder: Path, file: Path) -> None:
    """A file gone, renamed, or something else in its place."""
    how = rng.choice(["gone", "folder", "odd name", "link", "loop", "other"])
    if how == "other":
        shutil.copy(rng.choice([path for path in folder.rglob("*") if path.is_file()]), folder / "other.png")
        return
    content = file.read_bytes()
    file.unlink()
    if how == "folder":
        file.mkdir()
    elif how == "odd name":
        name = rng.choice([b"\xff\xfe", b"\x1b[31m", b"a\nb", b" ", "ü".encode("latin-1"), b"%", b"a" * 200])
        Path(os.fsdecode(os.fsencode(file.parent) + b"/" + name + os.fsencode(file.suffix))).write_bytes(content)
    elif how == "link":
        file.symlink_to(rng.choice(["/etc/hostname", "nowhere", ".", ".."]))
    elif how == "loop":
        file.symlink_to(file.name)


def break_source(rng: random.Random, folder: Path) -> str:
    """Break one file of a source; says how."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    texts = [path for path in files if path.suffix in (".json", ".jsonl", ".csv", ".txt", ".parquet", ".arrow")]
    file = rng.choice(texts * 4 + files) if texts else rng.choice(files)
    roll = rng.random()
    if roll < 0.1:
        break_files(rng, folder, file)
    elif file.suffix == ".parquet":
        break_table(rng, file)
    elif roll < 0.8 and file.suffix in (".json", ".jsonl"):
        file.write_bytes(break_json(rng, file.read_text()))
    elif roll < 0.7 and file.suffix == ".csv":
        file.write_bytes(break_csv(rng, file.read_text()))
    else:
        file.write_bytes(break_bytes(rng, file.read_bytes()))
    return file.name


def try_mutation(form: Callable[[Path], None], seed: int, scratch: Path) -> str:
    """Convert a broken source: that is one `UserError`, or files without a fault. What became of it."""
    rng = random.Random(f"{form.__name__} {seed}")
    folder, out = scratch / "in", scratch / "out"
    form(folder)
    break_source(rng, folder)
    source = FORMS[form]
    given: dict[str, Any] = {"num_frames": 1, "special_text": "escape", "eval_share": 0.3, "question": "Which?"}
    chosen = {name: value for name, value in given.items() if source in SOURCE_OPTIONS[name][1] and rng.random() < 0.4}
    if "num_frames" in SOURCE_OPTIONS and source in SOURCE_OPTIONS["num_frames"][1]:
        chosen["num_frames"] = 1
    options = OwnDataOptions(
        out=out, source=str(folder), on_bad=rng.choice(["stop", "skip", "skip"]), workers=1, progress=False, **chosen
    )
    try:
        result = SOURCES[source](options)
    except UserError:
        return "refused"
    result.render(Console(file=io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="replace")))
    json.dumps(result.to_json_dict())
    for file in result.files.values():
        report = check_file(file, special_text="refuse" if source in OWN_DATA else "escape")
        assert report.ok, report.faults[0]
        assert report.records, file
    return "converted"


def main(count: int, first: int = 0) -> int:
    """Try so many mutations of each form and print what they raise."""
    seen: dict[str, int] = {}
    outcomes: dict[str, int] = {}
    for seed in range(first, first + count):
        for form in FORMS:
            with tempfile.TemporaryDirectory() as scratch:
                try:
                    outcome = try_mutation(form, seed, Path(scratch))
                except Exception as error:  # what is looked for
                    outcome = "CRASHED"
                    where = traceback.extract_tb(error.__traceback__)[-1]
                    name = f"{type(error).__name__} at {Path(where.filename).name}:{where.lineno}"
                    if name not in seen:
                        traceback.print_exc()
                        print(f"^^^ {form.__name__} {seed}: {error!r:.300}", flush=True)
                    seen[name] = seen.get(name, 0) + 1
            outcomes[outcome] = outcomes.get(outcome, 0) + 1
    print(outcomes, seen)
    return len(seen)


if __name__ == "__main__":
    os.environ.setdefault("PHI3V_CACHE", tempfile.mkdtemp())
    sys.exit(main(*map(int, sys.argv[1:])) > 0)
