"""Everything that can be known to be wrong with a run, in seconds and without training.

The checks run from the cheapest to the most expensive; one that needs what failed before it is left out.
"""

from __future__ import annotations

import itertools
import platform
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.text import Text

from phi3v.config import RunConfig
from phi3v.data.batches import RowPlan
from phi3v.data.check import ensure_checked
from phi3v.data.collate import encode_record
from phi3v.data.faults import DataFaultsError
from phi3v.data.images import describe_kinds
from phi3v.data.order import Mixed
from phi3v.data.overlap import find_overlaps
from phi3v.data.rows import RowDataset
from phi3v.data.table import RecordTable
from phi3v.errors import UserError
from phi3v.evaluate.answer_limit import answer_limit
from phi3v.findings import Finding, Report
from phi3v.machine import available_cores
from phi3v.paths import free_space, require_writable
from phi3v.plan.hardware import GIB, Machine, this_machine
from phi3v.plan.planner import Planner
from phi3v.processing.conversation import IGNORE_INDEX, TokenStream
from phi3v.processing.processor import Phi3VProcessor
from phi3v.terminal import say
from phi3v.train.checks import Case, refusals
from phi3v.train.collectives import HostCollectives
from phi3v.train.data_facts import DataFacts, doubtful_answers
from phi3v.train.device import RuntimeDevice, choose_device, default_workers
from phi3v.train.header import describe_mixture, describe_objective
from phi3v.train.methods.gradient_check import check_gradients
from phi3v.train.methods.loading import ModelFacts, inspect_model, load_for_training, load_processor
from phi3v.train.methods.strategies import summarize
from phi3v.train.objectives import make_objective
from phi3v.train.open_data import data_files, open_tables, order_of, probe_index, questions_of
from phi3v.train.prepare import (
    check_fast_paths,
    make_plan,
    preferences_of,
    require_lengths,
)
from phi3v.train.run_folder import HINT, check_run_folder, environment
from phi3v.train.schedule import describe_schedule, total_steps

SHOWN_FAULTS = 5  # of a data file
SAMPLED_RECORDS = 64  # whose labels are checked
SHOWN_TOKENS = 160  # of the sample's text, around what is trained on
END_TOKENS = ("<|end|>", "<|endoftext|>")
# Pages that a core reads, resizes and cuts in a second (the official processor takes 103 ms for one).
PAGES_PER_CORE = 10


def diagnose(config: RunConfig, console: Console) -> Report:
    """Run every check of a recipe and return what they found."""
    config = config.absolute()
    report = Report(console)
    _check_environment(report)
    case, facts, processor = check_setup(config, report)
    with report.checking("run folder"):
        folder = check_run_folder(config)
        require_writable(folder, f"training.output_dir {folder}", HINT)
        report.say("run folder", "pass", f"{folder} is free for a run")
    report.add(check_disk(config))
    if case is not None:
        _check_workers(config, case.runtime, report)
    case, table, eval_table = check_data(config, report, case, processor)
    if table is not None and eval_table is not None:
        with report.checking("overlap"):
            none = Finding("overlap", "pass", "data.eval shares no image and no question with data.train")
            for finding in find_overlaps(table, eval_table) or [none]:
                report.add(finding)
    if case is not None and facts is not None and processor is not None and table is not None:
        _check_records(config, report, facts, processor, table, eval_table)
        if not report.has_failed("lengths"):
            lengths = require_lengths(config, table, facts, processor, config.objective)
            order = order_of(config, table)
            if isinstance(order, Mixed):
                report.say("mixture", "pass", describe_mixture(order, table.names))
            plan = make_plan(config, case.runtime, facts.skeleton, lengths, order)
            report.add(describe_schedule(config.training, total_steps(config.training, plan.num_steps)))
    if case is not None and facts is not None and not report.has_failed("lengths") and not refusals(case):
        with report.checking("plan"):
            _check_plan(config, report, case.runtime)
    if not report.ok:
        report.say("gradients", "warn", "not tried: something before them failed")
    elif case is not None and facts is not None and processor is not None and table is not None:
        with report.checking("self-check"):
            facts = _check_fast_paths(config, report, case.runtime, facts, processor, table)
        with report.checking("gradients"):
            _check_gradients(config, report, case.runtime, facts, processor, table)
    failed = sum(finding.verdict == "fail" for finding in report.findings)
    warned = sum(finding.verdict == "warn" for finding in report.findings)
    summary = f"{failed} failed, {warned} warnings" if failed or warned else "ready to train"
    say(console, summary, style="bold red" if failed else "bold")
    return report


def check_before_training(config: RunConfig) -> None:
    """The cheap part, for every run: what would stop it late and costs nothing to see.

    Raises:
        UserError: the disk is full.
    """
    finding = check_disk(config)
    if finding.verdict == "fail":
        raise UserError(finding.what, where=finding.check, hint=finding.hint)


def _check_environment(report: Report) -> None:
    facts = environment()
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items() if version)
    report.say("versions", "pass", f"Python {platform.python_version()}, {versions}")
    gpus = facts["gpus"]
    report.say("device", "pass", ", ".join(gpus) + f", CUDA {facts['cuda']}" if gpus else "no GPU: this CPU computes")
    report.say("memory", "pass", f"{this_machine().gpu.memory_bytes / GIB:.1f} GiB a device")


def check_setup(config: RunConfig, report: Report) -> tuple[Case | None, ModelFacts | None, Phi3VProcessor | None]:
    """Device, configuration and model, as far as they can be had."""
    facts, processor = None, None
    try:
        runtime = choose_device(config.training.precision)
    except UserError as error:
        report.fail("precision", error)
        return None, None, None
    report.say("precision", "pass", f"{runtime.precision} ({runtime.reason})")
    case = Case(config, runtime)
    if not _refuse(report, "configuration", case):
        with report.checking("configuration"):
            accumulation = config.accumulation_steps(runtime.world_size)
            report.say(
                "configuration",
                "pass",
                f"{config.method.name}, {config.objective.name}, {config.training.batch_size} samples a step: "
                f"{config.training.micro_batch_size} at a time, {accumulation} accumulated",
            )
    with report.checking("model"):
        facts = inspect_model(config, runtime)
        processor = load_processor(config)
        case = replace(case, model=facts.skeleton)
        if not _refuse(report, "model", case):
            report.say("model", "pass", f"{config.model.path}: all weights there, attention {facts.attention}")
    return case, facts, processor


def _refuse(report: Report, check: str, case: Case) -> bool:
    """Fail with what makes the run impossible, now that more is known; whether there was anything new."""
    return sum(report.fail(check, refusal) for refusal in refusals(case)) > 0


def check_disk(config: RunConfig) -> Finding:
    """Whether what a run saves fits the disk."""
    free = free_space(Path(config.training.output_dir).absolute())
    # The trained model with its best copy, in the stored dtype; adapters are far smaller.
    model = sum(path.stat().st_size for path in Path(config.model.path).glob("*.safetensors")) or int(8.3e9)
    needed = 2 * model if config.method.name in ("full", "frozen-vision") else max(int(1e9), model // 4)
    what = f"{free / GIB:.0f} GiB free, about {needed / GIB:.1f} needed for what is saved"
    if free > needed:
        return Finding("disk", "pass", what)
    return Finding("disk", "fail", what, "free some space, or choose another training.output_dir")


def _check_workers(config: RunConfig, runtime: RuntimeDevice, report: Report) -> None:
    cores, wanted = available_cores(), config.data.num_workers
    workers = default_workers(runtime) if wanted is None else wanted
    if workers * runtime.node_ranks > max(1, cores):
        what = f"{workers} reading processes a rank on {cores} cores get in each other's way"
        hint = f"set data.num_workers to at most {max(0, cores // runtime.node_ranks - 1)}"
        report.say("workers", "warn", what, hint)
    else:
        fed = max(1, workers) * PAGES_PER_CORE
        what = f"{workers} on {cores} cores, enough for some {fed} full pages a second a rank"
        report.say("workers", "pass", what)


def check_data(
    config: RunConfig, report: Report, case: Case | None, processor: Phi3VProcessor | None
) -> tuple[Case | None, RecordTable | None, RecordTable | None]:
    """Both data files; the tables of files without faults, and the case with what is known of them."""
    table, eval_table = None, None
    with report.checking("data"):
        data_files(config)
        good = [_check_data_file(config, report, key, path) for key, path in config.data.paths]
        if config.data.eval is None:
            report.say("data.eval", "warn", "none: nothing will be evaluated", "set it to a JSONL file")
        if all(good):
            table, eval_table = open_tables(config, progress=False)
            if case is not None and processor is not None:
                questions = questions_of(config, eval_table, processor)
                facts = DataFacts.of(table, questions, config.evaluation)
                case = replace(case, data=facts)
                if not _refuse(report, "data", case) and config.objective.is_preference:
                    judged = f"{facts.pairs:,} records with rejected answers, {facts.labels:,} with a label"
                    report.say("objective", "pass", f"{describe_objective(config.objective)}; {judged}")
                if doubtful := doubtful_answers(config.objective, facts):
                    report.add(doubtful)
    return case, table, eval_table


def _check_data_file(config: RunConfig, report: Report, key: str, path: str) -> bool:
    level = config.data.image_check
    level = "header" if level == "decode" else level
    try:
        checked = ensure_checked(Path(path), max_errors=SHOWN_FAULTS, **config.data.reading, image_level=level)
    except DataFaultsError as error:
        for fault in error.faults:
            what, _, hint = str(fault).partition("\n")
            report.say(key, "fail", what, hint.strip().removeprefix("→ ") or None)
        return False
    counts = f"{checked.records:,} records, {checked.turns:,} turns, {checked.images:,} images"
    kinds = f"; of these {describe_kinds(checked.image_kinds)}" if checked.image_kinds else ""
    report.say(key, "pass", f"{path}: {counts}, headers read{kinds}")
    return True


def _check_records(
    config: RunConfig,
    report: Report,
    facts: ModelFacts,
    processor: Phi3VProcessor,
    table: RecordTable,
    eval_table: RecordTable | None,
) -> None:
    """What the model reads and is trained on: tokens, labels, lengths, answers."""
    with report.checking("tokens"):
        _check_tokens(report, processor, facts)
    if not report.has_failed("tokens"):
        with report.checking("labels"):
            _check_labels(report, processor, table)
    with report.checking("lengths"):
        require_lengths(config, table, facts, processor, config.objective)
        if eval_table is not None:
            require_lengths(config, eval_table, facts, processor)
        what = f"no record is longer than the {facts.context:,} tokens that the model reads"
        report.say("lengths", "pass", what)
    with report.checking("answers"):
        questions = questions_of(config, eval_table, processor)
        if questions is not None:
            limit = answer_limit(questions, config.evaluation.max_new_tokens)
            report.add(limit.finding or Finding("answers", "pass", str(limit)))


def _check_tokens(report: Report, processor: Phi3VProcessor, facts: ModelFacts) -> None:
    """The special tokens that end an answer are single tokens which the model has."""
    ids = {name: processor.tokenize_text(name) for name in END_TOKENS}
    broken = [name for name in END_TOKENS if len(ids[name]) != 1]
    size = facts.skeleton.config.vocab_size
    outside = [name for name in END_TOKENS if ids[name][0] >= size]
    if broken:
        what = f"the tokenizer splits {' and '.join(broken)}, so the end of an answer would never be trained"
        report.say("tokens", "fail", what, "copy tokenizer.json of the published model again")
    elif outside:
        report.say("tokens", "fail", f"{outside[0]} is token {ids[outside[0]][0]}, the model has {size}")
    else:
        named = ", ".join(f"{name} is {tokens[0]}" for name, tokens in ids.items())
        report.say("tokens", "pass", f"{named}; generation stops at both")


def _check_labels(report: Report, processor: Phi3VProcessor, table: RecordTable) -> None:
    """What is trained on: of one sample shown, of several counted, with the end of every answer."""

    def stream(index: int) -> TokenStream:
        count = processor.image_processor.calc_num_image_tokens_from_image_size
        record = table[index]
        return encode_record(record, processor, [count(*size) for size in table.image_sizes(record)])

    shown = stream(probe_index(table))
    if report.console is not None:
        report.console.print(mask_text(processor, shown.input_ids, shown.labels), soft_wrap=True)
    chosen = range(0, len(table), max(1, len(table) // SAMPLED_RECORDS))
    labelled = [(table[index], stream(index).labels) for index in chosen]
    masked = [record for record, labels in labelled if all(label == IGNORE_INDEX for label in labels)]
    if masked:
        what = (
            f"{len(masked)} of {len(labelled)} sampled records are masked entirely, first {table.line_of(masked[0])}: "
            "they would not be trained on"
        )
        report.say("labels", "fail", what, "look at the answers of the data file")
        return
    trained = sum(label != IGNORE_INDEX for label in shown.labels)
    report.say("labels", "pass", f"{trained} of {len(shown.labels)} tokens of the sample are trained on (green above)")
    end, end_of_text = (processor.tokenize_text(name)[0] for name in END_TOKENS)
    unended = [
        record
        for record, labels in labelled
        if labels.count(end) < record.num_questions or (record.turns[-1].weight and labels[-1] != end_of_text)
    ]
    if unended:
        what = (
            f"in {len(unended)} of {len(labelled)} sampled records {' or '.join(END_TOKENS)} is not trained on, "
            f"first {table.line_of(unended[0])}: the model would not learn to stop"
        )
        report.say("end of answers", "fail", what, "the mask must reach to the last token of an answer")
    else:
        what = f"{' and '.join(END_TOKENS)} are trained on in {len(labelled)} records"
        report.say("end of answers", "pass", what)


def _check_plan(config: RunConfig, report: Report, runtime: RuntimeDevice) -> None:
    """Whether the recipe as it is fits this machine."""
    plan = Planner(config, progress=False).plan(Machine(this_machine().gpu, runtime.world_size))
    own = plan.own
    if own.fits and not own.changes:
        speed = own.speed
        rate = f", about {speed.samples_per_second:.2f} samples/s" if speed and speed.samples_per_second else ""
        report.say("plan", "pass", f"fits: {own.reason}{rate}")
    elif own.fits:
        what = f"this recipe does not fit this machine as it is: {own.reason}"
        report.say("plan", "fail", what, f"take it with {', '.join(own.changes)}")
    else:
        what = f"{config.method.name} does not fit this machine: {own.reason}"
        report.say("plan", "fail", what, f"recommended: {plan.reason}")


def _check_fast_paths(
    config: RunConfig,
    report: Report,
    runtime: RuntimeDevice,
    facts: ModelFacts,
    processor: Phi3VProcessor,
    table: RecordTable,
) -> ModelFacts:
    """Each fast path beside the plain one; the model's facts with what is left of them."""
    lengths = require_lengths(config, table, facts, processor, config.objective)
    ranks = HostCollectives(1)
    checked = check_fast_paths(config, facts, runtime, ranks, table, lengths, processor, report.console)
    for verdict in checked.verdicts:
        if verdict.state == "passed":
            report.say("self-check", "pass", str(verdict))
    for finding in checked.findings:
        report.add(finding)
    if not checked.verdicts:
        why = "training.self_check is off" if config.training.self_check == "off" else "no GPU"
        report.say("self-check", "pass", f"not made: {why}")
    return facts.with_attention(checked.paths.attention)


def _check_gradients(
    config: RunConfig,
    report: Report,
    runtime: RuntimeDevice,
    facts: ModelFacts,
    processor: Phi3VProcessor,
    table: RecordTable,
) -> None:
    """One real forward and backward pass on the smallest batch."""
    model = load_for_training(config, facts, runtime)
    for part in summarize(model):
        adapters = ", ".join(f"{name} ×{count}" for name, count in part.adapters.items())
        trained = f"{part.trainable:,} of {part.total:,} parameters" if part.trainable else "frozen"
        report.say(f"trained, {part.part}", "pass", trained + (f": adapters on {adapters}" if adapters else ""))
    counts = table.image_counts()
    with_images = counts.nonzero()[0]
    smallest = int(with_images[counts[with_images].argmin()]) if len(with_images) else 0
    dataset = RowDataset(table, processor, preferences=preferences_of(config, facts, table))
    batch = dataset[RowPlan(((smallest,),), ends_step=True)]
    loss_of = make_objective(config.objective).probe_loss
    checked = check_gradients(model, batch, autocast_dtype=runtime.autocast_dtype, loss_of=loss_of)
    report.say("gradients", "pass", f"all {checked} trainable tensors get one, no frozen one does")


def mask_text(processor: Phi3VProcessor, input_ids: list[int], labels: list[int]) -> Text:
    """A sample as text: what is trained on in green, the rest dimmed, an image as its number of tokens."""
    text = Text()
    kinds = [(token if token < 0 else 0, label != IGNORE_INDEX) for token, label in zip(input_ids, labels, strict=True)]
    start = 0
    for (image, is_trained), run in itertools.groupby(kinds):
        count = len(list(run))
        if image:
            text.append(f"[image {-image}: {count} tokens]", style="blue")
        else:
            piece = processor.tokenizer.decode(input_ids[start : start + count])
            if len(piece) > 4 * SHOWN_TOKENS:
                piece = f"{piece[: 2 * SHOWN_TOKENS]} … {piece[-2 * SHOWN_TOKENS :]}"
            text.append(piece.replace("\n", "⏎"), style="green" if is_trained else "dim")
        start += count
    return text
