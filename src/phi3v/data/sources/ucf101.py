"""UCF-101: which of these classes of action does the clip show?

From the hub's ``sayakpaul/ucf101-subset`` (a tar of 10 classes, downloaded as a whole), a tar file, or a folder. In
either, clips lie in one of three ways, below any folders:

* ``{train,val,test}/CLASS/NAME.avi``: the splits as they are.
* ``CLASS/NAME.avi`` with ``trainlist01.txt`` and ``testlist01.txt`` (of the original ``ucfTrainTestlist``): the
  splits train and test of these lists.
* ``CLASS/NAME.avi`` alone: split by group, the ``g08`` of ``v_Biking_g08_c02.avi``, as the clips of a group are cut
  from one video. Of the groups of a class, in order, the first 7/25 are test, as in the original's first split, the
  next 3/25 val, the others train.

Output as the recipe's: ``images/SPLIT/CLASS/NAME.K.jpg``, ``ucf101_SPLIT.jsonl``, sorted by class and name. Ids are the
clips' own, ``CLASS/NAME``.
"""

from __future__ import annotations

import contextlib
import lzma
import os
import re
import shutil
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import IO, cast

import huggingface_hub

from phi3v.data.convert import BadUnit, Conversion, ConversionResult, ConvertOptions, Unit
from phi3v.data.sources.media import Medium
from phi3v.data.sources.records import RawRecord, RawTurn, RecordWriter
from phi3v.data.sources.splits import unknown_layout
from phi3v.data.sources.tables import cannot_reach_hub, local_source
from phi3v.data.video import VIDEO_SUFFIXES
from phi3v.errors import UserError

SOURCE = "ucf101"
HUB_ID = "sayakpaul/ucf101-subset"
HUB_FILE = "UCF101_subset.tar.gz"
SPLITS = ("train", "val", "test")
LISTS = {"train": "trainlist01.txt", "test": "testlist01.txt"}

_KNOWN = ["{train,val,test}/CLASS/NAME.avi", f"CLASS/NAME.avi, with or without {LISTS['train']} and {LISTS['test']}"]

# Path inside the folder or tar, with "/" -> reads its bytes. Read from several threads.
_Files = dict[str, Callable[[], bytes]]


@dataclass(frozen=True, slots=True)
class _Clip:
    path: str
    split: str
    label: str

    @property
    def name(self) -> str:
        return PurePosixPath(self.path).stem


def convert(options: ConvertOptions) -> ConversionResult:
    """Write ``images/SPLIT/CLASS/NAME.K.jpg`` and ``ucf101_SPLIT.jsonl`` of every split.

    Args:
        options: ``source`` is a folder, a tar file or a hub id; ``num_frames`` frames of each clip are taken.

    Raises:
        UserError: clips lie in none of the ways above, a tar cannot be read or reaches out of its folder, ``out`` holds
            other data, or clips are bad and are not to be skipped.
    """
    path = local_source(options.source) or _download(options.source)
    with Conversion(SOURCE, options) as conversion, contextlib.ExitStack() as stack:
        archives = [path] if path.is_file() else sorted(path.glob("*.tar*")) + sorted(path.glob("*.tgz"))
        files = {} if path.is_file() else _in_folder(path)
        if not any(map(_is_clip, files)) and len(archives) == 1:
            path = archives[0]
            files = stack.enter_context(_in_archive(path, options.out))
        clips, bad = _clips(files, conversion)
        if not clips:
            raise unknown_layout(path, _KNOWN)
        writer = RecordWriter(conversion, SOURCE)
        labels = sorted({clip.label for clip in clips})
        prompt = f"Classify the video into one of the following classes: {', '.join(labels)}."
        for split in SPLITS:
            of_split = [clip for clip in clips if clip.split == split]
            if of_split:
                units = (_unit(writer, files, path, clip, prompt) for clip in of_split)
                total = len(bad) + len(of_split)
                conversion.write_split(split, chain(bad, units), total=total, file_name=f"ucf101_{split}.jsonl")
                bad = []
        return conversion.result()


def _unit(writer: RecordWriter, files: _Files, path: Path, clip: _Clip, prompt: str) -> Unit:
    place = f"{path}/{clip.path}" if path.is_dir() else f"{path}: {clip.path}"
    name = f"{clip.label}/{clip.name}"

    def read() -> list[RawRecord]:
        medium = Medium("video", data=files[clip.path](), stem=f"{clip.split}/{name}", name=place)
        return [RawRecord(name, (RawTurn(prompt, clip.label, (medium,)),))]

    return writer.unit(place, read)


def _download(source: str | None) -> Path:
    try:
        if source in (None, HUB_ID):
            return Path(huggingface_hub.hf_hub_download(HUB_ID, HUB_FILE, repo_type="dataset"))
        return Path(huggingface_hub.snapshot_download(str(source), repo_type="dataset"))
    except (OSError, ValueError) as error:
        raise cannot_reach_hub(source or HUB_ID, error) from None


def _in_folder(folder: Path) -> _Files:
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes for path in paths}


@contextlib.contextmanager
def _in_archive(archive: Path, scratch: Path) -> Iterator[_Files]:
    """The files of a tar, while this is open. Nothing is unpacked under a name of the tar's choice."""
    files: _Files = {}
    # Uncompressed into a nameless file, so that members can be read in any order.
    with tempfile.TemporaryFile(dir=scratch) as plain:
        try:
            with tarfile.open(archive) as members:
                packed = cast(IO[bytes], members.fileobj)
                packed.seek(0)
                shutil.copyfileobj(packed, plain)
            plain.seek(0)
            with tarfile.open(fileobj=plain, mode="r:") as members:
                for member in members:
                    # For the names alone: a dataset has no file that lies or points outside of it.
                    tarfile.data_filter(member, str(scratch))
                    if member.isfile():
                        files[str(PurePosixPath(member.name))] = _reader(plain.fileno(), member)
        except tarfile.FilterError as error:
            raise UserError(f"is not safe: {error}", where=str(archive), hint="do not use this file") from None
        except (tarfile.TarError, OSError, EOFError, zlib.error, lzma.LZMAError) as error:
            raise UserError(f"cannot be read: {error}", where=str(archive), hint="copy or download it again") from None
        yield files


def _reader(descriptor: int, member: tarfile.TarInfo) -> Callable[[], bytes]:
    # By position, so that threads share one open file.
    return lambda: os.pread(descriptor, member.size, member.offset_data)


def _is_clip(path: str) -> bool:
    name = PurePosixPath(path)
    return name.suffix.lower() in VIDEO_SUFFIXES and not name.name.startswith(".")


def _clips(files: _Files, conversion: Conversion) -> tuple[list[_Clip], list[BadUnit]]:
    """The clips, train first, each split by class and name; and those that have no place."""
    paths = [path for path in files if _is_clip(path) and len(PurePosixPath(path).parts) >= 2]
    lists = {split: _listed(files, name) for split, name in LISTS.items()}
    if any(_split_folder(path) for path in paths):
        clips = [_Clip(path, split, _label(path)) for path in paths if (split := _split_folder(path))]
        bad = [BadUnit(path, "lies outside of train/, val/, test/") for path in paths if not _split_folder(path)]
    elif any(lists.values()):
        clips, bad = _by_lists(paths, lists, conversion)
    else:
        clips, bad = _by_groups(paths), []
        if clips:
            conversion.note("there are no splits; the clips were split by group")
    named: dict[tuple[str, str, str], _Clip] = {}
    for clip in sorted(clips, key=lambda clip: (SPLITS.index(clip.split), clip.label, clip.name, clip.path)):
        first = named.setdefault((clip.split, clip.label, clip.name), clip)
        if first is not clip:
            bad.append(BadUnit(clip.path, f"has the name of {first.path}", "rename one of them"))
    return list(named.values()), bad


def _label(path: str) -> str:
    return PurePosixPath(path).parts[-2]


def _split_folder(path: str) -> str | None:
    parts = PurePosixPath(path).parts
    return parts[-3] if len(parts) >= 3 and parts[-3] in SPLITS else None


def _listed(files: _Files, name: str) -> list[str]:
    """The ``CLASS/NAME.avi`` of a list, whose lines may end with the number of the class."""
    found = [read for path, read in files.items() if PurePosixPath(path).name == name]
    lines = found[0]().decode("utf-8", "replace").splitlines() if found else []
    return [line.split()[0] for line in lines if line.strip()]


def _by_lists(
    paths: list[str], lists: dict[str, list[str]], conversion: Conversion
) -> tuple[list[_Clip], list[BadUnit]]:
    there = {"/".join(PurePosixPath(path).parts[-2:]): path for path in paths}
    clips, bad = [], []
    for split, entries in lists.items():
        for entry in entries:
            if path := there.pop(entry, None):
                clips.append(_Clip(path, split, _label(path)))
            else:
                what = f"is in {LISTS[split]}, but there is no such clip"
                bad.append(BadUnit(entry, what, "is the source complete?"))
    if there:
        conversion.note(f"{len(there):,} clips are in neither list and are not converted")
    return clips, bad


def _by_groups(paths: list[str]) -> list[_Clip]:
    groups: dict[str, dict[tuple[int, str], list[str]]] = {}
    for path in paths:
        name = PurePosixPath(path).stem
        found = re.search(r"_g(\d+)_c\d+$", name)
        group = (int(found[1]), "") if found else (0, name)
        groups.setdefault(_label(path), {}).setdefault(group, []).append(path)
    return [
        _Clip(path, split, label)
        for label, of_class in groups.items()
        for split, group in zip(_splits(len(of_class)), sorted(of_class), strict=True)
        for path in of_class[group]
    ]


def _splits(count: int) -> Iterator[str]:
    """The split of each of ``count`` groups of a class: test, then val, then train."""
    test = max(1, round(count * 7 / 25)) if count >= 2 else 0
    val = max(1, round(count * 3 / 25)) if count >= 3 else 0
    yield from ["test"] * test + ["val"] * val + ["train"] * (count - test - val)
