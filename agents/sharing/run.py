"""Read a finished training run, and strip it of private options before an upload."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from agents.policies.saved import present_backbone, read_data
from agents.ppo.config import with_present_names
from agents.sharing.repository import PICTURES, POLICY, RESULTS

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

    @property
    def pictures(self) -> tuple[str, ...]:
        """Names of its pictures for a repository; none after `train_ppo --no-pictures`."""
        config = self.results.get("config") if isinstance(self.results, dict) else None
        drawn = config.get("pictures", True) if isinstance(config, dict) else True
        return PICTURES if drawn else ()

    @classmethod
    def read(cls, folder: Path) -> TrainingRun:
        """Read and check the folder of a run.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: policy.zip or results.json is damaged.
        """
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder}: no such folder. Pass that of a run of train_ppo.")
        _check_present(folder, (POLICY, RESULTS))
        try:
            results = json.loads((folder / RESULTS).read_text())
        except ValueError as error:
            raise ValueError(f"{folder / RESULTS}: not readable ({error}).") from error
        data = read_data(folder / POLICY)
        if isinstance(results, dict) and isinstance(results.get("config"), dict):
            config = with_present_names(results["config"], str(folder / RESULTS))
            results["config"] = config | _with_present_backbone(config, data)
        features = data.get("policy_kwargs", {}).get("features")
        run = cls(folder, results, features if isinstance(features, dict) else {})
        _check_present(folder, run.pictures)
        return run

    @property
    def config(self) -> dict[str, Any]:
        """The run's options without those of one machine; absolute paths keep their last part."""
        return without_folders(self.results["config"], leave_out=_PRIVATE)


def _check_present(folder: Path, names: Collection[str]) -> None:
    for name in names:
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder}: no {name} in this folder. A run of train_ppo writes it at its end."
            )


def _with_present_backbone(config: dict[str, Any], policy: dict[str, Any]) -> dict[str, Any]:
    """Return the environment's options of a run, with the present name of the SAM."""
    own, weights = config.get("env_config"), policy.get("policy_weights")
    if not isinstance(own, dict) or "backbone" not in own:
        return {}
    digest = weights.get("backbone") if isinstance(weights, dict) else None
    name = present_backbone(own["backbone"], own.get("checkpoint"), digest)
    return {"env_config": own | {"backbone": name}}


def without_folders(value: Any, leave_out: Collection[str] = ()) -> Any:
    """Return a JSON value in which absolute paths, keys too, keep their last part only.

    Args:
        value: the content of a results.json, or a part of it.
        leave_out: keys that are left out, at any depth.
    """
    if isinstance(value, dict):
        return {
            without_folders(key): without_folders(item, leave_out)
            for key, item in value.items()
            if key not in leave_out
        }
    if isinstance(value, list):
        return [without_folders(item, leave_out) for item in value]
    if isinstance(value, str) and PurePath(value).is_absolute():
        return PurePath(value).name
    return value
