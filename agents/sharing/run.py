"""Read a finished training run, and strip it of private options before an upload."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from agents.policies.saved import read_data
from agents.ppo.config import with_present_names
from agents.sharing.repository import POLICY, RESULTS, RUN_FILES

#: Options that tell where a run wrote and how it was started.
_PRIVATE = (
    *("out", "overwrite", "resume", "disk"),
    *("mlflow", "mlflow_uri", "mlflow_experiment", "register_model"),
)


@dataclass(frozen=True)
class TrainingRun:
    """A finished run of train_ppo.

    Attributes:
        folder: its folder.
        results: content of results.json, with options by their present names.
        features: arguments of the policy's features, as far as they are plain.
    """

    folder: Path
    results: dict[str, Any]
    features: dict[str, Any]

    @classmethod
    def read(cls, folder: Path) -> TrainingRun:
        """Read and check the folder of a run.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: policy.zip or results.json is damaged.
        """
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder}: no such folder. Pass that of a run of train_ppo.")
        for name in RUN_FILES:
            if not (folder / name).is_file():
                raise FileNotFoundError(
                    f"{folder}: no {name} in this folder. A run of train_ppo writes it at its end."
                )
        try:
            results = json.loads((folder / RESULTS).read_text())
        except ValueError as error:
            raise ValueError(f"{folder / RESULTS}: not readable ({error}).") from error
        if isinstance(results, dict) and isinstance(results.get("config"), dict):
            results["config"] = with_present_names(results["config"], str(folder / RESULTS))
        features = read_data(folder / POLICY).get("policy_kwargs", {}).get("features")
        return cls(folder, results, features if isinstance(features, dict) else {})

    @property
    def config(self) -> dict[str, Any]:
        """The run's options without those of one machine; absolute paths keep their last part."""
        return _shareable(self.results["config"])


def _shareable(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _shareable(item) for key, item in value.items() if key not in _PRIVATE}
    if isinstance(value, str) and PurePath(value).is_absolute():
        return PurePath(value).name
    return value
