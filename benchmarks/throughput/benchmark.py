"""`throughput`: what batching gains over the way it is done today, phase by phase."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from unittest.mock import patch

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from segment_anything.modeling import Sam

import sam_gym  # noqa: F401  (registers the environments)
from benchmarks import report
from benchmarks.options import BackboneOptions, provenance, require_at_least
from benchmarks.throughput import report as throughput_report
from benchmarks.throughput.machine import (
    decoder_speed,
    encoder_speed,
    peak_memory_mib,
    precision_effect,
)
from benchmarks.throughput.reference import PredictorEnv, check_comparable, plain_sam
from sam_gym.backbones import BACKBONES, Backbone
from sam_gym.backbones.embeddings.store import EmbeddingStore
from sam_gym.data.cache import SampleCache
from sam_gym.envs.click import ClickCore, SamSegConfig
from sam_gym.metrics.masks import iou
from sam_gym.utils.progress import ProgressBar
from sam_gym.utils.transfer import synchronise

_SIDES = ("vector", "reference", "scalar")

#: Phase of a step -> whose methods make it up. Time in a nested method counts for that one only.
PHASES = {
    "encode": ("backbone.encode",),
    "decode": ("backbone.decode_best",),
    "samples": ("_draw_all",),
    "store": ("store.acquire", "store.gather"),
    "clicks": ("_add_click",),
    "score": ("_low_iou", "_reward"),
    "observation": ("_shown", "observe", "info"),
}
REST = "rest"
_KINDS = ("cached", "fresh")

#: Two batch sizes round differently, and a logit near zero may flip a pixel: the largest difference
#: of a reward that is put down to that, by precision, and the share of rewards that may exceed it.
_TOLERANCES = {torch.float32: 0.01}
_LOW_PRECISION_TOLERANCE = 0.05
_MAX_OUTLIERS = 0.02

#: Growth over images is measured with at most so many environments, and at least so many images
#: for each: then several chunks remain on either side of the first eviction.
_GROWTH_NUM_ENVS = 64
_GROWTH_IMAGES_PER_ENV = 8


@dataclass
class ThroughputBenchmarkConfig(BackboneOptions):
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
    growth_images: int = 1024
    """Fresh images over which the cost of a step is followed; 0 leaves that out."""

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
        require_at_least(0, seed=self.seed, growth_images=self.growth_images)
        if self.steps % self.max_steps:
            raise ValueError(
                f"--steps must be a multiple of --max-steps ({self.max_steps}), got {self.steps}: "
                "else some repeats would hold more resets than others."
            )

    @property
    def growth_num_envs(self) -> int:
        """Environments that play while the cost is followed over images."""
        fitting = [n for n in self.num_envs if n <= _GROWTH_NUM_ENVS]
        return max(fitting) if fitting else min(self.num_envs)

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
            "compile": self.compile,
            "obs": obs,
            "max_steps": self.max_steps,
        }


def run(config: ThroughputBenchmarkConfig) -> dict[str, Any]:
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
    with ProgressBar() as progress:
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
        chunks = []
        if config.growth_images:
            task = progress.add_task("fresh images", total=config.growth_images)
            for chunk in play_chunks(config):
                chunks.append(chunk)
                progress.update(task, completed=chunk.images)
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
        "linear_fit": {
            kind: linear_fit(
                {int(n): measured[kind]["vector_step_ms"] for n, measured in by_num_envs.items()}
            )
            for kind in _KINDS
        },
        "growth": {"num_envs": config.growth_num_envs, **growth(chunks)} if chunks else None,
        "rollout_bytes": rollout_bytes(config, backbone),
        "rollout_bytes_vit_b": rollout_bytes(config, shapes_of("vit_b")),
        "encoder": encoder_speed(backbone, plain),
        "decoder": decoder_speed(backbone, max(config.num_envs)),
        "mask_iou_with_float32": precision_effect(backbone),
        "peak_memory_mib": peak_memory,
        **provenance(config, backbone),
    }
    throughput_report.write(summary, rows, out)
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
        self,
        config: ThroughputBenchmarkConfig,
        backbone: Backbone,
        plain: Sam,
        num_envs: int,
        fresh: bool,
    ) -> None:
        self.config, self.backbone, self.num_envs = config, backbone, num_envs
        settings = config.env_settings(fresh)
        self.vector = make_vector(num_envs, settings)
        self.scalars = [
            gym.make("SamSeg-v0", disable_env_checker=True, **settings) for _ in range(num_envs)
        ]
        rules = ClickCore(SamSegConfig(**settings), 1)
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
        mask_iou = np.array(
            [
                [iou(*pair) for pair in zip(*step, strict=True)]
                for step in zip(vector.masks, reference.masks, strict=True)
            ]
        )
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


def make_vector(num_envs: int, settings: dict[str, Any]) -> gym.vector.VectorEnv:
    """The vector environment, whose episodes begin in the step that ends those before."""
    return gym.make_vec(
        "SamSeg-v0",
        num_envs=num_envs,
        vectorization_mode="vector_entry_point",
        autoreset_mode="SameStep",
        **settings,
    )


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
    slots, seconds = torch.arange(core.num_envs), 0.0
    for row in actions:
        started = time.perf_counter()
        _, reward, _, _, info = env.step(row)
        # What is drawn ahead or still running on the device is work of this side, also where
        # nothing hides it.
        core.prefetcher.wait()
        synchronise(core.device)
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
    synchronise(envs[0].unwrapped.core.device)  # type: ignore[attr-defined]
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


class Chunk(NamedTuple):
    """An episode of every environment, on fresh images.

    Attributes:
        images: images encoded by its end, since the environments were made.
        held: embeddings in the store by its end.
        step_ms: milliseconds per vector step.
    """

    images: int
    held: int
    step_ms: float


def play_chunks(config: ThroughputBenchmarkConfig) -> Iterator[Chunk]:
    """Play the vector environment alone on fresh images until it has seen `growth_images`.

    The embedding store and the sample cache hold a quarter of the images: the first chunks fill
    them, the later ones evict.
    """
    num_envs = config.growth_num_envs
    total = max(config.growth_images, _GROWTH_IMAGES_PER_ENV * num_envs)
    rng = np.random.default_rng(config.seed)
    with closing(make_vector(num_envs, config.env_settings(fresh=True))) as env:
        core: ClickCore = env.unwrapped.core  # type: ignore[attr-defined]
        # An episode's image is let go once the next one's is there.
        kept = max(total // 4, 2 * num_envs)
        embedding_bytes = core.backbone.feature_spec.nbytes
        core.samples = SampleCache(core.dataset, kept * core.dataset[0].image.nbytes)
        core.store = EmbeddingStore(core.backbone, kept * embedding_bytes)
        env.reset(seed=config.seed)
        while core.store.encoded < total:
            actions = rng.integers(0, int(core.action_space.n), (config.max_steps, num_envs))
            seconds = play_vector(env, actions, Played())
            step_ms = 1000 * seconds / config.max_steps
            yield Chunk(core.store.encoded, len(core.store), step_ms)


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
    config: ThroughputBenchmarkConfig,
    num_envs: int,
    kind: str,
    repeat: int,
    seconds: dict[str, float],
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


def _speed(
    config: ThroughputBenchmarkConfig, num_envs: int, rows: Sequence[dict[str, Any]]
) -> dict[str, float]:
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


def _phases(
    config: ThroughputBenchmarkConfig, profiles: Sequence[dict[str, float]]
) -> dict[str, Any]:
    """Median milliseconds per vector step of each phase, and the share that is not the model."""
    overhead = [1 - (p["encode"] + p["decode"]) / sum(p.values()) for p in profiles]
    return {
        "phases_ms": {
            phase: 1000 * float(np.median([p[phase] for p in profiles])) / config.steps
            for phase in (*PHASES, REST)
        },
        "overhead_share": float(np.median(overhead)),
    }


def linear_fit(step_ms: Mapping[int, float]) -> dict[str, float] | None:
    """Least-squares line through milliseconds per vector step by number of environments.

    Returns:
        ms_per_env, intercept_ms and r_squared; None for fewer than three numbers of environments,
        through which a line always fits.
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
    """Cost of a step against images seen, without the first chunk, which warms up.

    `capacity` is how many embeddings were held at most;
    `last_over_first` is the median of the last quarter of the chunks over that of the first.
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
    """A backbone without weights, which only its shapes can be asked for."""
    device = torch.device("meta")
    with device:
        return Backbone(name, BACKBONES.get(name).build(), device, torch.float32)


def rollout_bytes(
    config: ThroughputBenchmarkConfig, backbone: Backbone, steps: int = 128
) -> dict[str, float]:
    """Bytes of the observations that a rollout of one environment stores, in either form."""

    def stored(obs: str) -> int:
        core = ClickCore(SamSegConfig(**config.env_settings(False, obs)), 1)
        core.backbone = backbone
        sample = core._make_observation_space().sample()
        core.close()
        return steps * sum(np.asarray(value).nbytes for value in sample.values())

    full, handle = stored("full"), stored("handle")
    return {"steps": steps, "full": full, "handle": handle, "ratio": full / handle}
