"""What other people's evaluation harnesses find here: the model, and tasks on our data files.

lmms-eval finds the model by the entry point ``lmms_eval.models``. Only `lmms_model.py` and `lmms_tasks.py`, which it
loads itself, import it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

TASKS = Path(__file__).parent / "tasks"  # for lmms-eval's --include_path


def lmms_eval_models() -> Any:
    """The manifest of the model ``phi3v``; in place of lmms-eval's own of that name, which is of no chat form."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest("phi3v", chat_class_path="phi3v.evaluators.lmms_model.Phi3V")
