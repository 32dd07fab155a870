"""Annotate a folder of images with a trained agent, or with everything mode.

python -m agents.annotate --policy explicit --images PHOTOS --categories star,ring
python -m agents.annotate --everything --images PHOTOS
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from agents.annotation.folder import FolderConfig, FolderRun, annotate_folder
from agents.evaluate import PolicyAgent
from agents.sharing.pull import PolicyOption
from agents.tasks import task_of_policy
from sam_gym.data.base import split_names
from sam_gym.utils import cli
from sam_gym.utils.settings import Count, check_settings

#: The option that selects everything mode instead of an agent.
EVERYTHING = "--everything"


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


def annotate(config: AnnotateConfig) -> dict[str, Any]:
    """Annotate images and write COCO JSON; returns its content.

    Raises:
        ValueError, FileNotFoundError: an option, the policy or the folder is wrong.
    """
    check_settings(config)
    if not config.categories.strip(" ,"):
        raise ValueError("--categories is empty: name what to look for, for example star,ring.")
    run = FolderRun.prepare(config)
    agent = PolicyAgent.load(config.policy, config.device)
    task = task_of_policy(agent.policy)
    task.require("annotate")
    features = agent.policy.features
    names = split_names(config.categories, features.get("vocabulary") or features["categories"])
    names = [name for name in names if name]
    return annotate_folder(run, task.make_annotator(agent, names, config))


def main(args: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the command line."""
    args = list(sys.argv[1:] if args is None else args)
    if EVERYTHING in args:
        from agents.annotation import everything

        return everything.main([arg for arg in args if arg != EVERYTHING])
    return annotate(cli.parse(AnnotateConfig, "python -m agents.annotate", args))


if __name__ == "__main__":
    cli.run(main, "Run the same command again to resume.")
