"""``evaluation``: when answers are generated, and how they are scored."""

from __future__ import annotations

from dataclasses import dataclass, field

from phi3v.config.bounds import require_bounds
from phi3v.errors import UserError
from phi3v.grammar import suggestion

METRIC_NAMES = (
    "accuracy",
    "anls",
    "exact_match",
    "relaxed_accuracy",
    "token_f1",
    "per_class_accuracy",
    "auroc",
    "consistency",
)


@dataclass
class EvaluationConfig:
    """Evaluation by generating answers: before, during and after training, and in phi3v eval."""

    before: bool = True
    """Evaluate before training."""
    after: bool = True
    """Evaluate after training."""
    metrics: list[str] = field(default_factory=lambda: ["accuracy"])
    """Metrics, the primary one first (it selects the best weights): accuracy, anls, exact_match, relaxed_accuracy,
    token_f1, per_class_accuracy, auroc, consistency."""
    answer_words: list[str] = field(default_factory=list)
    """Answers whose probabilities are computed, for auroc; the positive one first, e.g. [yes, no]."""
    max_questions: int | None = None
    """Number of questions, sampled once from the whole file with the seed; default: all."""
    batch_size: int = 8
    """Questions answered at once on a device."""
    batch_tokens: int = 32768
    """Maximum prompt tokens of such a batch, including padding; longer prompts make smaller batches."""
    max_new_tokens: int | None = None
    """Maximum tokens of an answer; default: a quarter more than the longest reference answer, from 64 to 2048."""
    eval_steps: int | None = None
    """Optimizer steps between evaluations during training, also after the last step; default: none."""
    eval_steps_questions: int | None = None
    """Number of questions of an evaluation during training; default: as before and after."""
    keep_best: bool = False
    """Keep the weights with the best score of eval_steps in best/ and use them for final/, instead of the last ones."""
    early_stopping_patience: int | None = None
    """Stop after this many evaluations in a row without a better score; default: never."""

    def __post_init__(self) -> None:
        counts = "max_questions batch_size batch_tokens max_new_tokens"
        during = "eval_steps eval_steps_questions early_stopping_patience"
        require_bounds(self, "evaluation", at_least_1=f"{counts} {during}")
        self._check_metrics()
        for key in ("eval_steps_questions", "keep_best", "early_stopping_patience"):
            if getattr(self, key) and self.eval_steps is None:
                hint = "set evaluation.eval_steps, e.g. to 100"
                raise UserError("there is no evaluation during training", where=f"evaluation.{key}", hint=hint)

    def _check_metrics(self) -> None:
        where = "evaluation.metrics"
        if not self.metrics:
            raise UserError("no metric is named", where=where, hint=f"choose from {', '.join(METRIC_NAMES)}")
        for name in self.metrics:
            if name not in METRIC_NAMES:
                hint = suggestion(name, METRIC_NAMES, f"choose from {', '.join(METRIC_NAMES)}")
                raise UserError(f"there is no metric {name!r}", where=where, hint=hint)
            if self.metrics.count(name) > 1:
                raise UserError(f"{name} is named twice", where=where, hint="name it once")
        where = "evaluation.answer_words"
        if self.answer_words and (len(set(self.answer_words)) < max(2, len(self.answer_words))):
            raise UserError("needs at least two different words", where=where, hint="e.g. [yes, no]")
        if not all(word.strip() for word in self.answer_words):
            raise UserError("holds an empty word", where=where, hint="e.g. [yes, no]")
        if "auroc" in self.metrics and not self.answer_words:
            raise UserError(
                "auroc needs the answers whose probabilities it compares",
                where=where,
                hint="name them, the positive one first, e.g. [yes, no]",
            )
