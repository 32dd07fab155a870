"""`gpu`: what one GPU gives, by the other benchmarks, one after another (`benchmarks/gpu.sh`)."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import report
from benchmarks.video_speed.peer import has_peer
from sam_gym.backbones.download import default_path
from sam_gym.backbones.loading import resolve_device
from sam_gym.backbones.spec import BACKBONES, PublishedWeights
from sam_gym.utils.fields import documented
from sam_gym.utils.files import make_folder, write_atomic, write_json
from sam_gym.utils.provenance import provenance
from sam_gym.utils.registry import check_choice
from sam_gym.utils.runs import remove_files
from sam_gym.utils.settings import Positive, Seed, check_settings

#: Files of the run, beside a folder for each part.
_RESULTS, _TABLE = "results.json", "table.md"
#: In the folder of a part: how it ended, and what it printed.
_OUTCOME, _LOG = "part.json", "log.txt"
#: SAM -> number of sub-environments, repeats, and images per call of the encoder. The reference
#: encodes an image for each environment and episode.
_SIZES = {"vit_b": (64, 2, 16), "vit_l": (16, 1, 8), "vit_h": (16, 1, 8)}
_DTYPES = ("bfloat16", "float32")
#: Seconds that a part has to end by itself when it is stopped.
_GRACE = 10.0


@documented
@dataclass(frozen=True, kw_only=True)
class GpuConfig:
    """Measure one GPU in about ten minutes: environments, everything mode and tracking.

    Other benchmarks run one after another, each in a process of its own and with a time limit, and
    their results are gathered in one JSON file and one table. A part that fails is reported, and
    the others go on. The same command again runs what failed or is missing, and keeps what is
    finished. Where the published checkpoints have not been downloaded, weights are random.
    """

    out: str = "runs/gpu"
    """Folder for results.json, table.md, parts.csv, report.html, and a folder for each part."""
    overwrite: bool = False
    """Run the parts again, and replace their results."""
    device: str = "cuda"
    """Device: cuda, cuda:N; or cpu, with --quick."""
    quick: bool = False
    """Try the script itself: a tiny model and the fewest steps, whose times say nothing."""
    parts: tuple[str, ...] = ()
    """Names of the parts to run, one or several (default: all)."""
    minutes: Positive = 10.0
    """Minutes after which no further part is started."""
    part_minutes: Positive = 3.0
    """Minutes after which a part is stopped; one that compiles has twice as many."""
    seed: Seed = 0
    """Seed of all parts."""

    def plan(self) -> list[Part]:
        """Return the parts; raise `ValueError` if an option is wrong."""
        check_settings(self)
        device = resolve_device(self.device)
        if device.type != "cuda" and not self.quick:
            raise ValueError(
                f"--device {self.device}: the parts are sized for a GPU. Pass --quick to try the "
                "script on a CPU."
            )
        parts = quick_parts() if self.quick else full_parts()
        for name in self.parts:
            check_choice("part", name, [part.name for part in parts])
        return parts


@dataclass(frozen=True)
class Part:
    """A run of another benchmark.

    Attributes:
        name: of its folder.
        benchmark: its name in `benchmarks.run`.
        options: its command line, without folder, device and seed.
    """

    name: str
    benchmark: str
    options: tuple[str, ...]

    def minutes(self, config: GpuConfig) -> float:
        """Return after how many minutes it is stopped."""
        return config.part_minutes * (2 if "--compile" in self.options else 1)

    def command(self, config: GpuConfig) -> list[str]:
        """Return the command, which replaces what an interrupted part has left."""
        own = ("--device", config.device, "--seed", str(config.seed))
        out = ("--out", os.fspath(Path(config.out).expanduser() / self.name), "--overwrite")
        module = [sys.executable, "-m", "benchmarks.run"]
        return [*module, self.benchmark, *self.options, *own, *out]


def full_parts() -> list[Part]:
    """Return the parts of a GPU, the most important first."""
    few = ("--growth-images", "0", "--precision-images", "8")
    throughput = {}
    for name, (num_envs, repeats, batch) in _SIZES.items():
        size = ("--num-envs", str(num_envs), "--repeats", str(repeats))
        throughput[name] = (*size, "--encoder-batch", str(batch), *few, *_model(name))
    grids = ("--grids", "32x32", "--images", "2")
    cases = ("--cases", "1x1", "1x8", "4x4", "--frames", "16", "--repeats", "1")
    return [
        *_by_dtype("throughput", "vit_b", throughput["vit_b"]),
        *_by_dtype("generator", "vit_b", (*grids, *_model("vit_b"), *_thresholds("vit_b"))),
        Part("video_speed-base_plus", "video_speed",
             ("--shape", "base_plus", *cases, "--memory-frames", "200")),
        *_by_dtype("throughput", "vit_l", throughput["vit_l"]),
        *_by_dtype("throughput", "vit_h", throughput["vit_h"]),
        # Last, since compiling takes minutes.
        Part("throughput-vit_b-compiled", "throughput",
             (*throughput["vit_b"], "--dtype", "bfloat16", "--compile")),
    ]  # fmt: skip


def quick_parts() -> list[Part]:
    """Return parts of the same kinds that take seconds on a CPU."""
    model, least = "micro-v0", ("--num-envs", "2", "--max-steps", "1", "--steps", "1")
    few = ("--repeats", "1", "--images", "1", "--growth-images", "0", "--random-weights")
    images = ("--encoder-batch", "1", "--precision-images", "1")
    grid = ("--grids", "2x2", "--images", "1", "--no-memory", *_model(model), *_thresholds(model))
    cases = ("--cases", "1x1", "--frames", "3", "--repeats", "1", "--memory-frames", "0")
    own = ("--backbone", model, *least, *few, *images, "--dtype", "float32")
    return [
        Part(f"throughput-{model}-float32", "throughput", own),
        Part(f"generator-{model}-bfloat16", "generator", (*grid, "--dtype", "bfloat16")),
        Part("video_speed-small", "video_speed", ("--shape", "small", *cases)),
    ]


def _by_dtype(benchmark: str, model: str, options: Sequence[str]) -> Iterator[Part]:
    for dtype in _DTYPES:
        yield Part(f"{benchmark}-{model}-{dtype}", benchmark, (*options, "--dtype", dtype))


def _model(name: str) -> tuple[str, ...]:
    """Return the options of a SAM: its weights, or random ones where they would be downloaded."""
    published = isinstance(BACKBONES.get(name).weights, PublishedWeights)
    random = published and not default_path(name).is_file()
    return "--backbone", name, *(("--random-weights",) if random else ())


def _thresholds(name: str) -> tuple[str, ...]:
    """Return the thresholds of everything mode, 0 with random weights: no mask would pass them."""
    iou, stability = (0.0, 0.0) if len(_model(name)) > 2 else BACKBONES.get(name).thresholds
    return "--pred-iou-thresh", str(iou), "--stability-score-thresh", str(stability)


def run(config: GpuConfig) -> dict[str, Any]:
    """Run the parts that are missing, and write all results.

    Raises:
        ValueError, FileExistsError: an option is wrong, or the folder holds other parts.
        SystemExit: a part failed, or was not run for lack of time; all results are written.
    """
    parts = config.plan()
    out = make_folder(config.out)
    wanted = [part for part in parts if not config.parts or part.name in config.parts]
    if config.overwrite:
        remove_files(out, (_RESULTS, _TABLE, *(f"{part.name}/{_OUTCOME}" for part in wanted)))
    outcomes = {part.name: _read(out / part.name / _OUTCOME) for part in parts}
    for part in wanted:
        _check_command(outcomes[part.name], part, config)
    if not has_peer():
        print("The package sam2 is not installed: tracking has no reference (pip install sam2).")
    started = time.monotonic()
    for number, part in enumerate(wanted, 1):
        where = f"[{number}/{len(wanted)}] {part.name}"
        if outcomes[part.name].get("status") == "done":
            print(f"{where}: finished before.", flush=True)
            continue
        if time.monotonic() - started < 60 * config.minutes:
            print(f"{where}: {shlex.join(part.command(config))}", flush=True)
            own = run_part(part, config, out)
        else:
            message = f"{config.minutes:g} minutes were over"
            own = {"status": "not run", "seconds": 0.0, "message": message}
            own["command"] = part.command(config)
        outcomes[part.name] = own
        print(f"{where}: {_told(own)}.", flush=True)
        write_json(out / _RESULTS, _summary(config, out, outcomes))
    summary = _summary(config, out, outcomes)
    _write(summary, out)
    missing = [part.name for part in wanted if outcomes[part.name]["status"] != "done"]
    if missing:
        raise SystemExit(
            f"{len(missing)} of {len(wanted)} parts are missing: {', '.join(missing)}. Run the "
            "same command again to repeat them."
        )
    return summary


def _told(outcome: Mapping[str, Any]) -> str:
    message = f", {outcome['message']}" if outcome["message"] else ""
    return f"{outcome['status']} after {outcome['seconds']:.0f} s{message}"


def _read(path: Path) -> dict[str, Any]:
    """Return how a part ended before; empty if it has not."""
    return json.loads(path.read_text()) if path.is_file() else {}


def _check_command(outcome: Mapping[str, Any], part: Part, config: GpuConfig) -> None:
    """Raise `FileExistsError` if a part ended before that had other options."""
    now = part.command(config)[1:]
    before = outcome["command"][1:] if outcome else now
    if before != now:
        raise FileExistsError(
            f"{config.out} holds a run of another command:\n  {shlex.join(before)}\ninstead of\n"
            f"  {shlex.join(now)}\nPass the options that it had, --overwrite to run the parts "
            "again, or another --out."
        )


def run_part(part: Part, config: GpuConfig, out: Path) -> dict[str, Any]:
    """Run a part in a process of its own; return its status, seconds, message and command.

    Args:
        part: the part.
        config: has the limit of its time.
        out: folder of the run.
    """
    folder = make_folder(out / part.name)
    remove_files(folder, (_OUTCOME, _RESULTS))
    command, minutes, started = part.command(config), part.minutes(config), time.monotonic()
    with (folder / _LOG).open("w") as log:
        # A session of its own, so that processes which it starts end with it.
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        try:
            status = process.wait(60 * minutes)
            message = ""
        except subprocess.TimeoutExpired:
            message = f"stopped after {minutes:g} minutes"
        finally:
            if process.poll() is None:
                _stop(process)
    if not message and status:
        written = (folder / _LOG).read_text(errors="replace").splitlines()
        message = next((line for line in reversed(written) if line.strip()), f"status {status}")
    outcome = {
        "status": "failed" if message else "done",
        "seconds": time.monotonic() - started,
        "message": message,
        "command": command,
    }
    write_json(folder / _OUTCOME, outcome)
    return outcome


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End a process and those that it has started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        try:
            process.wait(_GRACE)
        except subprocess.TimeoutExpired:
            pass
    process.wait()


# Report ------------------------------------------------------------------------------------------


def _summary(
    config: GpuConfig, out: Path, outcomes: Mapping[str, dict[str, Any]]
) -> dict[str, Any]:
    """Return the content of results.json; parts without an outcome are left out."""
    parts = {}
    for name, outcome in outcomes.items():
        path = out / name / _RESULTS
        if outcome:
            results = json.loads(path.read_text()) if path.is_file() else None
            parts[name] = outcome | {"results": results}
    return {"benchmark": "gpu", "parts": parts} | provenance(config)


#: Table -> column -> format of its cells.
_TABLES = {
    "Environments": {
        "SAM": "{sam}",
        "precision": "{precision}",
        "envs": "{envs}",
        "images": "{images}",
        "steps/s": "{vector_steps_per_second:.0f}",
        "SamPredictor": "{reference_steps_per_second:.0f}",
        "ratio": "{speedup_vs_reference:.2f}x",
        "scalar loop": "{scalar_steps_per_second:.0f}",
        "mask IoU": "{mask_iou:.4f}",
    },
    "Models": {
        "SAM": "{sam}",
        "precision": "{precision}",
        "encode, images/s": "{images_per_second:.1f}",
        "segment_anything": "{plain_images_per_second:.1f}",
        "decode, ms a prompt": "{ms_per_prompt:.3f}",
        "one click, ms": "{click_latency_ms:.2f}",
        "roofline": "{fraction_of_roofline:.0%}",
        "peak memory, MiB": "{peak}",
    },
    "Everything mode": {
        "SAM": "{sam}",
        "precision": "{precision}",
        "grid": "{grid}",
        "s an image": "{ours_seconds:.2f}",
        "SamAutomaticMaskGenerator": "{reference_seconds:.2f}",
        "ratio": "{ratio:.2f}x",
        "found": "{found:.1%}",
    },
    "Tracking": {
        "shape": "{shape}",
        "videos": "{videos}",
        "objects of each": "{objects}",
        "ms an object-frame": "{ours_ms:.2f}",
        "sam2": "{sam2}",
        "ratio": "{ratio}",
    },
}
_NOTES = {
    "Environments": "Steps per second of the vector environment `SamSeg-v0`, of one `SamPredictor` "
    "per environment (in float32), and of a loop over scalar environments. mask IoU: between the "
    "former two; it says little with random weights in low precision.",
    "Models": "compiled: `torch.compile` in its mode reduce-overhead, which runs CUDA graphs on a "
    "GPU; the package has none of its own. segment_anything encodes one image at a time, in "
    "float32. Memory of the device, with all sides in one process.",
    "Everything mode": "SamAutomaticMaskGenerator computes in float32. found: fraction of its "
    "masks that match one of ours. With random weights, thresholds are 0, so that both keep all "
    "masks.",
    "Tracking": "In float32, with random weights. sam2: `SAM2VideoPredictor`.",
}


def _rows(parts: Mapping[str, dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Return the rows of each table."""
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in _TABLES}
    for part in parts.values():
        results = part["results"]
        if results is None:
            continue
        settings, benchmark = results["settings"], results["benchmark"]
        if benchmark == "video_speed":
            for row in results["rows"]:
                peer = {"sam2": "", "ratio": ""}
                if results["peer"]:
                    peer = {"sam2": f"{row['sam2_ms']:.2f}", "ratio": f"{row['ratio']:.2f}x"}
                rows["Tracking"].append({"shape": settings["shape"]} | row | peer)
            continue
        weights = ", random weights" * settings["random_weights"]
        compiled = ", compiled" * results["compiled"]
        own = {"sam": results["backbone"] + weights, "precision": results["dtype"] + compiled}
        if benchmark == "generator":
            rows["Everything mode"] += [own | row for row in results["rows"]]
            continue
        peak = {"peak": report.mib(results["peak_memory_mib"])}
        rows["Models"].append(own | results["encoder"] | results["decoder"] | peak)
        for num_envs, kinds in results["by_num_envs"].items():
            rows["Environments"] += [
                own
                | {"envs": num_envs, "images": kind}
                | numbers
                | {"mask_iou": numbers["agreement"]["mean_mask_iou_with_reference"]}
                for kind, numbers in kinds.items()
            ]
    return rows


def _write(summary: dict[str, Any], out: Path) -> None:
    parts = summary["parts"]
    outcomes = [
        {"part": name} | {key: own[key] for key in ("status", "seconds", "message")}
        for name, own in parts.items()
    ]
    files = report.write_results(out, summary, "parts.csv", outcomes)
    devices = {own["results"]["device"] for own in parts.values() if own["results"]}
    lead = f"Measured on {', '.join(sorted(devices)) or 'no device'}; torch "
    lead += f"{summary['versions']['torch']}, sam-gym {summary['versions']['sam-gym']}."
    if summary["settings"]["quick"]:
        lead += " A trial of the script (--quick): these times say nothing."
    page = report.Page("One GPU", lead)
    text = [f"# One GPU\n\n{lead}"]
    for name, rows in _rows(parts).items():
        if rows:
            table = report.formatted(rows, _TABLES[name])
            page.heading(name)
            page.table(*table)
            page.text(_NOTES[name].replace("`", ""))
            text.append(f"## {name}\n\n{report.markdown_table(*table)}\n\n{_NOTES[name]}")
    columns = {
        **{"part": "{part}", "status": "{status}", "seconds": "{seconds:.0f}"},
        "message": "{message}",
    }
    table = report.formatted(outcomes, columns)
    text.append(f"## Parts\n\n{report.markdown_table(*table)}")
    files.append(write_atomic(out / _TABLE, "\n\n".join(text) + "\n"))
    page.heading("Parts")
    page.table(*table, wrap=True)
    page.finish(files, summary["settings"], "gpu", *table)
    print(f"Table: {files[-1]}")
