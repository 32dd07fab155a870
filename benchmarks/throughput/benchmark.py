"""`throughput`: the vector environment against one SamPredictor per environment, by phase."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from benchmarks.checkouts import checkouts_of
from benchmarks.report import output_folder
from benchmarks.throughput.against import compare_builds, turns
from benchmarks.throughput.config import KINDS, ThroughputBenchmarkConfig
from benchmarks.throughput.machine import (
    decoder_speed,
    encoder_speed,
    peak_memory_mib,
    precision_effect,
)
from benchmarks.throughput.playing import PHASES, REST, SIDES, Chunk, Match, play_chunks
from benchmarks.throughput.reference import plain_sam
from benchmarks.throughput.report import write_report
from sam_gym.backbones import BACKBONES, Backbone
from sam_gym.envs.click import ClickCore, SamSegConfig
from sam_gym.utils.progress import ProgressBar
from sam_gym.utils.provenance import provenance


def run(config: ThroughputBenchmarkConfig) -> dict[str, Any]:
    """Run the benchmark and write its report.

    Raises:
        ValueError, FileNotFoundError: an option or the checkpoint is wrong.
        RuntimeError: the sides disagree on their masks or rewards (not with random weights in low
            precision), or the other checkout failed.
    """
    config.validate()
    checkouts_of(config.against)
    out = output_folder(config.out, config.overwrite)
    with config.as_checkpoint() as own:
        backbone = own.load()
        numbers, rows = _measure(own, backbone)
    summary = {"benchmark": "throughput"} | numbers | provenance(config, backbone)
    write_report(summary, rows, out)
    if config.random_weights and backbone.dtype != torch.float32:
        return summary  # random logits lie near zero, where low precision flips their signs
    for num_envs_name, measured in summary["by_num_envs"].items():
        for kind, numbers in measured.items():
            if not numbers["agreement"]["agree"]:
                raise RuntimeError(
                    f"The sides disagree on {kind} images with {num_envs_name} environments, so "
                    f"their times cannot be compared: {numbers['agreement']}."
                )
    return summary


def _measure(
    config: ThroughputBenchmarkConfig, backbone: Backbone
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return the numbers of the benchmark, and a row per repeat and side."""
    plain = plain_sam(backbone)
    rows: list[dict[str, Any]] = []
    by_num_envs: dict[str, dict[str, Any]] = {}
    with ProgressBar() as progress:
        # First, since another checkout may not know an option.
        task = progress.add_task("both builds", total=turns(config), visible=turns(config) > 0)
        builds = compare_builds(config, lambda: progress.advance(task))
        # Warm-up, repeats and profile, for cached and for fresh images.
        total = len(config.num_envs) * len(KINDS) * (2 * config.repeats + 1)
        task = progress.add_task("stepping", total=total)
        for num_envs in config.num_envs:
            measured, steps = {}, config.steps * num_envs
            for kind in KINDS:
                match = Match(config, backbone, plain, num_envs, fresh=kind == "fresh")
                for number in range(config.repeats + 1):
                    seconds = match.play()
                    setting = {"num_envs": num_envs, "images": kind}
                    for side, elapsed in seconds.items() if number else ():
                        played = {"side": side, "repeat": number, "env_steps": steps}
                        speed = {"seconds": elapsed, "env_steps_per_second": steps / elapsed}
                        rows.append(setting | played | speed)
                    progress.advance(task)
                profiles = []
                for _ in range(config.repeats):
                    profiles.append(match.profile())
                    progress.advance(task)
                own = [r for r in rows if r["images"] == kind and r["num_envs"] == num_envs]
                measured[kind] = {
                    **_speed(config, num_envs, own),
                    **_phases(config, profiles),
                    "agreement": match.agreement(),
                }
                match.close()
            by_num_envs[str(num_envs)] = measured
        chunks = []
        if config.growth_images:
            task = progress.add_task("fresh images", total=config.growth_images)
            for chunk in play_chunks(config):
                chunks.append(chunk)
                progress.update(task, completed=chunk.images)
    peak_memory = peak_memory_mib(backbone.device)

    numbers = {
        **{
            f"speedup_vs_loop{'' if kind == 'cached' else '_fresh'}": {
                n: round(measured[kind]["speedup_vs_reference"], 3)
                for n, measured in by_num_envs.items()
            }
            for kind in KINDS
        },
        "by_num_envs": by_num_envs,
        "linear_fit": {
            kind: linear_fit(
                {int(n): measured[kind]["vector_step_ms"] for n, measured in by_num_envs.items()}
            )
            for kind in KINDS
        },
        "builds": builds,
        "growth": {"num_envs": config.growth_num_envs, **growth(chunks)} if chunks else None,
        "rollout_bytes": rollout_bytes(config, backbone),
        "rollout_bytes_vit_b": rollout_bytes(config, shapes_of("vit_b")),
        "encoder": encoder_speed(backbone, plain, config.encoder_batch),
        "decoder": decoder_speed(backbone, max(config.num_envs)),
        "mask_iou_with_float32": precision_effect(backbone, config.precision_images),
        "peak_memory_mib": peak_memory,
    }
    return numbers, rows


def _speed(
    config: ThroughputBenchmarkConfig, num_envs: int, rows: Sequence[dict[str, Any]]
) -> dict[str, float]:
    """Return medians over the repeats; a speed-up is the median of the repeats' speed-ups."""
    seconds = {
        side: np.array([row["seconds"] for row in rows if row["side"] == side]) for side in SIDES
    }
    steps = config.steps * num_envs
    return {
        **{f"{side}_steps_per_second": steps / float(np.median(seconds[side])) for side in SIDES},
        "speedup_vs_reference": float(np.median(seconds["reference"] / seconds["vector"])),
        "speedup_vs_scalar": float(np.median(seconds["scalar"] / seconds["vector"])),
        "vector_step_ms": 1000 * float(np.median(seconds["vector"])) / config.steps,
    }


def _phases(
    config: ThroughputBenchmarkConfig, profiles: Sequence[dict[str, float]]
) -> dict[str, Any]:
    """Return median milliseconds per vector step and phase, and the share outside of the model."""
    overhead = [1 - (p["encode"] + p["decode"]) / sum(p.values()) for p in profiles]
    return {
        "phases_ms": {
            phase: 1000 * float(np.median([p[phase] for p in profiles])) / config.steps
            for phase in (*PHASES, REST)
        },
        "overhead_share": float(np.median(overhead)),
    }


def linear_fit(step_ms: Mapping[int, float]) -> dict[str, float] | None:
    """Fit a line to milliseconds per vector step by number of environments (least squares).

    Returns:
        ms_per_env, intercept_ms and r_squared; None for fewer than three numbers of environments.
    """
    if len(step_ms) < 3:
        return None
    sizes, times = np.array(list(step_ms)), np.array(list(step_ms.values()))
    slope, intercept = np.polyfit(sizes, times, 1)
    return {
        "ms_per_env": float(slope),
        "intercept_ms": float(intercept),
        "r_squared": float(np.corrcoef(sizes, times)[0, 1] ** 2),
    }


def growth(chunks: Sequence[Chunk]) -> dict[str, Any]:
    """Return the step time by number of images seen, without the first (warm-up) chunk.

    `capacity` is the maximum number of embeddings held, `last_over_first` the median step time of
    the last quarter of the chunks over that of the first quarter.
    """
    images, held, step_ms = zip(*chunks[1:], strict=True)
    quarter = max(1, len(step_ms) // 4)
    return {
        "images": list(images),
        "step_ms": list(step_ms),
        "capacity": max(held),
        "last_over_first": float(np.median(step_ms[-quarter:]) / np.median(step_ms[:quarter])),
    }


def shapes_of(name: str) -> Backbone:
    """Return a backbone on the meta device, for its shapes only."""
    device = torch.device("meta")
    with device:
        return Backbone(name, BACKBONES.get(name).build(), device, torch.float32)


def rollout_bytes(
    config: ThroughputBenchmarkConfig, backbone: Backbone, steps: int = 128
) -> dict[str, float]:
    """Return the bytes of observations in a rollout of one environment, by `obs` form."""

    def stored(obs: str) -> int:
        core = ClickCore(SamSegConfig(**config.env_settings(False, obs)), 1)
        core.backbone = backbone
        sample = core._make_observation_space().sample()
        core.close()
        return steps * sum(np.asarray(value).nbytes for value in sample.values())

    full, handle = stored("full"), stored("handle")
    return {"steps": steps, "full": full, "handle": handle, "ratio": full / handle}
