"""What the tests of sharded checkpoints run."""

from __future__ import annotations

from pathlib import Path

SETTINGS: dict[str, object] = {
    "data.num_workers": 0,
    "training.max_steps": 4,
    "training.batch_size": 6,
    "training.micro_batch_size": 1,
    "training.learning_rate": 2e-3,
    "training.warmup_steps": 1,
    "training.schedule": "constant_with_warmup",
    "training.logging_steps": 1,
    "checkpoint.save_steps": 2,
    "checkpoint.keep_last": 10,
    "checkpoint.format": "sharded",
    "evaluation.before": "false",
    "evaluation.after": "false",
}


def command(model: Path, data: Path, out: Path, engine: str = "auto", **others: object) -> list[str]:
    """``phi3v train`` of a few steps that saves sharded checkpoints."""
    settings = SETTINGS | {
        "model.path": model,
        "data.train": data / "train.jsonl",
        "training.output_dir": out,
        "distributed.engine": engine,
    }
    settings |= others
    return ["train", *(part for name, value in settings.items() for part in (f"--{name}", str(value)))]
