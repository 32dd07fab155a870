"""Annotate images with a click agent, which segments one category at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice
from typing import Annotated, Any

import numpy as np
import tyro

from agents.annotation.folder import AnnotatedItem, FolderConfig, Key
from agents.annotation.instances import Instance, split_instances
from agents.annotation.presence import Presence
from agents.baselines.base import TrainedAgent
from agents.clip.models import Clip
from agents.policies import SamPolicy
from agents.policies.explicit import shared_surgery
from agents.sharing.pull import PolicyOption
from sam_gym.data import Sample
from sam_gym.data.coco_writer import mask_annotation
from sam_gym.data.synthetic.scenes import Scenes
from sam_gym.envs.click import ClickCore, ClickTarget, SamSegConfig
from sam_gym.utils.digest import digest_of
from sam_gym.utils.fields import documented
from sam_gym.utils.registry import unknown_name
from sam_gym.utils.render import draw_episode, draw_masks
from sam_gym.utils.settings import Count, Fraction
from sam_gym.utils.text import counted

#: An item to annotate, with its image uint8 (H, W, 3).
Item = tuple[Key, np.ndarray]


def _categories_help() -> str:
    """Return the help text of `--categories`, with the words of the bundled agents."""
    return (
        "Comma-separated categories to segment. The bundled agents know the objects of procedural "
        f"scenes, and none of photographs: {', '.join(Scenes.categories)}."
    )


@documented
@dataclass(kw_only=True)
class AnnotateConfig(FolderConfig):
    """Annotate a folder of images with a trained agent and write COCO JSON.

    The agent segments every category in every image that shows it. An annotation has the agent's
    mask, a `score` (SAM's predicted IoU), its `presence` (the probability that the image shows the
    category) and the number of `clicks`. Files that cannot be read are reported and skipped. Run
    the same command again to resume an interrupted run.

    Example: python -m agents.annotate --policy explicit --images PHOTOS --categories star,ring

    To annotate everything without an agent: `python -m agents.annotate --everything --help`.

    --config NAME or --config FILE.yaml gives options, which flags override.
    Names: dense, quick, whole_objects.
    """

    policy: PolicyOption
    categories: Annotated[str, tyro.conf.arg(help=_categories_help())]
    min_score: float = 0.0
    """Drop masks of a lower score."""
    min_presence: Fraction | None = None
    """Minimum `presence`, the probability that the image shows the category: below it, the
    category has no mask (None: as calibrated for the agent; 0: keep every mask)."""
    instances: bool = False
    """Write a mask per instance, instead of one of all instances of a category."""
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
        presence: tells which categories an image shows (None: all).
        instances: split the mask of a category into instances.

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
        presence: Presence | None = None,
        instances: bool = False,
    ) -> None:
        self.agent, self.presence, policy = agent, presence, agent.policy
        self.instances, self.batch_size = instances, num_envs
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
        searched = (policy.search,) if policy.search else ()
        label = repr(
            (policy.features, policy.others, policy.features_extractor.identity, *searched)
        )
        scored = "" if presence is None else presence.identity
        self.identity = digest_of(policy.state_dict(), label + scored)

    def keys(self, file: str) -> list[Key]:
        return [(file, category) for category in range(len(self.categories))]

    def label(self, key: Key) -> str:
        file, category = key
        return f"{file}__{self.categories[category]}"

    def stream(self, items: Iterator[Item]) -> Iterator[AnnotatedItem]:
        try:
            while batch := list(islice(items, self.core.num_envs)):
                absent = [self._is_absent(item) for item in batch]
                self.play([item for item, skip in zip(batch, absent, strict=True) if not skip])
                env_indices = count()
                for (key, image), skip in zip(batch, absent, strict=True):
                    if skip:
                        yield AnnotatedItem(key, image.shape[:2], [], None)
                    else:
                        yield self._annotated(next(env_indices), key, image)
        finally:
            self.core.close()

    def _is_absent(self, item: Item) -> bool:
        (_, category), image = item
        return self.presence is not None and self.presence.is_absent(image, category)

    def play(self, batch: Sequence[Item]) -> None:
        """Play one episode per item, at most `num_envs`; other sub-environments rest."""
        if not batch:
            return
        core = self.core
        targets = [
            ClickTarget(image, np.ones(image.shape[:2], bool), None, category, file, None)
            for (file, category), image in batch
        ]
        missing = core.num_envs - len(targets)
        core.set_targets(range(core.num_envs), targets + targets[-1:] * missing)
        core.end_episodes(range(len(targets), core.num_envs))
        while len(indices := core.playing()):
            actions = self.agent.act(core, core.observe(np.arange(core.num_envs)))
            _, terminated, _ = core.step(indices, actions[indices])
            core.end_episodes(indices[terminated])

    def _annotated(self, env_index: int, key: Key, image: np.ndarray) -> AnnotatedItem:
        """Annotation of a sub-environment's mask, if it has pixels and sufficient scores."""
        core, (_, category) = self.core, key
        name, clicked = self.categories[category], int(core.num_clicks[env_index])
        mask, clicks = core.mask(env_index), core.clicks(env_index)
        score = float(core.predicted_ious[env_index, clicked])
        values: dict[str, Any] = {"clicks": clicked, "category": name}
        caption = f"{name}  score {score:.2f}  {counted(clicked, 'click')}"
        keep = bool(mask.any()) and score >= self.min_score
        if self.presence is not None:
            presence = self.presence.score(core, env_index, image, category)
            values["presence"] = round(presence, 4)
            caption += f"  presence {presence:.2f}"
            keep = keep and presence >= self.presence.least
        size = image.shape[:2]
        if not keep:
            return AnnotatedItem(key, size, [], None)
        found = [Instance(mask, score)]
        if self.instances:
            features = core.store.gather(core.handles[[env_index]], check=False)
            found = split_instances(self.backbone, features, mask, score)
            found = [own for own in found if own.score >= self.min_score]
        annotations = [mask_annotation(own.mask, score=own.score, **values) for own in found]

        def draw() -> np.ndarray:
            if self.instances:
                masks = [own.mask for own in found]
                return draw_masks(
                    image, masks, caption=f"{caption}  {counted(len(masks), 'instance')}"
                )
            return draw_episode(image, mask, clicks, caption=caption)

        return AnnotatedItem(key, size, annotations, draw if annotations else None)


def check_others(policy: SamPolicy) -> None:
    """Raise `ValueError` if a click policy does not tell what its other actions mean."""
    own: Any = policy
    others = int(own.action_space.n) - 2 * own.grid**2
    if others != len(own.others):
        raise ValueError(
            f"This policy has {others} actions beyond clicks, but names {len(own.others)} "
            "of them. Train it with this version of train_ppo."
        )


class UnknownCategory(ValueError):
    """A policy cannot find a category."""


def check_categories(policy: SamPolicy, categories: Sequence[str]) -> None:
    """Check that a policy can find categories.

    A policy with a CLIP of an open vocabulary takes words that it was not trained on.

    Raises:
        UnknownCategory: the policy cannot find one.
        ValueError: one is given twice.
    """
    known = policy.features.get("vocabulary")
    is_open = "clip" in policy.features and clip_of(policy).is_open
    for name in categories:
        if known and name not in known and not is_open:
            unknown = unknown_name("category of this policy", name, known)
            raise UnknownCategory(
                f"{unknown} It was trained on these alone. --everything finds masks of other "
                "things, without names; an agent that is trained with an open CLIP (--policy "
                "explicit --clip ViT-B-16 --clip-pretrained openai) takes any word."
            )
        if list(categories).count(name) > 1:
            raise ValueError(f"Category {name!r} is named twice.")
    policy.set_categories(categories)


def clip_of(policy: SamPolicy) -> Clip:
    """Return the CLIP of an explicit policy."""
    return shared_surgery(**policy.features["clip"]).clip


def untrained_words(policy: SamPolicy, categories: Sequence[str]) -> dict[str, str]:
    """Return the categories that a policy was not trained on, each with the nearest known word.

    Empty for policies without a vocabulary or a CLIP.
    """
    known = list(policy.features.get("vocabulary") or ())
    new = [name for name in categories if known and name not in known]
    if not new or "clip" not in policy.features:
        return {}
    surgery = shared_surgery(**policy.features["clip"])
    alike = surgery.embed_texts(new) @ surgery.embed_texts(known).T
    nearest = alike.argmax(dim=1).tolist()
    return {name: known[index] for name, index in zip(new, nearest, strict=True)}
