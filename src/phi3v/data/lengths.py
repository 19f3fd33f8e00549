"""Which records are longer than a model reads, found without making the tokens of all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phi3v.data.schema import Record
from phi3v.errors import UserError
from phi3v.processing.hd_transform import num_img_tokens, page_geometry

if TYPE_CHECKING:
    from phi3v.data.table import RecordTable
    from phi3v.processing.processor import Phi3VProcessor

RELEASED_CONTEXT = 131_072  # max_position_embeddings of the released models
RELEASED_CROPS = (16, 4)  # what they advise for one image and for several
CHARACTERS_PER_TOKEN = 4  # of texts, where there is no tokenizer to ask
# Tokens at most of what a turn, and an image, have around them: role, line breaks, ends; BOS of each chunk of text.
_AROUND = 32
SHOWN_LINES = 5
LENGTH_HINT = "split the record, give it fewer images, lower model.num_crops, or leave it out"


@dataclass(frozen=True)
class Context:
    """How many tokens of a record a model reads.

    Attributes:
        tokens: its ``max_position_embeddings``.
        processor: counts them; without one they are estimated.
    """

    tokens: int = RELEASED_CONTEXT
    processor: Phi3VProcessor | None = None

    def may_exceed(self, text_bytes: Any, turns: Any, images: Any) -> Any:
        """Whether a record, or each of several as arrays, is perhaps too long; if not, it needs no counting."""
        crops = self.processor.image_processor.num_crops if self.processor is not None else max(RELEASED_CROPS)
        # A page of one column has the most row ends. A token has a byte at least.
        return text_bytes + _AROUND * (1 + turns) + (num_img_tokens(crops, 1) + _AROUND) * images > self.tokens

    def count(self, record: Record, image_sizes: Sequence[tuple[int, int]]) -> int:
        """Tokens of a record, from its texts and the sizes of its images."""
        if self.processor is None:
            crops = RELEASED_CROPS[len(image_sizes) > 1]
            characters = sum(len(turn.user) + len(turn.assistant) for turn in record.turns) + len(record.system or "")
            pages = sum(page_geometry(width, height, crops).num_img_tokens for width, height in image_sizes)
            return characters // CHARACTERS_PER_TOKEN + pages
        from phi3v.data.collate import encode_record  # takes seconds to import, and a check may do without

        of_image = self.processor.image_processor.calc_num_image_tokens_from_image_size
        # One token an image, and its own number added: the runs of a page would cost the most.
        rest = len(encode_record(record, self.processor, [1] * len(image_sizes)).input_ids) - len(image_sizes)
        return rest + sum(of_image(width, height) for width, height in image_sizes)

    def too_long(self, tokens: int) -> str:
        """What is wrong with a record of so many tokens."""
        about, which = ("about ", "Phi-3.5-vision") if self.processor is None else ("", "the model")
        return f"the record has {about}{tokens:,} tokens, and {which} reads {self.tokens:,} (max_position_embeddings)"


def require_context(table: RecordTable, context: Context) -> None:
    """Look whether the model can read every record whole.

    Raises:
        UserError: it cannot; names lines and lengths. Or the header of an image of a long record cannot be read.
    """
    too_long = []
    for index in context.may_exceed(table.text_bytes(), table.turn_counts(), table.image_counts()).nonzero()[0]:
        record = table[int(index)]
        tokens = context.count(record, table.image_sizes(record))
        if tokens > context.tokens:
            too_long.append((record.line, tokens))
    if too_long:
        raise beyond_context(table.path, too_long, context)


def beyond_context(path: Path, too_long: Sequence[tuple[int, int]], context: Context) -> UserError:
    """The error for records that are too long, as line and tokens of each."""
    line, tokens = too_long[0]
    what = context.too_long(tokens)
    if len(too_long) > 1:
        lines = ", ".join(f"{line} ({tokens:,})" for line, tokens in too_long[1 : 1 + SHOWN_LINES])
        what += f"; {len(too_long) - 1} more are too long: line {lines}" + ", …" * (len(too_long) > 1 + SHOWN_LINES)
    return UserError(what, where=f"{path}:{line}", hint=LENGTH_HINT)
