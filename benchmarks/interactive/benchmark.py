"""`interactive`: the number of clicks a SAM needs to segment an object."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from benchmarks.interactive.clicking import Item, Result, click_batch, run_grabcut
from benchmarks.interactive.grabcut import LONGEST_SIDE
from benchmarks.interactive.report import write_report
from benchmarks.options import BackboneOptions, subset
from benchmarks.report import output_folder
from sam_gym.data import DATASETS, Dataset
from sam_gym.data.cache import SampleCache
from sam_gym.data.options import DatasetOptions
from sam_gym.metrics.masks import number_of_clicks, number_of_failures
from sam_gym.utils.fields import documented
from sam_gym.utils.progress import ProgressBar
from sam_gym.utils.provenance import provenance
from sam_gym.utils.settings import Count, Natural, check_settings

#: Default number of images of an endless procedural dataset.
SCENES = 100


@documented
@dataclass(frozen=True, kw_only=True)
class InteractiveBenchmarkConfig(DatasetOptions, BackboneOptions):
    """Measure the number of clicks (NoC) that a SAM needs per object, and compare with cv2.grabCut.

    The standard protocol: each click is the innermost pixel of the widest error region, IoU is
    computed at image size, ignored pixels do not count. cv2.grabCut gets the same clicks. The IoU
    from the box of each object is reported beside.
    """

    out: str = "runs/interactive"
    """Folder for results.json, objects.csv, pictures and report.html."""
    split: str | None = None
    """Split to measure on (None: the held-out split of the dataset)."""
    categories: str | None = None
    """coco: comma-separated names of categories (None: all)."""
    objects: Literal["mask", "components", "instances"] | None = None
    """folder: an object is the whole mask (default), one of its components, or an instance."""
    min_area: Natural | None = None
    """coco, folder: minimum area of an object, in pixels."""
    max_images: Count | None = None
    """Maximum number of images, sampled by the seed (None: all; procedural datasets: 100)."""
    max_objects: Count | None = None
    """Maximum number of objects, sampled by the seed (None: all)."""
    clicks: Count = 20
    """Clicks per object; an object that never reaches the IoU counts as this many."""
    zoom: bool = False
    """Look at each object again in a window around its mask, encoded by itself."""
    batch_size: Count = 16
    """Number of objects per decoder call."""
    baseline: bool = True
    """Also give the same clicks to cv2.grabCut."""
    baseline_clicks: Count = 5
    """Clicks per object for grabCut, which is slow."""
    baseline_objects: Count = 50
    """Number of objects for grabCut, sampled by the seed."""
    pictures: Natural = 9
    """Objects to draw, evenly spaced by rank from best to worst."""


def run(config: InteractiveBenchmarkConfig) -> dict[str, Any]:
    """Run the benchmark and write its report.

    Raises:
        ValueError, FileNotFoundError: an option, the data or the checkpoint is wrong.
    """
    check_settings(config)
    out = output_folder(config.out, config.overwrite, pictures=["pictures/*.png"])
    dataset = open_dataset(config)
    backbone = config.load()
    samples = SampleCache(dataset, 2**30, backbone.check_image)
    items = find_objects(config, dataset, samples)

    results: list[Result] = []
    with ProgressBar() as progress:
        task = progress.add_task("clicking", total=len(items))
        for first in range(0, len(items), config.batch_size):
            batch = items[first : first + config.batch_size]
            results += click_batch(backbone, samples, batch, config.clicks, config.zoom)
            progress.advance(task, len(batch))
        if config.baseline:
            compared = subset(results, config.baseline_objects, config.seed)
            for result in progress.track(compared, description="grabCut, same clicks"):
                run_grabcut(samples, result, config.baseline_clicks)

    summary = {
        "benchmark": "interactive",
        "dataset": dataset.name,
        "split": _split(config),
        "clicks": config.clicks,
        **summarise(results),
        "miou_box": float(np.mean([r.box_iou for r in results])),
        "grabcut": summarise_grabcut(results),
        **provenance(config, backbone),
    }
    write_report(out, summary, results, backbone, samples)
    return summary


def _split(config: InteractiveBenchmarkConfig) -> str:
    return config.split or DATASETS.get(config.dataset).held_out_split


def open_dataset(config: InteractiveBenchmarkConfig) -> Dataset:
    """Open the dataset; raises `ValueError` for options that it does not take."""
    spec = DATASETS.get(config.dataset)
    # Option of the command -> the dataset's option, and its value.
    given = {
        "--categories": ("categories", config.categories),
        "--objects": ("target", config.objects),
        "--min-area": ("min_area", config.min_area),
    }
    options = {}
    for option, (name, value) in given.items():
        if value is not None:
            if name not in spec.parameters:
                takers = [other.name for other in DATASETS.values() if name in other.parameters]
                raise ValueError(f"{option} is for {', '.join(takers)}, not for {config.dataset}.")
            options[name] = value
    if config.data is not None and not spec.reads_files:
        takers = [name for name, other in DATASETS.items() if other.reads_files]
        raise ValueError(f"--data is for {', '.join(takers)}, not for {config.dataset}.")
    return config.make_dataset(_split(config), **options)


def find_objects(
    config: InteractiveBenchmarkConfig, dataset: Dataset, samples: SampleCache
) -> list[Item]:
    """List all objects. Reads every image once, so that a broken file stops the run early."""
    max_images = config.max_images
    if max_images is None and DATASETS.get(config.dataset).procedural:
        max_images = SCENES
    items = []
    for number in subset(range(len(dataset)), max_images, config.seed):
        sample = samples[number]
        items += [
            Item(number, i, sample.source, dataset.categories[category])
            for i, category in enumerate(sample.categories)
        ]
    return subset(items, config.max_objects, config.seed)


def curve_numbers(ious: np.ndarray, seconds: Sequence[float]) -> dict[str, Any]:
    """Return the protocol's numbers from the IoU (N, K) of N objects after each of K clicks."""
    return {
        "miou_at_k": ious.mean(axis=0).tolist(),
        "noc85": float(number_of_clicks(ious, 0.85).mean()),
        "noc90": float(number_of_clicks(ious, 0.90).mean()),
        "nof90": number_of_failures(ious, 0.90),
        "n": len(ious),
        "ms_per_click": 1000 * float(np.mean(seconds)),
    }


def summarise(results: Sequence[Result]) -> dict[str, Any]:
    """Return `curve_numbers` of the SAM."""
    return curve_numbers(np.array([r.ious for r in results]), [r.seconds for r in results])


def summarise_grabcut(results: Sequence[Result]) -> dict[str, Any] | None:
    """Return grabCut's numbers and ours on the same objects and clicks; None if it did not run."""
    compared = [r for r in results if r.baseline]
    if not compared:
        return None
    theirs = np.array([r.baseline for r in compared])
    ours = np.array([r.ious[: theirs.shape[1]] for r in compared])
    return {
        "clicks": theirs.shape[1],
        **curve_numbers(theirs, [r.baseline_seconds for r in compared]),
        "longest_side": LONGEST_SIDE,
        "backbone_on_same_objects": curve_numbers(ours, [r.seconds for r in compared]),
    }
