"""The answers of a record as training on preferences takes them: a sample each, with one page and one prompt.

A record has a chosen answer (its last turn's) and any number of rejected ones, or a single answer that is labelled good
or bad. In a packed row its samples are branches of one group; in a padded batch each is a row. The answers of earlier
turns are context. A record with several rejected answers is as many pairs of its chosen one, which together weigh as
much as another record's one.

KTO also needs each prompt with an answer to another one, to see how far the model has moved from its reference whatever
is asked: that of the record before it in the file (of the first, the last one's), as TRL pairs them in a batch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch

from phi3v.config import ObjectiveConfig
from phi3v.data.collate import Page, Sample
from phi3v.data.lengths import LONG_CONTEXT, Ints, RecordLengths, TableLengths
from phi3v.data.schema import Record
from phi3v.data.table import RecordTable
from phi3v.processing.conversation import IGNORE_INDEX, TokenStream, tokenize_answer
from phi3v.processing.processor import Phi3VProcessor

Role = Literal["chosen", "rejected", "mismatched"]
SIGNS: dict[Role, float] = {"chosen": 1.0, "rejected": -1.0, "mismatched": 0.0}
# What of a row weighs, and what all of it is that the model does not take.
ANSWER_WEIGHTS = ("answer_weights", "pair_weights")
ANSWER_FIELDS = (
    *ANSWER_WEIGHTS,
    "answer_signs",
    "answer_lengths",
    "answer_places",
    "answer_groups",
    "pair_groups",
    "pairs",
    "reference",
)


@dataclass
class AnswerSample(Sample):
    """A prompt with one of its answers, which alone has labels.

    Attributes:
        place: of the answer among those of its record.
    """

    role: Role = "chosen"
    place: int = 0


class Preferences:
    """Makes the samples of records and says in a row which answer is what.

    Args:
        long_context_start: samples longer than this share no prefix with shorter ones (LongRoPE).
        reference: log-probabilities of all answers by the reference model, float32.

    Attributes:
        starts: where the answers of each record begin among those of all records; the last entry is their number.
    """

    def __init__(
        self,
        table: RecordTable,
        objective: ObjectiveConfig,
        long_context_start: int = LONG_CONTEXT,
        reference: torch.Tensor | None = None,
    ) -> None:
        self.table = table
        self.objective = objective
        self.long_context_start = long_context_start
        self.reference = reference
        self.has_mismatched = objective.name == "kto"
        self.starts: list[int] = np.cumsum([0, *(1 + table.rejected_counts() + self.has_mismatched)]).tolist()

    def samples(
        self, record: Record, index: int, stream: TokenStream, pages: list[Page], processor: Phi3VProcessor
    ) -> list[AnswerSample]:
        """One sample for each answer of a record.

        Args:
            index: of the record.
            stream: its tokens with the chosen answer.
        """
        texts = list(record.rejected)
        roles: list[Role] = ["rejected"] * (1 + len(texts))
        if record.label is not False:
            roles[0] = "chosen"
        if self.has_mismatched:
            texts.append(self.table[index - 1].turns[-1].assistant)
            roles.append("mismatched")
        prompt, own = stream.input_ids[: stream.prompts[-1]], stream.input_ids[stream.prompts[-1] :]
        answers = [own, *(tokenize_answer(processor.backend_tokenizer, text) for text in texts)]
        masked = [IGNORE_INDEX] * len(prompt)
        return [
            AnswerSample(prompt + answer, masked + answer, pages, 1, index, role, place)
            for place, (answer, role) in enumerate(zip(answers, roles, strict=True))
        ]

    def shareable(self, samples: Sequence[Sample]) -> list[list[Sample]]:
        """The samples of a group in groups that may share a prefix: apart where some are long and some are not."""
        sides: dict[bool, list[Sample]] = {}
        for sample in samples:
            sides.setdefault(len(sample.input_ids) > self.long_context_start, []).append(sample)
        return list(sides.values())

    def complete(self, row: dict[str, Any], samples: Sequence[Any]) -> dict[str, Any]:
        """A row of answers.

        Args:
            row: of all ``samples``, as of `pack_row` or `Collator`.

        Returns:
            In place of ``loss_weights``: ``answer_tokens``, the number of labels of each answer; ``answer_places``, its
            place among those of all records; ``answer_signs``, ``answer_weights``, ``answer_lengths`` and ``reference``
            float32 (A,), ``pairs`` int64 (P, 2) and ``pair_weights`` float32 (P,), see `preference_loss.Answers`;
            ``counts`` with the weight of the row.
        """
        lengths = [sum(label != IGNORE_INDEX for label in sample.labels) for sample in samples]
        # A record that is drawn twice in an epoch may be twice in a row, and then counts twice.
        times: Counter[tuple[int, int]] = Counter()
        of_record: dict[tuple[int, int], list[int]] = {}
        for at, sample in enumerate(samples):
            time = times[sample.index, sample.place]
            times[sample.index, sample.place] += 1
            of_record.setdefault((sample.index, time), []).append(at)
        pairs, pair_weights = [], []
        weights = [1.0] * len(samples)
        for own in of_record.values():
            chosen = [at for at in own if samples[at].role == "chosen"]
            rejected = [at for at in own if samples[at].role == "rejected"]
            if not chosen:
                continue
            for at in rejected:
                pairs.append((chosen[0], at))
                pair_weights.append(1 / len(rejected))
                if self.objective.takes_pairs:
                    weights[at] = 1 / len(rejected)
        judged = sum(sample.role != "mismatched" for sample in samples)
        weight = sum(pair_weights) if self.objective.takes_pairs else float(judged)
        counts = row["counts"]
        places = [self.starts[sample.index] + sample.place for sample in samples]
        answers = {
            "answer_tokens": tuple(lengths),
            "answer_places": tuple(places),
            "answer_lengths": torch.tensor(lengths, dtype=torch.float32),
            "answer_signs": torch.tensor([SIGNS[sample.role] for sample in samples]),
            "answer_weights": torch.tensor(weights),
            "pairs": torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2),
            "pair_weights": torch.tensor(pair_weights, dtype=torch.float32),
            "counts": counts._replace(
                weight=weight,
                samples=len(of_record),
                questions=len(of_record),
                records=tuple(index for index, _ in of_record),
            ),
        }
        if self.reference is not None:
            answers["reference"] = self.reference[places]
        return {name: value for name, value in row.items() if name != "loss_weights"} | answers


def lengths_at(
    measured: TableLengths, objective: ObjectiveConfig, num_crops: int, long_context_start: int = LONG_CONTEXT
) -> RecordLengths:
    """How long the records are for an objective: with all their answers, where it learns from preferences."""
    lengths = measured.at(num_crops, long_context_start)
    if not objective.is_preference:
        return lengths
    answers, count = measured.answers, measured.alternatives
    if objective.name == "kto":
        ends = np.cumsum(count)
        answers = np.insert(answers, ends, np.roll(answers[ends - count], 1))
        count = count + 1
    return _of_answers(measured, lengths, answers, count, num_crops, long_context_start)


def _of_answers(
    measured: TableLengths, lengths: RecordLengths, answers: Ints, count: Ints, num_crops: int, long_context_start: int
) -> RecordLengths:
    """
    Args:
        lengths: of the records with their last answers alone.
        answers: tokens of each answer, one record after the other.
        count: answers of each record.
    """
    n = len(lengths)
    prompt = measured.prompts[measured.first_turn + measured.turns - 1] + lengths.image_tokens
    record = np.repeat(np.arange(n), count)
    whole = prompt[record] + answers

    def summed(values: Any) -> Ints:
        return np.bincount(record, values, n).astype(np.int64)

    total, separate, squared, num_long = map(summed, (answers, whole, whole**2, whole > long_context_start))
    longest = np.zeros(n, dtype=np.int64)
    np.maximum.at(longest, record, whole)

    def prompts(samples: Ints) -> Ints:
        """Tokens before the answers of so many samples in a group: the last one stands in every branch."""
        return np.where(samples > 1, prompt - 1 + samples, prompt * samples)

    tokens = total + prompts(count - num_long) + prompts(num_long)
    is_mixed = (num_long > 0) & (num_long < count)
    below = separate - count * lengths.prefix
    # In a group of its page a record has the prompt in every branch; for a long one it would be better alone.
    shares = (lengths.prefix > 0) & ~is_mixed & (2 * below + lengths.prefix < 2 * tokens)
    pages = measured.pages[measured.first_turn]
    alone = 2 * (int(pages.max(initial=0)) + 1) + np.arange(n)
    return replace(
        lengths,
        tokens=tokens,
        targets=total,
        prefix=np.where(shares, lengths.prefix, 0),
        page=np.where(shares, 2 * pages + (num_long > 0), alone),
        answers=count,
        below=np.where(shares, below, tokens),
        own_prefix=np.where((count > 1) & ~is_mixed, prompt - 1, 0),
        longest=longest,
        separate=separate,
        squared=squared,
    )
