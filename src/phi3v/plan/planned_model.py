"""The configuration of a model that is planned for, perhaps one that is not here."""

from __future__ import annotations

from pathlib import Path

from phi3v.errors import UserError
from phi3v.model.configuration import Phi3VConfig
from phi3v.model.presets import preset_config

# Hub ids of the two released models: their sizes are known without asking the hub.
RELEASED = {"phi-3.5-vision": "phi-3.5-vision", "phi-3-vision": "phi-3-vision"}


def planned_config(path: str) -> tuple[Phi3VConfig, str]:
    """The configuration of the model at ``path`` and where it is from; nothing is downloaded for a released model.

    Raises:
        UserError: there is no model, and it is not a released one.
    """
    if Path(path).is_dir():
        try:
            return Phi3VConfig.from_pretrained(path), str(path)
        except (OSError, ValueError) as error:
            raise UserError(f"no model there: {str(error).splitlines()[0]}", where=f"model.path {path}") from None
    for name, preset in RELEASED.items():
        if name in path.lower():
            return preset_config(preset), f"the released {preset}"
    raise UserError(
        "no model there, and it is not one of the released models",
        where=f"model.path {path}",
        hint="give a folder in the official layout, microsoft/Phi-3.5-vision-instruct or …/Phi-3-vision-128k-instruct",
    )
