"""`continual`: adapt to domain after domain without forgetting (CoSAM, arXiv 2412.06418)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from itertools import product
from typing import Any

import numpy as np

from adaptation.features import FeatureBank
from adaptation.method_flags import options_from_flags
from adaptation.results import RunResult
from adaptation.strategy import STRATEGIES
from adaptation.trainer import Trainer, check_tune
from benchmarks.continual.config import ContinualBenchmarkConfig, with_defaults
from benchmarks.continual.report import pictures, write_report
from benchmarks.report import output_folder, refuse_unfinished
from sam_gym.data.streams import Stream, low_res_ceiling
from sam_gym.utils.digest import text_digest
from sam_gym.utils.provenance import provenance


def jobs_of(config: ContinualBenchmarkConfig) -> dict[str, tuple[str, str]]:
    """Return label -> method and tune target; with several targets, METHOD+TARGET is the label."""
    jobs: dict[str, tuple[str, str]] = {}
    for tune in config.tune:
        for name in config.methods:
            method = STRATEGIES.get(name)
            fits = tune in method.tunes and name != "zero_shot"
            chosen = tune if fits else method.default_tune
            check_tune(name, chosen)
            label = f"{name}+{chosen}" if len(config.tune) > 1 and fits else name
            jobs.setdefault(label, (name, chosen))
    return jobs


def run(config: ContinualBenchmarkConfig) -> dict[str, Any]:
    """Run the benchmark and write its report.

    Raises:
        ValueError, FileNotFoundError: an option, the data or the checkpoint is wrong.
    """
    config = with_defaults(config)
    jobs = jobs_of(config)
    streams = {order: config.stream.open(order) for order in config.orders or (None,)}
    first = next(iter(streams.values()))
    split = config.train.split or first.held_out_split
    config = replace(config, train=replace(config.train, split=split))
    retention = config.stream.open_retention()
    out = output_folder(
        config.out or f"runs/continual{'-full' if config.full else ''}",
        config.overwrite,
        resume=config.resume,
        pictures=["matrix_*.png"],
    )
    if not (config.resume or config.overwrite):
        refuse_unfinished(out, "runs/*/*/checkpoint.pt")

    runs: dict[str, list[RunResult]] = {}
    sheet = None
    for order, seed in product(streams, range(config.train.seed, config.train.seed + config.seeds)):
        # Methods with the same seed and order share a trainer, and so a feature bank.
        settings, folder = replace(config.train, seed=seed), out / "runs" / _slug(order)
        trainer = Trainer(settings, config.model.arguments, folder, retention)
        for label, (method, tune) in jobs.items():
            options = options_from_flags(config.method_options, method)
            done = trainer.fit(
                streams[order],
                method,
                tune,
                method_options=options,
                resume=config.resume,
                overwrite=config.overwrite,
            )
            runs.setdefault(label, []).append(done)
            numbers = done.summary(config.train.prompts[0])
            last, forgotten = numbers["last_iou"], numbers["ff_iou"]
            print(
                f"{label:<22} seed {seed}  last {last:5.1f}"
                + (f"  forgotten {forgotten:5.1f}" if forgotten is not None else " " * 17)
                + f"  {done.seconds:6.1f} s",
                flush=True,
            )
        sheet = sheet or pictures(trainer, first, jobs)
    summary = summarize(config, first, runs, trainer.bank(first))
    write_report(config, summary, runs, first, sheet or [], out)
    return summary


def _slug(order: str | None) -> str:
    if order is None:
        return "given"
    slug = order.replace(":", "-").replace(",", "_")
    return slug if len(slug) <= 80 else f"{slug[:80]}-{text_digest(order)[:8]}"


def spread(values: Sequence[float | None]) -> dict[str, float | None] | None:
    """Mean and standard deviation over runs; None if the number does not apply."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    deviation = float(np.std(known, ddof=1)) if len(known) > 1 else 0.0
    return {"mean": round(float(np.mean(known)), 3), "std": round(deviation, 3)}


def summarize(
    config: ContinualBenchmarkConfig,
    stream: Stream,
    runs: Mapping[str, list[RunResult]],
    bank: FeatureBank,
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
    split = some.split
    return {
        "benchmark": "continual",
        "setting": "full" if config.full else "quick",
        "split": split,
        "prompt": config.train.prompts[0],
        "domains": [
            {
                "name": domain.name,
                "thin": domain.thin,
                "ceiling": round(
                    100
                    * low_res_ceiling(
                        domain.split(split),
                        bank.backbone.image_size,
                        bank.backbone.mask_shape[0],
                        config.train.max_images,
                        bank.backbone.squashes,
                    ),
                    1,
                ),
                "narrow_objects": some.narrow[domain.name],
                "objects": len(bank.held_out(domain, split).rows),
            }
            for domain in stream
        ],
        "methods": methods,
        "by_run": {label: [asdict(run) for run in own] for label, own in runs.items()},
        "backbone": {"name": bank.backbone.name, "identity": bank.backbone.identity},
        **provenance(config),
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
