"""``phi3v data pairs``: a model's own answers, scored by a metric, as pairs of a better and a worse one.

The folder of the result holds ``answers.jsonl``, all answers with their scores, and ``pairs.jsonl``, a data file whose
``images/`` is a link to the images of the questions; of shards it has those of the pairs. While answers are drawn, each
rank adds them to a file of its own, batch by batch; a command that is run again goes on after the last batch.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState
from filelock import FileLock, Timeout
from rich.console import Console

from phi3v.config import Precision
from phi3v.data.collate import QuestionDataset, upto_question
from phi3v.data.image_store import FolderStore, ImageStore, faults_of
from phi3v.data.jsonl import replacing, write_jsonl
from phi3v.data.schema import Record, Turn
from phi3v.data.shards.index import require_data
from phi3v.errors import UserError
from phi3v.evaluate.answer_limit import answer_limit
from phi3v.evaluate.evaluation import require_good_references
from phi3v.evaluate.generate import Generated, sample_answers
from phi3v.evaluate.metrics import METRICS
from phi3v.evaluate.pairs import Chosen, Drawn, Pair, PairCounts, choose_pair
from phi3v.evaluate.sampling import Sampling
from phi3v.json_files import read_json
from phi3v.model.checkpoint import model_content
from phi3v.paths import cannot_write, file_hash
from phi3v.terminal import progress_bar, say
from phi3v.train.device import RuntimeDevice, choose_device, default_workers
from phi3v.train.evaluate_finetuned import open_data, open_questions
from phi3v.train.finetuned import FinetunedModel, inspect_tuned, load_tuned, resolve_model

PAIRS, ANSWERS, SETTINGS = "pairs.jsonl", "answers.jsonl", "settings.json"
_PARTS = "answers-rank*.jsonl"
_ROOM = "is there room, and the permission to write?"


@dataclass(frozen=True)
class PairOptions:
    """What the command line says.

    Attributes:
        metric: that answers are scored by; None for the first one of the model's run.
        samples: answers to each question.
        chosen: the better answer of a pair is the best of them, or the reference.
        min_margin: by how much scores must differ at least.
        max_questions: as many, drawn from the file by the seed.
        batch_size: answers that are written at once, as far as the run's ``evaluation.batch_tokens`` allow.

    Raises:
        UserError: an option has no such value, or all answers to a question would be the same.
    """

    metric: str | None = None
    samples: int = 8
    temperature: float = 1.0
    top_p: float = 0.95
    seed: int = 0
    chosen: Chosen = "best"
    min_margin: float = 0.0
    max_questions: int | None = None
    batch_size: int = 64
    max_new_tokens: int | None = None
    num_crops: int | None = None
    precision: Precision | None = None

    def __post_init__(self) -> None:
        for name in ("samples", "max_questions", "batch_size", "max_new_tokens", "num_crops"):
            number = getattr(self, name)
            if number is not None and number < 1:
                raise UserError(f"must be at least 1, not {number}", where=_option(name))
        for name, low, high in (("temperature", 0, 100), ("top_p", 0, 1), ("min_margin", 0, 1)):
            number = getattr(self, name)
            if not low <= number <= high or (name == "top_p" and number == 0):
                raise UserError(f"must be in {low} to {high}, not {number:g}", where=_option(name))
        if self.chosen == "best" and (self.samples == 1 or self.temperature == 0):
            what = "all answers to a question would be the same, and none better than another"
            hint = "draw several (--samples 8 --temperature 1), or take the reference: --chosen reference"
            raise UserError(what, where="--samples" if self.samples == 1 else "--temperature", hint=hint)
        if self.temperature == 0 and self.samples > 1:
            raise UserError("all answers would be the same", where="--temperature", hint="draw one: --samples 1")

    @property
    def sampling(self) -> Sampling:
        return Sampling(self.temperature, self.top_p, self.seed)


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def make_pairs(
    name: str, data: Path, out: Path, console: Console, options: PairOptions, *, base: str | None = None
) -> dict[str, Any]:
    """Draw answers to the questions of ``data``, score them and write pairs; under ``torchrun`` all ranks draw.

    Args:
        name: a model folder, a hub id, an adapter or a run folder.
        out: the folder of the result; answers that are there already are kept.
        base: the model that it was tuned from, where that has moved.

    Returns:
        What was written, counts and means, as plain values.

    Raises:
        UserError: the model, the data or an option is wrong, ``out`` holds something else, or there is no pair.
    """
    require_data(data)
    tuned = resolve_model(name, base)
    if tuned.graphs is not None:
        hint = "name the model that it was made of"
        raise UserError("is an export as graphs, which draw no answers", where=f"--model {name}", hint=hint)
    metric = options.metric or tuned.run.evaluation.metrics[0]
    if METRICS[metric].needs_probabilities:
        hint = f"choose from {', '.join(key for key, value in METRICS.items() if not value.needs_probabilities)}"
        raise UserError(f"{metric} does not score single answers", where="--metric", hint=hint)
    runtime = choose_device(options.precision or tuned.run.training.precision)
    if (out / PAIRS).exists():
        hint = f"remove it to make pairs anew of the answers in {ANSWERS}, or name another folder"
        raise UserError("exists already", where=str(out / PAIRS), hint=hint)
    table = open_data(tuned, str(data))
    inspected = inspect_tuned(tuned, runtime, num_crops=options.num_crops)
    questions = open_questions(table, inspected, limit=options.max_questions, seed=options.seed)
    require_good_references(questions)
    limit = answer_limit(questions, options.max_new_tokens or tuned.run.evaluation.max_new_tokens)
    settings = {
        "model": _content(tuned),
        "data": table.sha256,
        "samples": options.samples,
        **asdict(options.sampling),
        "max_new_tokens": limit.tokens,
        "num_crops": inspected.processor.image_processor.num_crops,
        "exif_orientation": table.exif_orientation,
        "precision": runtime.precision,
    }
    with ExitStack() as stack:
        if runtime.rank == 0:
            stack.enter_context(_alone_in(out))
        with PartialState().main_process_first():  # the others find what the first one wrote
            _same_settings(out / SETTINGS, settings)
            _link_images(out / "images", table.images)
        known = _read_answers(out)
        PartialState().wait_for_everyone()  # before one of them adds to the files
        ids = [question.id for question in questions.questions()]
        wanted = [index for index, asked in enumerate(ids) if asked not in known]
        for line in (
            f"drawing answers of {name}: {options.samples} to each of {len(questions):,} questions of {data}",
            f"device: {runtime.device}, {runtime.precision} ({runtime.reason}), {runtime.world_size} ranks",
            f"answers: {limit}",
            *([f"{len(ids) - len(wanted):,} questions are answered already"] if len(wanted) < len(ids) else []),
        ):
            say(console, line)
        if wanted:
            model, _ = load_tuned(tuned, runtime, inspected=inspected)
            _draw(model, questions, wanted, ids, out, console, options, limit.tokens, tuned, runtime)
            PartialState().wait_for_everyone()  # until all have written
            known = _read_answers(out)
        told: dict[str, Any] = {}
        if runtime.rank == 0:
            told = _write(questions, ids, known, out, metric, options, console)
    return {"model": name, "data": str(data), "metric": metric, "file": str(out / PAIRS)} | told


def _content(tuned: FinetunedModel) -> str:
    """What tells the model from others, wherever it lies."""
    files = sorted(tuned.adapter.glob("*.safetensors")) if tuned.adapter is not None else []
    return " ".join([model_content(tuned.base), *map(file_hash, files)])


@contextlib.contextmanager
def _alone_in(out: Path) -> Iterator[None]:
    """Meanwhile no other such command may write into the folder."""
    lock = FileLock(out / ".drawing", timeout=0)
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        what = "another command is writing into this folder"
        raise UserError(what, where=str(out), hint="wait for it, or stop it") from None
    except OSError as error:
        raise cannot_write(error, str(out), _ROOM) from None
    try:
        yield
    finally:
        (out / ".drawing").unlink(missing_ok=True)
        lock.release()


def _same_settings(file: Path, settings: dict[str, Any]) -> None:
    """Write down what the answers depend on, or compare it with what is there."""
    if not file.exists():
        try:
            with replacing(file) as temporary:
                temporary.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise cannot_write(error, str(file), _ROOM) from None
        return
    known = read_json(file)
    changed = [key for key, value in settings.items() if known.get(key) != value]
    if changed:
        shown = ", ".join(
            key if key in ("model", "data") else f"{key} {known.get(key)} → {settings[key]}" for key in changed
        )
        hint = "name another folder, or run it as before"
        raise UserError(f"the answers here were drawn with other settings: {shown}", where=str(file.parent), hint=hint)


def _link_images(link: Path, images: ImageStore) -> None:
    """Let the new data file find the images of the old one."""
    if not isinstance(images, FolderStore):
        if link.is_symlink():
            raise UserError("is a link to other images", where=str(link), hint="name another folder with --out")
        return
    root = images.root
    try:
        if link.exists():
            if link.resolve() != root.resolve():
                what = f"is there already, and is not the folder of the images, {root}"
                raise UserError(what, where=str(link), hint="name another folder with --out")
        elif root.is_dir():
            link.symlink_to(root.resolve(), target_is_directory=True)
    except OSError as error:
        raise cannot_write(error, str(link), _ROOM) from None


def _keep_images(folder: Path, record: Record, images: ImageStore) -> None:
    """Write the images of a record that are no files yet."""
    for name in record.images if not isinstance(images, FolderStore) else ():
        file = folder / name
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            with faults_of(images.where(name)), images.open(name) as opened, replacing(file) as temporary:
                temporary.write_bytes(opened.read())


def _read_answers(out: Path) -> dict[str, list[Drawn]]:
    """All answers in a folder, by the question's id; a last line that is not complete is left out."""
    known: dict[str, list[Drawn]] = {}
    for file in [out / ANSWERS, *sorted(out.glob(_PARTS))]:
        try:
            lines = file.read_bytes().splitlines(keepends=True) if file.exists() else []
        except OSError as error:
            raise UserError(f"cannot be read: {error.strerror}", where=str(file), hint="look at the disk") from None
        for number, line in enumerate(lines, start=1):
            try:
                value = json.loads(line)
                known[value["id"]] = [Drawn(answer["text"], answer["cut"]) for answer in value["answers"]]
            except (ValueError, KeyError, TypeError) as error:
                if number == len(lines) and not line.endswith(b"\n"):
                    continue  # it was being written when the process ended
                hint = "remove the line; its question is answered again"
                raise UserError(f"is no line of answers: {error}", where=f"{file}:{number}", hint=hint) from None
    return known


def _draw(
    model: Any,
    questions: QuestionDataset,
    wanted: Sequence[int],
    ids: Sequence[str],
    out: Path,
    console: Console,
    options: PairOptions,
    max_new_tokens: int,
    tuned: FinetunedModel,
    runtime: RuntimeDevice,
) -> None:
    """Answer the questions and add the answers to this rank's file, batch by batch."""
    path = out / _PARTS.replace("*", str(runtime.rank))
    evaluation = tuned.run.evaluation
    workers = default_workers(runtime) if tuned.run.data.num_workers is None else tuned.run.data.num_workers
    try:
        with path.open("ab+") as file, progress_bar(console) as bar:
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)  # what a killed process left of a line
            task = bar.add_task("drawing answers", total=len(ids), completed=len(ids) - len(wanted), extra="")

            def take(answers: dict[int, list[Generated]]) -> None:
                for index, drawn in answers.items():
                    line = {"id": ids[index], "answers": [asdict(Drawn(each.text, each.cut)) for each in drawn]}
                    file.write(json.dumps(line, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n")
                file.flush()
                bar.advance(task, len(answers) * runtime.world_size)  # the other ranks are about as far

            sample_answers(
                model,
                questions.processor,
                questions,
                wanted,
                take,
                count=options.samples,
                sampling=options.sampling,
                batch_size=options.batch_size,
                batch_tokens=evaluation.batch_tokens,
                max_new_tokens=max_new_tokens,
                autocast_dtype=runtime.autocast_dtype,
                num_workers=workers,
                rank=runtime.rank,
                world_size=runtime.world_size,
            )
    except OSError as error:
        raise cannot_write(error, str(path), _ROOM) from None


def _write(
    questions: QuestionDataset,
    ids: Sequence[str],
    known: dict[str, list[Drawn]],
    out: Path,
    metric: str,
    options: PairOptions,
    console: Console,
) -> dict[str, Any]:
    """Write all answers with their scores, and the pairs; says what came of the questions."""
    missing = [name for name in ids if name not in known]
    if missing:
        what = f"the answers to {len(missing):,} questions are missing, first to {missing[0]!r}"
        raise UserError(what, where=str(out), hint="can all machines write into this folder? Run it again")
    counts = PairCounts()
    score = METRICS[metric].of_answer

    def scored() -> Iterator[dict[str, Any]]:
        for question in questions.questions():
            answers = [
                asdict(drawn) | {"score": score(drawn.text, question.references)} for drawn in known[question.id]
            ]
            yield {"id": question.id, "question": question.text, "references": question.references, "answers": answers}

    def pairs() -> Iterator[dict[str, Any]]:
        records = ((questions.table[int(record)], int(turn)) for record, turn in questions.index)
        for name, (record, turn) in zip(ids, records, strict=True):
            asked = record.turns[turn]
            pair = choose_pair(asked, known[name], metric, chosen=options.chosen, min_margin=options.min_margin)
            counts.add(asked, known[name], metric, pair)
            if pair is not None:
                _keep_images(out / "images", upto_question(record, turn), questions.table.images)
                yield _record(name, record, turn, pair)

    has_others = bool(known.keys() - set(ids))
    try:
        if not has_others:  # of a smaller part of the questions, the files of the ranks keep the others
            write_jsonl(out / ANSWERS, scored(), overwrite=True)
            for part in out.glob(_PARTS):
                part.unlink()
        with replacing(out / PAIRS) as temporary:
            write_jsonl(temporary, pairs())
            for line in counts.describe(metric):
                say(console, line)
            if not counts.pairs:
                hint = "draw more freely (--temperature, --samples), take --chosen reference, or lower --min-margin"
                raise UserError("no question has a better and a worse answer", where=str(out), hint=hint)
    except OSError as error:
        raise cannot_write(error, str(out), _ROOM) from None
    say(console, f"written: {out / PAIRS}")
    return counts.to_json_dict()


def _record(name: str, record: Record, turn_index: int, pair: Pair) -> dict[str, Any]:
    """The record of a pair: the conversation as far as its question, whose earlier turns are context."""
    turns = [_turn(turn, turn.assistant, 0) for turn in record.turns[:turn_index]]
    asked = record.turns[turn_index]
    last = _turn(asked, pair.chosen, 1) | {"rejected": pair.rejected, "scores": list(pair.scores)}
    # What is right stays with the question: an evaluation of the pairs must not take the chosen answer for it.
    last["answers"] = list(asked.answers or (asked.assistant,))
    source = {"source": record.source} if record.source is not None else {}
    system = {"system": record.system} if record.system is not None else {}
    return {"id": name, **source, **system, "conversations": [*turns, last]}


def _turn(turn: Turn, assistant: str, weight: int) -> dict[str, Any]:
    images = {"images": list(turn.images)} if turn.images else {}
    offsets = {"image_offsets": list(turn.image_offsets)} if turn.image_offsets is not None else {}
    return {**images, **offsets, "user": turn.user, "assistant": assistant} | ({} if weight else {"weight": 0})
