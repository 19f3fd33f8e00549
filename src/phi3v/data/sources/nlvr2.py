"""NLVR2: is this statement true of these two photographs?

Two forms give the same records for the same content:

* The hub's ``HuggingFaceM4/the_cauldron``, config ``nlvr2`` (`questions.py`), or a folder of its parquet or arrow
  files. Its texts are taken verbatim.
* The original distribution: ``train.json``, ``dev.json``, ``test1.json``, ``test2.json`` (in the folder or in its
  ``data/``), one object a line with ``identifier`` ``SPLIT-SET-PAIR-SENTENCE``, ``sentence``, ``label``
  ``"True"`` or ``"False"``, and ``directory`` in train; the images of ``dev-850-0-1`` are
  ``dev/dev-850-0-img0.png`` and ``…-img1.png``, those of train ``images/train/DIRECTORY/…``; each of the two places
  is tried for every split.

Both images are in one turn, the left one first. The statements about a pair are records one after the other that
name the same two files. For the original distribution ids are the ``identifier``, the question is `QUESTION` and the
answer the label. That wording is ours: the collection's own could not be looked up when this was written, so evaluate
a model with data from the same form that it was trained on.
"""

from __future__ import annotations

from itertools import chain
from pathlib import Path

from phi3v.data.convert import BadUnit, Conversion, ConversionResult, ConvertOptions
from phi3v.data.jsonl import read_lines
from phi3v.data.sources.media import Medium
from phi3v.data.sources.questions import Group, convert_dataset, json_line, question_of, text_of, write_groups
from phi3v.data.sources.records import RawRecord
from phi3v.data.sources.splits import unknown_layout
from phi3v.errors import UserError

SOURCE = "nlvr2"
QUESTION = "Is the following statement about the two images true or false? {sentence}"
SPLITS = ("train", "dev", "test1", "test2")

# (line, question) of every statement about a pair of images; the pair is its directory and its identifier
_Pairs = dict[tuple[str, str], list[tuple[int, RawRecord]]]


def convert(options: ConvertOptions) -> ConversionResult:
    """Write ``images/SPLIT/N.{0,1}.png`` and ``SPLIT.jsonl`` of every split; see `questions.py`."""
    return convert_dataset(
        SOURCE,
        options,
        original="train.json, dev.json, test1.json with images",
        find_files=_annotation_files,
        write_original=_write_original,
        num_images=2,
    )


def _write_original(conversion: Conversion, folder: Path, files: dict[str, Path]) -> None:
    roots = {split: _image_roots(folder, split, file) for split, file in files.items()}
    for split, file in files.items():
        pairs, bad = _read_pairs(file)
        groups = (_group(file, roots[split], *pair, statements) for pair, statements in pairs.items())
        write_groups(conversion, SOURCE, split, chain(bad, groups), total=len(bad) + len(pairs))


def _annotation_files(folder: Path) -> dict[str, Path]:
    return {
        split: file
        for split in SPLITS
        for parent in (folder, folder / "data")
        if (file := parent / f"{split}.json").is_file()
    }


def _read_pairs(file: Path) -> tuple[_Pairs, list[BadUnit]]:
    """The statements by pair, in the order of the pairs' first lines; and the lines that cannot be used.

    All of them at once, some 30 MB for train: the statements about a pair may lie anywhere in the file.
    """
    pairs: _Pairs = {}
    bad = []
    for line, raw in read_lines(file):
        try:
            row = json_line(raw)
            identifier = text_of(row.get("identifier"), "identifier")
            name = identifier.split("-")
            if len(name) != 4:
                raise UserError(f"identifier is not SPLIT-SET-PAIR-SENTENCE: {identifier!r:.60}", hint="correct it")
            sentence = text_of(row.get("sentence"), "sentence")
            label = str(row.get("label"))
            if label not in ("True", "False"):
                what = f"label is neither True nor False: {label!r:.60}"
                raise UserError(what, hint="there is nothing to learn from it")
        except UserError as error:
            bad.append(BadUnit.of(f"{file}:{line}", error))
            continue
        pair = (str(row.get("directory", "")), "-".join(name[:3]))
        question = question_of(QUESTION.format(sentence=sentence), label, id=identifier)
        pairs.setdefault(pair, []).append((line, question))
    return pairs, bad


def _image_roots(folder: Path, split: str, file: Path) -> list[Path]:
    roots = [root for root in (folder / "images" / split, folder / split) if root.is_dir()]
    if not roots:
        raise unknown_layout(folder, [f"images/{split}/ or {split}/ for the images of {file.name}"])
    return roots


def _group(file: Path, roots: list[Path], directory: str, name: str, statements: list[tuple[int, RawRecord]]) -> Group:
    def read() -> tuple[list[Medium], list[RawRecord]]:
        paths = [f"{directory}/{name}-img{k}.png" if directory else f"{name}-img{k}.png" for k in range(2)]
        root = next((root for root in roots if (root / paths[0]).is_file()), roots[0])
        return [Medium("image", path=path, root=root) for path in paths], [question for _, question in statements]

    return Group(f"{file}:{statements[0][0]}", read)
