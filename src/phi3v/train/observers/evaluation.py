"""Evaluation while it trains: scores every few steps, the best weights, and when to stop."""

from __future__ import annotations

import dataclasses
import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from phi3v.data.collate import QuestionDataset
from phi3v.evaluate.evaluation import EvaluationResult
from phi3v.train.methods.weights import (
    WRITE_ERRORS,
    IncompleteSaveError,
    failure_text,
    save_replacing,
    saved_tensors,
)
from phi3v.train.observers.evaluating import evaluate_model
from phi3v.train.observers.faults import StepFaults
from phi3v.train.observers.progress import ProgressObserver
from phi3v.train.observers.tracking import Trackers
from phi3v.train.prepare import PreparedRun
from phi3v.train.state import Observer, TrainState

logger = logging.getLogger("phi3v")


@dataclass(frozen=True)
class Best:
    """The best evaluation so far."""

    step: int
    score: float


class EvaluationObserver(Observer):
    """Evaluates every ``eval_steps`` optimizer steps and at the last one; training goes on as if it had not.

    What is evaluated, and kept in ``best/``, are the weights as they would be saved: in the dtype of the checkpoint.
    All ranks come to the same score, so all stop at the same step.
    """

    def __init__(
        self,
        run: PreparedRun,
        questions: QuestionDataset,
        progress: ProgressObserver,
        faults: StepFaults,
        trackers: Trackers,
    ) -> None:
        self.run = run
        self.questions = questions
        self.config = run.evaluation
        self.progress = progress
        self.faults = faults
        self.trackers = trackers
        self.best: Best | None = None
        self.without_improvement = 0
        self.stopped_early = False

    @property
    def best_folder(self) -> Path:
        return self.run.folder / "best"

    def state(self) -> dict[str, Any]:
        """What a resumed run needs to judge as one that was not interrupted."""
        return {
            "best": dataclasses.asdict(self.best) if self.best is not None else None,
            "without_improvement": self.without_improvement,
            "stopped_early": self.stopped_early,
        }

    def on_resume(self, saved: dict[str, Any]) -> None:
        state = saved["evaluation"]
        if state is None:
            return
        self.best = Best(**state["best"]) if state["best"] is not None else None
        self.without_improvement = state["without_improvement"]
        self.stopped_early = state["stopped_early"]

    def on_step(self, state: TrainState) -> None:
        assert self.config.eval_steps is not None
        if state.step % self.config.eval_steps and state.step != state.max_steps:
            return
        self.faults.settle()
        start = time.perf_counter()
        devices = [self.run.runtime.device] if self.run.runtime.device.type == "cuda" else []
        # Reading data draws a seed; training must find the generators as it left them.
        with torch.random.fork_rng(devices), self.run.engine.whole_model(self.run.facts.stored_dtype) as model:
            result = evaluate_model(
                model,
                self.run.processor,
                self.questions,
                self.config,
                self.run.runtime,
                num_workers=self.run.num_workers,
                bar=self.progress.bar,
                description=f"evaluating step {state.step}",
            )
            before = self.best
            improved = self._judge(state.step, result)
            if improved and self.config.keep_best and not self._keep(model, before):
                self.best, improved = before, False
        took = time.perf_counter() - start
        self.progress.leave_out(took)
        if self.run.runtime.rank == 0:
            self._report(state, result, took, improved)
        patience = self.config.early_stopping_patience
        if patience is not None and self.without_improvement >= patience and state.step < state.max_steps:
            self.stopped_early = True
            state.should_stop = True
            self.run.console.print(
                f"stopping at step {state.step}: {patience} evaluations without a better {result.primary.name}",
                highlight=False,
            )

    def _keep(self, model: Any, before: Best | None) -> bool:
        """Save the best weights, or say why they are not kept; a collective.

        Args:
            before: whose weights are kept so far.
        """
        wrong: str | None = None
        if self.run.runtime.rank == 0:
            try:
                save_replacing(model, self.run.processor, self.best_folder, saved_tensors(model))
            except IncompleteSaveError:
                raise
            except WRITE_ERRORS as error:
                wrong = failure_text(error)
        wrong = self.run.collectives.broadcast(wrong)
        if wrong is None:
            return True
        kept = f"best/ holds those of step {before.step}" if before is not None else "there is no best/ yet"
        text = f"the best weights so far could not be kept: {wrong}; {kept}, and training goes on"
        logger.error("%s", text)
        self.run.console.print(text, style="bold red", highlight=False, markup=False, soft_wrap=True)
        return False

    def _judge(self, step: int, result: EvaluationResult) -> bool:
        """Whether this is the best so far; of equal scores the first stays."""
        score = result.primary.value
        if score is not None and (self.best is None or score > self.best.score):
            self.best = Best(step, score)
            self.without_improvement = 0
            return True
        self.without_improvement += 1
        return False

    def _report(self, state: TrainState, result: EvaluationResult, seconds: float, improved: bool) -> None:
        line = {
            "step": state.step,
            "epoch": round(state.epoch, 4),
            "eval": {score.name: score.summary() for score in result.scores},
            **(
                {
                    "eval_sources": {
                        name: {s.name: s.summary() for s in scores} for name, scores in result.scores_of.items()
                    }
                }
                if result.sources
                else {}
            ),
            "num_cut": result.num_cut,
            "best": improved,
            "eval_seconds": round(seconds, 2),
        }
        self.progress.write(line)
        tracked = {f"eval/{score.name}": score.value for score in result.scores}
        for name, scores in result.scores_of.items():
            tracked |= {f"eval/{name}/{score.name}": score.value for score in scores}
        self.trackers.log({name: value for name, value in tracked.items() if value is not None}, state.step)
        self.run.console.print(
            f"step {state.step}/{state.max_steps}  {result}{'  best so far' if improved else ''}",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )
