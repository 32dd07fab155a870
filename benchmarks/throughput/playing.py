"""Play the same episodes on the three sides of `throughput`, and time them."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
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
from benchmarks.throughput.config import ThroughputBenchmarkConfig
from benchmarks.throughput.reference import PredictorEnv
from sam_gym.backbones import Backbone
from sam_gym.backbones.embeddings.store import EmbeddingStore
from sam_gym.data.cache import SampleCache
from sam_gym.envs.click import ClickCore, SamSegConfig
from sam_gym.metrics.masks import iou
from sam_gym.utils.transfer import synchronise

SIDES = ("vector", "reference", "scalar")

#: Phase of a step -> its methods. Time in a nested method counts for that method only.
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

#: Results of different batch sizes differ by rounding, and a logit near zero may flip a pixel.
#: Tolerated difference of rewards by precision, and tolerated fraction of rewards beyond it.
_TOLERANCES = {torch.float32: 0.01}
_LOW_PRECISION_TOLERANCE = 0.05
_MAX_OUTLIERS = 0.02

#: Minimum number of images per environment when growth is measured: several chunks then lie on
#: either side of the first eviction.
_GROWTH_IMAGES_PER_ENV = 8


@dataclass
class Played:
    """The results of one side.

    Attributes:
        masks: per step, bool (N, hm, wm), the low-res mask of each environment.
        rewards: per step, (N,).
        final_ious: per step that ended episodes, (N,).
    """

    masks: list[np.ndarray] = field(default_factory=list)
    rewards: list[np.ndarray] = field(default_factory=list)
    final_ious: list[np.ndarray] = field(default_factory=list)


class Match:
    """Three sides that play the same episodes; each measures the time of its steps only.

    Args:
        config: the settings.
        backbone: the model of the vector and the scalar environments.
        plain: the model of the reference environments.
        num_envs: environments on each side.
        fresh: whether every episode has a new image.
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
        self.played = {side: Played() for side in SIDES}
        self.vector.reset(seed=config.seed)
        for number, env in enumerate(self.scalars):
            env.reset(seed=config.seed + number)
        self.reference.reset(seed=config.seed)

    def _actions(self) -> np.ndarray:
        shape = (self.config.steps, self.num_envs)
        return self._rng.integers(0, int(self.core.action_space.n), shape)

    def play(self) -> dict[str, float]:
        """Play `steps` steps on all sides; returns the seconds per side."""
        actions = self._actions()
        sides = {
            "vector": lambda played: play_vector(self.vector, actions, played),
            "scalar": lambda played: play_scalars(self.scalars, actions, played),
            "reference": lambda played: play_reference(self.reference, actions, played),
        }
        return {side: play(self.played[side]) for side, play in sides.items()}

    def profile(self) -> dict[str, float]:
        """Play `steps` steps on the vector side; returns the seconds per phase."""
        actions = self._actions()
        with phase_timers(self.core) as seconds:
            total = play_vector(self.vector, actions, Played())
        phases = {phase: seconds[phase] for phase in PHASES}
        return phases | {REST: total - sum(phases.values())}

    def agreement(self) -> dict[str, Any]:
        """Return the differences between the sides.

        Vector and scalar environments compute rewards alike, so their rewards are compared. The
        reference scores at image size, so its masks are compared instead.
        """
        tolerance = _TOLERANCES.get(self.backbone.dtype, _LOW_PRECISION_TOLERANCE)
        vector, reference, scalar = (self.played[side] for side in SIDES)
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
    """Make the vector environment with same-step autoreset."""
    return gym.make_vec(
        "SamSeg-v0",
        num_envs=num_envs,
        vectorization_mode="vector_entry_point",
        autoreset_mode="SameStep",
        **settings,
    )


def share_memory(cores: Sequence[ClickCore], warm: bool) -> None:
    """Give one side an embedding store and a sample cache of its own.

    No side reuses the embeddings of another, and the scalar environments share one cache.
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
    env_index, seconds = torch.arange(core.num_envs), 0.0
    for row in actions:
        started = time.perf_counter()
        _, reward, _, _, info = env.step(row)
        # Prefetching and pending device work belong to this side.
        core.prefetcher.wait()
        synchronise(core.device)
        seconds += time.perf_counter() - started
        played.rewards.append(reward)
        # Logits of a finished episode stay until the next click in its sub-environment.
        clicks = info["final_info"]["clicks"] if "final_info" in info else info["clicks"]
        logits = core.logits[env_index, torch.from_numpy(clicks)]
        played.masks.append((logits > 0).cpu().numpy())
        if "final_info" in info:
            played.final_ious.append(info["final_info"]["iou"])
    return seconds


def play_scalars(envs: Sequence[gym.Env], actions: np.ndarray, played: Played) -> float:
    """Step scalar environments in a loop through actions (T, N); returns the seconds."""
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
        images: number of images encoded so far.
        held: number of embeddings in the store.
        step_ms: milliseconds per vector step.
    """

    images: int
    held: int
    step_ms: float


def play_chunks(config: ThroughputBenchmarkConfig) -> Iterator[Chunk]:
    """Play the vector environment on fresh images until it has encoded `growth_images`.

    The embedding store and the sample cache hold a quarter of the images, so later chunks evict.
    """
    num_envs = config.growth_num_envs
    total = max(config.growth_images, _GROWTH_IMAGES_PER_ENV * num_envs)
    rng = np.random.default_rng(config.seed)
    with closing(make_vector(num_envs, config.env_settings(fresh=True))) as env:
        core: ClickCore = env.unwrapped.core  # type: ignore[attr-defined]
        # The image of an episode is released after the next one is acquired.
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
    """Time the methods of `PHASES` on a core; yields a dict of seconds that grows with each call.

    The methods are restored afterwards. Each call synchronises the device, so that its work counts
    for the phase that requested it; speed is therefore measured without timers.
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
