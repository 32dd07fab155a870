"""`pointing`: does CLIP Surgery find what a word names?"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from agents.clip.models import load_clip
from agents.clip.pointing import PointingResult, pointing_game, redundant_feature, word_maps
from agents.clip.surgery import ClipSurgery, min_max
from benchmarks import report
from benchmarks.options import device_name, require_at_least
from sam_gym.data import DATASETS, Sample
from sam_gym.utils.files import write_csv, write_json
from sam_gym.utils.progress import ProgressBar
from sam_gym.utils.render import draw_heat, save_image, tile
from sam_gym.version import __version__

_SHOWN = 12


@dataclass
class Config:
    """Play the pointing game: is the maximum of a word's map on a thing of that name?

    Every category of every image counts once. Beside CLIP Surgery stand its two halves alone, plain
    CLIP's patch similarity, and chance: the share of the image that the category covers.
    """

    out: str = "runs/pointing"
    """Folder for results.json, words.csv, pictures and report.html."""
    clip: str = "clip_micro"
    """CLIP to measure: clip_micro, or a model of open_clip (ViT-B-16, ...)."""
    clip_pretrained: str | None = None
    """Its weights: a tag of open_clip or a file (clip_micro brings its own)."""
    blocks: int | None = None
    """How many of its last blocks are surgical (left out: what suits the model)."""
    dataset: str = "scenes"
    """Dataset name: scenes, rooms, rooms-panoramas, coco, folder, entities, domain."""
    data: str | None = None
    """Root folder of a dataset that reads files."""
    split: str | None = None
    """Split to measure on (default: the held-out split: test, or val for coco)."""
    images: int = 512
    """How many images, the first of the split."""
    device: str = "auto"
    """Where CLIP runs: auto (CUDA, then MPS, then CPU), cpu, mps, cuda, cuda:N."""


def run(config: Config) -> dict[str, Any]:
    """Run the benchmark and write its report.

    Raises:
        ValueError, FileNotFoundError: an option, the data or the weights are wrong.
    """
    require_at_least(1, images=config.images)
    out = report.output_folder(config.out)
    clip = load_clip(config.clip, config.clip_pretrained, config.device)
    surgery, plain = ClipSurgery(clip, config.blocks), ClipSurgery(clip, 0)
    spec = DATASETS.get(config.dataset)
    split = config.split or spec.held_out_split
    root = {} if config.data is None else {"root": config.data}
    dataset = spec.make(split, **root)
    surgery.clip.check_known(dataset.categories)
    samples = [dataset[index] for index in range(min(config.images, len(dataset)))]

    ways = {
        "surgery": (surgery, "empty"),
        "surgery, all texts": (surgery, "texts"),
        "architecture surgery only": (surgery, "none"),
        "feature surgery only": (plain, "empty"),
        "plain CLIP": (plain, "none"),
    }
    results: dict[str, PointingResult] = {}
    with ProgressBar() as progress:
        task = progress.add_task("pointing", total=len(ways))
        for name, (how, redundant) in ways.items():
            results[name] = pointing_game(how, samples, dataset.categories, redundant)  # type: ignore[arg-type]
            progress.advance(task)
    played = results["surgery"]
    summary = {
        "benchmark": "pointing",
        "clip": clip.name,
        "clip_identity": clip.identity,
        "surgical_blocks": surgery.blocks,
        "images": len(samples),
        "words": len(played.hits),
        "accuracy": {name: round(result.accuracy, 4) for name, result in results.items()},
        "ci95": {name: round(result.half_width, 4) for name, result in results.items()},
        "chance": round(played.chance, 4),
        "by_category": {
            name: by.by_category(dataset.categories)
            for name, by in results.items()
            if name in ("surgery", "plain CLIP")
        },
        "device": device_name(clip.device),
        "versions": {"sam-gym": __version__, "torch": torch.__version__},
        "settings": asdict(config),
    }
    _write(config, summary, surgery, samples, dataset.categories, out)
    return summary


def _write(
    config: Config,
    summary: dict[str, Any],
    surgery: ClipSurgery,
    samples: list[Sample],
    names: tuple[str, ...],
    out: Path,
) -> None:
    json_file = write_json(out / "results.json", summary)
    words = summary["by_category"]
    csv_file = write_csv(
        out / "words.csv",
        [
            {"word": word, **{name: by[word] for name, by in words.items()}}
            for word in words["surgery"]
        ],
    )
    pictures = draw_maps(surgery, samples[:_SHOWN], names)
    save_image(out / "maps.png", pictures)

    rows = [
        [name, f"{value:.3f}", f"{summary['ci95'][name]:.3f}"]
        for name, value in summary["accuracy"].items()
    ]
    rows.append(["chance", f"{summary['chance']:.3f}", ""])
    columns = ["map", "pointing accuracy", "± (95%)"]
    page = report.Page(
        f"Pointing game of {summary['clip']} on {config.dataset}",
        "Is the maximum of a word's map on a thing of that name? "
        f"{summary['words']} words in {summary['images']} images.",
    )
    page.cards(
        {
            "CLIP Surgery": f"{summary['accuracy']['surgery']:.3f}",
            "plain CLIP": f"{summary['accuracy']['plain CLIP']:.3f}",
            "chance": f"{summary['chance']:.3f}",
        }
    )
    page.table(columns, rows)
    page.heading("By word")
    page.table(
        ["word", *words],
        [[word, *(f"{by[word]:.3f}" for by in words.values())] for word in words["surgery"]],
    )
    page.heading("Maps")
    page.plot(out / "maps.png", "maps of words in the image; a cross where they are greatest")
    page.settings(summary["settings"], [json_file, csv_file])
    page_file = page.write(out / "report.html")
    report.print_table(f"pointing: {summary['clip']} on {config.dataset}", columns, rows)
    print(f"Report: {page_file}")


def draw_maps(
    surgery: ClipSurgery, samples: list[Sample], names: tuple[str, ...], columns: int = 4
) -> np.ndarray:
    """The map of one word per image, uint8 (H, W, 3); the things of that name are outlined."""
    texts, off = surgery.embed_texts(names), redundant_feature(surgery, "empty")
    frames = []
    for number, sample in enumerate(samples):
        present = np.unique(sample.categories)
        category = int(present[number % len(present)])
        heat = min_max(word_maps(surgery, sample.image, texts, off))[category].cpu().numpy()
        frames.append(
            draw_heat(
                sample.image,
                heat,
                target=sample.category_mask(category),
                caption=names[category],
            )
        )
    return tile(frames, columns)
