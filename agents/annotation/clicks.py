"""Annotate images with a click agent, which segments one category at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from agents.annotation.folder import AnnotatedItem, FolderConfig, Key
from agents.baselines.base import TrainedAgent
from agents.policies import SamPolicy
from agents.sharing.pull import PolicyOption
from sam_gym.data import Sample
from sam_gym.data.coco_writer import mask_annotation
from sam_gym.envs.click import ClickCore, ClickTarget, SamSegConfig
from sam_gym.utils.digest import digest_of
from sam_gym.utils.fields import documented
from sam_gym.utils.registry import unknown_name
from sam_gym.utils.render import draw_episode
from sam_gym.utils.settings import Count


@documented
@dataclass(kw_only=True)
class AnnotateConfig(FolderConfig):
    """Annotate a folder of images with a trained agent and write COCO JSON.

    The agent segments every category in every image. An annotation has the agent's mask, a
    `score` (SAM's predicted IoU) and the number of `clicks`. Files that cannot be read are reported
    and skipped. Run the same command again to resume an interrupted run.

    Example: python -m agents.annotate --policy explicit --images PHOTOS --categories star,ring

    To annotate everything without an agent: `python -m agents.annotate --everything --help`.
    """

    policy: PolicyOption
    categories: str
    """Comma-separated categories to segment."""
    min_score: float = 0.0
    """Drop masks of a lower score."""
    num_envs: Count = 16
    """Number of masks to segment in parallel."""
    max_steps: Count | None = None
    """Actions per mask (None: as in training)."""
    keep_best: bool = False
    """Keep the previous mask when a click yields one of lower score."""


class _NoDataset:
    """Dataset of an environment whose targets are placed from outside."""

    name = "images"

    def __init__(self, categories: Sequence[str]) -> None:
        self.categories = tuple(categories)

    def __len__(self) -> int:
        return 0

    def __getitem__(self, index: int) -> Sample:
        raise IndexError(f"{index}: there are no annotated images.")

    def draw(self, rng: np.random.Generator) -> tuple[int, int | None]:
        raise RuntimeError("Targets have to be placed: nothing can be drawn.")


class ClickAnnotator:
    """Plays a click agent on images without annotations; keys are (file, category index).

    Args:
        agent: the agent.
        categories: categories to segment.
        num_envs: masks that are segmented side by side.
        max_steps: actions per mask (None: as in training).
        keep_best: see `SamSegConfig`.
        min_score: drop masks of a lower score.
        description: `info` of the annotation file.

    Raises:
        ValueError: the policy needs a cue click, does not tell what its actions mean, or does not
            know a category; or a category is given twice.
    """

    new_categories = False

    def __init__(
        self,
        agent: TrainedAgent,
        categories: Sequence[str],
        num_envs: int,
        max_steps: int | None = None,
        keep_best: bool = False,
        min_score: float = 0.0,
        description: str = "",
    ) -> None:
        self.agent, policy, self.batch_size = agent, agent.policy, num_envs
        self.categories, self.min_score = categories, min_score
        self.description, self.settings = description, {"categories": list(categories)}
        if "cue_click" in policy.observation_space.spaces:
            raise ValueError("This policy was trained on instances, which a cue click shows to it.")
        check_others(policy)
        check_categories(policy, categories)
        backbone = dict(policy.features["backbone"])
        config = SamSegConfig(
            obs="handle",
            backbone=backbone.pop("name"),
            **backbone,
            grid=policy.grid,
            max_steps=max_steps or policy.features["max_steps"],
            keep_best=keep_best,
            initial_mask=policy.initial_mask,
            stop="stop" in policy.others,
            undo="undo" in policy.others,
        )
        self.core = ClickCore(config, num_envs, _NoDataset(categories))
        self.backbone = self.core.backbone
        label = repr((policy.features, policy.others, policy.features_extractor.identity))
        self.identity = digest_of(policy.state_dict(), label)

    def keys(self, file: str) -> list[Key]:
        return [(file, category) for category in range(len(self.categories))]

    def label(self, key: Key) -> str:
        file, category = key
        return f"{file}__{self.categories[category]}"

    def stream(self, items: Iterator[tuple[Key, np.ndarray]]) -> Iterator[AnnotatedItem]:
        try:
            while batch := list(islice(items, self.core.num_envs)):
                self._play(batch)
                for env_index, (key, image) in enumerate(batch):
                    yield self._annotated(env_index, key, image)
        finally:
            self.core.close()

    def _play(self, batch: Sequence[tuple[Key, np.ndarray]]) -> None:
        """Play one episode per item; sub-environments that are left over repeat the last item."""
        core = self.core
        targets = [
            ClickTarget(image, np.ones(image.shape[:2], bool), None, category, file, None)
            for (file, category), image in batch
        ]
        missing = core.num_envs - len(targets)
        core.set_targets(range(core.num_envs), targets + targets[-1:] * missing)
        playing = np.ones(core.num_envs, bool)
        while playing.any():
            actions = self.agent.act(core, core.observe(np.arange(core.num_envs)))
            indices = np.flatnonzero(playing)
            _, terminated, truncated = core.step(indices, actions[indices])
            playing[indices] = ~(terminated | truncated)

    def _annotated(self, env_index: int, key: Key, image: np.ndarray) -> AnnotatedItem:
        """Annotation of a sub-environment's mask, if it has pixels and a sufficient score."""
        core, (_, category) = self.core, key
        name, count = self.categories[category], int(core.num_clicks[env_index])
        mask, clicks = core.mask(env_index), core.clicks(env_index)
        score = float(core.predicted_ious[env_index, count])
        annotation = mask_annotation(mask, score=score, clicks=count, category=name)
        keep = annotation["area"] > 0 and score >= self.min_score

        def draw() -> np.ndarray:
            caption = f"{name}  score {score:.2f}  {count} clicks"
            return draw_episode(image, mask, clicks, caption=caption)

        annotations, size = [annotation] if keep else [], image.shape[:2]
        return AnnotatedItem(key, size, annotations, draw if keep else None)


def check_others(policy: SamPolicy) -> None:
    """Raise `ValueError` if a click policy does not tell what its other actions mean."""
    own: Any = policy
    others = int(own.action_space.n) - 2 * own.grid**2
    if others != len(own.others):
        raise ValueError(
            f"This policy has {others} actions beyond clicks, but names {len(own.others)} "
            "of them. Train it with this version of train_ppo."
        )


def check_categories(policy: SamPolicy, categories: Sequence[str]) -> None:
    """Raise `ValueError` for a category that a policy does not know, or that is given twice."""
    known = policy.features.get("vocabulary")
    for name in categories:
        if known and name not in known:
            raise unknown_name("category of this policy", name, known)
        if list(categories).count(name) > 1:
            raise ValueError(f"Category {name!r} is named twice.")
    policy.set_categories(categories)
