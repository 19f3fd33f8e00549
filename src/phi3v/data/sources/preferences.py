"""What a row says in the keys of the tool that wrote it: a conversation, and how good its last answer is.

The conversation is a list of messages, or a question and an answer in keys of their own. Preferences are, in TRL's
forms, where ``prompt``, ``chosen`` and ``rejected`` are texts or lists of messages, and ``prompt`` may be absent::

    {"prompt": "What is this?", "chosen": "A dog.", "rejected": "A cat.", "images": ["7.jpg"]}
    {"prompt": "What is this?", "completion": "A cat.", "label": false, "images": ["7.jpg"]}

in LLaMA-Factory's and ms-swift's::

    {"conversations": [{"from": "human", "value": "…"}], "chosen": {"from": "gpt", "value": "…"}, "rejected": {…}}
    {"instruction": "…", "input": "…", "chosen": "…", "rejected": "…"}
    {"messages": [… as far as the chosen answer], "rejected_response": "…"}

and those of the columns ``question``, ``chosen`` and ``rejected`` (RLAIF-V), which RLHF-V keeps as JSON in ``text``.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from phi3v.data.jsonl import json_kind
from phi3v.data.sources.records import Row
from phi3v.errors import UserError

Role = Literal["system", "user", "assistant"]
ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "bot": "assistant",
}
KEYS = ("messages", "conversations")  # of the list of messages
COMMON = "a record had no prompt: what chosen and rejected have in common at their beginning is its question"
LABELLED = "a label that is true or false was taken to say whether the answer is a good one"

_QUESTIONS = ("prompt", "question", "query", "instruction")
_ANSWERS = ("chosen", "completion", "response", "output")
_REJECTED = ("rejected", "rejected_response", "rejected_messages")
_LABELS = ("label", "kto_tag")
_SCORES = (("score_chosen", "score_rejected"), ("chosen_score", "rejected_score"), ("chosen_rating", "rejected_rating"))
_ENDLESS = 1e300  # no score
# One of these columns, at least, has a table that is read here.
COLUMNS = (*KEYS, *_ANSWERS, "text")
_HH = re.compile(r"(?:\A|\n\n)(Human|Assistant):[ \n]?")  # Anthropic's hh-rlhf, and what is made like it


@dataclass(frozen=True, slots=True)
class Said:
    """A message that was not read yet.

    Attributes:
        where: the field.
        content: a message, or its text alone.
        role: of a text alone.
    """

    where: str
    content: Any
    role: Role | None = None


@dataclass(slots=True)
class Chat:
    """A conversation, with its last answer judged or not.

    Attributes:
        messages: as far as the chosen answer.
        rejected: worse answers in its place.
        label: whether the last answer is good, if it has been judged by itself.
        scores: of the last answer and of each rejected one.
        used: the keys of the row that this was made of.
    """

    messages: list[Said]
    rejected: list[Said] = field(default_factory=list)
    label: bool | None = None
    scores: tuple[float, ...] = ()
    used: set[str] = field(default_factory=set)


def chat_of(row: Row, decided: Counter[str]) -> Chat:
    """The conversation of a row.

    Args:
        decided: counts what was decided on the way.

    Raises:
        UserError: there is none, or what is compared in it is not two answers to one question.
    """
    row, used = _unpacked(row)
    key, rejected = _present(row, KEYS), _present(row, _REJECTED)
    answer, question = _present(row, ("chosen",) if key else _ANSWERS), None if key else _present(row, _QUESTIONS)
    for side, other in (("rejected", "chosen"), ("chosen", "rejected")):
        if row.get(other) is not None and {"rejected": rejected, "chosen": answer or key}[side] is None:
            hint = "a pair is a better and a worse answer: complete the record, or leave it out"
            raise UserError(f"is missing: {other} stands alone", where=side, hint=hint)
    others: list[Said] | None = None
    if key is not None:
        messages = _listed(row, key)
        if answer is not None:
            messages = _with_chosen(row, answer, messages, key)
        if row.get("prompt") in map(_text, messages):
            used.add("prompt")
    elif answer is None:
        hint = f"is this the right source for the file? The record's keys are {', '.join(map(str, row))}"
        raise UserError(f"has neither {' nor '.join(KEYS)}", hint=hint)
    elif question is None and isinstance(row[answer], str):
        if not (rejected and isinstance(row[rejected], str)):
            hint = f"the question stands under one of {', '.join(_QUESTIONS)}"
            raise UserError(f"has {answer} and no question", hint=hint)
        messages, others = _without_prompt(row, answer, rejected, decided)
    else:
        if question is not None:
            used.add(question)
        messages = _asked(row, answer, question, used)
    used |= {name for name in (key, answer, rejected) if name is not None}
    chat = Chat(messages, used=used)
    if rejected is not None:
        chat.rejected = _answers(row, rejected, messages[:-1]) if others is None else others
        _refuse_other_images(row)
        _read_scores(row, chat)
    else:
        _read_label(row, chat, decided)
    return chat


def _unpacked(row: Row) -> tuple[Row, set[str]]:
    """The row, with what RLHF-V keeps as JSON in ``text`` beside its other columns."""
    text = row.get("text")
    if isinstance(text, str) and text.lstrip().startswith("{") and _present(row, (*KEYS, *_ANSWERS)) is None:
        try:
            text = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UserError(f"is not valid JSON: {error}", where="text", hint="write the texts into columns") from None
    if isinstance(text, Mapping) and "chosen" in text:
        return {name: value for name, value in row.items() if name != "text"} | dict(text), {"text"}
    return row, set()


def _present(row: Row, names: tuple[str, ...]) -> str | None:
    return next((name for name in names if row.get(name) is not None), None)


def _listed(row: Row, key: str) -> list[Said]:
    items = row[key]
    if not isinstance(items, list):
        hint = "write one message after the other: […]"
        raise UserError(f"must be a list, not {json_kind(items)}", where=key, hint=hint)
    return [Said(f"{key}[{k}]", item) for k, item in enumerate(items)]


def _role(message: Said) -> Role | None:
    content = message.content
    if message.role is not None or not isinstance(content, Mapping):
        return message.role
    sender = content.get("from") if content.get("from") is not None else content.get("role")
    return ROLES.get(sender.lower()) if isinstance(sender, str) else None


def _text(message: Said) -> object:
    content = message.content
    if not isinstance(content, Mapping):
        return content
    return content.get("value") if content.get("from") is not None else content.get("content")


def _with_chosen(row: Row, key: str, messages: list[Said], of: str) -> list[Said]:
    """A conversation as far as the chosen answer; it may have ended with that already."""
    prompt = messages[:-1] if messages and _role(messages[-1]) == "assistant" else messages
    chosen = _only(_answers(row, key, prompt), key)
    if prompt is not messages and _text(chosen) != _text(messages[-1]):
        hint = f"let {of} end with the question, or with the chosen answer"
        raise UserError(f"is another answer than the last of {of}", where=key, hint=hint)
    return [*prompt, chosen]


def _asked(row: Row, answer: str, question: str | None, used: set[str]) -> list[Said]:
    """A question in a key of its own, with its answer; or a conversation that the answer is the end of."""
    asked = None if question is None else row[question]
    value = row[answer]
    if isinstance(value, list) and value and _role(Said("", value[0])) not in (None, "assistant"):
        whole = _listed(row, answer)
        if isinstance(asked, str) and asked not in map(_text, whole[:-1]):
            hint = f"give {answer} as the answer alone, or leave {question} out"
            raise UserError(f"is not in the conversation of {answer}", where=question, hint=hint)
        if not isinstance(asked, list):
            return whole
    if isinstance(asked, list):
        assert question is not None
        prompt = _listed(row, question)
    elif isinstance(asked, str):
        assert question is not None
        more = row.get("input") if question == "instruction" else None
        if isinstance(more, str) and more.strip():
            asked = f"{asked}\n{more}"
            used.add("input")
        prompt = _history(row, used)
        prompt += _turns(question, asked) if question == "prompt" else [Said(question, asked, "user")]
    else:
        hint = "write a text, or a list of messages"
        raise UserError(f"must be a text, not {json_kind(asked)}", where=question or "prompt", hint=hint)
    return [*prompt, _only(_answers(row, answer, prompt), answer)]


def _history(row: Row, used: set[str]) -> list[Said]:
    """Earlier turns, as pairs of question and answer."""
    pairs = row.get("history")
    if not pairs:
        return []
    used.add("history")
    if not isinstance(pairs, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        raise UserError("must be a list of pairs", where="history", hint='write [["question", "answer"], …]')
    roles: tuple[Role, Role] = ("user", "assistant")
    return [Said(f"history[{k}][{n}]", pair[n], roles[n]) for k, pair in enumerate(pairs) for n in (0, 1)]


def _turns(key: str, text: str) -> list[Said]:
    """A text as one question, or as the turns that ``Human:`` and ``Assistant:`` begin in it."""
    parts = _HH.split(text.lstrip())
    if len(parts) < 3 or parts[0].strip() or parts[1] != "Human":
        return [Said(key, text, "user")]
    said = zip(parts[1::2], parts[2::2], strict=True)
    turns = [Said(key, words.strip(), "user" if who == "Human" else "assistant") for who, words in said]
    return turns if turns[-1].content or turns[-1].role == "user" else turns[:-1]


def _without_prompt(row: Row, chosen: str, rejected: str, decided: Counter[str]) -> tuple[list[Said], list[Said]]:
    """What two texts have in common at their beginning, continued by the chosen one, and the end of the other."""
    both = [_turns(key, row[key]) for key in (chosen, rejected)]
    if len(both[0]) > 1 and both[0][-1].role == "assistant":
        prompts = [[_text(message) for message in said[:-1]] for said in both]
        if prompts[0] != prompts[1]:
            raise _differ(rejected)
        return both[0], both[1][-1:]
    texts = row[chosen], row[rejected]
    differs = next((k for k, (a, b) in enumerate(zip(*texts, strict=False)) if a != b), min(map(len, texts)))
    end = max(texts[0].rfind(white, 0, differs) for white in " \n\t") + 1  # within a word nobody would part them
    if not texts[0][:end].strip():
        hint = 'write the question under "prompt"'
        raise UserError("chosen and rejected have no prompt, and begin with different words", hint=hint)
    decided[COMMON] += 1
    question = Said(chosen, texts[0][:end].strip(), "user")
    ends = [Said(key, row[key][end:].strip(), "assistant") for key in (chosen, rejected)]
    return [question, ends[0]], ends[1:]


def _answers(row: Row, key: str, prompt: list[Said]) -> list[Said]:
    """The answers under a key: one, several texts, or the last message of a conversation that begins as ``prompt``."""
    value = row[key]
    if isinstance(value, str):
        if "prompt" not in row:
            return [Said(key, value, "assistant")]
        turns = _turns(key, value)
        if len(turns) == 1:
            return [Said(key, value.lstrip(), "assistant")]  # plain text goes on where the prompt ends
        if list(map(_plain, turns[:-1])) != list(map(_plain, prompt)):
            raise _differ(key)
        return turns[-1:]
    if isinstance(value, Mapping):
        return [Said(key, value)]
    if not isinstance(value, list) or not value:
        what = "is an empty list" if value == [] else f"must be a text or messages, not {json_kind(value)}"
        raise UserError(what, where=key, hint="write the answer as a text")
    if all(isinstance(item, str) for item in value):
        return [Said(f"{key}[{k}]", item, "assistant") for k, item in enumerate(value)]
    said = _listed(row, key)
    if len(said) > 1 or _role(said[0]) != "assistant":
        if list(map(_plain, said[: len(prompt)])) != list(map(_plain, prompt)):
            raise _differ(key)
        said = said[len(prompt) :]
    if len(said) != 1:
        hint = "what is compared is one answer with another, to the same question"
        raise UserError(f"must have one answer after the question, not {len(said)} messages", where=key, hint=hint)
    return said


def _plain(message: Said) -> object:
    return (_role(message), _text(message))


def _only(answers: list[Said], key: str) -> Said:
    if len(answers) > 1:
        raise UserError(f"has {len(answers)} answers", where=key, hint="a record has one chosen answer")
    return answers[0]


def _differ(key: str) -> UserError:
    hint = "two answers to the same question are compared: the messages before them must be the same"
    return UserError("differs from the chosen conversation before its last answer", where=key, hint=hint)


def _refuse_other_images(row: Row) -> None:
    """Raise `UserError` if the rejected answer is about other images."""
    images = row.get("rejected_images")
    if images and images != row.get("images"):
        hint = "two answers to the same question about the same images are compared: leave the record out"
        raise UserError("are other images than those of the chosen answer", where="rejected_images", hint=hint)


def _read_scores(row: Row, chat: Chat) -> None:
    for keys in _SCORES:
        numbers = [value for key in keys if isinstance(value := row.get(key), int | float) and abs(value) < _ENDLESS]
        if len(numbers) == 2 and len(chat.rejected) == 1:
            chat.scores = tuple(map(float, numbers))
            chat.used |= set(keys)
            return


def _read_label(row: Row, chat: Chat, decided: Counter[str]) -> None:
    """What says of a single answer whether it is good; ``label`` of a chat may be anything else."""
    for key in _LABELS:
        label = row.get(key)
        if isinstance(label, bool):
            chat.label = label
            decided[LABELLED] += key == "label" and "completion" not in chat.used
            chat.used.add(key)
            return
        if label is not None and (key == "kto_tag" or "completion" in chat.used):
            hint = "true for a good answer, false for a bad one"
            raise UserError(f"must be true or false, not {json_kind(label)}", where=key, hint=hint)
