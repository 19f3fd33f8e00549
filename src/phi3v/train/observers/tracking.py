"""Where metrics go beside ``metrics.jsonl`` and TensorBoard: services, through the library's own integrations."""

from __future__ import annotations

import netrc
import os
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

from phi3v.errors import UserError

PROJECT = "phi3v"


def prepare_trackers(names: Sequence[str], rank: int) -> list[str]:
    """Set what the services read from the environment, where a person has not; to call before they start.

    Returns:
        Lines to show: where each will write.

    Raises:
        UserError: MLflow's store cannot be reached; that would else end the run once it trains.
    """
    os.environ.setdefault("MLFLOW_EXPERIMENT_NAME", PROJECT)
    os.environ.setdefault("WANDB_PROJECT", PROJECT)
    os.environ.setdefault("WANDB_SILENT", "true")
    os.environ.setdefault("WANDB_CONSOLE", "off")  # it would copy the terminal, and ours is in log.txt
    return [_prepare(name, rank) for name in names]


def _prepare(name: str, rank: int) -> str:
    if name == "trackio":
        return f"trackio: on this machine; `trackio show --project {PROJECT}` shows it"
    if name == "wandb":
        if "WANDB_MODE" not in os.environ and not _wandb_knows_who():
            # It would ask for a key, or end the run where there is no terminal.
            os.environ["WANDB_MODE"] = "offline"
            return "wandb: nobody is logged in, so it writes to wandb/; `wandb sync` uploads it"
        return f"wandb: mode {os.environ.get('WANDB_MODE', 'online')}, project {os.environ['WANDB_PROJECT']}"
    import mlflow

    experiment = os.environ["MLFLOW_EXPERIMENT_NAME"]
    if rank == 0:
        try:
            mlflow.set_experiment(experiment)
        except Exception as error:  # its stores raise errors of many classes
            said = str(error).strip().splitlines()
            raise UserError(
                f"MLflow's store cannot be used: {said[0] if said else type(error).__name__}",
                where=f"training.report_to mlflow, {mlflow.get_tracking_uri()}",
                hint="set MLFLOW_TRACKING_URI to a server, or pip install mlflow for a store on this machine",
            ) from None
    return f"mlflow: {mlflow.get_tracking_uri()}, experiment {experiment}"


def _wandb_knows_who() -> bool:
    """Whether a key is at hand, where wandb looks for one; asking wandb itself may prompt or reach for the network."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    file = Path(os.environ.get("NETRC", Path.home() / ".netrc"))
    try:
        return netrc.netrc(file).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
