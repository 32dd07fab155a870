"""`interactive`: how many clicks a SAM needs to segment an object."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from benchmarks import report
from benchmarks.interactive.grabcut import LONGEST_SIDE, GrabCut
from benchmarks.options import BackboneOptions, provenance, require_at_least
from sam_gym.backbones import Backbone
from sam_gym.data import DATASETS, Dataset, Sample
from sam_gym.data.cache import SampleCache
from sam_gym.metrics.masks import iou, number_of_clicks, number_of_failures
from sam_gym.simulation.clicks import Click
from sam_gym.simulation.interactive import Target, click_out
from sam_gym.utils.plots import save_figure
from sam_gym.utils.progress import ProgressBar
from sam_gym.utils.render import draw_episode, save_image

#: How many scenes are clicked unless said otherwise; there is no end to them.
SCENES = 100
_SHOWN_CLICKS = (1, 3, 5)
_FRAME_HEIGHT = 260


@dataclass
class InteractiveBenchmarkConfig(BackboneOptions):
    """Click objects out of images and count the clicks.

    The standard protocol: each click is at the middle of the widest error, the IoU is taken at the
    size of the image, ignored pixels are left out. cv2.grabCut gets the same clicks beside it.
    """

    out: str = "runs/interactive"
    """Folder for results.json, objects.csv, pictures and report.html."""
    dataset: str = "scenes"
    """Dataset name: scenes, rooms, rooms-panoramas, coco, folder, entities, domain."""
    data: str | None = None
    """Root folder of a dataset that reads files."""
    split: str | None = None
    """Split to measure on (default: the held-out split: test, or val for coco)."""
    categories: str | None = None
    """coco: names of the categories to measure, with commas; left out: all."""
    objects: Literal["mask", "components", "instances"] | None = None
    """folder: what one object is: the whole mask (if left out), a component of it, an instance."""
    min_area: int | None = None
    """coco, folder: ignore objects of fewer pixels."""
    max_images: int | None = None
    """Use only so many images, drawn by the seed; scenes, which is endless: 100 if left out."""
    max_objects: int | None = None
    """Use only so many objects, drawn by the seed; left out: every instance of every image."""
    clicks: int = 20
    """Clicks per object; an object that never gets there counts as this many."""
    batch_size: int = 16
    """Objects that are decoded together."""
    baseline: bool = True
    """Also give the same clicks to cv2.grabCut."""
    baseline_clicks: int = 5
    """Clicks that grabCut gets; it is slow."""
    baseline_objects: int = 50
    """Objects that grabCut gets, drawn by the seed."""
    pictures: int = 9
    """Objects to draw, evenly spaced by rank from best to worst."""

    def validate(self) -> None:
        """Raise `ValueError` for a value that cannot work."""
        require_at_least(
            1,
            clicks=self.clicks,
            batch_size=self.batch_size,
            max_images=self.max_images,
            max_objects=self.max_objects,
            baseline_clicks=self.baseline_clicks,
            baseline_objects=self.baseline_objects,
        )
        require_at_least(0, pictures=self.pictures, seed=self.seed, min_area=self.min_area)


@dataclass(frozen=True)
class Item:
    """One object: the instance of an image, and what to call it."""

    image: int
    instance: int
    source: str
    category: str


@dataclass
class Result:
    """What became of an object.

    Attributes:
        item: the object.
        clicks: in order; fewer than asked for when the mask became perfect.
        ious: IoU after each click.
        seconds: of the model, per click.
        baseline: IoU of the baseline after each of its clicks; empty if it was not asked.
        baseline_seconds: of the baseline, per click.
    """

    item: Item
    clicks: list[Click]
    ious: list[float]
    seconds: float
    baseline: list[float]
    baseline_seconds: float = 0.0


def run(config: InteractiveBenchmarkConfig) -> dict[str, Any]:
    """Run the benchmark and write its report.

    Raises:
        ValueError, FileNotFoundError: an option, the data or the checkpoint is wrong.
    """
    config.validate()
    out = report.output_folder(config.out)
    dataset = open_dataset(config)
    backbone = config.load()
    samples = SampleCache(dataset, 2**30)
    items = find_objects(config, dataset, samples)

    results: list[Result] = []
    with ProgressBar() as progress:
        task = progress.add_task("clicking", total=len(items))
        for first in range(0, len(items), config.batch_size):
            batch = items[first : first + config.batch_size]
            results += click_batch(backbone, samples, batch, config.clicks)
            progress.advance(task, len(batch))
        if config.baseline:
            compared = _subset(results, config.baseline_objects, config.seed)
            for result in progress.track(compared, description="grabCut, same clicks"):
                run_grabcut(samples, result, config.baseline_clicks)

    summary = {
        "benchmark": "interactive",
        "dataset": dataset.name,
        "split": _split(config),
        "clicks": config.clicks,
        **summarise(results),
        "grabcut": summarise_grabcut(results),
        **provenance(config, backbone),
    }
    _write(out, config, summary, results, backbone, samples)
    return summary


# Objects ---------------------------------------------------------------------------------------


def _split(config: InteractiveBenchmarkConfig) -> str:
    return config.split or DATASETS.get(config.dataset).held_out_split


def open_dataset(config: InteractiveBenchmarkConfig) -> Dataset:
    """The dataset of the config; `ValueError` for options that it does not take."""
    spec = DATASETS.get(config.dataset)
    # Option of the command -> the dataset's option, and its value.
    given = {
        "--data": ("root", config.data),
        "--categories": ("categories", config.categories),
        "--objects": ("target", config.objects),
        "--min-area": ("min_area", config.min_area),
    }
    options = {}
    for option, (name, value) in given.items():
        if value is not None:
            if name not in spec.parameters:
                takers = [other.name for _, other in DATASETS.items() if name in other.parameters]
                raise ValueError(f"{option} is for {', '.join(takers)}, not for {config.dataset}.")
            options[name] = value
    if spec.reads_files and config.data is None:
        raise ValueError(f"Dataset {config.dataset!r} reads files: pass --data FOLDER.")
    return spec.make(_split(config), **options)


def find_objects(
    config: InteractiveBenchmarkConfig, dataset: Dataset, samples: SampleCache
) -> list[Item]:
    """All objects to click out. Reads every image once, so that a broken one stops before work."""
    max_images = config.max_images
    if max_images is None and DATASETS.get(config.dataset).procedural:
        max_images = SCENES
    items = []
    for number in _subset(range(len(dataset)), max_images, config.seed):
        sample = samples[number]
        items += [
            Item(number, i, sample.source, dataset.categories[category])
            for i, category in enumerate(sample.categories)
        ]
    return _subset(items, config.max_objects, config.seed)


def _subset(items: Sequence[Any], count: int | None, seed: int) -> list[Any]:
    """`count` of the items, drawn by the seed, in their order."""
    if count is None or count >= len(items):
        return list(items)
    chosen = np.random.default_rng(seed).choice(len(items), count, replace=False)
    return [items[i] for i in np.sort(chosen).tolist()]


def target_of(sample: Sample, item: Item) -> Target:
    return Target(sample.image, sample.masks[item.instance], sample.ignore)


# Work ------------------------------------------------------------------------------------------


def click_batch(
    backbone: Backbone, samples: SampleCache, items: Sequence[Item], clicks: int
) -> list[Result]:
    """Click some objects out in one batch."""
    targets = [target_of(samples[item.image], item) for item in items]
    return [
        Result(item, session.clicks, session.ious, session.seconds, [])
        for item, session in zip(items, click_out(backbone, targets, clicks), strict=True)
    ]


def run_grabcut(samples: SampleCache, result: Result, clicks: int) -> None:
    """Give grabCut the clicks that our model got, one after the other, and note the IoU of each."""
    target = target_of(samples[result.item.image], result.item)
    grabcut = GrabCut(target.image)
    mask = np.zeros(target.mask.shape, bool)
    seconds = 0.0
    for count in range(1, min(clicks, len(result.ious)) + 1):
        if count <= len(result.clicks):
            started = time.perf_counter()
            mask = grabcut.cut(result.clicks[:count])
            seconds += time.perf_counter() - started
        result.baseline.append(iou(mask, target.mask, target.ignore))
    result.baseline_seconds = seconds / max(1, min(clicks, len(result.clicks)))


# Numbers ---------------------------------------------------------------------------------------


def curve_numbers(ious: np.ndarray, seconds: Sequence[float]) -> dict[str, Any]:
    """The numbers of the protocol from the IoU of N objects after each of K clicks: (N, K)."""
    return {
        "miou_at_k": ious.mean(axis=0).tolist(),
        "noc85": float(number_of_clicks(ious, 0.85).mean()),
        "noc90": float(number_of_clicks(ious, 0.90).mean()),
        "nof90": number_of_failures(ious, 0.90),
        "n": len(ious),
        "ms_per_click": 1000 * float(np.mean(seconds)),
    }


def summarise(results: Sequence[Result]) -> dict[str, Any]:
    return curve_numbers(np.array([r.ious for r in results]), [r.seconds for r in results])


def summarise_grabcut(results: Sequence[Result]) -> dict[str, Any] | None:
    """grabCut's numbers, and ours on the same objects and clicks; None if it did not run."""
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


def object_rows(results: Sequence[Result], baseline_clicks: int) -> list[dict[str, Any]]:
    """One row per object for the CSV."""
    rows = []
    for r in results:
        ious = np.array([r.ious])
        row: dict[str, Any] = {
            "source": r.item.source,
            "instance": r.item.instance,
            "category": r.item.category,
            "noc85": number_of_clicks(ious, 0.85)[0],
            "noc90": number_of_clicks(ious, 0.90)[0],
        }
        row |= {f"iou@{k}": value for k, value in enumerate(r.ious, start=1)}
        if baseline_clicks:
            padded = r.baseline + [None] * (baseline_clicks - len(r.baseline))
            row |= {f"grabcut_iou@{k}": value for k, value in enumerate(padded, start=1)}
        marks = (f"{'+' if c.positive else '-'}({c.x} {c.y})" for c in r.clicks)
        rows.append(row | {"clicks": " ".join(marks)})
    return rows


# Report ----------------------------------------------------------------------------------------


def _write(
    out: Path,
    config: InteractiveBenchmarkConfig,
    summary: dict[str, Any],
    results: Sequence[Result],
    backbone: Backbone,
    samples: SampleCache,
) -> None:
    grabcut = summary["grabcut"]
    rows = object_rows(results, grabcut["clicks"] if grabcut else 0)
    files = report.write_results(out, summary, "objects.csv", rows)
    curve_file = save_figure(out / "curve.png", _curve(summary))

    page = report.Page(
        f"{backbone.name} on {summary['dataset']}: interactive segmentation",
        f"A simulated user clicks {summary['n']} objects of {summary['dataset']} "
        f"({summary['split']}) out of their images with {backbone.name}, {config.clicks} clicks "
        "each. Every click falls in the middle of the widest error; IoU is taken at the size of "
        "the image.",
    )
    page.cards(_headline(summary))
    page.heading("mIoU over clicks")
    page.plot(curve_file, "mean IoU over number of clicks")
    columns, table = _table(summary)
    page.table(columns, table)
    page.text(
        "NoC85 and NoC90: mean number of clicks until the IoU reaches 0.85 or 0.90, where an "
        f"object that never does counts as {config.clicks}; NoF90: how many never reach 0.90. "
        "Milliseconds per click are the model's, with encoding shared over the clicks, in batches "
        f"of {config.batch_size} on {summary['device']}."
    )
    if grabcut:
        page.text(
            f"cv2.grabCut gets the clicks that {backbone.name} got, which were placed on "
            f"{backbone.name}'s errors and not on its own. It works on images of at most "
            f"{LONGEST_SIDE} pixels a side and goes on from its last mask at every click. Its "
            f"column and the one after it are over the same {grabcut['n']} objects and at most "
            f"{grabcut['clicks']} clicks."
        )
    if config.pictures:
        page.heading("Objects from best to worst")
        page.text(
            "Evenly spaced by rank, none picked by hand. White: the object. Blue: the mask. "
            "Green: positive clicks. Red: negative clicks."
        )
        folder = out / "pictures"
        folder.mkdir(exist_ok=True)
        shown = [r for r in results if r.baseline] or results
        for rank, result in _spread(shown, config.pictures):
            frames = _frames(backbone, samples, result)
            name = f"{rank:03d}_{result.item.source}_{result.item.instance}".replace("/", "_")
            save_image(folder / f"{name}.png", frames)
            caption = f"{rank} of {len(shown)}: {result.item.category}, {result.item.source}"
            page.photograph(frames, caption)
    heading = f"interactive: {backbone.name} on {summary['dataset']}"
    page.finish(files, summary["settings"], heading, columns, table)


def _checkpoints(clicks: int) -> list[int]:
    return [k for k in (1, 2, 3, 5, 10, 20) if k <= clicks]


def _headline(summary: dict[str, Any]) -> dict[str, str]:
    curve = summary["miou_at_k"]
    cards = {f"mIoU@{k}": f"{curve[k - 1]:.3f}" for k in _checkpoints(len(curve)) if k != 2}
    cards |= {name: f"{summary[name.lower()]:.2f}" for name in ("NoC85", "NoC90")}
    return cards | {"ms per click": f"{summary['ms_per_click']:.1f}", "objects": str(summary["n"])}


def _table(summary: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of the table: a column per method, a row per number."""
    methods = {summary["backbone"]: summary}
    if summary["grabcut"]:
        grabcut = summary["grabcut"]
        methods["grabCut"] = grabcut
        methods[f"{summary['backbone']}, those objects"] = grabcut["backbone_on_same_objects"]
    rows = [["objects", *(str(m["n"]) for m in methods.values())]]
    for k in _checkpoints(summary["clicks"]):
        curves = (m["miou_at_k"] for m in methods.values())
        rows.append([f"mIoU@{k}", *(f"{c[k - 1]:.3f}" if k <= len(c) else "" for c in curves)])
    for name in ("NoC85", "NoC90"):
        rows.append([name, *(f"{m[name.lower()]:.2f}" for m in methods.values())])
    rows.append(["NoF90", *(str(m["nof90"]) for m in methods.values())])
    rows.append(["clicks at most", *(str(len(m["miou_at_k"])) for m in methods.values())])
    rows.append(["ms per click", *(f"{m['ms_per_click']:.1f}" for m in methods.values())])
    return ["", *methods], rows


def _curve(summary: dict[str, Any]) -> Any:
    figure, axes = report.new_plot()

    def line(values: Sequence[float], label: str, colour: str, style: str = "-") -> None:
        axes.plot(range(1, len(values) + 1), values, style, marker="o", ms=4, color=colour)
        axes.lines[-1].set_label(label)

    line(summary["miou_at_k"], f"{summary['backbone']} ({summary['n']} objects)", report.BLUE)
    grabcut = summary["grabcut"]
    if grabcut:
        if grabcut["n"] != summary["n"]:
            same = grabcut["backbone_on_same_objects"]["miou_at_k"]
            line(same, f"{summary['backbone']} ({grabcut['n']} of them)", report.BLUE, ":")
        line(grabcut["miou_at_k"], f"grabCut, same clicks ({grabcut['n']})", report.ORANGE)
    axes.set(xlabel="clicks", ylabel="mean IoU", ylim=(0, 1), xlim=(0.5, summary["clicks"] + 0.5))
    axes.set_xticks(range(1, summary["clicks"] + 1, 1 + summary["clicks"] // 25))
    axes.legend(frameon=False)
    return figure


def _spread(results: Sequence[Result], count: int) -> list[tuple[int, Result]]:
    """Objects evenly spaced by their IoU after five clicks, with their rank (1 is the best)."""
    clicks = min(max(_SHOWN_CLICKS), len(results[0].ious))
    ranked = sorted(results, key=lambda r: -r.ious[clicks - 1])
    ranks = np.linspace(0, len(ranked) - 1, min(count, len(ranked))).round().astype(int)
    return [(rank + 1, ranked[rank]) for rank in ranks.tolist()]


def _frames(backbone: Backbone, samples: SampleCache, result: Result) -> np.ndarray:
    """The object after one, three and five clicks, and what grabCut made of it, side by side."""
    target = target_of(samples[result.item.image], result.item)
    shown: list[tuple[str, np.ndarray, list[Click], float]] = []
    for count in (k for k in _SHOWN_CLICKS if k <= len(result.ious)):
        session = click_out(backbone, [target], count)[0]
        title = f"{count} click{'s' * (count > 1)}"
        shown.append((title, session.mask, session.clicks, session.ious[-1]))
    if result.baseline:
        clicks = result.clicks[: len(result.baseline)]
        grabcut = GrabCut(target.image)
        mask = [grabcut.cut(clicks[:count]) for count in range(1, len(clicks) + 1)][-1]
        shown.append((f"grabCut, {len(clicks)} clicks", mask, clicks, result.baseline[-1]))
    window = _window(target, [click for _, _, clicks, _ in shown for click in clicks])
    top, left = (side.start for side in window)
    return report.side_by_side(
        [
            draw_episode(
                target.image[window],
                mask[window],
                [(x - left, y - top, positive) for x, y, positive in clicks],
                target=target.mask[window],
                caption=f"{title}   IoU {overlap:.2f}",
                height=_FRAME_HEIGHT,
            )
            for title, mask, clicks, overlap in shown
        ]
    )


def _window(target: Target, clicks: Sequence[Click]) -> tuple[slice, slice]:
    """Rows and columns around an object and its clicks, so that small objects can be seen."""
    ys, xs = np.nonzero(target.mask)
    lows = min(ys.min(), *(c.y for c in clicks)), min(xs.min(), *(c.x for c in clicks))
    highs = max(ys.max(), *(c.y for c in clicks)), max(xs.max(), *(c.x for c in clicks))
    extent = max(high - low for low, high in zip(lows, highs, strict=True))
    # Half the extent as surroundings, and never fewer pixels than can be looked at.
    half = max(extent, 48)
    return tuple(
        slice(int(max(0, (low + high) // 2 - half)), int(min(size, (low + high) // 2 + half)))
        for low, high, size in zip(lows, highs, target.mask.shape, strict=True)
    )  # type: ignore[return-value]
