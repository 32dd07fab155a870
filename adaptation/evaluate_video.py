"""Track the objects of held-out videos from one prompt each: J, F, J&F, tables and overlays.

    python -m adaptation.evaluate_video --adapter runs/mine/adapter.safetensors --data PATH \\
        --dataset coco-video --out results/mine
    python -m adaptation.evaluate_video --dataset davis --data PATH --out results/davis --overlays 5

With an adapter, the tracker without it is measured beside it. Writes report.json, objects.csv (one
row per object), videos.csv (one row per video), and overlays.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro

from adaptation.video.options import TrackerOptions
from sam_gym.data import VIDEO_DATASETS, VideoDataset, video_dataset_help
from sam_gym.data.options import ReadingOptions
from sam_gym.data.splits import check_held_out
from sam_gym.utils import cli
from sam_gym.utils.fields import documented
from sam_gym.utils.files import make_folder, write_csv, write_json
from sam_gym.utils.runs import refuse_finished
from sam_gym.utils.settings import Count, Natural

#: Resamples of videos for the interval of a difference.
_RESAMPLES = 2000


@documented
@dataclass(frozen=True, kw_only=True)
class HeldOutOptions(ReadingOptions):
    """The videos."""

    registry = VIDEO_DATASETS

    dataset: Annotated[str, tyro.conf.arg(help=video_dataset_help())] = "clips"
    data: str | None = None
    """Root folder of a dataset that reads files."""
    split: Literal["train", "val", "test", "all"] | None = None
    """Split (None: the held-out split of the dataset)."""
    videos: Count | None = None
    """Maximum number of videos (None: all; of `clips`: 32)."""

    def open(self) -> tuple[VideoDataset, str]:
        """Open the split; also its name. Raises as `sam_gym.data.make_video_dataset`."""
        spec = VIDEO_DATASETS.get(self.dataset)
        split = self.split or spec.held_out_split
        options = self.options_of(self.dataset)
        if self.data is not None:
            options["root"] = self.data
        if self.dataset == "clips":
            options.setdefault("length", self.videos or 32)
        return spec.make(split, **options), split


@documented
@dataclass(frozen=True, kw_only=True)
class EvaluateVideoConfig:
    """Evaluate a tracker."""

    out: str
    """Folder for the results."""
    overwrite: bool = False
    """Replace the results in --out. Without --overwrite, results there are an error."""
    prompt: Literal["mask", "point", "box"] = "mask"
    """Prompt of each object, in the frame in which it is seen first."""
    protocol: Literal["davis", "sav", "all"] = "davis"
    """Which frames count; see `sam_gym.metrics.video.VideoScorer`."""
    overlays: Natural = 0
    """Number of videos to draw with their masks."""
    overlay_format: Literal["gif", "mp4"] = "gif"
    """Format of drawn videos."""
    model: tyro.conf.OmitArgPrefixes[TrackerOptions] = field(default_factory=TrackerOptions)
    video: tyro.conf.OmitArgPrefixes[HeldOutOptions] = field(default_factory=HeldOutOptions)


def main(args: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the command line; returns the content of report.json.

    Raises:
        ValueError, FileNotFoundError: a name, a value, the data or the adapter is wrong.
        FileExistsError: the folder holds results.
    """
    config = cli.parse(
        EvaluateVideoConfig, "python -m adaptation.evaluate_video", args, description=__doc__
    )
    folder = Path(config.out).expanduser()
    if not config.overwrite:
        refuse_finished(folder, "report.json")
    dataset, split = config.video.open()
    check_held_out(dataset, split)
    make_folder(folder)
    # Wrong data is refused before torch is imported.
    from sam_gym.backbones import load_backbone
    from sam_gym.backbones.spec import check_tracks
    from sam_gym.backbones.video.evaluation import score_videos, track
    from sam_gym.backbones.video.tracker import VideoTracker
    from sam_gym.metrics.video import summarize
    from sam_gym.utils.progress import track as shown
    from sam_gym.utils.render import draw_overlays, save_video

    model = config.model
    check_tracks(model.backbone)
    adapters: dict[str, str | None] = (
        {"tracker": None} if model.adapter is None else {"adapted": model.adapter}
    )
    if model.adapter is not None:
        adapters["without adapter"] = None
    count = min(len(dataset), config.video.videos or len(dataset))
    report: dict[str, Any] = {"dataset": dataset.name, "split": split, "prompt": config.prompt}
    report |= {"protocol": config.protocol, "videos": count, "scores": {}}
    rows: list[dict[str, Any]] = []
    for number, (name, adapter) in enumerate(adapters.items()):
        backbone = load_backbone(model.backbone, model.checkpoint, model.device, adapter=adapter)
        tracker = VideoTracker(backbone, keep="window")
        is_first = number == 0

        def method(
            video: Any, tracker: VideoTracker = tracker, is_first: bool = is_first
        ) -> Iterator[tuple[int, np.ndarray]]:
            masks: list[np.ndarray] = []
            draws = is_first and sum(1 for _ in folder.glob("overlay-*")) < config.overlays
            for frame, found in track(tracker, video, config.prompt):
                if draws:
                    masks.append(found)
                yield frame, found
            if draws:
                safe = "".join(c if c.isalnum() or c in "-_." else "_" for c in video.name)
                path = folder / f"overlay-{safe}.{config.overlay_format}"
                save_video(path, draw_overlays(video, masks, height=256))

        if is_first:
            for old in folder.glob("overlay-*"):
                old.unlink()
        videos = (dataset[k] for k in shown(range(count), name, transient=True))
        scores = score_videos(videos, dataset.categories, method, config.protocol)
        report["scores"][name] = {"objects": len(scores)} | summarize(scores)
        rows += [{"method": name} | score.row() for score in scores]
    if len(adapters) > 1:
        report["gain"] = gain(rows, *adapters)
    write_csv(folder / "objects.csv", rows)
    write_csv(folder / "videos.csv", per_video(rows))
    write_json(folder / "report.json", report)
    _print(report)
    print(f"Everything is in {folder}.")
    return report


def per_video(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the means over the objects of each video, by method."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["method"], row["video"]), []).append(row)
    return [
        {"method": method, "video": video, "objects": len(own)}
        | {name: float(np.mean([row[name] for row in own])) for name in ("J&F", "J", "F")}
        for (method, video), own in groups.items()
    ]


def gain(rows: Sequence[dict[str, Any]], one: str, other: str) -> dict[str, float | None]:
    """Return the difference of two methods in mean J&F over objects, and its 95% interval.

    The interval is a bootstrap over videos, since the objects of one resemble each other; of one
    video there is none.
    """
    values: dict[str, dict[tuple[str, int], float]] = {one: {}, other: {}}
    for row in rows:
        values[row["method"]][row["video"], row["object"]] = row["J&F"]
    shared = sorted(values[one].keys() & values[other].keys())
    off = np.array([values[one][key] - values[other][key] for key in shared])
    names = np.array([video for video, _ in shared])
    each = [off[names == name] for name in dict.fromkeys(names.tolist())]
    if len(each) < 2:
        return {"J&F": float(off.mean()), "low": None, "high": None}
    sums = np.array([(own.sum(), len(own)) for own in each])
    rng = np.random.default_rng(0)
    drawn = sums[rng.integers(len(sums), size=(_RESAMPLES, len(sums)))].sum(axis=1)
    low, high = np.percentile(drawn[:, 0] / drawn[:, 1], [2.5, 97.5])
    return {"J&F": float(off.mean()), "low": float(low), "high": float(high)}


def _print(report: dict[str, Any]) -> None:
    names = ("J&F", "J", "J recall", "J decay", "F", "F recall", "F decay")
    rows = [
        [name, *(f"{100 * own[column]:.1f}" for column in names), str(own["objects"])]
        for name, own in report["scores"].items()
    ]
    title = f"{report['dataset']} {report['split']}, {report['prompt']} prompt, in %"
    cli.print_table(title, ("", *names, "objects"), rows)
    if "gain" in report:
        found = f"gain: {100 * report['gain']['J&F']:+.1f} J&F"
        low, high = (report["gain"][name] for name in ("low", "high"))
        if low is None:
            print(f"{found}; one video has no interval")
        else:
            print(f"{found}, 95% interval {100 * low:+.1f} to {100 * high:+.1f}")


if __name__ == "__main__":
    cli.run(main, status=2)
