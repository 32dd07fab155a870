"""Fine-tune a video tracker on the motion of your videos: a time lapse, as COCO JSON of videos.

python examples/fine_tune_tracker.py
python examples/fine_tune_tracker.py --data PATH/videos --steps 500
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import tyro
from PIL import Image
from pycocotools import mask as rle

from adaptation import evaluate_video, train_video
from sam_gym import make_video_dataset
from sam_gym.data.videos.writer import AnnotatedVideo, Masklet, write_masklets


def write_time_lapses(root: Path, split: str, videos: int, frames: int, every: int) -> None:
    """Write one frame in `every` of clips, and their masks as `instances_SPLIT.json`."""
    clips = make_video_dataset("clips", split, length=videos, frames=(frames - 1) * every + 1)
    names, written = [f"{frame:05d}.png" for frame in range(frames)], []
    for number in range(videos):
        clip, video = clips[number], f"{split}_{number:03d}"
        folder = root / "images" / video
        folder.mkdir(parents=True, exist_ok=True)
        masks: list[dict[int, str]] = [{} for _ in clip.objects]
        for frame, name in enumerate(names):
            Image.fromarray(clip.image(frame * every)).save(folder / name)
            for own, mask in zip(masks, clip.annotation(frame * every).masks, strict=True):
                if mask.any():
                    own[frame] = rle.encode(np.asfortranarray(mask))["counts"].decode()
        objects = {
            track: Masklet(clips.categories[category], 1.0, own)
            for track, category, own in zip(clip.objects, clip.categories, masks, strict=True)
        }
        written.append(AnnotatedVideo(video, clip.size, names, objects))
    path = write_masklets(root, written, clips.categories, "coco-video")
    path.rename(root / f"instances_{split}.json")


def main(
    data: Path | None = None,
    videos: int = 96,
    held_out: int = 24,
    frames: int = 12,
    every: int = 16,
    steps: int = 200,
    learning_rate: float = 5e-4,
    seed: int = 0,
    out: Path = Path("runs/example_fine_tuning"),
) -> None:
    """Fine-tune `micro_video`, and measure the gain on held-out videos.

    Args:
        data: Folder of your videos (None: time lapses are written to OUT/videos).
        videos: Time lapses to train on.
        held_out: Time lapses to measure on.
        frames: Frames of a time lapse.
        every: Frames of the clip per frame of the time lapse.
        steps: Optimizer steps.
        learning_rate: Initial learning rate.
        seed: Seed of the training.
        out: Folder for everything.
    """
    if data is None:
        data = out / "videos"
        for split, count in (("train", videos), ("val", held_out)):
            if not (data / f"instances_{split}.json").exists():
                write_time_lapses(data, split, count, frames, every)
    run, report = out / f"run-{seed}", out / f"report-{seed}"
    source = ["--dataset", "coco-video", "--data", str(data), "--overwrite"]
    what = ["--parts", "memory", "--prompt.kind", "mask", "--prompt.corrected", "0"]
    pace = ["--steps", str(steps), "--learning-rate", str(learning_rate), "--seed", str(seed)]
    train_video.main([*source, *what, *pace, "--out", str(run)])
    adapter = ["--adapter", str(run / "adapter.safetensors"), "--split", "val"]
    result = evaluate_video.main([*source, *adapter, "--overlays", "2", "--out", str(report)])
    before, after = (result["scores"][name]["J&F"] for name in ("without adapter", "adapted"))
    print(f"held-out J&F {before:.3f} before, {after:.3f} after")


if __name__ == "__main__":
    tyro.cli(main)
