"""The task of `SamSeg-v0`: segment a target by clicks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch

from agents.annotation.clicks import AnnotateConfig, ClickAnnotator, check_categories
from agents.annotation.presence import presence_of
from agents.baselines.base import TrainedAgent
from agents.baselines.click import BASELINES
from agents.policies import POLICIES, ExplicitPolicy
from agents.sharing.markdown import code, text
from agents.sharing.run import TrainingRun
from agents.tasks.base import (
    C,
    CardFacts,
    ExportInput,
    Task,
    backbone_arguments,
    register,
    shell_option,
)
from sam_gym.envs.base_core import BaseCore
from sam_gym.envs.click import SamSegConfig
from sam_gym.envs.config import EnvConfig

#: Fields of the env config that an agent cannot do without where it plays.
_ENVIRONMENT = ("target", "dataset", "backbone", "grid", "max_steps")
_OTHER_ACTIONS = ("stop", "undo")
#: Default of `TrainPPOConfig.search`.
_SEARCH = 2


def _search(search: int | None, recalibrate: bool, initial_mask: str) -> int:
    """Return what None stands for in `TrainPPOConfig.search`, or the value."""
    if search is None:
        return 0 if recalibrate or initial_mask != "empty" else _SEARCH
    return search


@register
class ClickTask(Task):
    """Clicks on the images of one dataset."""

    env_id = "SamSeg-v0"
    config_class: ClassVar[type[EnvConfig]] = SamSegConfig
    policies = ("implicit", "explicit")
    baselines = BASELINES
    supports = frozenset(
        {"annotate", "categories", "export", "hub", "policy_plots", "recalibration", "search"}
    )

    def scored_at(self, env_config: C, score: str) -> C:
        own: Any = env_config
        return replace(own, score=score)

    def policy_arguments(
        self, run: Any, env_config: EnvConfig, core: BaseCore[Any, Any]
    ) -> dict[str, Any]:
        own: Any = env_config
        backbone = core.backbone
        features: dict[str, Any] = {
            "backbone": backbone_arguments(env_config),
            "categories": list(core.dataset.categories),
            "max_steps": own.max_steps,
        }
        if issubclass(POLICIES.get(run.policy), ExplicitPolicy):
            clip = {"name": run.clip, "pretrained": run.clip_pretrained}
            features["clip"] = clip | {"device": own.device}
            features["allow_unknown"] = run.allow_unknown_words
            features["temperature"] = run.temperature
        features["vocabulary"] = features["categories"] if run.know_category else []
        return {
            "features": features,
            "grid": own.grid,
            "others": ["stop"] * own.stop + ["undo"] * own.undo,
            "initial_mask": own.initial_mask,
            "recalibrate": run.recalibrate,
            "search": _search(run.search, run.recalibrate, own.initial_mask),
            # The target map is as fine as a mask.
            "upscale_factor": max(1, backbone.mask_shape[0] // backbone.embedding_shape[1]),
        }

    # Annotation and export ---------------------------------------------------------------------

    def make_annotator(
        self, agent: TrainedAgent, categories: Sequence[str], config: AnnotateConfig
    ) -> ClickAnnotator:
        check_categories(agent.policy, categories)  # before presence asks its CLIP for the words
        return ClickAnnotator(
            agent,
            categories,
            config.num_envs,
            config.max_steps,
            config.keep_best,
            config.min_score,
            f"annotated by {config.policy}",
            presence_of(agent, config.policy, categories, config.min_presence),
            config.instances,
        )

    def export_inputs(self, policy: Any) -> dict[str, ExportInput]:
        features, extractor = policy.features, policy.features_extractor
        count = len(features["categories"])
        channels, height, width = extractor.backbone.embedding_shape
        inputs = {
            "sam_image_embeddings": ExportInput(
                (channels, height, width),
                torch.float32,
                "embedding of the image, as the backbone's encode returns it",
            ),
            "sam_pred_mask_prob": ExportInput(
                extractor.backbone.mask_shape, torch.float32, "probability of the current mask"
            ),
            "target_category": ExportInput(
                (), torch.int64, "index of the category in `categories`", count
            ),
            "num_steps": ExportInput(
                (), torch.int64, "actions taken so far", features["max_steps"]
            ),
        }
        if extractor.has_cue:
            inputs["cue_click"] = ExportInput(
                (2,), torch.float32, "(x, y) of the cue click, 0 to 1 of the frame"
            )
        if "clip" in features:
            inputs["word_maps"] = ExportInput(
                (count, 1 + height * width), torch.float32, "of agents.policies.explicit"
            )
        return inputs

    def export_facts(self, policy: Any) -> dict[str, Any]:
        return {
            "categories": policy.features["categories"],
            "grid": policy.grid,
            "max_steps": policy.features["max_steps"],
            "initial_mask": policy.initial_mask,
            "actions": "grid x grid positive clicks row by row, as many negative, then others",
            "others": policy.others,
        }

    # The model card ----------------------------------------------------------------------------

    def card_facts(self, run: TrainingRun, policy: str) -> CardFacts:
        config = run.config
        own, words = config["env_config"], run.features.get("categories", [])
        facts, limits = self._card_basics(config), self._card_limits(own)
        actions = [f"clicks on {text(own['grid'])} x {text(own['grid'])} cells"]
        actions += [name for name in _OTHER_ACTIONS if own[name]]
        facts.append(
            f"**Actions**: {', '.join(actions)}; at most {text(own['max_steps'])} per mask."
        )
        initial = own.get("initial_mask", "empty")
        if search := _search(config.get("search", 0), config["recalibrate"], initial):
            facts.append(
                f"**Search**: before each click, {text(search + 2)} clicks are decoded "
                "and judged by the module that predicts the target."
            )
        if own["target"] == "instance":
            facts.append("**Target**: one instance, shown by a cue click.")
            limits.append("It needs a cue click for each target, so `annotate` cannot use it.")
            options = [*_ENVIRONMENT, *_OTHER_ACTIONS, *filter(own.get, ["dataset_kwargs"])]
            command = self._card_evaluation(run, policy, *options)
        else:
            named = shell_option("categories", ",".join(words[:2]) or "NAME,NAME")
            command = (
                f"python -m agents.annotate --policy {policy} --images PATH/photos "
                f"{named} --out annotations.json"
            )
            if words:
                facts.append(f"**Categories in training**: {', '.join(map(text, words))}.")
            if config["policy"] == "implicit":
                limits.append("Categories that it was not trained on tell it nothing.")
        return CardFacts(
            summary=(
                "An agent that segments by clicking: at each step it looks at the features of a "
                "Segment Anything Model (SAM) and at the current mask, and places a positive or a "
                "negative click."
            ),
            dataset=own["dataset"],
            facts=facts,
            command=command,
            limits=limits,
            counts=("clicks",),
            metric="Mean IoU at the size of the image",
        )

    def _card_policy(self, config: Mapping[str, Any]) -> str:
        return {
            "implicit": ", which knows a category by its number",
            "explicit": f", which is told in words, through the CLIP {code(config.get('clip'))}",
        }.get(config["policy"], "")
