"""Track objects through a video from clicks, and correct the tracker where it is wrong.

python examples/track_video.py
python examples/track_video.py --video clip.mp4 --point 210 350
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import tyro
from scipy.ndimage import distance_transform_edt

from sam_gym import TrackingSession, Video, VideoTracker, make_video_dataset
from sam_gym.backbones.video.frames import open_video
from sam_gym.metrics.masks import iou
from sam_gym.metrics.video import VideoScorer, summarize
from sam_gym.utils.render import draw_masks, save_gif


def inside(mask: np.ndarray) -> tuple[int, int]:
    """Return the pixel (x, y) of a mask bool (H, W) that is farthest from its boundary."""
    depth = distance_transform_edt(np.pad(mask, 1))[1:-1, 1:-1]
    y, x = divmod(int(depth.argmax()), mask.shape[1])
    return x, y


def track(session: TrackingSession, clip: Video) -> dict[int, np.ndarray]:
    """Track all objects from their prompts on; return the masks bool (N, H, W) of each frame."""
    masks = {}
    for step in session.propagate(start=0, from_prompts=True):
        # The session has its objects in the order of their prompts, the clip in its own.
        own = dict(zip(step.objects, step.masks(), strict=True))
        nothing = np.zeros(clip.size, bool)
        masks[step.frame] = np.stack([own.get(name, nothing) for name in clip.objects])
    return masks


def main(
    video: Path | None = None,
    point: tuple[float, float] | None = None,
    backbone: str = "micro_video",
    frames: int = 16,
    corrections: int = 3,
    out: Path = Path("runs/example_tracking.gif"),
) -> None:
    """Track the objects of a procedural clip, or one object of a video of yours.

    Args:
        video: A video file or a folder of frames (None: a clip with ground truth).
        point: Click on the object in the first frame of the video, (x, y) in pixels.
        backbone: A SAM with a video memory.
        frames: Frames of the procedural clip.
        corrections: Clicks that correct the tracker.
        out: The film.
    """
    tracker = VideoTracker(backbone)
    out.parent.mkdir(parents=True, exist_ok=True)
    if video is not None:
        if point is None:
            raise SystemExit("error: --video needs --point X Y, a click in its first frame.")
        source = open_video(video)
        session = tracker.open([source])
        session.prompt(video=0, frame=0, object="object", points=[point], labels=[1])
        film = [draw_masks(source[step.frame], step.masks()) for step in session.propagate()]
        save_gif(out, film, fps=10)
        print(f"{out}: {len(film)} frames.")
        return

    clips = make_video_dataset("clips", "test", frames=frames, length=1)
    clip = clips[0]
    session = tracker.open([clip])
    # A click on each object in the first frame that shows it.
    truth = [clip.annotation(frame).masks for frame in range(len(clip))]
    for number, name in enumerate(clip.objects):
        frame = next(frame for frame in range(len(clip)) if truth[frame][number].any())
        session.prompt(0, frame, name, points=[inside(truth[frame][number])], labels=[1])
    masks = track(session, clip)

    def score() -> float:
        scorer = VideoScorer(clip, clips.categories)
        for frame, own in masks.items():
            scorer.add(frame, own)
        return summarize(scorer.results())["J&F"]

    print(f"a click on each of {len(clip.objects)} objects: J&F {score():.3f}")

    # More clicks: on the object that is tracked worst, in the first frame in which it is lost.
    for _ in range(corrections):
        ious = np.array(
            [
                [iou(*pair) for pair in zip(masks[f], truth[f], strict=True)]
                for f in range(len(clip))
            ]
        )
        number = int(ious.mean(axis=0).argmin())
        lost = [f for f in range(len(clip)) if truth[f][number].any() and ious[f, number] < 0.5]
        frame = lost[0] if lost else int(ious[:, number].argmin())
        missing = truth[frame][number] & ~masks[frame][number]
        extra = masks[frame][number] & ~truth[frame][number]
        wrong, label = (missing, 1) if missing.sum() >= extra.sum() else (extra, 0)
        session.prompt(
            0, frame, clip.objects[number], points=[inside(wrong)], labels=[label], clear=False
        )
        masks = track(session, clip)
        print(f"and a correction in frame {frame}: J&F {score():.3f}")

    film = [draw_masks(clip.image(f), masks[f], targets=truth[f]) for f in sorted(masks)]
    save_gif(out, film, fps=5)
    print(f"{out}: the tracks; white: ground truth.")


if __name__ == "__main__":
    tyro.cli(main)
