"""Numbers of the `continual` benchmark: means and deviations over runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch

from adaptation.features import FeatureBank
from adaptation.results import RunResult
from benchmarks.continual.config import Config
from sam_gym.data.streams import Stream, low_res_ceiling
from sam_gym.version import __version__


def spread(values: Sequence[float | None]) -> dict[str, float | None] | None:
    """Mean and standard deviation over runs; None if the number does not apply."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    deviation = float(np.std(known, ddof=1)) if len(known) > 1 else 0.0
    return {"mean": round(float(np.mean(known)), 3), "std": round(deviation, 3)}


def summarize(
    config: Config, stream: Stream, runs: Mapping[str, list[RunResult]], bank: FeatureBank
) -> dict[str, Any]:
    methods: dict[str, Any] = {}
    for label, own in runs.items():
        entry: dict[str, Any] = {"tune": own[0].tune, "runs": len(own)}
        for prompt in config.train.prompts:
            rows = [run.summary(prompt) for run in own]
            numbers = {name: spread([row.get(name) for row in rows]) for name in rows[0]}
            for group, names in _groups(stream).items():
                ends = [_of_group(run, prompt, names) for run in own]
                numbers[f"last_iou_{group}"] = spread(ends)
            if prompt == config.train.prompts[0]:
                entry |= numbers
            else:
                entry[prompt] = numbers
        entry["trainable_parameters"] = own[0].trainable
        entry["bytes_per_domain"] = round(float(np.mean([run.kept_bytes for run in own])))
        entry["seconds"] = spread([run.seconds for run in own])
        methods[label] = entry
    some = next(iter(runs.values()))[0]
    return {
        "benchmark": "continual",
        "setting": "full" if config.full else "quick",
        "prompt": config.train.prompts[0],
        "domains": [
            {
                "name": domain.name,
                "thin": domain.thin,
                "ceiling": round(
                    100
                    * low_res_ceiling(
                        domain.split(config.train.split),
                        bank.backbone.image_size,
                        bank.backbone.mask_shape[0],
                        config.train.max_images,
                    ),
                    1,
                ),
                "narrow_objects": some.narrow[domain.name],
                "objects": len(bank.held_out(domain, config.train.split).rows),
            }
            for domain in stream
        ],
        "methods": methods,
        "by_run": {label: [asdict(run) for run in own] for label, own in runs.items()},
        "backbone": {"name": bank.backbone.name, "identity": bank.backbone.identity},
        "threads": torch.get_num_threads(),
        "versions": {"sam-gym": __version__, "torch": torch.__version__},
        "settings": asdict(config),
    }


def _groups(stream: Stream) -> dict[str, list[str]]:
    """Names of compact and thin domains, if both exist."""
    groups = {
        name: [domain.name for domain in stream if domain.thin is thin]
        for name, thin in (("compact", False), ("thin", True))
    }
    return groups if all(groups.values()) else {}


def _of_group(run: RunResult, prompt: str, names: Sequence[str]) -> float:
    last = run.scores[prompt]["iou"][-1]
    return float(np.mean([last[run.domains.index(name)] for name in names]))
