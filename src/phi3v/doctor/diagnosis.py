"""`phi3v doctor`: everything that can be known to be wrong with a run, in seconds and without training.

The checks run from the cheapest to the dearest; one that needs what failed before it is left out. Each is one line:
pass, warn or fail, and what to do.
"""

from __future__ import annotations

import platform
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from phi3v.config import RunConfig
from phi3v.data.check import check_file
from phi3v.data.collate import Collator, ConversationDataset, encode_record
from phi3v.data.images import describe_kinds
from phi3v.data.lengths import Context, require_context
from phi3v.data.overlap import find_overlap
from phi3v.data.table import RecordTable
from phi3v.errors import UserError
from phi3v.evaluate.answer_limit import answer_limit
from phi3v.findings import Finding, Report, Verdict
from phi3v.machine import available_cores
from phi3v.model.configuration import Phi3VConfig
from phi3v.paths import require_writable
from phi3v.plan.hardware import GIB, Machine, this_machine
from phi3v.plan.planner import Planner
from phi3v.processing.conversation import IGNORE_INDEX, TokenStream
from phi3v.processing.processor import Phi3VProcessor
from phi3v.train.checks import Case, DataFacts, refusals
from phi3v.train.device import RuntimeDevice, choose_device, default_workers
from phi3v.train.methods.gradient_check import check_gradients
from phi3v.train.methods.loading import ModelFacts, inspect_model, load_for_training, load_processor
from phi3v.train.methods.strategies import summarize
from phi3v.train.prepare import data_files, make_plan, open_tables, probe_index, questions_of
from phi3v.train.run_folder import HINT, check_run_folder, environment
from phi3v.train.schedule import describe_schedule, total_steps

SAMPLED_FAULTS = 5  # of a data file that are shown
SAMPLED_RECORDS = 64  # whose labels are looked at
SHOWN_TOKENS = 160  # of the sample's text, around what is learnt
END_TOKENS = ("<|end|>", "<|endoftext|>")
# Pictures of a page that a core reads, resizes and cuts in a second (the official processor takes 103 ms for one).
PAGES_PER_CORE = 10


class Examination:
    """The checks of one recipe, with what they find out for each other."""

    def __init__(self, config: RunConfig, console: Console | None) -> None:
        self.config = config
        self.console = console
        self.report = Report()
        self.compute: RuntimeDevice | None = None
        self.facts: ModelFacts | None = None
        self.processor: Phi3VProcessor | None = None
        self.table: RecordTable | None = None
        self.eval_table: RecordTable | None = None
        self.case: Case | None = None
        self.said: set[str] = set()

    def say(self, check: str, verdict: Verdict, what: str, hint: str | None = None) -> None:
        self.add(Finding(check, verdict, what, hint))

    def add(self, finding: Finding) -> None:
        self.report.findings.append(finding)
        if self.console is not None:
            finding.render(self.console)

    def fail(self, check: str, error: UserError) -> None:
        self.say(check, "fail", f"{error.where}: {error.what}" if error.where else error.what, error.hint)

    def run(self, check: str, work: Callable[[], None]) -> bool:
        """Do a check; what it raises as `UserError` is its failure. Returns whether it passed."""
        before = sum(finding.verdict == "fail" for finding in self.report.findings)
        try:
            work()
        except UserError as error:
            if str(error) not in self.said:
                self.fail(check, error)
        return before == sum(finding.verdict == "fail" for finding in self.report.findings)

    # Environment

    def environment(self) -> None:
        facts = environment()
        versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items() if version)
        self.say("versions", "pass", f"Python {platform.python_version()}, {versions}")
        gpus = facts["gpus"]
        self.say("device", "pass", ", ".join(gpus) + f", CUDA {facts['cuda']}" if gpus else "no GPU: this CPU computes")
        machine = this_machine()
        self.say("memory", "pass", f"{machine.gpu.memory_bytes / GIB:.1f} GiB a device")

    def precision(self) -> None:
        self.compute = choose_device(self.config.training.precision)
        self.say("precision", "pass", f"{self.compute.precision} ({self.compute.reason})")

    def disk(self) -> None:
        folder = Path(self.config.training.output_dir).absolute()
        while not folder.exists():
            folder = folder.parent
        free = shutil.disk_usage(folder).free
        # The tuned model with its best copy, in the stored dtype; adapters are far smaller.
        full = self.config.method.name in ("full", "frozen-vision")
        model = _folder_bytes(Path(self.config.model.path)) or int(8.3e9)
        needed = 2 * model if full else max(int(1e9), model // 4)
        verdict: Verdict = "pass" if free > needed else "fail"
        hint = None if verdict == "pass" else "free some space, or choose another training.output_dir"
        self.say("disk", verdict, f"{free / GIB:.0f} GiB free, about {needed / GIB:.1f} needed for what is saved", hint)

    def workers(self) -> None:
        assert self.compute is not None
        cores, wanted = available_cores(), self.config.data.num_workers
        workers = default_workers(self.compute) if wanted is None else wanted
        if workers * self.compute.node_ranks > max(1, cores):
            self.say(
                "workers",
                "warn",
                f"{workers} reading processes a rank on {cores} cores get in each other's way",
                f"set data.num_workers to at most {max(0, cores // self.compute.node_ranks - 1)}",
            )
        else:
            fed = max(1, workers) * PAGES_PER_CORE
            self.say("workers", "pass", f"{workers} on {cores} cores, enough for some {fed} full pages a second a rank")

    # Configuration and model

    def refused(self, check: str, **facts: Any) -> bool:
        """Say what the list of `phi3v.train.checks` refuses now that more is known; whether that was anything."""
        assert self.case is not None
        self.case = replace(self.case, **facts)
        found = [refusal for refusal in refusals(self.case) if str(refusal) not in self.said]
        for refusal in found:
            self.said.add(str(refusal))
            self.fail(check, refusal)
        return bool(found)

    def configuration(self) -> None:
        assert self.compute is not None
        self.case = Case(self.config, self.compute)
        if not self.refused("configuration"):
            accumulation = self.config.accumulation_steps(self.compute.world_size)
            self.say(
                "configuration",
                "pass",
                f"{self.config.method.name}, {self.config.training.batch_size} samples a step: "
                f"{self.config.training.micro_batch_size} at a time, {accumulation} accumulated",
            )

    def run_folder(self) -> None:
        folder = check_run_folder(self.config)
        require_writable(folder, f"training.output_dir {folder}", HINT)
        self.say("run folder", "pass", f"{folder} is free for a run")

    def model(self) -> None:
        assert self.compute is not None
        self.facts = inspect_model(self.config, self.compute)
        self.processor = load_processor(self.config)
        if not self.refused("model", model=self.facts.skeleton):
            self.say("model", "pass", f"{self.config.model.path}: all weights there, attention {self.facts.attention}")

    def tokens(self) -> None:
        """The special tokens of the tokenizer are single tokens, and those that end an answer are known."""
        assert self.processor is not None
        broken = [name for name in END_TOKENS if len(self.processor.tokenize_text(name)) != 1]
        if broken:
            self.say(
                "tokens",
                "fail",
                f"the tokenizer splits {' and '.join(broken)}, so an answer's end would never be learnt",
                "copy tokenizer.json of the published model again",
            )
            return
        ids = {name: self.processor.tokenize_text(name)[0] for name in END_TOKENS}
        size = Phi3VConfig.from_pretrained(self.config.model.path).vocab_size
        outside = [name for name, number in ids.items() if number >= size]
        if outside:
            self.say("tokens", "fail", f"{outside[0]} is token {ids[outside[0]]}, the model has {size}")
            return
        named = ", ".join(f"{name} is {number}" for name, number in ids.items())
        self.say("tokens", "pass", f"{named}; generation stops at both")

    # Data

    def data(self) -> None:
        data_files(self.config)
        good = True
        for key, name in (("data.train", self.config.data.train), ("data.eval", self.config.data.eval)):
            if name is None:
                self.say(key, "warn", "none: nothing will be measured", "set it to a JSONL file")
                continue
            report = check_file(
                Path(name),
                max_errors=SAMPLED_FAULTS,
                **self.config.data.reading,
                image_level="header" if self.config.data.image_check == "decode" else self.config.data.image_check,
            )
            if report.ok:
                counts = f"{report.records:,} records, {report.turns:,} turns, {report.images:,} pictures"
                kinds = f"; of these {describe_kinds(report.image_kinds)}" if report.image_kinds else ""
                self.say(key, "pass", f"{name}: {counts}, headers read{kinds}")
            else:
                good = False
                for fault in report.faults:
                    what, _, hint = str(fault).partition("\n")
                    self.say(key, "fail", what, hint.strip().removeprefix("→ ") or None)
        if good:
            self.table, self.eval_table = open_tables(self.config, progress=False)
            if self.case is not None and self.processor is not None:
                questions = questions_of(self.config, self.eval_table, self.processor)
                self.refused("data", data=DataFacts.of(self.table, questions, self.config.evaluation))

    def labels(self) -> None:
        """What is learnt: of one sample shown, of several counted, with the end of every answer."""
        assert self.processor is not None
        assert self.table is not None
        table, processor = self.table, self.processor
        shown = self._stream(probe_index(table))
        if self.console is not None:
            self.console.print(mask_text(processor, shown.input_ids, shown.labels), soft_wrap=True)
        chosen = range(0, len(table), max(1, len(table) // SAMPLED_RECORDS))
        streams = [(table[index], self._stream(index).labels) for index in chosen]
        masked = [record for record, labels in streams if all(label == IGNORE_INDEX for label in labels)]
        if masked:
            self.say(
                "labels",
                "fail",
                f"{len(masked)} of {len(streams)} sampled records are masked whole, first line {masked[0].line}: "
                "nothing of them would be learnt",
                "look at the answers of the data file",
            )
            return
        learnt = sum(label != IGNORE_INDEX for label in shown.labels)
        self.say("labels", "pass", f"{learnt} of {len(shown.labels)} tokens of the sample are learnt (green above)")
        end, end_of_text = (processor.tokenize_text(name)[0] for name in END_TOKENS)
        unended = [
            record
            for record, labels in streams
            if labels.count(end) < record.num_questions or (record.turns[-1].weight and labels[-1] != end_of_text)
        ]
        if unended:
            self.say(
                "end of answers",
                "fail",
                f"in {len(unended)} of {len(streams)} sampled records {' or '.join(END_TOKENS)} is not learnt, "
                f"first line {unended[0].line}: the model would not learn to stop",
                "the mask must reach to the last token of an answer",
            )
        else:
            self.say("end of answers", "pass", f"{' and '.join(END_TOKENS)} are learnt in {len(streams)} records")

    def schedule(self) -> None:
        """What the learning rate does in a run of this data."""
        assert self.compute is not None
        assert self.facts is not None
        assert self.processor is not None
        assert self.table is not None
        plan = make_plan(self.config, self.compute, self.facts.skeleton, self.table, self.processor)
        self.add(describe_schedule(self.config.training, total_steps(self.config.training, plan.num_steps)))

    def overlap(self) -> None:
        """What is measured on is not learnt from."""
        assert self.table is not None
        if self.eval_table is None:
            return
        shared = find_overlap(self.table, self.eval_table, self.config.data.special_text)
        self.add(
            shared.finding or Finding("overlap", "pass", "data.eval shares no image and no question with data.train")
        )

    def lengths(self) -> None:
        """The model reads every record whole."""
        assert self.facts is not None
        assert self.processor is not None
        for table in (self.table, self.eval_table):
            if table is not None:
                require_context(table, Context(self.facts.context, self.processor))
        self.say("lengths", "pass", f"no record is longer than the {self.facts.context:,} tokens that the model reads")

    def answers(self) -> None:
        """How long an answer may be, and which references are longer."""
        assert self.processor is not None
        questions = questions_of(self.config, self.eval_table, self.processor)
        if questions is None:
            return
        limit = answer_limit(questions, self.config.evaluation.max_new_tokens)
        self.add(limit.finding or Finding("answers", "pass", str(limit)))

    def _stream(self, index: int) -> TokenStream:
        """The tokens and labels of a record, its pictures not decoded."""
        assert self.processor is not None
        assert self.table is not None
        record = self.table[index]
        count = self.processor.image_processor.calc_num_image_tokens_from_image_size
        return encode_record(record, self.processor, [count(*size) for size in self.table.image_sizes(record)])

    # Gradients and plan

    def gradients(self) -> None:
        """One real forward and backward pass on the smallest batch."""
        assert self.compute is not None
        assert self.facts is not None
        assert self.processor is not None
        assert self.table is not None
        model = load_for_training(self.config, self.facts, self.compute)
        for part in summarize(model):
            adapters = ", ".join(f"{name} ×{count}" for name, count in part.adapters.items())
            trained = f"{part.trainable:,} of {part.total:,} parameters" if part.trainable else "frozen"
            self.say(f"trained, {part.part}", "pass", trained + (f": adapters on {adapters}" if adapters else ""))
        collator = Collator(self.processor.tokenizer.pad_token_id)
        sample = ConversationDataset(self.table, self.processor)[smallest_index(self.table)]
        checked = check_gradients(model, collator([sample]), autocast_dtype=self.compute.autocast_dtype)
        self.say("gradients", "pass", f"all {checked} trainable tensors get one, no frozen one does")

    def plan(self) -> None:
        """Whether the recipe as it is fits this machine."""
        assert self.compute is not None
        plan = Planner(self.config, progress=False).plan(Machine(this_machine().gpu, self.compute.world_size))
        own = plan.own
        if not own.fits or own.changes:
            what = f"{self.config.method.name} does not fit this machine: {own.reason}"
            if own.fits:
                what = f"this recipe does not fit this machine as it is: {own.reason}"
            hint = f"take it with {', '.join(own.changes)}" if own.fits else f"recommended: {plan.reason}"
            self.say("plan", "fail", what, hint)
            return
        speed = own.speed
        rate = f", about {speed.samples_per_second:.2f} samples/s" if speed and speed.samples_per_second else ""
        self.say("plan", "pass", f"fits: {own.reason}{rate}")


def diagnose(config: RunConfig, console: Console) -> Report:
    """Run every check of a recipe and return what they found."""
    examination = Examination(config.absolute(), console)
    examination.run("environment", examination.environment)
    if examination.run("precision", examination.precision):
        examination.run("configuration", examination.configuration)
        examination.run("model", examination.model)
    examination.run("run folder", examination.run_folder)
    examination.run("disk", examination.disk)
    if examination.compute is not None:
        examination.run("workers", examination.workers)
    examination.run("data", examination.data)
    if examination.table is not None:
        examination.run("overlap", examination.overlap)
    can_encode = examination.processor is not None and examination.table is not None
    good, fits = False, True
    if can_encode:
        good = examination.run("tokens", examination.tokens) and examination.run("labels", examination.labels)
        fits = examination.run("lengths", examination.lengths)
        examination.run("answers", examination.answers)
    if examination.facts is not None and can_encode:
        examination.run("schedule", examination.schedule)
    if examination.facts is not None and fits and not examination.said:
        examination.run("plan", examination.plan)
    if good and examination.facts is not None and examination.report.ok:
        examination.run("gradients", examination.gradients)
    elif not examination.report.ok:
        examination.say("gradients", "warn", "not tried: something before them failed")
    failed = sum(finding.verdict == "fail" for finding in examination.report.findings)
    warned = sum(finding.verdict == "warn" for finding in examination.report.findings)
    summary = f"{failed} failed, {warned} warnings" if failed or warned else "ready to train"
    console.print(Text(summary, style="bold red" if failed else "bold"))
    return examination.report


def check_before_training(config: RunConfig) -> None:
    """The cheap part, for every run: what would stop it late and costs nothing to see.

    Raises:
        UserError: the disk is full.
    """
    examination = Examination(config, None)
    examination.disk()
    for finding in examination.report.findings:
        if finding.verdict == "fail":
            raise UserError(finding.what, where=finding.check, hint=finding.hint)


def smallest_index(table: RecordTable) -> int:
    """The record with a picture and the fewest of them, or the first."""
    counts = table.image_counts()
    with_pictures = counts.nonzero()[0]
    return int(with_pictures[counts[with_pictures].argmin()]) if len(with_pictures) else 0


def mask_text(processor: Phi3VProcessor, input_ids: list[int], labels: list[int]) -> Text:
    """A sample as text: what is learnt in green, what is not dimmed, a picture as its number of tokens."""
    text = Text()
    start = 0
    while start < len(input_ids):
        learnt = labels[start] != IGNORE_INDEX
        end = start
        if input_ids[start] < 0:
            while end < len(input_ids) and input_ids[end] == input_ids[start]:
                end += 1
            text.append(f"[picture {-input_ids[start]}: {end - start} tokens]", style="blue")
        else:
            while end < len(input_ids) and input_ids[end] >= 0 and (labels[end] != IGNORE_INDEX) == learnt:
                end += 1
            piece = processor.tokenizer.decode(input_ids[start:end])
            if len(piece) > 4 * SHOWN_TOKENS:
                piece = f"{piece[: 2 * SHOWN_TOKENS]} … {piece[-2 * SHOWN_TOKENS :]}"
            text.append(piece.replace("\n", "⏎"), style="green" if learnt else "dim")
        start = end
    return text


def _folder_bytes(folder: Path) -> int:
    """Size of a model folder's weights; 0 if it is not there."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors")) if folder.is_dir() else 0
