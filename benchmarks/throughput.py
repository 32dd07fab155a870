"""`throughput`: what the vector environment gains over a loop of environments, and its phases."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import gymnasium as gym
import numpy as np
import torch

import sam_gym  # noqa: F401  (registers the environments)
from benchmarks import report
from benchmarks.options import BackboneOptions, provenance, require_at_least
from sam_gym.backbones import Backbone
from sam_gym.backbones.store import EmbeddingStore
from sam_gym.data.cache import SampleCache
from sam_gym.envs.core import ClickCore
from sam_gym.files import write_csv, write_json

#: Phase of a step -> whose methods make it up. Time in a nested method counts for that one only.
PHASES = {
    "encode": ("backbone.encode",),
    "decode": ("backbone.decode_best",),
    "samples": ("_draw_all",),
    "store": ("store.acquire", "store.gather"),
    "clicks": ("_add_click",),
    "score": ("_score", "_reward"),
    "observation": ("observe", "info"),
}
REST = "rest"
_KINDS = ("cached", "fresh")

#: Two batch sizes round differently, and a logit near zero may flip a pixel: the largest difference
#: of a reward that is put down to that, by precision, and the share of rewards that may exceed it.
_TOLERANCES = {torch.float32: 0.01}
_LOW_PRECISION_TOLERANCE = 0.05
_MAX_OUTLIERS = 0.02


@dataclass
class Config(BackboneOptions):
    """Compare the vector environment with as many scalar environments in a Python loop.

    Both play the same actions on the same images with the same weights, and their rewards are
    compared. Cached images are in the embedding store and the sample cache; fresh images were
    never seen. Observations are handles; a step that ends episodes includes their reset.
    """

    out: str = "runs/throughput"
    """Folder for results.json, repeats.csv, phases.png and report.html."""
    num_envs: int = 64
    """Environments on either side."""
    max_steps: int = 5
    """Steps per episode."""
    steps: int = 10
    """Steps per repeat, a multiple of max_steps: then every repeat holds equally many resets."""
    repeats: int = 5
    """Timed repeats, of which the median counts; one more to warm up comes first."""
    images: int = 64
    """Different images among the cached ones."""

    def validate(self) -> None:
        """Raise `ValueError` for a value that cannot work."""
        require_at_least(
            1,
            num_envs=self.num_envs,
            max_steps=self.max_steps,
            steps=self.steps,
            repeats=self.repeats,
            images=self.images,
        )
        require_at_least(0, seed=self.seed)
        if self.steps % self.max_steps:
            raise ValueError(
                f"--steps must be a multiple of --max-steps ({self.max_steps}), got {self.steps}: "
                "else some repeats would hold more resets than others."
            )

    def env_settings(self, fresh: bool) -> dict[str, Any]:
        """Arguments of `SamSeg-v0`; the scenes are endless if they have to be fresh."""
        return {
            "dataset": "scenes",
            "split": "test",
            "dataset_kwargs": {"length": None if fresh else self.images},
            "backbone": self.backbone,
            "checkpoint": self.checkpoint,
            "device": self.device,
            "dtype": self.dtype,
            "obs": "handle",
            "max_steps": self.max_steps,
        }


def run(config: Config) -> dict[str, Any]:
    """Run the benchmark and write its report.

    Raises:
        ValueError, FileNotFoundError: an option or the checkpoint is wrong.
        RuntimeError: the two sides did not play the same episodes.
    """
    config.validate()
    out = report.output_folder(config.out)
    backbone = config.load()
    rows: list[dict[str, Any]] = []
    measured = {}
    with report.progress_bar() as progress:
        # Warm-up, repeats and profile, for cached and for fresh images.
        task = progress.add_task("stepping", total=2 * (2 * config.repeats + 1))
        for kind in _KINDS:
            match = Match(config, backbone, fresh=kind == "fresh")
            for number in range(config.repeats + 1):
                seconds = match.play()
                if number:
                    rows += _rows(config, kind, number, seconds)
                progress.advance(task)
            profiles = []
            for _ in range(config.repeats):
                profiles.append(match.profile())
                progress.advance(task)
            measured[kind] = {
                **_speed(config, [row for row in rows if row["images"] == kind]),
                **_phases(config, profiles),
                "agreement": match.agreement(),
            }
            match.close()

    summary = {
        "benchmark": "throughput",
        "num_envs": config.num_envs,
        "overhead_share": measured["cached"]["overhead_share"],
        **measured,
        **provenance(config, backbone),
    }
    _write(config, summary, rows, out)
    for kind, numbers in measured.items():
        if not numbers["agreement"]["agree"]:
            raise RuntimeError(
                f"The vector and the scalar environments disagree on {kind} images, so their times "
                f"cannot be compared: {numbers['agreement']}."
            )
    return summary


# Playing ---------------------------------------------------------------------------------------


@dataclass
class Played:
    """What one side got out of its steps: rewards (N,) per step, IoUs (N,) as episodes end."""

    rewards: list[np.ndarray] = field(default_factory=list)
    final_ious: list[np.ndarray] = field(default_factory=list)


class Match:
    """A vector environment and scalar environments that play the same episodes.

    Args:
        config: the settings.
        backbone: the model that all of them share.
        fresh: whether every episode has an image of its own.
    """

    def __init__(self, config: Config, backbone: Backbone, fresh: bool) -> None:
        self.config, self.backbone = config, backbone
        settings = config.env_settings(fresh)
        self.vector = gym.make_vec(
            "SamSeg-v0",
            num_envs=config.num_envs,
            vectorization_mode="vector_entry_point",
            autoreset_mode="SameStep",
            **settings,
        )
        self.scalars = [
            gym.make("SamSeg-v0", disable_env_checker=True, **settings)
            for _ in range(config.num_envs)
        ]
        self.core: ClickCore = self.vector.unwrapped.core  # type: ignore[attr-defined]
        share_memory([self.core], warm=not fresh)
        share_memory([env.unwrapped.core for env in self.scalars], warm=not fresh)  # type: ignore[attr-defined]
        self._rng = np.random.default_rng(config.seed)
        self._played = Played(), Played()
        self.vector.reset(seed=config.seed)
        for number, env in enumerate(self.scalars):
            env.reset(seed=config.seed + number)

    def _actions(self) -> np.ndarray:
        shape = (self.config.steps, self.config.num_envs)
        return self._rng.integers(0, int(self.core.action_space.n), shape)

    def play(self) -> dict[str, float]:
        """Play `steps` steps on both sides; returns the seconds of each."""
        actions = self._actions()
        seconds = {}
        started = time.perf_counter()
        play_vector(self.vector, actions, self._played[0])
        seconds["vector"] = time.perf_counter() - started
        started = time.perf_counter()
        play_scalars(self.scalars, actions, self._played[1])
        seconds["scalar"] = time.perf_counter() - started
        return seconds

    def profile(self) -> dict[str, float]:
        """Play `steps` steps on the vector side; returns the seconds of each phase."""
        actions = self._actions()
        with phase_timers(self.core) as seconds:
            started = time.perf_counter()
            play_vector(self.vector, actions, Played())
            total = time.perf_counter() - started
        phases = {phase: seconds[phase] for phase in PHASES}
        return phases | {REST: total - sum(phases.values())}

    def agreement(self) -> dict[str, Any]:
        """How far the two sides' rewards and final IoUs are apart."""
        tolerance = _TOLERANCES.get(self.backbone.dtype, _LOW_PRECISION_TOLERANCE)
        rewards, ious = (
            np.abs(np.array(vector) - np.array(scalar))
            for vector, scalar in (
                (self._played[0].rewards, self._played[1].rewards),
                (self._played[0].final_ious, self._played[1].final_ious),
            )
        )
        outliers = float((rewards > tolerance).mean())
        return {
            "agree": outliers <= _MAX_OUTLIERS,
            "max_reward_difference": float(rewards.max()),
            "max_final_iou_difference": float(ious.max()),
            "tolerance": tolerance,
            "share_beyond_tolerance": outliers,
        }

    def close(self) -> None:
        self.vector.close()
        for env in self.scalars:
            env.close()


def share_memory(cores: Sequence[ClickCore], warm: bool) -> None:
    """Give one side an embedding store and a sample cache of its own.

    So neither side finds what the other has encoded; and scalar environments, each of which would
    have a sample cache to itself, draw what one of them drew only once.
    """
    first = cores[0]
    samples = SampleCache(first.dataset, first.config.cache_mib * 2**20)
    store = EmbeddingStore(first.backbone, int(first.config.store_gib * 2**30))
    if warm:
        for index in range(len(first.dataset)):
            for handle in store.acquire([samples[index].image]):
                store.unpin(handle)
    for core in cores:
        core.samples, core.store = samples, store


def play_vector(env: gym.vector.VectorEnv, actions: np.ndarray, played: Played) -> None:
    """Step the vector environment through actions (T, N)."""
    for row in actions:
        _, reward, _, _, info = env.step(row)
        played.rewards.append(reward)
        if "final_info" in info:
            played.final_ious.append(info["final_info"]["iou"])


def play_scalars(envs: Sequence[gym.Env], actions: np.ndarray, played: Played) -> None:
    """Step scalar environments in a loop through actions (T, N), resetting those that end."""
    for row in actions:
        rewards, final_ious = [], []
        for env, action in zip(envs, row, strict=True):
            _, reward, terminated, truncated, info = env.step(int(action))
            rewards.append(float(reward))
            if terminated or truncated:
                final_ious.append(info["iou"])
                env.reset()
        played.rewards.append(np.array(rewards))
        if final_ious:
            played.final_ious.append(np.array(final_ious))


@contextmanager
def phase_timers(core: ClickCore) -> Iterator[dict[str, float]]:
    """Time the methods of `PHASES` on a core: a dict of seconds that fills up as they are called.

    The methods are put back afterwards. The device is waited for around each of them, so that its
    work counts where it was asked for; that is why speed is measured without timers.
    """
    seconds: dict[str, float] = defaultdict(float)
    nested: list[float] = []

    def timed(method: Any, phase: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            _synchronise(core.device)
            started = time.perf_counter()
            nested.append(0.0)
            try:
                return method(*args, **kwargs)
            finally:
                _synchronise(core.device)
                elapsed = time.perf_counter() - started
                seconds[phase] += elapsed - nested.pop()
                if nested:
                    nested[-1] += elapsed

        return call

    with ExitStack() as stack:
        for phase, methods in PHASES.items():
            for path in methods:
                *owners, name = path.split(".")
                owner = getattr(core, owners[0]) if owners else core
                wrapped = timed(getattr(owner, name), phase)
                stack.enter_context(patch.object(owner, name, wrapped))
        yield seconds


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


# Numbers ---------------------------------------------------------------------------------------


def _rows(
    config: Config, kind: str, repeat: int, seconds: dict[str, float]
) -> list[dict[str, Any]]:
    steps = config.steps * config.num_envs
    return [
        {
            "images": kind,
            "env": side,
            "repeat": repeat,
            "env_steps": steps,
            "seconds": elapsed,
            "env_steps_per_second": steps / elapsed,
        }
        for side, elapsed in seconds.items()
    ]


def _speed(config: Config, rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Medians over the repeats; the speed-up is the median of each repeat's own."""
    seconds = {
        side: np.array([row["seconds"] for row in rows if row["env"] == side])
        for side in ("vector", "scalar")
    }
    steps = config.steps * config.num_envs
    return {
        "vector_steps_per_second": steps / float(np.median(seconds["vector"])),
        "scalar_steps_per_second": steps / float(np.median(seconds["scalar"])),
        "speedup": float(np.median(seconds["scalar"] / seconds["vector"])),
        "vector_step_ms": 1000 * float(np.median(seconds["vector"])) / config.steps,
    }


def _phases(config: Config, profiles: Sequence[dict[str, float]]) -> dict[str, Any]:
    """Median milliseconds per vector step of each phase, and the share that is not the model."""
    overhead = [1 - (p["encode"] + p["decode"]) / sum(p.values()) for p in profiles]
    return {
        "phases_ms": {
            phase: 1000 * float(np.median([p[phase] for p in profiles])) / config.steps
            for phase in (*PHASES, REST)
        },
        "overhead_share": float(np.median(overhead)),
    }


# Report ----------------------------------------------------------------------------------------


def _write(config: Config, summary: dict[str, Any], rows: list[dict[str, Any]], out: Path) -> None:
    json_file = write_json(out / "results.json", summary)
    csv_file = write_csv(out / "repeats.csv", rows)
    plot_file = report.save_plot(out / "phases.png", _plot(summary))
    columns, table = _table(summary)

    page = report.Page(
        f"Throughput of SamSeg-v0 with {summary['backbone']}",
        f"One vector environment of {config.num_envs} against {config.num_envs} scalar "
        f"environments in a Python loop, on {summary['device']}, CPU threads: "
        f"{summary['threads']}. Same weights, same images, same actions.",
    )
    cached = summary["cached"]
    page.cards(
        {
            "env steps per second, vector": f"{cached['vector_steps_per_second']:.0f}",
            "times the scalar loop": f"{cached['speedup']:.1f}",
            "of a step is neither encode nor decode": f"{summary['overhead_share']:.1%}",
        }
    )
    page.table(columns, table)
    page.text(
        "Cached: the image was encoded before, as most are in training. Fresh: never seen before, "
        f"so that every episode of {config.max_steps} steps pays for drawing and encoding an "
        "image. Steps that end episodes include the reset. Medians of "
        f"{config.repeats} repeats of {config.steps} steps each; scalar environments share one "
        "sample cache and one embedding store."
    )
    page.heading("Where a vector step spends its time")
    page.plot(plot_file, "milliseconds per vector step by phase")
    page.table(
        ("phase", "cached, ms", "fresh, ms"),
        [
            (f"{phase}: {what}", *(f"{summary[k]['phases_ms'][phase]:.2f}" for k in _KINDS))
            for phase, what in _PHASE_NOTES.items()
        ],
    )
    page.settings(summary["settings"], [json_file, csv_file])
    page_file = page.write(out / "report.html")
    report.print_table(f"throughput: {summary['backbone']}, {config.num_envs} envs", columns, table)
    print(f"Report: {page_file}")


_PHASE_NOTES = {
    "encode": "the image encoder, with resizing",
    "decode": "the prompt encoder and the mask decoder",
    "samples": "waiting for the next images and targets, drawn in a thread meanwhile",
    "store": "finding embeddings by content, gathering them",
    "clicks": "turning actions into clicks",
    "score": "IoU and reward",
    "observation": "observations and infos",
    REST: "everything else",
}


def _table(summary: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    def row(name: str, key: str, style: str) -> list[str]:
        return [name, *(format(summary[kind][key], style) for kind in _KINDS)]

    return ["", *(f"{kind} images" for kind in _KINDS)], [
        row("vector, env steps/s", "vector_steps_per_second", ".0f"),
        row("scalar loop, env steps/s", "scalar_steps_per_second", ".0f"),
        row("speed-up", "speedup", ".2f"),
        row("vector step, ms", "vector_step_ms", ".1f"),
        row("neither encode nor decode", "overhead_share", ".1%"),
        [
            "largest difference of a reward",
            *(f"{summary[kind]['agreement']['max_reward_difference']:.1e}" for kind in _KINDS),
        ],
    ]


def _plot(summary: dict[str, Any]) -> Any:
    figure, axes = report.new_plot(height=2.6)
    colours = [
        report.BLUE,
        "#7db8e8",
        "#e08a1e",
        "#efb666",
        "#c9603f",
        "#8a6fb3",
        "#5a9e6f",
        "#b8bec6",
    ]
    kinds = _KINDS[::-1]  # a bar plot starts at the bottom
    left = np.zeros(len(kinds))
    for phase, colour in zip((*PHASES, REST), colours, strict=True):
        width = np.array([summary[kind]["phases_ms"][phase] for kind in kinds])
        axes.barh([f"{kind} images" for kind in kinds], width, 0.6, left, color=colour, label=phase)
        left += width
    axes.set_xlabel("milliseconds per vector step")
    axes.legend(frameon=False, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return figure
