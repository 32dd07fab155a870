"""Annotate a folder of images with a trained agent, everything mode or a semantic head, or videos.

python -m agents.annotate --policy explicit --images PHOTOS --categories star,ring
python -m agents.annotate --everything --images PHOTOS
python -m agents.annotate --config dense --images PHOTOS
python -m agents.annotate --semantic --adapter ADAPTER --images PHOTOS
python -m agents.annotate --video CLIP.mp4 --everything --out MASKLETS
torchrun --nproc_per_node=2 -m agents.annotate --everything --images PHOTOS
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from agents.annotation.clicks import AnnotateConfig, untrained_words
from agents.annotation.folder import FolderRun, annotate_folder
from agents.annotation.merging import AnnotationFile
from agents.annotation.presets import with_presets
from agents.evaluate import PolicyAgent
from agents.policies.saved import SHIPPED
from agents.tasks import task_of_policy
from sam_gym.data.base import split_names
from sam_gym.utils import cli
from sam_gym.utils.settings import check_settings
from sam_gym.utils.text import printable

#: The options that select everything mode or a semantic head instead of an agent.
EVERYTHING, SEMANTIC = "--everything", "--semantic"
#: The option that selects masklets.
VIDEO = "--video"


def annotate(config: AnnotateConfig) -> AnnotationFile:
    """Annotate images and write COCO JSON; returns the file.

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
    annotator = task.make_annotator(agent, names, config)
    for name, nearest in untrained_words(agent.policy, names).items():
        print(
            f"The agent was not trained on {printable(name)!r}: its CLIP alone tells where it is. "
            f"The nearest word of its training is {nearest!r}."
        )
    content = annotate_folder(run, annotator)
    if config.policy in SHIPPED and run.ranks.is_first:
        print(
            "The bundled agents learned from drawn scenes, and are often wrong on photographs. "
            "Train one on yours: python -m agents.train_ppo --dataset coco --data PATH "
            "--categories NAMES."
        )
    return content


def main(args: Sequence[str] | None = None) -> Any:
    """Run the command line; returns the COCO file, or the annotated videos."""
    args = with_presets(sys.argv[1:] if args is None else args)
    if any(arg == VIDEO or arg.startswith(f"{VIDEO}=") for arg in args):
        from agents.annotation import video

        return video.main(args)
    if EVERYTHING in args:
        from agents.annotation import everything

        return everything.main([arg for arg in args if arg != EVERYTHING])
    if SEMANTIC in args:
        from agents.annotation import semantic

        return semantic.main([arg for arg in args if arg != SEMANTIC])
    return annotate(cli.parse(AnnotateConfig, "python -m agents.annotate", args))


if __name__ == "__main__":
    cli.run(main, "Run the same command again to resume.")
