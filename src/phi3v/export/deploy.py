"""Exports in other formats than the official one: made from the float model, proven against it, then named."""

from __future__ import annotations

import gc
import importlib
import json
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from huggingface_hub import snapshot_download
from rich.console import Console

from phi3v.errors import UserError
from phi3v.evaluate.decoding import Logits, TorchDecoder
from phi3v.evaluate.metrics import Score
from phi3v.export import divergence
from phi3v.export.card import Part, Proof, write_format_card
from phi3v.export.divergence import (
    CONTROL_BITS,
    DRAWN,
    LEAST_CONTROL,
    LOGITS,
    OWN,
    PROOF,
    PROOF_FACTS,
    Divergence,
    Prompt,
    Speed,
    answer_prompts,
    bound_of,
    diverge,
    drawn_prompts,
    own_prompts,
    round_decoder,
)
from phi3v.export.formats import FORMATS, OPTIONS, FormatOptions, require_extra
from phi3v.export.make import (
    check_out,
    export,
    name_end_tokens,
    name_special_tokens,
    no_room,
    require_base_id,
    require_float,
    until_the_disk_is_full,
)
from phi3v.export.proof import name_data, own_data
from phi3v.model.checkpoint import make_weights_readable
from phi3v.model.configuration import Phi3VConfig
from phi3v.model.quantised import decoder_linears
from phi3v.paths import absolute, free_space
from phi3v.processing.conversation import stop_token_ids
from phi3v.processing.tokenizer import TOKENIZER_CONFIG
from phi3v.terminal import say
from phi3v.train.device import choose_device
from phi3v.train.evaluate_finetuned import evaluate_tuned
from phi3v.train.finetuned import FinetunedModel, load_tuned, resolve_model
from phi3v.train.methods.loading import make_skeleton
from phi3v.train.methods.weights import write_manifest

SAMPLES = 32  # own questions in the proof
QUESTIONS = 200  # that are scored
MEMORY_SHARE = 0.6  # of what is free: a float32 model above it is proven in its own dtype


class TooFarError(Exception):
    """An export is too far from the float model."""


def deploy(
    name: str,
    out: Path,
    formats: Sequence[str],
    options: dict[str, Any],
    console: Console,
    *,
    base: str | None = None,
    base_id: str | None = None,
    samples: int = SAMPLES,
    questions: int = QUESTIONS,
    overwrite: bool = False,
    **of_the_float_model: Any,
) -> list[Any]:
    """Write a tuned model in several formats; one goes to ``out`` itself, several to a folder each in it.

    Args:
        name: a run, its ``best`` or ``final``, a checkpoint, an adapter, or a model.
        formats: names in `FORMATS`, and ``hf`` for the official layout.
        options: fields of `FormatOptions` that were given.
        base, base_id, overwrite, of_the_float_model: as for `phi3v.export.make.export`.
        samples: own questions to compare with.
        questions: of the run's evaluation data, to score; 0: none.

    Returns:
        An `ExportResult` for ``hf`` and a `Proof` for each other format.

    Raises:
        UserError: something is missing, does not fit or is in the way, and nothing was made.
            A format that is too far from the float model is not left under its name; others are made all the same.
    """
    tuned = resolve_model(name, base)
    require_float(tuned)
    require_base_id(base_id)
    # Where several go to a folder that is a link, they are made on its disk.
    out = absolute(out).resolve() if len(formats) > 1 else absolute(out)
    places = {each: out / each if len(formats) > 1 else out for each in formats}
    made = {each: FormatOptions(each, **_known(each, options)) for each in formats if each != "hf"}
    _check_options(formats, options)
    for each, place in places.items():
        check_out(place, tuned, overwrite)
        if each != "hf":
            _check_format(tuned, made[each])
    if len(formats) > 1:
        check_out(out, tuned, overwrite=True)
    needed = _bytes_needed(tuned, formats)
    if free_space(out.parent) < needed * 1.05:
        raise no_room(out, needed, "there is no room")
    out.parent.mkdir(parents=True, exist_ok=True)
    results: list[Any] = []
    faults: dict[str, str] = {}
    with until_the_disk_is_full(out, needed), ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent)))
        as_float: dict[str, Any] = {"base": base, "base_id": base_id, "overwrite": overwrite} | of_the_float_model
        if "hf" in formats:
            results.append(export(name, places["hf"], console, **as_float))
            model = places["hf"]
        else:
            model = _float_model(tuned, name, work / "float", console, as_float)
        reference = _Reference.make(tuned, model, samples, work, console)
        _check_length(reference.prompts, model, made)
        score = _float_score(tuned, model, questions, console)
        questions = questions if score is not None else 0
        for each, fields in made.items():
            say(console, f"making {each}", style="bold")
            try:
                with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as temporary:
                    folder = Path(temporary) / places[each].name
                    folder.mkdir()
                    importlib.import_module(f"phi3v.export.formats.{FORMATS[each].maker}").make(model, folder, fields)
                    gc.collect()
                    proof = reference.prove(folder, fields, places[each])
                    proof = replace(proof, float_score=score, score=_score(tuned, folder, questions))
                    _finish(folder, proof, reference, tuned, base_id)
                    places[each].parent.mkdir(parents=True, exist_ok=True)
                    if places[each].exists():
                        places[each].rename(Path(temporary) / "old")
                    folder.rename(places[each])
            except TooFarError as error:
                faults[each] = str(error)
                continue
            proof.render(console)
            results.append(proof)
    if faults:
        kept = f"; made were {', '.join(each for each in formats if each not in faults)}" if results else ""
        raise UserError(
            "\n".join(faults.values()) + f". Nothing was left of that{kept}",
            hint="take more bits, smaller groups (--group-size), or fit the rounding to data (--calibrate, with w4a16)",
        )
    return results


def _known(name: str, options: dict[str, Any]) -> dict[str, Any]:
    """Those that a format knows."""
    return {key: value for key, value in options.items() if name != "hf" and key in FORMATS[name].choices}


def _check_options(formats: Sequence[str], options: dict[str, Any]) -> None:
    if len(set(formats)) < len(formats):
        raise UserError("names a format twice", where="--format")
    for key, value in options.items():
        if not any(each != "hf" and key in FORMATS[each].choices for each in formats):
            takers = [name for name, format_ in FORMATS.items() if key in format_.choices]
            raise UserError(
                f"is not known to the format {' or '.join(formats)}",
                where=OPTIONS[key],
                hint=f"it is about {', '.join(takers)}; leave it out",
            )
        if key in ("group_size", "max_length") and value < (key == "max_length"):
            raise UserError("must be positive", where=OPTIONS[key])


def _check_format(tuned: FinetunedModel, options: FormatOptions) -> None:
    """Whether it can be made here, before anything is read."""
    require_extra(options.format)
    format_ = FORMATS[options.format]
    config = Phi3VConfig.from_pretrained(tuned.base)
    size = format_.group_size if options.group_size is None else options.group_size
    if "group_size" not in format_.choices or (options.bits or format_.bits) == 8:
        size = options.group_size  # none, or one that is asked for
    for width in (config.hidden_size, config.intermediate_size):
        if size and width % size:
            raise UserError(
                f"{size} does not divide {width}, the inputs of a layer of this model",
                where="--group-size",
                hint="give another one, e.g. --group-size 32",
            )
    check = getattr(importlib.import_module(f"phi3v.export.formats.{format_.maker}"), "check", None)
    if check is not None:
        check(tuned.base, options)


def _check_length(prompts: Sequence[Prompt], model: Path, made: dict[str, FormatOptions]) -> None:
    """Whether graphs of a limited length take the run's own questions."""
    longest = max(len(prompt.input_ids) + len(prompt.answer) for prompt in prompts)
    for name, options in made.items():
        maker = importlib.import_module(f"phi3v.export.formats.{FORMATS[name].maker}")
        if hasattr(maker, "longest_sample") and longest > (most := maker.longest_sample(model, options)):
            raise UserError(
                f"{most:,}: the run's own questions take up to {longest:,} tokens with an answer",
                where="--max-length",
                hint=f"--max-length {longest} or more",
            )


def _bytes_needed(tuned: FinetunedModel, formats: Sequence[str]) -> int:
    """On the disk: of each format, and of the float model where that has to be made."""
    config = Phi3VConfig.from_pretrained(tuned.base)
    skeleton = make_skeleton(config)
    width = config.dtype.itemsize if isinstance(config.dtype, torch.dtype) else 4
    every = sum(parameter.numel() for parameter in skeleton.parameters())
    linears = sum(skeleton.get_submodule(name).weight.numel() for name in decoder_linears(skeleton))
    needed = 0 if _is_float_folder(tuned) and "hf" not in formats else every * width
    for name in formats:
        if name == "hf":
            continue
        format_ = FORMATS[name]
        rest = 4 if format_.is_graph else width
        needed += (every - linears) * rest + linears * format_.bits // 8 + linears // (format_.group_size or 64) * 2
    return needed


def _is_float_folder(tuned: FinetunedModel) -> bool:
    return tuned.adapter is None and not tuned.is_checkpoint


def _float_model(tuned: FinetunedModel, name: str, folder: Path, console: Console, settings: dict[str, Any]) -> Path:
    """A folder with the whole model in the official layout: the one that there is, or a merged one in ``folder``."""
    if not _is_float_folder(tuned) or settings.get("dtype") is not None:
        export(name, folder, Console(quiet=True), **settings)
        return folder
    if Path(tuned.base).is_dir():
        return Path(tuned.base)
    return Path(snapshot_download(tuned.base, allow_patterns=["*.json", "*.safetensors", "*.jinja"]))


@dataclass
class _Reference:
    """The float model's answers, after which it need not be in memory.

    Attributes:
        prompts: with their answers; own questions first.
        logits: (n, V) of each.
        parts: which prompts are own questions, where there are any, and which are drawn; each is held to its own bound.
        control, controls: how far it is with its decoder's weights rounded to 2 bits, on all prompts and on each part.
        folder: where the prompts are written.
        size: bytes of the float model's folder.
    """

    prompts: list[Prompt]
    logits: list[Logits]
    speed: Speed
    parts: dict[str, slice]
    control: Divergence
    controls: dict[str, Divergence]
    folder: Path
    size: int

    @classmethod
    def make(cls, tuned: FinetunedModel, folder: Path, samples: int, work: Path, console: Console) -> _Reference:
        model, processor = load_tuned(resolve_model(str(folder)), choose_device("fp32"))
        parameters = sum(parameter.numel() for parameter in model.parameters())
        if parameters * 4 < MEMORY_SHARE * _free_memory():
            model = model.float()
        own, where = [], "drawn images"
        images = work / "own"
        images.mkdir()
        try:
            own = own_prompts(tuned, processor, samples, images)
        except UserError as error:
            where += f", as the run's own data cannot be used ({str(error).splitlines()[0]})"
        config = model.config
        prompts = own + drawn_prompts(processor, config.long_context_start, config.max_position_embeddings)
        where = f"{len(own)} questions of {name_data(own_data(tuned))} and " * bool(own) + where
        say(console, f"comparing {len(prompts)} prompts: {where}")
        answers, logits, speed = answer_prompts(
            TorchDecoder(model, processor), prompts, stop_token_ids(processor.backend_tokenizer)
        )
        prompts = [replace(prompt, answer=answer) for prompt, answer in zip(prompts, answers, strict=True)]
        round_decoder(model, CONTROL_BITS)
        _, rounded, _ = answer_prompts(TorchDecoder(model, processor), prompts)
        parts: dict[str, slice] = {OWN: slice(len(own))} if own else {}
        parts[DRAWN] = slice(len(own), None)
        controls = {name: diverge(prompts[part], logits[part], rounded[part]) for name, part in parts.items()}
        for name, control in controls.items():
            if not control.mean > LEAST_CONTROL:
                raise UserError(
                    f"nothing can be proven of this model: {CONTROL_BITS}-bit weights hardly change its predictions "
                    f"({name}: {control})",
                    where=str(folder),
                    hint="is it trained?",
                )
        written = work / "prompts"
        written.mkdir()
        divergence.write_prompts(written, prompts)
        whole = diverge(prompts, logits, rounded)
        return cls(prompts, logits, speed, parts, whole, controls, written, _size(folder))

    def diverge(self, theirs: Sequence[Logits], part: slice = slice(None)) -> Divergence:
        """How far others' logits are from the float model's, on some of the prompts."""
        return diverge(self.prompts[part], self.logits[part], theirs[part])

    def prove(self, folder: Path, options: FormatOptions, place: Path) -> Proof:
        """Compare an export with the float model; ``place`` is where it goes.

        Raises:
            TooFarError: it is too far from it.
        """
        theirs, speed = divergence.answer_in_fresh_process(folder, self.folder)
        format_ = FORMATS[options.format]
        bits = options.bits or format_.bits
        parts = {}
        for name, part in self.parts.items():
            control = self.controls[name]
            parts[name] = Part(self.diverge(theirs, part), control, bound_of(format_.proven_bits or bits, control))
            if (fault := parts[name].fault()) is not None:
                raise TooFarError(f"{options.format} does not answer as the float model does: {fault} ({name})")
        return Proof(
            options.format,
            bits,
            place,
            self.diverge(theirs),
            self.control,
            parts,
            speed,
            self.speed,
            _size(folder),
            self.size,
            options.calibration is not None,
        )

    def save(self, folder: Path, proof: Proof) -> None:
        """Write what the export is proven with again: the drawn prompts; own questions stay where they are."""
        folder.mkdir()
        divergence.write_prompts(folder, self.prompts[self.parts[DRAWN]])
        divergence.write_logits(folder / LOGITS, self.logits[self.parts[DRAWN]])
        make_weights_readable(folder)
        told = {
            "format": proof.format,
            "bits": proof.bits,
            "bound": proof.parts[DRAWN].bound,
            "control": proof.parts[DRAWN].control.mean,
            "export": {name: value for name, value in proof.to_json_dict().items() if name != "folder"},
        }
        (folder / PROOF_FACTS).write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")


def _finish(folder: Path, proof: Proof, reference: _Reference, tuned: FinetunedModel, base_id: str | None) -> None:
    """Write proof, card and manifest, and what the source's files may lack."""
    reference.save(folder / PROOF, proof)
    name_end_tokens(folder)
    name_special_tokens(folder / TOKENIZER_CONFIG)
    write_format_card(folder, proof, tuned, base_id)
    write_manifest(folder, tuned_from=tuned.origin)


def _score(tuned: FinetunedModel, folder: Path, questions: int) -> Score | None:
    """Of the run's task, on its data as it was read there; none where that is not known."""
    run = tuned.run
    if run.data.eval is None or not questions:
        return None
    settings = {"max_questions": min(questions, run.evaluation.max_questions or questions)}
    return evaluate_tuned(
        str(folder), run.data.eval, Console(quiet=True), run=run, settings=settings, precision="fp32"
    ).primary


def _float_score(tuned: FinetunedModel, folder: Path, questions: int, console: Console) -> Score | None:
    """As `_score`; none, which is said, where the data is not there any more or not as it was."""
    try:
        return _score(tuned, folder, questions)
    except UserError as error:
        say(console, f"no scores, as the run's evaluation data cannot be used ({str(error).splitlines()[0]})")
        return None


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir() if path.is_file())


def _free_memory() -> int:
    return torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else psutil.virtual_memory().available
