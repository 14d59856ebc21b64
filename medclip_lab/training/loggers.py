"""TensorBoard, Weights & Biases, MLflow by Lightning, into the run's folder unless the environment says else."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger

from medclip_lab.distributed import launched_world
from medclip_lab.errors import UserError
from medclip_lab.files import digest
from medclip_lab.training.meter import Reading
from medclip_lab.training.trainer import TrainerConfig


def build_loggers(config: TrainerConfig, out: Path, settings: dict[str, Any], start: int = 0) -> list[Logger]:
    """The loggers a run asks for.

    Args:
        settings: of the run, written down where a logger keeps settings.
        start: the step it goes on from; points after it are made again.

    Raises:
        UserError: a logger whose package is not installed.
    """
    loggers: list[Logger] = []
    # Of a run that goes on the same name, that its curve is one.
    name = f"{out.name}-{digest(str(out.resolve()))[:8]}"
    try:
        if config.tensorboard:
            loggers.append(TensorBoardLogger(out, name="tensorboard", version="", purge_step=start or None))
        if config.wandb:
            offline = os.environ.get("WANDB_MODE", "offline") != "online"
            wandb = WandbLogger(
                project=config.wandb, name=out.name, id=name, save_dir=out, offline=offline, resume="allow"
            )
            wandb.log_hyperparams(settings)
            loggers.append(wandb)
        if config.mlflow:
            where = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{out.resolve() / 'mlflow.db'}"
            known = _mlflow_run(config.mlflow, name, where) if start else None
            mlflow = MLFlowLogger(config.mlflow, run_name=name, tracking_uri=where, run_id=known)
            if known is None:  # it refuses a setting that is another now, as the number of workers may be
                mlflow.log_hyperparams(settings)
            loggers.append(mlflow)
    except ModuleNotFoundError as error:
        which = next(field for field in ("mlflow", "wandb", "tensorboard") if getattr(config, field))
        raise UserError(f"trainer.{which}: {str(error).splitlines()[0]}: pip install 'medclip_lab[{which}]'") from None
    return loggers


def _mlflow_run(experiment: str, name: str, where: str) -> str | None:
    """The id of the newest run of this name, running again; None if there is none, and on ranks that do not log."""
    if launched_world()[0] > 0:
        return None
    from mlflow.entities import RunStatus
    from mlflow.tracking import MlflowClient

    client = MlflowClient(where)
    known = client.get_experiment_by_name(experiment)
    if known is None:
        return None
    # The digest alone: there is no way to write a folder's quotes in its filters.
    same = f"attributes.run_name LIKE '%-{name.rpartition('-')[2]}'"
    runs = client.search_runs([known.experiment_id], same, max_results=1, order_by=["attributes.start_time DESC"])
    if not runs:
        return None
    found = str(runs[0].info.run_id)
    client.update_run(found, status=RunStatus.to_string(RunStatus.RUNNING))
    return found


class LoggerSink:
    """Hands readings on. What a validation finds Lightning has logged already."""

    def __init__(self, loggers: Sequence[Logger]) -> None:
        self.loggers = loggers

    def show(self, reading: Reading) -> None:
        if "val_loss" in reading.values:
            return
        values = {name: value for name, value in reading.values.items() if value is not None}
        for logger in self.loggers:
            logger.log_metrics(values, reading.step)
