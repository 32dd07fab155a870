"""Experiment tracking: TensorBoard, and MLflow on request."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar
from urllib.parse import quote

import numpy as np
from PIL import Image
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import KVWriter, Logger, TensorBoardOutputFormat
from tensorboard.compat.proto.summary_pb2 import Summary  # type: ignore[import-untyped]
from torch.utils.tensorboard import SummaryWriter

from sam_gym.utils.cli import stop_at_sigterm
from sam_gym.utils.files import wait_for_a_later_name
from sam_gym.utils.process_group import ALONE, ProcessGroup

T = TypeVar("T")

#: Maximum number of items that MLflow takes in one call.
_PARAMS_PER_CALL, _METRICS_PER_CALL = 100, 1000
_NOT_IN_KEYS = re.compile(r"[^\w./: -]")


@dataclass(frozen=True)
class PictureFile:
    """A picture or an animation to record: `logger.record(name, PictureFile(path))`.

    Attributes:
        path: of a PNG or GIF.
    """

    path: Path


class TensorBoard(TensorBoardOutputFormat):
    """Writes to TensorBoard and supersedes what the folder holds from some step on.

    Args:
        folder: of the event files; a resumed run adds a file.
        first_step: the first step to supersede.
    """

    def __init__(self, folder: Path, first_step: int) -> None:
        wait_for_a_later_name(folder)
        self.writer = SummaryWriter(str(folder), purge_step=first_step)
        self._is_closed = False

    def write(
        self, key_values: dict[str, Any], key_excluded: dict[str, tuple[str, ...]], step: int = 0
    ) -> None:
        for key, value in key_values.items():
            if isinstance(value, PictureFile):
                self._add_picture(key, value.path, step)
        super().write(key_values, key_excluded, step)

    def _add_picture(self, key: str, path: Path, step: int) -> None:
        """Add an encoded image file; SB3's own `Video` would need moviepy."""
        with Image.open(path) as image:
            width, height = image.size
        encoded = Summary.Image(
            height=height, width=width, colorspace=3, encoded_image_string=path.read_bytes()
        )
        assert self.writer.file_writer is not None
        self.writer.file_writer.add_summary(
            Summary(value=[Summary.Value(tag=key, image=encoded)]), step
        )


def make_logger(
    folder: Path, done: int, ranks: ProcessGroup = ALONE, *, mlflow: MlflowRun | None = None
) -> Logger:
    """Return a logger to TensorBoard and MLflow; it writes on the first rank only.

    Args:
        folder: of TensorBoard's files.
        done: number of environment steps whose records are kept.
        ranks: the processes of the run.
        mlflow: receives the same values as TensorBoard.
    """
    outputs: list[KVWriter] = [TensorBoard(folder, done + 1)] if ranks.is_first else []
    if mlflow is not None:
        outputs.append(mlflow)
    return Logger(str(folder), outputs)


def require_mlflow(where: str | Path) -> None:
    """Raise `ImportError` if a package is missing that MLflow needs for a store.

    Args:
        where: see `MlflowRun`.
    """
    # No telemetry unless the user enables it.
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    try:
        import mlflow.tracking  # noqa: F401

        if isinstance(where, Path) or where.startswith("sqlite:"):
            import alembic  # noqa: F401
            import sqlalchemy  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"--mlflow needs more packages ({error}): pip install 'sam-gym[mlflow]'."
        ) from error


class MlflowRun(KVWriter, BaseCallback):
    """A run in MLflow: parameters, the scalars that TensorBoard gets, pictures and results.

    MLflow cannot delete points. Points are therefore held until a checkpoint contains them, and
    sent after it is written: a run that is killed and resumed has every point once, with
    TensorBoard's value. Pictures are sent immediately; redrawn ones replace the first.

    The object is an output of the logger, a callback (after the one that writes checkpoints), a
    part of checkpoints, and a context manager that reports how the run ended: FINISHED, KILLED (by
    Ctrl-C or SIGTERM) or FAILED. After SIGKILL, the run stays RUNNING in MLflow.

    Args:
        where: URI of a server or a store, or the folder of a local store, created if missing.
        experiment: name of the experiment, created if missing.
        name: of a new run.
        params: of a new run, by names with dots.
        tags: of a new run.
        run_id: an existing run to resume instead.

    Raises:
        ImportError: MLflow is not installed.
        ConnectionError: MLflow cannot be reached, does not know the run, or refuses a request.
    """

    def __init__(
        self,
        where: str | Path,
        experiment: str,
        *,
        name: str,
        params: Mapping[str, Any],
        tags: Mapping[str, str],
        run_id: str | None = None,
    ) -> None:
        super().__init__()
        require_mlflow(where)
        from mlflow import MlflowClient

        self.where = where
        self._held: list[tuple[str, float, int, int]] = []
        self._in_checkpoint = 0
        self._sent_before: set[tuple[str, int]] = set()
        uri = _local_uri(where) if isinstance(where, Path) else where
        with self._plain_errors():
            self.client = MlflowClient(uri, registry_uri=uri)
            if run_id is None:
                self.run_id = self._begin(experiment, name, params, tags)
            else:
                self.run_id = run_id
                self._resume()

    def _begin(
        self, experiment: str, name: str, params: Mapping[str, Any], tags: Mapping[str, str]
    ) -> str:
        from mlflow.entities import Param
        from mlflow.utils.validation import MAX_ENTITY_KEY_LENGTH, MAX_PARAM_VAL_LENGTH

        known = self.client.get_experiment_by_name(experiment)
        if known is None:
            files = self.where / "files" if isinstance(self.where, Path) else None
            place = files.absolute().as_uri() if files else None
            number = self.client.create_experiment(experiment, artifact_location=place)
        else:
            number = known.experiment_id
        run_id = self.client.create_run(number, tags=dict(tags), run_name=name).info.run_id
        entities = []
        for key, value in params.items():
            name = _shortened(_NOT_IN_KEYS.sub("_", key), MAX_ENTITY_KEY_LENGTH)
            entities.append(Param(name, _shortened(str(value), MAX_PARAM_VAL_LENGTH)))
        for some in _portions(entities, _PARAMS_PER_CALL):
            self.client.log_batch(run_id, params=some)
        return run_id

    def _resume(self) -> None:
        self.client.update_run(self.run_id, status="RUNNING")
        self._sent_before = {
            (key, point.step)
            for key in self.client.get_run(self.run_id).data.metrics
            for point in self.client.get_metric_history(self.run_id, key)
        }

    @contextmanager
    def _plain_errors(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # a server, a database or a file store can fail in many ways
            raise ConnectionError(
                f"MLflow ({self.where}): {str(error).partition(chr(10))[0] or repr(error)}"
            ) from error

    def write(
        self, key_values: dict[str, Any], key_excluded: dict[str, tuple[str, ...]], step: int = 0
    ) -> None:
        now = round(1000 * time.time())
        for key, value in key_values.items():
            if isinstance(value, PictureFile):
                self._send_file(value.path, value.path.parent.name)
            elif isinstance(value, np.ScalarType) and not isinstance(value, str):
                if "tensorboard" not in key_excluded[key]:
                    self._held.append((key, float(value), now, step))  # type: ignore[arg-type]

    def close(self) -> None:
        """Do nothing: results follow, and the context manager ends the run."""

    def get_state(self) -> dict[str, Any]:
        """Return the state for a checkpoint; call `on_checkpoint` when it is written."""
        return {"run_id": self.run_id, "held": list(self._held)}

    def on_checkpoint(self) -> None:
        """Send all held points when the next rollout starts: a checkpoint contains them."""
        self._in_checkpoint = len(self._held)

    def set_state(self, state: dict[str, Any]) -> None:
        """Restore the state that `get_state` returned; the run is that of `run_id`."""
        self._held = list(state["held"])
        self._in_checkpoint = len(self._held)

    def _on_step(self) -> bool:
        return True

    def _on_rollout_start(self) -> None:
        self._send(self._in_checkpoint)
        self._in_checkpoint = 0

    def _send(self, count: int) -> None:
        """Send the first `count` held points."""
        from mlflow.entities import Metric

        points = [p for p in self._held[:count] if (p[0], p[3]) not in self._sent_before]
        with self._plain_errors():
            for some in _portions(points, _METRICS_PER_CALL):
                self.client.log_batch(self.run_id, metrics=[Metric(*point) for point in some])
        del self._held[:count]

    def _send_file(self, path: Path, folder: str | None = None) -> None:
        with self._plain_errors():
            self.client.log_artifact(self.run_id, str(path), folder)

    def finish(self, files: Sequence[Path], policy: Path, register: str | None = None) -> None:
        """Send the results of a finished run.

        Args:
            files: results.
            policy: the policy.zip.
            register: name of the registered model to add the policy to, created if missing.
        """
        for path in files:
            self._send_file(path)
        self._send_file(policy, "policy")
        self._send(len(self._held))
        if register is not None:
            with self._plain_errors():
                self._register(register)

    def _register(self, name: str) -> None:
        from mlflow.exceptions import MlflowException

        try:
            self.client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        files = self.client.get_run(self.run_id).info.artifact_uri
        self.client.create_model_version(name, f"{files}/policy", self.run_id)

    def __enter__(self) -> MlflowRun:
        self._handler = stop_at_sigterm()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._handler is not None:
            signal.signal(signal.SIGTERM, self._handler)
        if kind is None:
            with self._plain_errors():
                self.client.set_terminated(self.run_id, "FINISHED")
        else:
            status = "FAILED" if issubclass(kind, Exception) else "KILLED"
            # An error of MLflow must not hide the error that ended the run.
            with suppress(Exception):
                self.client.set_terminated(self.run_id, status)


def _local_uri(folder: Path) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    return "sqlite:///" + quote((folder.absolute() / "mlflow.db").as_posix(), safe="/:")


def _portions(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    return (items[start : start + size] for start in range(0, len(items), size))


def _shortened(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 3] + "..."
