"""What the converters of people's own data are told beyond where it lies."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from phi3v.data.convert import ConvertOptions
from phi3v.data.schema import SpecialText
from phi3v.errors import UserError


@dataclass(frozen=True, slots=True)
class OwnDataOptions(ConvertOptions):
    """`ConvertOptions` and the options of single sources; which takes which is in ``SOURCE_OPTIONS``.

    Attributes:
        image_root: the folder that image and video paths are relative to; default that of the data file.
        special_text: whether literal special tokens in texts make a record bad, or are escaped.
        eval_share: share of the data that goes to ``eval.jsonl`` if it has no splits; None for the source's default.
        question: the question of every record.
        image_columns: columns of image paths.
        question_column: column of questions.
        answer_column: column of answers.
        split_column: column of split names.
        id_column: column of record ids.

    Raises:
        UserError: ``eval_share`` is not in 0 to 1 (without 1), or ``question`` is blank.
    """

    image_root: Path | None = None
    special_text: SpecialText = "refuse"
    eval_share: float | None = None
    question: str | None = None
    image_columns: tuple[str, ...] = ()
    question_column: str | None = None
    answer_column: str | None = None
    split_column: str | None = None
    id_column: str | None = None

    def __post_init__(self) -> None:
        # Named in full: in a dataclass with slots, `super()` is of the class before it got them.
        ConvertOptions.__post_init__(self)
        if self.eval_share is not None and not 0 <= self.eval_share < 1:
            hint = "0.1 keeps a tenth for evaluation, 0 nothing"
            raise UserError(f"must be at least 0 and below 1, not {self.eval_share:g}", where="--eval-share", hint=hint)
        if self.question is not None and not self.question.strip():
            raise UserError("is empty", where="--question", hint="write the question that every record asks")
        if self.image_root is not None and not self.image_root.is_dir():
            raise UserError(f"no such folder: {self.image_root}", where="--image-root", hint="check the path")

    def required_source(self, example: str) -> Path:
        """The file or folder of the data.

        Args:
            example: what it may look like, for the message.

        Raises:
            UserError: it was not named, or there is none.
        """
        if self.source is None:
            raise UserError("is missing", where="--source", hint=f"name your data, e.g. --source {example}")
        path = Path(self.source).expanduser()
        if not path.exists():
            hint = "it is a path on this machine; data on the hub must be downloaded first"
            raise UserError("no such file or folder", where=f"--source {self.source}", hint=hint)
        return path
