"""`generator`: MaskGenerator against segment_anything's SamAutomaticMaskGenerator."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pycocotools import mask as rle
from segment_anything import SamAutomaticMaskGenerator

from benchmarks import report
from benchmarks.options import TimedOptions
from benchmarks.throughput.machine import peak_memory_mib
from benchmarks.throughput.reference import check_comparable, plain_sam
from sam_gym.backbones import Backbone
from sam_gym.data import DATASETS
from sam_gym.data.options import DatasetOptions
from sam_gym.mask_generation.generator import GeneratorOptions, MaskGenerator
from sam_gym.simulation.clicks import relative_grid
from sam_gym.utils.fields import documented
from sam_gym.utils.files import plain
from sam_gym.utils.progress import ProgressBar
from sam_gym.utils.provenance import provenance
from sam_gym.utils.settings import Count, Fraction, Natural, check_settings
from sam_gym.utils.text import counted
from sam_gym.utils.transfer import synchronise

#: Masks of this IoU count as equal.
_SAME = 0.99
#: Minimum fraction of the reference's masks found, for times to be comparable.
_LEAST_FOUND = 0.95
_SIDES = ("ours", "reference")


@documented
@dataclass(frozen=True, kw_only=True)
class GeneratorBenchmarkConfig(DatasetOptions, TimedOptions):
    """Compare everything mode with segment_anything's SamAutomaticMaskGenerator: time and memory.

    Both process the same images with the same weights and options, and their masks are compared.
    Peak memory is measured in a separate process with one image.
    """

    out: str = "runs/generator"
    """Folder for results.json, grids.csv and report.html."""
    grids: tuple[str, ...] = ("32x32", "64x64", "320x64")
    """Point grids, COLUMNSxROWS, one or several."""
    images: Count = 4
    """Number of images, the first of the split."""
    repeats: Count = 1
    """Timed repeats per image; results are medians."""
    split: str = "test"
    """Split of the dataset to use."""
    pred_iou_thresh: Fraction = 0.6
    """Minimum predicted IoU; low, since micro predicts a lower IoU than SAM."""
    stability_score_thresh: Fraction = 0.8
    """Minimum stability score of a mask."""
    crop_n_layers: Natural = 0
    """Number of layers of crops."""
    min_mask_region_area: Natural = 0
    """Remove islands and holes of fewer pixels."""
    memory: bool = True
    """Measure the peak memory of each side in a separate process."""

    def validate(self) -> None:
        """Raise `ValueError` if an option is out of range."""
        check_comparable(self.backbone)
        check_settings(self)
        if not self.grids:
            raise ValueError("--grids needs at least one grid, for example 32x32.")
        for grid in self.grids:
            self.generator_options(grid).validate()

    def generator_options(self, grid: str) -> GeneratorOptions:
        """Return the options of both sides for a grid, COLUMNSxROWS."""
        numbers = grid.lower().split("x")
        if len(numbers) != 2 or not all(number.isdigit() for number in numbers):
            raise ValueError(
                f"--grids: {grid!r} is not a grid; write COLUMNSxROWS, for example 32x32."
            )
        columns, rows = map(int, numbers)
        shared = {field.name for field in fields(GeneratorOptions)} & set(asdict(self))
        own = {name: getattr(self, name) for name in shared}
        return GeneratorOptions(grid=(columns, rows), output="coco_rle", **own)


def run(config: GeneratorBenchmarkConfig) -> dict[str, Any]:
    """Run the benchmark and write its report.

    Raises:
        ValueError, FileNotFoundError: an option or the checkpoint is wrong.
        RuntimeError: the sides do not find the same masks.
    """
    config.validate()
    out = report.output_folder(config.out, config.overwrite)
    backbone = config.load()
    images = _images(config)
    steps = config.images * config.repeats + len(_SIDES) * config.memory
    rows = []
    with ProgressBar() as bar:
        task = bar.add_task("generating", total=steps * len(config.grids))
        for grid in config.grids:
            sides = {side: _generator(backbone, config, grid, side) for side in _SIDES}
            row = {"grid": grid} | _compare(
                sides, images, config.repeats, backbone.device, bar, task
            )
            for side in _SIDES if config.memory else ():
                row[f"{side}_peak_mib"] = _peak_memory(config, grid, side)
                bar.advance(task)
            rows.append(row)
    summary = {
        "benchmark": "generator",
        "rows": rows,
        "speedup": {row["grid"]: round(row["ratio"], 3) for row in rows},
        "memory_growth": _growth(rows) if config.memory else None,
    } | provenance(config, backbone)
    _write(summary, out)
    for row in rows:
        if row["found"] < _LEAST_FOUND and backbone.dtype == torch.float32:
            raise RuntimeError(
                f"The sides disagree on a grid of {row['grid']}, so their times cannot be "
                f"compared: {row['found']:.1%} of the reference's masks are found."
            )
    return summary


def _images(config: GeneratorBenchmarkConfig) -> list[np.ndarray]:
    procedural = DATASETS.get(config.dataset).procedural
    dataset = config.make_dataset(config.split, **({"length": config.images} if procedural else {}))
    return [dataset[index].image for index in range(config.images)]


def _generator(
    backbone: Backbone, config: GeneratorBenchmarkConfig, grid: str, side: str
) -> Callable[[np.ndarray], list[dict[str, Any]]]:
    """Return the function of a side: image -> records."""
    options = config.generator_options(grid)
    if side == "ours":
        return MaskGenerator(backbone, options).generate
    settings = asdict(options)
    for name in ("grid", "points_per_batch", "crop_n_points_downscale_factor"):
        settings.pop(name)
    layers = [relative_grid(*options.layer_grid(i)) for i in range(options.crop_n_layers + 1)]
    return SamAutomaticMaskGenerator(
        plain_sam(backbone),
        points_per_side=None,
        point_grids=layers,
        output_mode=settings.pop("output"),
        **settings,
    ).generate


def _compare(
    sides: dict[str, Callable[[np.ndarray], list[dict[str, Any]]]],
    images: Sequence[np.ndarray],
    repeats: int,
    device: torch.device,
    bar: Any,
    task: Any,
) -> dict[str, Any]:
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    found, masks = [], dict.fromkeys(sides, 0)
    for image in images:
        records: dict[str, list[dict[str, Any]]] = {}
        times: dict[str, list[float]] = {side: [] for side in sides}
        # Alternating, so that load of the machine affects both.
        for _ in range(repeats):
            for side, generate in sides.items():
                synchronise(device)
                started = time.perf_counter()
                records[side] = generate(image)
                synchronise(device)
                times[side].append(time.perf_counter() - started)
            bar.advance(task)
        for side in sides:
            seconds[side].append(float(np.median(times[side])))
            masks[side] += len(records[side])
        found += _found(records["reference"], records["ours"])
    ours, reference = (float(np.mean(seconds[side])) for side in _SIDES)
    return {
        "ours_seconds": ours,
        "reference_seconds": reference,
        "ratio": reference / ours,
        "ours_masks": masks["ours"],
        "reference_masks": masks["reference"],
        "found": float(np.mean(found)) if found else 1.0,
    }


def _found(theirs: Sequence[dict[str, Any]], ours: Sequence[dict[str, Any]]) -> list[bool]:
    """Return whether each mask of the reference is among ours."""
    if not theirs or not ours:
        return [False] * len(theirs)
    coded = ([record["segmentation"] for record in records] for records in (theirs, ours))
    iou = rle.iou(*coded, [0] * len(ours))
    return (np.asarray(iou).max(axis=1) >= _SAME).tolist()


# Memory ----------------------------------------------------------------------------------------


def _peak_memory(config: GeneratorBenchmarkConfig, grid: str, side: str) -> float | None:
    """Return the peak memory in MiB of a process with one image (see `measure_memory`)."""
    job = {"config": plain(asdict(replace(config, images=1))), "grid": grid, "side": side}
    code = (
        "import sys; from benchmarks.generator import measure_memory; measure_memory(sys.argv[1])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(job)], capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(f"Measuring the memory of {side} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def measure_memory(job: str) -> None:
    """Process one image and print the peak memory in MiB; runs in a separate process.

    Args:
        job: JSON of the config, the grid and the side.
    """
    content = json.loads(job)
    settings = content["config"] | {"grids": tuple(content["config"]["grids"])}
    config = GeneratorBenchmarkConfig(**settings)
    backbone = config.load()
    _generator(backbone, config, content["grid"], content["side"])(_images(config)[0])
    print(json.dumps(_high_water_mib(backbone.device)))


def _high_water_mib(device: torch.device) -> float | None:
    status = Path("/proc/self/status")
    if device.type == "cuda" or not status.exists():
        return peak_memory_mib(device)
    # getrusage may report the peak of the parent process.
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def _growth(rows: Sequence[dict[str, Any]]) -> dict[str, float | None]:
    """Return peak memory with the last grid over that with the first, by side."""
    growth: dict[str, float | None] = {}
    for side in _SIDES:
        peaks = [row[f"{side}_peak_mib"] for row in rows]
        growth[side] = None if None in peaks else round(peaks[-1] / peaks[0], 3)
    return growth


def _write(summary: dict[str, Any], out: Path) -> None:
    rows, settings = summary["rows"], summary["settings"]
    files = report.write_results(out, summary, "grids.csv", rows)
    columns = {
        "grid": "{grid}",
        "s an image": "{ours_seconds:.2f}",
        "reference, s": "{reference_seconds:.2f}",
        "ratio": "{ratio:.2f}x",
        "masks": "{ours_masks}",
        "reference": "{reference_masks}",
        "found": "{found:.1%}",
    }
    if settings["memory"]:
        columns |= {"peak, MiB": "{ours_peak}", "reference, MiB": "{reference_peak}"}
    peaks = [
        {f"{side}_peak": report.mib(row.get(f"{side}_peak_mib")) for side in _SIDES} for row in rows
    ]
    table = report.formatted([row | peak for row, peak in zip(rows, peaks, strict=True)], columns)
    page = report.Page(
        "Everything mode",
        f"{summary['backbone']}: MaskGenerator and segment_anything's SamAutomaticMaskGenerator "
        f"on {counted(settings['images'], 'image')}, with the same weights and options.",
    )
    page.cards({f"speed-up, {row['grid']}": f"{row['ratio']:.2f}x" for row in rows})
    page.table(*table)
    page.text(
        f"found: fraction of the reference's masks that match one of ours with an IoU of {_SAME}. "
        "peak: peak memory of a process with one image."
    )
    page.finish(files, settings, f"everything mode, {summary['backbone']}", *table)
