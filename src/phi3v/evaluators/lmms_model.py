"""The model as lmms-eval runs it: greedy, batched, by the same code as ``phi3v eval``."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from tqdm import tqdm

from phi3v.config import DTYPES, PRECISIONS, EvaluationConfig
from phi3v.data.collate import Sample, require_clip_statistics
from phi3v.data.readers import reading
from phi3v.errors import UserError
from phi3v.evaluate.batches import PreparedQuestions
from phi3v.evaluate.generate import generate_answers
from phi3v.evaluators.messages import Generation, read_messages, write_answer
from phi3v.machine import CPU
from phi3v.train.device import RuntimeDevice, choose_device, choose_precision, default_workers
from phi3v.train.finetuned import inspect_tuned, load_tuned, resolve_model

try:
    from lmms_eval.api.model import lmms
except ImportError:  # the file can be looked at without it
    lmms = object

BATCHES_AHEAD = 8  # batches' worth of questions that are prepared, then sorted by length and answered


class Phi3V(lmms):
    """Phi-3-vision for lmms-eval, in its chat form.

    Args:
        pretrained: a model folder, a hub id, an adapter or a run folder.
        base: the model that it was tuned from, where that has moved.
        num_crops: crops of an image at most; by default as the model was saved.
        batch_size: questions answered at once.
        device: ``cuda``, ``cuda:0``, ``cpu``; by default a GPU if there is one, and under a launcher the rank's own.
        dtype: of the computation, ``auto``, ``bf16``, ``fp16`` or ``fp32``; by default as the run was evaluated.
        max_num_frames: frames that are taken of a clip.

    Raises:
        UserError: an option is wrong, or the model cannot be loaded.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str,
        base: str | None = None,
        num_crops: int | None = None,
        batch_size: int | str = 1,
        device: str | None = None,
        dtype: str | None = None,
        max_num_frames: int = 8,
        max_batch_size: int | None = None,
        **unknown: Any,
    ) -> None:
        super().__init__()
        if unknown:
            hint = "pretrained, base, num_crops, batch_size, device, dtype and max_num_frames are taken"
            raise UserError("is no option of this model", where=f"model_args {next(iter(unknown))}", hint=hint)
        self.batch_size = _count("batch_size", batch_size)
        self.frames = _count("max_num_frames", max_num_frames)
        tuned = resolve_model(str(pretrained), None if base is None else str(base))
        self.runtime = _choose(device, dtype or tuned.run.training.precision)
        inspected = inspect_tuned(tuned, self.runtime, num_crops=num_crops and _count("num_crops", num_crops))
        require_clip_statistics(inspected.processor.image_processor)
        self.context = inspected.facts.context
        self.model, self.processor = load_tuned(tuned, self.runtime, inspected=inspected)
        self._rank, self._world_size = self.runtime.rank, self.runtime.world_size

    @property
    def device(self) -> torch.device:
        return self.runtime.device

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """The answers to all requests of this rank, in their order.

        Raises:
            UserError: a request asks for what is not supported, or its prompt is too long.
        """
        groups: dict[Generation, list[int]] = {}
        for number, request in enumerate(requests):
            generation = Generation.read(request.args[2], _name(request))
            groups.setdefault(generation, []).append(number)
        answers = [""] * len(requests)
        with tqdm(total=len(requests), disable=self._rank != 0, desc="answering") as bar:
            for generation, numbers in groups.items():
                step = BATCHES_AHEAD * self.batch_size
                parts = [numbers[start : start + step] for start in range(0, len(numbers), step)]

                def prepare(part: list[int], generation: Generation = generation) -> list[Sample]:
                    return [self._sample(requests[number], generation) for number in part]

                with reading(prepare, parts, default_workers(self.runtime)) as prepared:
                    for part, samples in zip(parts, prepared, strict=True):
                        answers_of_part = self._answer(samples, generation, bar)
                        for number, answer in zip(part, answers_of_part, strict=True):
                            answers[number] = answer
        return answers

    def _sample(self, request: Any, generation: Generation) -> Sample:
        _, doc_to_messages, _, doc_id, task, split = request.args
        where = _name(request)
        messages = doc_to_messages(self.task_dict[task][split][doc_id])
        sample = read_messages(messages, self.processor, frames=self.frames, where=where)
        longest = len(sample.input_ids) + generation.max_new_tokens
        if longest > self.context:
            hint = "lower num_crops, max_num_frames or max_new_tokens"
            what = f"prompt and answer may take {longest:,} tokens, and the model reads {self.context:,}"
            raise UserError(what, where=where, hint=hint)
        return sample

    def _answer(self, samples: list[Sample], generation: Generation, bar: Any) -> list[str]:
        generated = generate_answers(
            self.model,
            self.processor,
            PreparedQuestions(samples),
            batch_size=self.batch_size,
            batch_tokens=EvaluationConfig().batch_tokens,
            max_new_tokens=generation.max_new_tokens,
            words=generation.answer_words,
            autocast_dtype=self.runtime.autocast_dtype,
            on_batch=bar.update,
        )
        return [
            write_answer(
                generation.end(answer.text), dict(zip(generation.answer_words, answer.probabilities, strict=True))
            )
            for answer in generated
        ]

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        raise _unsupported("tasks of several rounds")

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        raise _unsupported("log-likelihoods")


def _name(request: Any) -> str:
    return f"{request.args[4]} {request.args[5]}[{request.args[3]}]"


def _unsupported(what: str) -> UserError:
    return UserError(f"{what} are not supported", where="phi3v for lmms-eval", hint="tasks that generate text are")


def _count(name: str, value: Any) -> int:
    try:
        number = int(str(value))
    except ValueError:
        number = 0
    if number < 1:
        raise UserError(f"must be a whole number from 1, not {value}", where=name)
    return number


def _choose(device: str | None, dtype: str) -> RuntimeDevice:
    """The device and the precision that were asked for, as ``phi3v eval`` would choose them."""
    precisions = {name: name for name in PRECISIONS} | {name: precision for precision, name in DTYPES.items()}
    if dtype not in precisions:
        raise UserError(f"{dtype} is not known", where="dtype", hint=f"choose from {', '.join(PRECISIONS)}")
    precision: Any = precisions[dtype]
    runtime = choose_device(precision)
    if device is None:
        return runtime
    try:
        wanted = torch.device(device)
    except RuntimeError:
        wanted = torch.device("meta")
    if wanted.type == "cpu" and runtime.device.type == "cuda":
        precision, reason = choose_precision(precision, CPU)
        return dataclasses.replace(runtime, device=wanted, precision=precision, reason=reason, gpu=CPU)
    if wanted.type != runtime.device.type:
        raise UserError(f"{device} is not there", where="device", hint=f"leave it out: {runtime.device} is taken")
    if wanted.index is not None and runtime.world_size == 1:
        return dataclasses.replace(runtime, device=wanted)
    return runtime
