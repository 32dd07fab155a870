"""`video_speed`: time and memory of `VideoTracker` against sam2's `SAM2VideoPredictor`."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import report
from benchmarks.options import OutputOptions
from benchmarks.video_speed.peer import Shape, has_peer, random_predictor
from benchmarks.video_speed.sides import (
    SHAPES,
    FrameLogits,
    ShapeName,
    draw_prompts,
    random_tracker,
    track_ours,
    track_theirs,
    write_videos,
)
from sam_gym.backbones.loading import resolve_device
from sam_gym.data.synthetic.clips import Clips
from sam_gym.metrics.masks import iou
from sam_gym.utils.fields import documented
from sam_gym.utils.files import plain
from sam_gym.utils.progress import ProgressBar
from sam_gym.utils.provenance import device_name, provenance
from sam_gym.utils.settings import Count, Natural, Seed, check_settings
from sam_gym.utils.text import counted
from sam_gym.utils.transfer import synchronise

#: Minimum mean IoU of the masks of both sides, for times to be comparable.
SAME = 0.99
#: Frame from which the growth of memory is counted.
SETTLED = 200
_SIDES = ("ours", "sam2")
_Track = Callable[[], Iterator[FrameLogits]]


@documented
@dataclass(frozen=True, kw_only=True)
class VideoSpeedConfig(OutputOptions):
    """Compare VideoTracker with sam2's SAM2VideoPredictor: time per object-frame, and memory.

    Both have the same random weights, read the same folders of frames, get the same prompts, and
    return masks at the size of the video. They track one frame each in turn, in one process, in
    float32, so that load of the machine affects both. Their masks are compared. Without the package
    sam2 (pip install sam2), only ours is measured. Memory is that of a process of its own.
    """

    out: str = "runs/video-speed"
    """Folder for results.json, cases.csv and report.html."""
    shape: ShapeName = "small"
    """Size of the model: small (256 pixels, as micro_video), tiny and base_plus (SAM 2.1)."""
    cases: tuple[str, ...] = ("1x1", "1x8", "4x4")
    """What is tracked, VIDEOSxOBJECTS, one or several."""
    frames: Count = 32
    """Number of frames of each video."""
    repeats: Count = 3
    """Repeats of each case; results are medians."""
    memory_frames: Natural = 2000
    """Number of frames after which memory is measured; it is compared with that at frame 200, or at
    a tenth of them if they are fewer (0: not measured)."""
    memory_objects: Count = 4
    """Number of objects while memory is measured."""
    device: str = "auto"
    """Device: auto (CUDA, then MPS, then CPU), cpu, mps, cuda."""
    seed: Seed = 0
    """Seed of weights and prompts."""

    def validate(self) -> list[tuple[int, int]]:
        """Return the cases; raise `ValueError` if an option is out of range."""
        check_settings(self)
        cases = []
        for case in self.cases:
            numbers = case.lower().split("x")
            if len(numbers) != 2 or not all(n.isdigit() and int(n) for n in numbers):
                raise ValueError(
                    f"--cases: {case!r} is no case; write VIDEOSxOBJECTS, for example 4x4."
                )
            cases.append((int(numbers[0]), int(numbers[1])))
        if not cases:
            raise ValueError("--cases needs at least one case, for example 1x8.")
        if self.frames < 3:
            raise ValueError(f"--frames must be at least 3, got {self.frames}.")
        if 0 < self.memory_frames < 20:
            raise ValueError(f"--memory-frames must be 0 or at least 20, got {self.memory_frames}.")
        return cases


def run(config: VideoSpeedConfig) -> dict[str, Any]:
    """Run the benchmark and write its report.

    Raises:
        ValueError: an option is wrong.
        RuntimeError: the sides do not find the same masks.
    """
    cases = config.validate()
    out = report.output_folder(config.out, config.overwrite)
    shape, device = SHAPES[config.shape], resolve_device(config.device)
    torch.manual_seed(config.seed)
    predictor = random_predictor(shape, device) if has_peer() else None
    if predictor is None:
        print("The package sam2 is not installed: only our side is measured (pip install sam2).")
    tracker = random_tracker(shape, device, predictor)
    rng = np.random.default_rng(config.seed)
    rows = []
    with tempfile.TemporaryDirectory() as folder, ProgressBar() as bar:
        most = max(videos for videos, _ in cases)
        folders = write_videos(Path(folder), most, config.frames, shape.image_size)
        task = bar.add_task("tracking", total=config.frames * config.repeats * len(cases))
        for videos, objects in cases:
            own = folders[:videos]
            prompts = [draw_prompts(rng, objects, shape.image_size) for _ in own]
            sides: dict[str, _Track] = {"ours": partial(track_ours, tracker, own, prompts)}
            if predictor is not None:
                sides["sam2"] = partial(track_theirs, predictor, own, prompts)
            row = _compare(sides, config, device, lambda: bar.advance(task))
            row = {"videos": videos, "objects": objects} | _per_object(row, videos * objects)
            rows.append(row)
    summary = {
        "benchmark": "video_speed",
        "peer": predictor is not None,
        "device": device_name(device),
        "rows": rows,
        "memory": _memory(config) if config.memory_frames else None,
    } | provenance(config)
    _write(summary, out)
    for row in rows:
        if row.get("mask_iou", 1.0) < SAME:
            raise RuntimeError(
                f"The sides disagree with {row['objects']} objects in {row['videos']} videos, so "
                f"their times cannot be compared: mean IoU of masks {row['mask_iou']:.3f}."
            )
    return summary


def _compare(
    sides: dict[str, _Track], config: VideoSpeedConfig, device: torch.device, advance: Any
) -> dict[str, Any]:
    """Time the sides frame by frame in alternation.

    Returns:
        Of each side, the median over repeats of the seconds before the first frame (opening and
        prompts) and of those of all frames together; and the mean IoU of the masks of both sides,
        with their mean area as a fraction of the frame.
    """
    opening: dict[str, list[float]] = {side: [] for side in sides}
    tracking: dict[str, list[float]] = {side: [] for side in sides}
    same: list[float] = []
    areas: list[float] = []
    for repeat in range(config.repeats):
        running = {side: track() for side, track in sides.items()}
        seconds: dict[str, list[float]] = {side: [] for side in sides}
        for _ in range(config.frames):
            logits = {}
            for side, frames in running.items():
                synchronise(device)
                started = time.perf_counter()
                logits[side] = next(frames)
                synchronise(device)
                seconds[side].append(time.perf_counter() - started)
            if repeat == 0 and len(sides) == 2:
                same += _overlaps(*logits.values())
                areas += [float((own > 0).float().mean()) for own in logits["sam2"]]
            advance()
        for side, own in seconds.items():
            # The first frame is prompted, not tracked.
            opening[side].append(own[0])
            tracking[side].append(sum(own[1:]))
    row: dict[str, Any] = {}
    for side in sides:
        row[f"{side}_opening"] = float(np.median(opening[side]))
        row[f"{side}_tracking"] = float(np.median(tracking[side]))
    if len(sides) == 2:
        both = zip(tracking["sam2"], tracking["ours"], strict=True)
        row["ratio"] = float(np.median([theirs / ours for theirs, ours in both]))
        total = [row[f"{side}_opening"] + row[f"{side}_tracking"] for side in ("sam2", "ours")]
        row["ratio_with_opening"] = total[0] / total[1]
        row["mask_iou"], row["mask_area"] = float(np.mean(same)), float(np.mean(areas))
    return row | {"tracked_frames": config.frames - 1}


def _overlaps(ours: FrameLogits, theirs: FrameLogits) -> list[float]:
    return [
        iou(own, other)
        for first, second in zip(ours, theirs, strict=True)
        for own, other in zip((first > 0).cpu().numpy(), (second > 0).cpu().numpy(), strict=True)
    ]


def _per_object(row: dict[str, Any], objects: int) -> dict[str, Any]:
    """Add milliseconds per object-frame."""
    frames = row["tracked_frames"]
    return row | {
        f"{side}_ms": 1000 * row[f"{side}_tracking"] / (frames * objects)
        for side in _SIDES
        if f"{side}_tracking" in row
    }


# Memory ------------------------------------------------------------------------------------------


class _Endless(Sequence[np.ndarray]):
    """Frames of one video, to and fro, none of which is kept."""

    def __init__(self, frames: int, size: int) -> None:
        self._clip, self._frames = Clips("test", frames=48, length=1, size=size)[0], frames

    def __len__(self) -> int:
        return self._frames

    def __getitem__(self, frame: Any) -> Any:
        last = len(self._clip) - 1
        return self._clip.image(last - abs(last - frame % (2 * last)))


def _memory(config: VideoSpeedConfig) -> dict[str, Any]:
    """Measure the memory of a process that tracks a long video; see `measure_memory`."""
    code = (
        "import sys; from benchmarks.video_speed.benchmark import measure_memory; "
        "measure_memory(sys.argv[1])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(plain(asdict(config)))],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"Measuring memory failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def measure_memory(job: str) -> None:
    """Track a long video and print the memory after some frames; runs in a separate process.

    Args:
        job: JSON of the config.
    """
    content = json.loads(job)
    config = VideoSpeedConfig(**content | {"cases": tuple(content["cases"])})
    shape, device = SHAPES[config.shape], resolve_device(config.device)
    torch.manual_seed(config.seed)
    tracker = random_tracker(shape, device)
    session = tracker.open([_Endless(config.memory_frames, shape.image_size)])
    rng = np.random.default_rng(config.seed)
    prompts = draw_prompts(rng, config.memory_objects, shape.image_size)
    for number, prompt in enumerate(prompts):
        session.prompt(0, 0, number, **prompt)
    settled = min(SETTLED, config.memory_frames // 10)
    marks = np.linspace(settled, config.memory_frames, 10).round().astype(int) - 1
    seen: list[float] = []
    for step in session.propagate():
        step.masks()
        if step.frame in marks:
            seen.append(_used_mib(device))
    frames = [int(mark) + 1 for mark in marks]
    growth = seen[-1] - seen[0]
    print(json.dumps({"frames": frames, "mib": seen, "growth_mib": growth}))


def _used_mib(device: torch.device) -> float:
    """Return the memory in use: of the device, or resident memory of the process."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device) / 2**20
    status = Path("/proc/self/status")
    if not status.exists():
        raise RuntimeError("Resident memory is read from /proc: pass --memory-frames 0.")
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) / 1024


# Report ------------------------------------------------------------------------------------------


def case_table(summary: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return columns and cells of the times of all cases."""
    columns = {
        "videos": "{videos}",
        "objects of each": "{objects}",
        "ms an object-frame": "{ours_ms:.2f}",
        "opening, s": "{ours_opening:.2f}",
    }
    if summary["peer"]:
        columns |= {
            "sam2, ms": "{sam2_ms:.2f}",
            "sam2, opening, s": "{sam2_opening:.2f}",
            "ratio": "{ratio:.2f}x",
            "with opening": "{ratio_with_opening:.2f}x",
            "IoU of masks": "{mask_iou:.4f}",
        }
    return report.formatted(summary["rows"], columns)


def _write(summary: dict[str, Any], out: Path) -> None:
    rows, settings, memory = summary["rows"], summary["settings"], summary["memory"]
    files = report.write_results(out, summary, "cases.csv", rows)
    table = case_table(summary)
    shape: Shape = SHAPES[settings["shape"]]
    page = report.Page(
        "Speed of tracking",
        f"VideoTracker and sam2's SAM2VideoPredictor with the same random weights, shape "
        f"{settings['shape']}: frames of {shape.image_size} pixels, on {summary['device']}, CPU "
        f"threads: {summary['threads']}.",
    )
    cards = {
        f"{row['videos']} x {row['objects']}": (
            f"{row['ratio']:.2f}x" if summary["peer"] else f"{row['ours_ms']:.1f} ms"
        )
        for row in rows
    }
    if memory is not None:
        cards[f"growth of memory to frame {memory['frames'][-1]}"] = (
            f"{memory['growth_mib']:.1f} MiB"
        )
    page.cards(cards)
    page.table(*table)
    page.text(
        "An object-frame is one object in one frame, from the file of the frame to the mask at the "
        "size of the video. sam2 reads all frames while it opens a video, VideoTracker reads each "
        "when it tracks it. Opening includes the prompts. Several videos are one batch for "
        "VideoTracker, and states in turn for sam2. Both take turns frame by frame, in one process;"
        " medians of "
        f"{counted(settings['repeats'], 'repeat')}."
    )
    if memory is not None:
        page.heading("Memory")
        page.text(
            "Memory of a process that tracks "
            f"{counted(settings['memory_objects'], 'object')} and keeps what later frames "
            "recall (keep='window')."
        )
        both = zip(memory["frames"], memory["mib"], strict=True)
        page.table(("frame", "MiB"), [(str(frame), f"{mib:.1f}") for frame, mib in both])
    page.finish(files, settings, f"video_speed: {settings['shape']}", *table)
    if memory is not None:
        first, last = memory["frames"][0], memory["frames"][-1]
        print(f"Memory from frame {first} to {last}: {memory['growth_mib']:+.1f} MiB.")
