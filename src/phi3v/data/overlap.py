"""What the evaluation data shares with the training data; a score on that says little about new data.

Images are the same if their files hold the same bytes. Only files of equal size are read.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass

from phi3v.data.cache import recall, remember
from phi3v.data.image_store import THREADS
from phi3v.data.schema import Record
from phi3v.data.table import RecordTable
from phi3v.findings import Finding


@dataclass(frozen=True)
class Overlap:
    """Of the questions for evaluation.

    Attributes:
        questions: how many there are.
        same: that are trained on too, with the same images.
        same_image: others, about an image that is trained on.
        first_at: where the first of all these is.
    """

    questions: int
    same: int
    same_image: int
    first_at: str

    @property
    def finding(self) -> Finding | None:
        """What to say of it, if there is any."""
        return self.finding_of("data.train", "data.eval")

    def finding_of(self, trained: str, asked: str) -> Finding | None:
        """`finding` of data that is called so."""
        if not self.same + self.same_image:
            return None
        parts = [
            f"{self.same:,} are asked there too, about the same images" if self.same else "",
            f"{self.same_image:,} {'more ' if self.same else ''}are about images that it has"
            if self.same_image
            else "",
        ]
        return Finding(
            "overlap",
            "warn",
            f"{asked} shares records with {trained}: of {self.questions:,} questions "
            f"{' and '.join(filter(None, parts))} (first in {self.first_at})",
            "memorised answers score well: keep each image in one of the two files",
        )


def find_overlaps(train: RecordTable, other: RecordTable) -> list[Finding]:
    """What to say of the records that ``other`` shares with ``train``, source by source where they have such.

    Raises:
        UserError: the cache cannot be written.
    """
    trained = [(f"data.train {name}", table) for name, table in zip(train.names, train.sources, strict=True)]
    asked = [(f"data.eval {name}", table) for name, table in zip(other.names, other.sources, strict=True)]
    found = [
        find_overlap(table, questions).finding_of(name, questions_name)
        for name, table in trained or [("data.train", train)]
        for questions_name, questions in asked or [("data.eval", other)]
    ]
    return [finding for finding in found if finding is not None]


def find_overlap(train: RecordTable, other: RecordTable) -> Overlap:
    """What ``other`` shares with ``train``; remembered in the cache for these versions of both files.

    Raises:
        UserError: the cache cannot be written.
    """
    memory = other.folder / f"overlap-{train.folder.name}.json"
    roots = [table.images.identity for table in (train, other)]
    known = recall(memory)
    if known.pop("roots", None) == roots:
        with contextlib.suppress(TypeError):
            return Overlap(**known)
    overlap = _compare(train, other)
    remember(memory, asdict(overlap) | {"roots": roots})
    return overlap


def _compare(train: RecordTable, other: RecordTable) -> Overlap:
    contents = _same_contents(train, other)
    asked: dict[tuple[tuple[str, ...], str], bool] = {}  # by images and text: whether it is trained on too
    for record in other:
        asked.update(dict.fromkeys(_questions(record, contents[1]), False))
    trained: set[str] = set()
    for record in train:
        for images, text in _questions(record, contents[0]):
            trained.update(images)
            if (images, text) in asked:
                asked[images, text] = True
    same = same_image = questions = 0
    first = ""
    for record in other:
        for images, text in _questions(record, contents[1]):
            questions += 1
            if asked[images, text]:
                same += 1
            elif not trained.isdisjoint(images):
                same_image += 1
            else:
                continue
            first = first or other.line_of(record)
    return Overlap(questions, same, same_image, first)


def _questions(record: Record, contents: dict[str, str]) -> Iterator[tuple[tuple[str, ...], str]]:
    """The images up to each question, as what they hold, and its text."""
    images: list[str] = []
    for turn in record.turns:
        images += [contents[name] for name in turn.images]
        if turn.weight:
            yield tuple(images), " ".join(turn.user.casefold().split())


def _same_contents(*tables: RecordTable) -> list[dict[str, str]]:
    """For each table what stands for the content of each of its images: equal where the files are."""
    names = [table.distinct_images()[0] for table in tables]
    stores = [table.images for table in tables]
    sizes = [store.stamps(of_table)[:, 0].tolist() for store, of_table in zip(stores, names, strict=True)]
    in_both = set.intersection(*map(set, sizes)) - {-1}
    found = []
    with ThreadPoolExecutor(THREADS) as pool:
        for store, of_table, of_sizes in zip(stores, names, sizes, strict=True):
            chosen = [name for name, size in zip(of_table, of_sizes, strict=True) if size in in_both]
            digests = dict(zip(chosen, pool.map(store.digest, chosen), strict=True))
            # What no other file can hold is like itself alone.
            found.append({name: digests.get(name) or store.where(name) for name in of_table})
    return found
