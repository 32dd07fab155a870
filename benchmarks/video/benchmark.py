"""`video`: J, F and J&F of a tracker from one prompt per object, beside baselines."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any, Literal

import numpy as np
import tyro

from adaptation.evaluate_video import HeldOutOptions, gain
from benchmarks.options import BackboneOptions
from benchmarks.report import output_folder
from benchmarks.video.report import write_report
from sam_gym.backbones import Backbone, load_backbone
from sam_gym.backbones.spec import check_tracks, find_spec, tracker_help
from sam_gym.backbones.video.evaluation import (
    FrameMasks,
    Method,
    copy_masks,
    follow_masks,
    score_videos,
    track,
    true_boxes,
)
from sam_gym.backbones.video.prompting import PromptKind
from sam_gym.backbones.video.tracker import VideoTracker
from sam_gym.data import VideoDataset
from sam_gym.data.base import Video
from sam_gym.data.splits import check_held_out
from sam_gym.metrics.video import ObjectScore, summarize
from sam_gym.utils.fields import documented
from sam_gym.utils.progress import ProgressBar
from sam_gym.utils.provenance import provenance
from sam_gym.utils.settings import Count, Natural, check_settings

#: Names of the baselines, in tables.
COPY, FOLLOW, ORACLE = "mask copied", "previous mask and box", "true box in every frame"


@documented
@dataclass(frozen=True, kw_only=True)
class VideoBenchmarkConfig(HeldOutOptions, BackboneOptions):
    """Measure the masks of a tracker, J, F and J&F, from one prompt per object.

    An object is prompted in the frame in which it is seen first, by its mask, its box or a click on
    its innermost pixel. Baselines without a memory get its mask: the mask copied into all frames,
    and the previous mask and box into a SAM for images. An oracle gets the true box in every frame.
    `clips` is drawn anew for each seed, and numbers are means over seeds.
    """

    out: str = "runs/video"
    """Folder for results.json, objects.csv, overlays and report.html."""
    backbone: Annotated[str, tyro.conf.arg(help=tracker_help("Tracker to measure"))] = "micro_video"
    prompts: tuple[PromptKind, ...] = ("mask", "box", "point")
    """Prompts of the tracker, one or several."""
    protocol: Literal["davis", "sav", "all"] = "davis"
    """Which frames count; see `sam_gym.metrics.video.VideoScorer`."""
    seeds: Count = 3
    """Number of seeds of `clips`, from --seed on."""
    baselines: bool = True
    """Also measure the baselines and the oracle."""
    image_backbone: str | None = None
    """SAM for images of the baselines (None: the one that the tracker builds on, or itself)."""
    pictures: Natural = 3
    """Videos to draw, evenly spaced by rank from best to worst."""


def run(config: VideoBenchmarkConfig) -> dict[str, Any]:
    """Run the benchmark and write its report.

    Raises:
        ValueError, FileNotFoundError: an option, the data or the checkpoint is wrong.
    """
    check_settings(config)
    check_tracks(config.backbone)
    if not config.prompts:
        raise ValueError("--prompts needs at least one of mask, box, point.")
    out = output_folder(config.out, config.overwrite, pictures=["overlay-*.gif"])
    datasets, split = open_datasets(config)
    backbone = config.load()
    tracker = VideoTracker(backbone, keep="window")
    methods: dict[tuple[str, str], Method] = {
        ("tracker", kind): partial(track, tracker, kind=kind) for kind in config.prompts
    }
    if config.baselines:
        images = load_images_backbone(config, backbone)
        methods[COPY, "mask"] = copy_masks
        methods[FOLLOW, "mask"] = partial(follow_masks, images)
        methods[ORACLE, "true boxes"] = partial(true_boxes, images)

    counts = {seed: min(len(own), config.videos or len(own)) for seed, own in datasets.items()}
    scores: dict[tuple[str, str], dict[int | None, list[ObjectScore]]] = {}
    seconds: dict[tuple[str, str], float] = {}
    with ProgressBar() as bar:
        for key, method in methods.items():
            name, kind = key
            task = bar.add_task(f"{name}, {kind}", total=sum(counts.values()))
            timed = _Timed(method, partial(bar.advance, task))
            scores[key] = {
                seed: score_videos(
                    (own[k] for k in range(counts[seed])), own.categories, timed, config.protocol
                )
                for seed, own in datasets.items()
            }
            seconds[key] = timed.seconds / timed.frames

    summary = {
        "benchmark": "video",
        "dataset": config.dataset,
        "split": split,
        "protocol": config.protocol,
        "videos": sum(counts.values()),
        "rows": [
            {"method": name, "prompt": kind}
            | summarise(list(own.values()))
            | {"ms_per_frame": 1000 * seconds[name, kind]}
            for (name, kind), own in scores.items()
        ],
        **provenance(config, backbone),
    }
    rows = object_rows(scores)
    if config.baselines:
        summary["gains"] = {kind: gains(rows, kind) for kind in config.prompts}
        summary["image_backbone"] = images.name
    write_report(out, summary, rows, scores, datasets, methods["tracker", config.prompts[0]])
    return summary


def open_datasets(config: VideoBenchmarkConfig) -> tuple[dict[int | None, VideoDataset], str]:
    """Open the videos of each seed, or those of the only dataset; also the split's name."""
    if config.dataset != "clips":
        dataset, split = config.open()
        check_held_out(dataset, split)
        return {None: dataset}, split
    if "seed" in config.dataset_kwargs:
        raise ValueError("--dataset-kwargs seed: use --seed, the first of --seeds seeds.")
    opened: dict[int | None, VideoDataset] = {}
    for seed in range(config.seed, config.seed + config.seeds):
        own = replace(config, dataset_kwargs=config.dataset_kwargs | {"seed": seed})
        opened[seed], split = own.open()
    return opened, split


def load_images_backbone(config: VideoBenchmarkConfig, backbone: Backbone) -> Backbone:
    """Load the SAM for images of the baselines."""
    name = config.image_backbone
    if name is None:
        spec = find_spec(config.backbone)
        if spec is None or not spec.base:
            return backbone
        name = spec.base
    return load_backbone(name, device=config.device, dtype=config.dtype)


class _Timed:
    """A method whose time is taken: the seconds of all frames, reading included."""

    def __init__(self, method: Method, done: Callable[[], None]) -> None:
        self.method, self.done = method, done
        self.seconds, self.frames = 0.0, 0

    def __call__(self, video: Video) -> Iterator[FrameMasks]:
        frames = self.method(video)
        while True:
            started = time.perf_counter()
            found = next(frames, None)
            self.seconds += time.perf_counter() - started
            if found is None:
                break
            self.frames += 1
            yield found
        self.done()


def summarise(runs: Sequence[Sequence[ObjectScore]]) -> dict[str, Any]:
    """Return the mean over seeds of the means over objects, and their standard deviations."""
    means = [summarize(own) for own in runs]
    numbers: dict[str, Any] = {"objects": sum(map(len, runs)), "seeds": len(runs)}
    for name in means[0]:
        values = [own[name] for own in means]
        numbers[name] = float(np.mean(values))
        if len(values) > 1:
            numbers[f"{name} std"] = float(np.std(values, ddof=1))
    return numbers


def object_rows(
    scores: dict[tuple[str, str], dict[int | None, list[ObjectScore]]],
) -> list[dict[str, Any]]:
    """Return the rows of objects.csv: one per method, prompt and object."""
    return [
        {"method": name, "prompt": kind, "seed": seed} | score.row()
        for (name, kind), own in scores.items()
        for seed, found in own.items()
        for score in found
    ]


def gains(rows: Sequence[dict[str, Any]], kind: str) -> dict[str, dict[str, float | None]]:
    """Return the tracker's J&F, from a kind of prompt, above that of each baseline.

    With 95% intervals, by bootstrap over videos.
    """
    own = [
        # The same number is another video with another seed.
        row | {"video": f"{row['seed']} {row['video']}"}
        for row in rows
        if row["method"] != "tracker" or row["prompt"] == kind
    ]
    return {
        name: gain([row for row in own if row["method"] in ("tracker", name)], "tracker", name)
        for name in (COPY, FOLLOW, ORACLE)
    }
