"""Let a trained agent annotate a folder of images: `python -m agents.annotate --help`."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from pycocotools import mask as rle

from agents.annotation.files import Ids, Progress, Reader, image_files, overlay_folder
from agents.evaluate import PolicyAgent
from agents.policies.base import ImplicitPolicy
from sam_gym.data import Sample
from sam_gym.envs.click import ClickCore, ClickTarget, SamSegConfig
from sam_gym.utils import cli
from sam_gym.utils.files import write_json
from sam_gym.utils.progress import track
from sam_gym.utils.registry import unknown_name
from sam_gym.utils.render import draw_episode, save_image

#: The option that asks for everything mode instead of an agent.
EVERYTHING = "--everything"


@dataclass
class Config:
    """Annotate a folder of images with a trained agent and write COCO JSON.

    Every image is asked for every category. An annotation has the agent's mask (RLE), a `score`
    (what SAM takes the mask's IoU for) and the number of `clicks`. A run that was cut off goes on
    where it was when it is started again. Files that are no images are reported and skipped.

    Without an agent, `--everything` finds the masks of all that is in the images; see
    `python -m agents.annotate --everything --help`.
    """

    policy: str
    """Path of a policy.zip, as train_ppo writes it, hf://USER/NAME[@REVISION], or one of the
    package: implicit, explicit."""
    images: str
    """Folder of images; folders within it are looked through too."""
    categories: str
    """Comma-separated categories to look for."""
    out: str = "annotations.json"
    """COCO JSON to write."""
    overlays: str | None = None
    """Folder for pictures of the masks and clicks (left out: beside `out`; "none": no pictures)."""
    coco: str | None = None
    """COCO JSON whose image and category ids are used, so that COCOeval can compare with it."""
    min_score: float = 0.0
    """Leave out masks of a lower score."""
    num_envs: int = 16
    """Images and categories that are worked on side by side."""
    max_steps: int | None = None
    """Actions per mask (left out: as in training)."""
    keep_best: bool = False
    """Keep the earlier mask when a click yields one of lower score."""
    device: str = "auto"
    """Where to work: auto, cpu, mps, cuda."""


@dataclass(frozen=True)
class Job:
    """A category to look for in an image file."""

    file: str
    category: int


class _Unlabelled:
    """The dataset of an environment whose targets are placed one by one."""

    name = "images"

    def __init__(self, categories: Sequence[str]) -> None:
        self.categories = tuple(categories)

    def __len__(self) -> int:
        return 0

    def __getitem__(self, index: int) -> Sample:
        raise IndexError(f"{index}: there are no annotated images.")

    def draw(self, rng: np.random.Generator) -> tuple[int, int | None]:
        raise RuntimeError("Targets have to be placed: nothing can be drawn.")


class Annotator:
    """Plays a policy on images that nobody has annotated.

    Args:
        agent: the policy.
        categories: what can be asked for.
        num_envs: masks that are worked on side by side.
        max_steps: actions per mask (None: as in training).
        keep_best: as of `SamSegConfig`.
    """

    def __init__(
        self,
        agent: PolicyAgent,
        categories: Sequence[str],
        num_envs: int,
        max_steps: int | None = None,
        keep_best: bool = False,
    ) -> None:
        self.agent, policy = agent, agent.policy
        if "cue_click" in policy.observation_space.spaces:  # type: ignore[attr-defined]
            raise ValueError("This policy was trained on instances, which a cue click shows to it.")
        others = int(policy.action_space.n) - 2 * policy.grid**2  # type: ignore[attr-defined]
        if others != len(policy.others):
            raise ValueError(
                f"This policy has {others} actions beyond clicks, but says of {len(policy.others)} "
                "what they are. Train it with this version of train_ppo."
            )
        check_words(policy, categories)
        backbone = dict(policy.features["backbone"])
        config = SamSegConfig(
            obs="handle",
            backbone=backbone.pop("name"),
            **backbone,
            grid=policy.grid,
            max_steps=max_steps or policy.features["max_steps"],
            keep_best=keep_best,
            stop="stop" in policy.others,
            undo="undo" in policy.others,
        )
        self.core = ClickCore(config, num_envs, _Unlabelled(categories))

    def annotate(
        self, images: Sequence[np.ndarray], jobs: Sequence[Job]
    ) -> Iterator[tuple[dict[str, Any], np.ndarray]]:
        """Work on up to `num_envs` jobs at once.

        Args:
            images: uint8 (H, W, 3), of each job.
            jobs: what to look for.

        Yields:
            For each job the mask's `segmentation` (RLE), `area`, `bbox`, `score` and `clicks`, and
            a picture of it, uint8 (H, W, 3).
        """
        core = self.core
        everything = [
            ClickTarget(image, np.ones(image.shape[:2], bool), None, job.category, job.file, None)
            for image, job in zip(images, jobs, strict=True)
        ]
        # The slots that are left over repeat the last job.
        missing = core.num_envs - len(everything)
        core.place(range(core.num_envs), everything + everything[-1:] * missing)
        playing = np.ones(core.num_envs, bool)
        while playing.any():
            actions = self.agent.act(core, core.observe(np.arange(core.num_envs)))
            slots = np.flatnonzero(playing)
            _, terminated, truncated = core.step(slots, actions[slots])
            playing[slots] = ~(terminated | truncated)
        for slot, job in enumerate(jobs):
            yield self._result(slot), self._picture(slot, job)

    def _result(self, slot: int) -> dict[str, Any]:
        count = int(self.core.num_clicks[slot])
        coded = rle.encode(np.asfortranarray(self.core.mask(slot), np.uint8))
        return {
            "segmentation": {"size": coded["size"], "counts": coded["counts"].decode("ascii")},
            "area": int(rle.area(coded)),
            "bbox": rle.toBbox(coded).tolist(),
            "iscrowd": 0,
            "score": float(self.core.predicted_ious[slot, count]),
            "clicks": count,
        }

    def _picture(self, slot: int, job: Job) -> np.ndarray:
        core, count = self.core, int(self.core.num_clicks[slot])
        score = core.predicted_ious[slot, count]
        caption = f"{core.dataset.categories[job.category]}  score {score:.2f}  {count} clicks"
        image = core.ground_truth(slot).image
        return draw_episode(image, core.mask(slot), core.clicks(slot), caption=caption)


def check_words(policy: ImplicitPolicy, categories: Sequence[str]) -> None:
    """Raise `ValueError` for a category that a policy cannot look for, or that is named twice."""
    known = policy.features.get("vocabulary")
    for name in categories:
        if known and name not in known:
            raise unknown_name("category of this policy", name, known)
        if list(categories).count(name) > 1:
            raise ValueError(f"Category {name!r} is named twice.")
    policy.set_categories(categories)


def annotate(config: Config) -> dict[str, Any]:
    """Annotate and write; returns what stands in the COCO file.

    Raises:
        ValueError, FileNotFoundError: an option, the policy or the folder is wrong.
    """
    if config.num_envs < 1:
        raise ValueError(f"--num-envs must be at least 1, got {config.num_envs}.")
    names = [name.strip() for name in config.categories.split(",") if name.strip()]
    if not names:
        raise ValueError("--categories is empty: name what to look for, for example star,ring.")
    files = image_files(config.images)
    ids = Ids(config.coco, files, names)
    files, left_out = ids.known(files, config.images)
    agent = PolicyAgent.load(config.policy, config.device)
    if not isinstance(agent.policy, ImplicitPolicy):
        raise ValueError(
            f"{config.policy}: this policy does not click for a category, so it cannot annotate. "
            "For the masks of all that is in an image: python -m agents.annotate --everything."
        )
    annotator = Annotator(agent, names, config.num_envs, config.max_steps, config.keep_best)

    out = Path(config.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    overlays = overlay_folder(config.overlays, out)
    progress = Progress(out.with_suffix(".partial.jsonl"), asdict(config) | {"names": names})
    jobs = [
        Job(file, category)
        for file in files
        for category in range(len(names))
        if (file, category) not in progress.done
    ]
    if progress.done:
        print(f"Going on: {len(progress.done)} of {len(progress.done) + len(jobs)} are done.")
    reader = Reader(config.images, annotator.core.backbone)
    for first in track(range(0, len(jobs), config.num_envs), "annotating"):
        pairs = [(job, reader.read(job.file)) for job in jobs[first : first + config.num_envs]]
        chunk = [(job, image) for job, image in pairs if image is not None]
        if not chunk:
            continue
        results = annotator.annotate([image for _, image in chunk], [job for job, _ in chunk])
        for (job, _), (result, picture) in zip(chunk, results, strict=True):
            keep = result["area"] > 0 and result["score"] >= config.min_score
            progress.add((job.file, job.category), result if keep else None)
            if overlays is not None and keep:
                overlays.mkdir(parents=True, exist_ok=True)
                name = f"{job.file}__{names[job.category]}.jpg".replace("/", "__")
                save_image(overlays / name, picture)
    annotator.core.close()

    content = _as_coco(config, progress, ids, names, reader)
    write_json(out, content)
    progress.finish()
    reader.report(left_out, config.coco)
    counts = f"{len(content['annotations'])} masks in {len(content['images'])} images"
    print(f"{counts}, {len(reader.broken)} files skipped: {out}")
    if overlays is not None:
        print(f"Pictures: {overlays}")
    return content


def _as_coco(
    config: Config, progress: Progress, ids: Ids, names: Sequence[str], reader: Reader
) -> dict[str, Any]:
    images: dict[str, dict[str, Any]] = {}
    annotations: list[dict[str, Any]] = []
    for (file, category), annotation in sorted(progress.done.items()):
        if file not in ids.images:
            continue
        if file not in images:
            image = reader.read(file)
            if image is None:
                continue
            height, width = image.shape[:2]
            images[file] = {
                "id": ids.images[file],
                "file_name": file,
                "height": height,
                "width": width,
            }
        if annotation is not None:
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": ids.images[file],
                    "category_id": ids.categories[names[category]],
                    **annotation,
                }
            )
    return {
        "info": {"description": f"annotated by {config.policy}"},
        "images": list(images.values()),
        "categories": [{"id": ids.categories[name], "name": name} for name in names],
        "annotations": annotations,
    }


def main(args: Sequence[str] | None = None) -> dict[str, Any]:
    """The command line."""
    args = list(sys.argv[1:] if args is None else args)
    if EVERYTHING in args:
        from agents.annotation import everything as annotate_everything

        return annotate_everything.main([arg for arg in args if arg != EVERYTHING])
    return annotate(tyro.cli(Config, args=args))


if __name__ == "__main__":
    cli.run(main)
