"""Checkpoints of a training: which run they belong to, writing and reading them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch

from adaptation.options import TrainConfig
from adaptation.strategy import Strategy
from sam_gym.utils.text import reason_of
from sam_gym.utils.training import read_state

#: Settings that change no result, so a run may be resumed with other ones.
_FREE = ("checkpoint_every", "memory_gib", "disk")
#: Settings under their former names.
_RENAMED = {"views": "augmentations", "objects_per_view": "objects_per_augmentation"}

#: Options that methods did not have at first, with the values that they had in effect.
_ADDED = {"semantic": {"class_weights": "none", "features": "sam"}}


def run_key(strategy: Strategy, config: TrainConfig) -> dict[str, Any]:
    """Everything that decides the results of a run, in plain values."""
    bank = strategy.context.bank
    settings = {name: value for name, value in asdict(config).items() if name not in _FREE}
    return {
        "method": strategy.name,
        "tune": strategy.context.tune,
        "domains": {domain.name: strategy.digest(domain) for domain in bank.stream},
        "backbone": bank.backbone.identity,
        "config": settings | {"prompts": list(config.prompts)},
        "method_options": asdict(strategy.options),
    }


def load_checkpoint(
    path: Path, key: Mapping[str, Any], strategy: Strategy, device: torch.device
) -> dict[str, Any]:
    """Read a checkpoint of the same run.

    Args:
        path: of the file.
        key: `run_key` of the run that resumes.
        strategy: its method.
        device: where tensors go.

    Raises:
        ValueError: the file is damaged, or belongs to another run.
    """
    try:
        state = read_state(path, device)
    except Exception as error:  # a damaged file raises errors of every kind
        raise ValueError(
            f"{path}: not a readable checkpoint ({reason_of(error)}). Remove the file to "
            "start this method again."
        ) from error
    saved = _with_new_names(state["key"], strategy)
    differs = [
        _difference(name, saved.get(name), value)
        for name, value in key.items()
        if saved.get(name) != value
    ]
    if differs:
        raise ValueError(
            f"{path}: a checkpoint of a run with another {'; '.join(differs)}. Resume with the "
            "same settings, or choose another --out."
        )
    return state


def _difference(name: str, then: object, now: object) -> str:
    """Name a part of two keys that differs, with the settings in it and their values."""
    if name not in ("config", "method_options", "method", "tune"):
        return name  # digests, which say nothing to a reader
    if not (isinstance(then, Mapping) and isinstance(now, Mapping)):
        return f"{name} ({then!r} then, {now!r} now)"
    settings = [
        f"{setting} {then.get(setting)!r} then, {now.get(setting)!r} now"
        for setting in sorted(then.keys() | now.keys())
        if then.get(setting) != now.get(setting)
    ]
    return f"{name} ({'; '.join(settings)})"


def _with_new_names(key: Mapping[str, Any], strategy: Strategy) -> dict[str, Any]:
    """A key with the present names of its settings and all present options.

    Formerly, `options` held those of all methods, with names such as `ewc_weight`.
    """
    config = {_RENAMED.get(name, name): value for name, value in key["config"].items()}
    key = dict(key) | {"config": config}
    if "options" in key:
        old = key.pop("options")
        key["method_options"] = {
            field.name: old.get(f"{strategy.name}_{field.name}", old.get(field.name))
            for field in fields(strategy.options)
        }
    if isinstance(options := key.get("method_options"), dict):
        key["method_options"] = _ADDED.get(strategy.name, {}) | options
    return key
