"""Where metrics go beside ``metrics.jsonl``: TensorBoard and services, through accelerate's trackers."""

from __future__ import annotations

import netrc
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import urlsplit

from accelerate.tracking import GeneralTracker, MLflowTracker, TensorBoardTracker, TrackioTracker, WandBTracker

from phi3v.errors import UserError
from phi3v.train.state import Observer, TrainState

PROJECT = "phi3v"


class Trackers(Observer):
    """Sends what is logged to TensorBoard (``RUN/runs``) and to the services that are configured; on rank 0.

    A context manager: at its end the services are told that the run has ended.
    """

    def __init__(self, folder: Path, services: Sequence[str], rank: int) -> None:
        self.folder = folder
        self.services = services
        self.rank = rank
        self._trackers: list[GeneralTracker] = []

    def __enter__(self) -> Trackers:
        return self

    def __exit__(self, *exception: object) -> None:
        for tracker in self._trackers:
            tracker.finish()

    def on_begin(self, state: TrainState) -> None:
        if self.rank == 0:
            self._trackers = [TensorBoardTracker("runs", self.folder), *map(self._service, self.services)]
            for tracker in self._trackers:
                tracker.start()

    def on_log(self, state: TrainState, values: Mapping[str, float]) -> None:
        self.log({f"train/{name}": value for name, value in values.items()} | {"train/epoch": state.epoch}, state.step)

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Send numbers under their whole names."""
        for tracker in self._trackers:
            tracker.log(dict(values), step=step)

    def _service(self, name: str) -> GeneralTracker:
        run = self.folder.resolve().name
        if name == "wandb":
            return WandBTracker(os.environ["WANDB_PROJECT"], name=run)
        if name == "mlflow":
            return MLflowTracker(run_name=run)
        return TrackioTracker(PROJECT, name=run)


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
