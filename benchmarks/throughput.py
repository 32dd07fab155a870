"""`throughput`: what batching gains over the way it is done today, phase by phase."""

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
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from segment_anything.modeling import Sam

import sam_gym  # noqa: F401  (registers the environments)
from benchmarks import report
from benchmarks.machine import (
    decoder_speed,
    encoder_speed,
    peak_memory_mib,
    precision_effect,
    synchronise,
)
from benchmarks.options import BackboneOptions, provenance, require_at_least
from benchmarks.reference import PredictorEnv, check_comparable, plain_sam
from sam_gym.backbones import Backbone
from sam_gym.backbones.store import EmbeddingStore
from sam_gym.data.cache import SampleCache
from sam_gym.envs.click import make_config
from sam_gym.envs.core import ClickCore
from sam_gym.files import write_csv, write_json

_SIDES = ("vector", "reference", "scalar")

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
    """Compare the vector environment with the way it is done today, for several numbers of envs.

    Three sides play the same actions on the same images with the same weights, and their masks are
    compared: `vector` is ours; `scalar` is a Python loop over our scalar environments; `reference`
    is what research code does, a `SamPredictor` per environment under SyncVectorEnv, which encodes
    at every reset. Cached images were seen before (only `reference` encodes them again); fresh
    images never. A step that ends episodes includes their reset.
    """

    out: str = "runs/throughput"
    """Folder for results.json, repeats.csv, plots and report.html."""
    num_envs: tuple[int, ...] = (1, 8, 64, 256)
    """Environments on each side, one or several numbers."""
    max_steps: int = 5
    """Steps per episode."""
    steps: int = 5
    """Steps per repeat, a multiple of max_steps: then every repeat holds equally many resets."""
    repeats: int = 5
    """Timed repeats, of which the median counts; one more to warm up comes first."""
    images: int = 64
    """Different images among the cached ones."""

    def validate(self) -> None:
        """Raise `ValueError` for a value that cannot work."""
        if not self.num_envs:
            raise ValueError("--num-envs needs at least one number.")
        check_comparable(self.backbone)
        require_at_least(
            1,
            num_envs=min(self.num_envs),
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

    def env_settings(self, fresh: bool, obs: str = "handle") -> dict[str, Any]:
        """Arguments of `SamSeg-v0`; the scenes are endless if they have to be fresh."""
        return {
            "dataset": "scenes",
            "split": "test",
            "dataset_kwargs": {"length": None if fresh else self.images},
            "backbone": self.backbone,
            "checkpoint": self.checkpoint,
            "device": self.device,
            "dtype": self.dtype,
            "obs": obs,
            "max_steps": self.max_steps,
        }


def run(config: Config) -> dict[str, Any]:
    """Run the benchmark and write its report.

    Raises:
        ValueError, FileNotFoundError: an option or the checkpoint is wrong.
        RuntimeError: the sides did not play the same episodes.
    """
    config.validate()
    out = report.output_folder(config.out)
    backbone = config.load()
    plain = plain_sam(backbone)
    rows: list[dict[str, Any]] = []
    by_num_envs: dict[str, dict[str, Any]] = {}
    with report.progress_bar() as progress:
        # Warm-up, repeats and profile, for cached and for fresh images.
        total = len(config.num_envs) * len(_KINDS) * (2 * config.repeats + 1)
        task = progress.add_task("stepping", total=total)
        for num_envs in config.num_envs:
            measured = {}
            for kind in _KINDS:
                match = Match(config, backbone, plain, num_envs, fresh=kind == "fresh")
                for number in range(config.repeats + 1):
                    seconds = match.play()
                    if number:
                        rows += _rows(config, num_envs, kind, number, seconds)
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
    peak_memory = peak_memory_mib(backbone.device)

    summary = {
        "benchmark": "throughput",
        **{
            f"speedup_vs_loop{'' if kind == 'cached' else '_fresh'}": {
                n: round(measured[kind]["speedup_vs_reference"], 3)
                for n, measured in by_num_envs.items()
            }
            for kind in _KINDS
        },
        "by_num_envs": by_num_envs,
        "rollout_bytes": rollout_bytes(config),
        "encoder": encoder_speed(backbone, plain),
        "decoder": decoder_speed(backbone, max(config.num_envs)),
        "mask_iou_with_float32": precision_effect(backbone),
        "peak_memory_mib": peak_memory,
        **provenance(config, backbone),
    }
    _write(config, summary, rows, out)
    for num_envs_name, measured in by_num_envs.items():
        for kind, numbers in measured.items():
            if not numbers["agreement"]["agree"]:
                raise RuntimeError(
                    f"The sides disagree on {kind} images with {num_envs_name} environments, so "
                    f"their times cannot be compared: {numbers['agreement']}."
                )
    return summary


# Playing ---------------------------------------------------------------------------------------


@dataclass
class Played:
    """What one side got out of its steps.

    Attributes:
        masks: per step, bool (N, hm, wm), the low-res mask of each environment.
        rewards: per step, (N,).
        final_ious: per step that ended episodes, (N,).
    """

    masks: list[np.ndarray] = field(default_factory=list)
    rewards: list[np.ndarray] = field(default_factory=list)
    final_ious: list[np.ndarray] = field(default_factory=list)


class Match:
    """Three sides that play the same episodes; each counts only the seconds of its steps.

    Args:
        config: the settings.
        backbone: the model of the vector and the scalar environments.
        plain: the model of the reference environments.
        num_envs: environments on each side.
        fresh: whether every episode has an image of its own.
    """

    def __init__(
        self, config: Config, backbone: Backbone, plain: Sam, num_envs: int, fresh: bool
    ) -> None:
        self.config, self.backbone, self.num_envs = config, backbone, num_envs
        settings = config.env_settings(fresh)
        self.vector = gym.make_vec(
            "SamSeg-v0",
            num_envs=num_envs,
            vectorization_mode="vector_entry_point",
            autoreset_mode="SameStep",
            **settings,
        )
        self.scalars = [
            gym.make("SamSeg-v0", disable_env_checker=True, **settings) for _ in range(num_envs)
        ]
        rules = ClickCore(make_config(settings), 1)
        self.reference = SyncVectorEnv(
            [lambda: PredictorEnv(plain, rules) for _ in range(num_envs)],
            autoreset_mode=AutoresetMode.SAME_STEP,
        )
        self.core: ClickCore = self.vector.unwrapped.core  # type: ignore[attr-defined]
        self.scalar_cores: list[ClickCore] = [
            env.unwrapped.core  # type: ignore[attr-defined]
            for env in self.scalars
        ]
        for cores in ([self.core], self.scalar_cores, [rules]):
            share_memory(cores, warm=not fresh)
        self._rng = np.random.default_rng(config.seed)
        self.played = {side: Played() for side in _SIDES}
        self.vector.reset(seed=config.seed)
        for number, env in enumerate(self.scalars):
            env.reset(seed=config.seed + number)
        self.reference.reset(seed=config.seed)

    def _actions(self) -> np.ndarray:
        shape = (self.config.steps, self.num_envs)
        return self._rng.integers(0, int(self.core.action_space.n), shape)

    def play(self) -> dict[str, float]:
        """Play `steps` steps on all sides; returns the seconds of each."""
        actions = self._actions()
        sides = {
            "vector": lambda played: play_vector(self.vector, actions, played),
            "scalar": lambda played: play_scalars(self.scalars, actions, played),
            "reference": lambda played: play_reference(self.reference, actions, played),
        }
        return {side: play(self.played[side]) for side, play in sides.items()}

    def profile(self) -> dict[str, float]:
        """Play `steps` steps on the vector side; returns the seconds of each phase."""
        actions = self._actions()
        with phase_timers(self.core) as seconds:
            total = play_vector(self.vector, actions, Played())
        phases = {phase: seconds[phase] for phase in PHASES}
        return phases | {REST: total - sum(phases.values())}

    def agreement(self) -> dict[str, Any]:
        """How far the sides are apart.

        Rewards of the vector and the scalar environments are computed alike, so they are compared
        as they are; the reference scores at the size of the image, so its masks are compared.
        """
        tolerance = _TOLERANCES.get(self.backbone.dtype, _LOW_PRECISION_TOLERANCE)
        vector, reference, scalar = (self.played[side] for side in _SIDES)
        rewards = np.abs(np.array(vector.rewards) - np.array(scalar.rewards))
        ious = np.abs(np.array(vector.final_ious) - np.array(scalar.final_ious))
        one, other = np.array(vector.masks), np.array(reference.masks)
        union = (one | other).sum(axis=(2, 3))
        mask_iou = np.where(union, (one & other).sum(axis=(2, 3)) / np.maximum(union, 1), 1.0)
        outliers = float((rewards > tolerance).mean())
        differing = float((mask_iou < 1 - tolerance).mean())
        return {
            "agree": max(outliers, differing) <= _MAX_OUTLIERS,
            "max_reward_difference": float(rewards.max()),
            "max_final_iou_difference": float(ious.max()),
            "mean_mask_iou_with_reference": float(mask_iou.mean()),
            "min_mask_iou_with_reference": float(mask_iou.min()),
            "tolerance": tolerance,
            "share_beyond_tolerance": max(outliers, differing),
        }

    def close(self) -> None:
        self.vector.close()
        for env in self.scalars:
            env.close()
        self.reference.close()


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


def play_vector(env: gym.vector.VectorEnv, actions: np.ndarray, played: Played) -> float:
    """Step the vector environment through actions (T, N); returns the seconds of its steps."""
    core: ClickCore = env.unwrapped.core  # type: ignore[attr-defined]
    slots, seconds = torch.arange(core.num_slots), 0.0
    for row in actions:
        started = time.perf_counter()
        _, reward, _, _, info = env.step(row)
        # What is drawn ahead is work of this side, also where nothing hides it.
        core.ahead.wait()
        seconds += time.perf_counter() - started
        played.rewards.append(reward)
        # Logits of an episode that has just ended stay until its slot is clicked again.
        clicks = info["final_info"]["clicks"] if "final_info" in info else info["clicks"]
        logits = core.logits[slots, torch.from_numpy(clicks)]
        played.masks.append((logits > 0).cpu().numpy())
        if "final_info" in info:
            played.final_ious.append(info["final_info"]["iou"])
    return seconds


def play_scalars(envs: Sequence[gym.Env], actions: np.ndarray, played: Played) -> float:
    """Step scalar environments in a loop through actions (T, N), resetting those that end."""
    started = time.perf_counter()
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
    return time.perf_counter() - started


def play_reference(env: SyncVectorEnv, actions: np.ndarray, played: Played) -> float:
    """Step the reference through actions (T, N); returns the seconds of its steps."""
    seconds = 0.0
    for row in actions:
        started = time.perf_counter()
        env.step(row)
        seconds += time.perf_counter() - started
        played.masks.append(np.stack([one.unwrapped.last_mask for one in env.envs]))  # type: ignore[attr-defined]
    return seconds


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
            synchronise(core.device)
            started = time.perf_counter()
            nested.append(0.0)
            try:
                return method(*args, **kwargs)
            finally:
                synchronise(core.device)
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


# Numbers ---------------------------------------------------------------------------------------


def _rows(
    config: Config, num_envs: int, kind: str, repeat: int, seconds: dict[str, float]
) -> list[dict[str, Any]]:
    steps = config.steps * num_envs
    return [
        {
            "num_envs": num_envs,
            "images": kind,
            "side": side,
            "repeat": repeat,
            "env_steps": steps,
            "seconds": elapsed,
            "env_steps_per_second": steps / elapsed,
        }
        for side, elapsed in seconds.items()
    ]


def _speed(config: Config, num_envs: int, rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Medians over the repeats; a speed-up is the median of each repeat's own."""
    seconds = {
        side: np.array([row["seconds"] for row in rows if row["side"] == side]) for side in _SIDES
    }
    steps = config.steps * num_envs
    return {
        **{f"{side}_steps_per_second": steps / float(np.median(seconds[side])) for side in _SIDES},
        "speedup_vs_reference": float(np.median(seconds["reference"] / seconds["vector"])),
        "speedup_vs_scalar": float(np.median(seconds["scalar"] / seconds["vector"])),
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


def rollout_bytes(config: Config, steps: int = 128) -> dict[str, float]:
    """Bytes of the observations that a rollout of one environment stores, in either form."""

    def stored(obs: str) -> int:
        core = ClickCore(make_config(config.env_settings(False, obs)), 1)
        sample = core.observation_space.sample()
        core.close()
        return steps * sum(np.asarray(value).nbytes for value in sample.values())

    full, handle = stored("full"), stored("handle")
    return {"steps": steps, "full": full, "handle": handle, "ratio": full / handle}


# Report ----------------------------------------------------------------------------------------


def _write(config: Config, summary: dict[str, Any], rows: list[dict[str, Any]], out: Path) -> None:
    json_file = write_json(out / "results.json", summary)
    csv_file = write_csv(out / "repeats.csv", rows)
    speed_file = report.save_plot(out / "speed.png", _speed_plot(summary))
    middle = str(config.num_envs[len(config.num_envs) // 2])
    measured = summary["by_num_envs"][middle]
    phase_file = report.save_plot(out / "phases.png", _phase_plot(measured))
    columns, table = _table(summary)

    page = report.Page(
        f"Throughput of SamSeg-v0 with {summary['backbone']}",
        f"One vector environment against as many environments that each work SAM alone, on "
        f"{summary['device']}, CPU threads: {summary['threads']}. Same weights, same images, same "
        "actions.",
    )
    page.cards(
        {
            f"env steps per second, {middle} envs": (
                f"{measured['cached']['vector_steps_per_second']:.0f}"
            ),
            "times the reference, cached": f"{measured['cached']['speedup_vs_reference']:.1f}",
            "times the reference, fresh": f"{measured['fresh']['speedup_vs_reference']:.1f}",
            "smaller rollouts": f"{summary['rollout_bytes']['ratio']:.0f}x",
        }
    )
    page.table(columns, table)
    page.text(
        "Reference: a SamPredictor per environment under SyncVectorEnv, as research code does it: "
        "encodes at every reset, copies the embedding into every observation, masks at image size. "
        "Scalar: a Python loop over this package's own scalar environments. Cached: the image was "
        "encoded before, as most are in training. Fresh: never seen before, so that every episode "
        f"of {config.max_steps} steps pays for drawing and encoding an image. Steps that end "
        f"episodes include the reset. Medians of {config.repeats} repeats of {config.steps} steps."
    )
    page.plot(speed_file, "environment steps per second by number of environments")
    page.heading(f"Where a vector step of {middle} environments spends its time")
    page.plot(phase_file, "milliseconds per vector step by phase")
    page.table(
        ("phase", "cached, ms", "fresh, ms"),
        [
            (f"{phase}: {what}", *(f"{measured[k]['phases_ms'][phase]:.2f}" for k in _KINDS))
            for phase, what in _PHASE_NOTES.items()
        ],
    )
    page.heading("Model and machine")
    page.table(("", ""), _machine_table(summary))
    page.settings(summary["settings"], [json_file, csv_file])
    page_file = page.write(out / "report.html")
    report.print_table(f"throughput: {summary['backbone']}", columns, table)
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
    columns = [
        "envs",
        "images",
        "vector, steps/s",
        "reference",
        "scalar loop",
        "vs reference",
        "vs scalar",
        "not the model",
    ]
    rows = []
    for num_envs, measured in summary["by_num_envs"].items():
        for kind in _KINDS:
            numbers = measured[kind]
            rows.append(
                [
                    num_envs,
                    kind,
                    *(f"{numbers[f'{s}_steps_per_second']:.0f}" for s in _SIDES),
                    f"{numbers['speedup_vs_reference']:.2f}x",
                    f"{numbers['speedup_vs_scalar']:.2f}x",
                    f"{numbers['overhead_share']:.1%}",
                ]
            )
    return columns, rows


def _machine_table(summary: dict[str, Any]) -> list[tuple[str, str]]:
    encoder, decoder = summary["encoder"], summary["decoder"]
    rollout, peak = summary["rollout_bytes"], summary["peak_memory_mib"]
    return [
        ("encode, images per second", f"{encoder['images_per_second']:.1f}"),
        ("of plain segment_anything", f"{encoder['plain_images_per_second']:.1f}"),
        (f"decode, ms per prompt of {decoder['prompts']}", f"{decoder['ms_per_prompt']:.3f}"),
        ("one click, ms", f"{decoder['click_latency_ms']:.2f}"),
        ("decode, share of the roofline", f"{decoder['fraction_of_roofline']:.1%}"),
        ("large matrix product, GFLOP/s", f"{decoder['matmul_gflop_per_second']:.0f}"),
        ("large copy, GB/s", f"{decoder['copy_gb_per_second']:.1f}"),
        ("rollout of 128 steps, full form, MiB", f"{rollout['full'] / 2**20:.1f}"),
        ("rollout of 128 steps, handle form, MiB", f"{rollout['handle'] / 2**20:.3f}"),
        ("peak memory while playing, MiB", "unknown" if peak is None else f"{peak:.0f}"),
        *(
            (f"mask IoU with float32, {what} in {dtype}", f"{value:.4f}")
            for dtype, effect in summary["mask_iou_with_float32"].items()
            for what, value in effect.items()
        ),
    ]


def _speed_plot(summary: dict[str, Any]) -> Any:
    figure, axes = report.new_plot()
    sizes = [int(n) for n in summary["by_num_envs"]]
    colours = {"vector": report.BLUE, "scalar": "#e08a1e", "reference": "#8a6fb3"}
    for side in _SIDES:
        for kind, dashes in zip(_KINDS, ("-", "--"), strict=True):
            speed = [
                measured[kind][f"{side}_steps_per_second"]
                for measured in summary["by_num_envs"].values()
            ]
            label = f"{side}, {kind}"
            axes.plot(sizes, speed, dashes, color=colours[side], marker="o", ms=4, label=label)
    axes.set(xscale="log", xlabel="environments", ylabel="env steps per second")
    axes.set_ylim(bottom=0)
    axes.set_xticks(sizes, [str(n) for n in sizes])
    axes.minorticks_off()
    axes.legend(frameon=False, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return figure


def _phase_plot(measured: dict[str, Any]) -> Any:
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
        width = np.array([measured[kind]["phases_ms"][phase] for kind in kinds])
        axes.barh([f"{kind} images" for kind in kinds], width, 0.6, left, color=colour, label=phase)
        left += width
    axes.set_xlabel("milliseconds per vector step")
    axes.legend(frameon=False, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return figure
