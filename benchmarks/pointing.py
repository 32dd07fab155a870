"""`pointing`: measure how well CLIP Surgery localises words."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from agents.clip.models import load_clip
from agents.clip.pointing import Redundant, pointing_game, redundant_feature, word_maps
from agents.clip.surgery import ClipSurgery, min_max
from benchmarks import report
from benchmarks.options import OutputOptions
from sam_gym.data import DATASETS, Sample
from sam_gym.data.options import DatasetOptions
from sam_gym.utils.fields import documented
from sam_gym.utils.progress import track
from sam_gym.utils.provenance import device_name, provenance
from sam_gym.utils.render import draw_heat, save_image, tile
from sam_gym.utils.settings import Count, Natural, check_settings
from sam_gym.utils.text import counted

_SHOWN = 12


@documented
@dataclass(frozen=True, kw_only=True)
class PointingBenchmarkConfig(DatasetOptions, OutputOptions):
    """Play the pointing game: does the maximum of a word's map lie on an object of that category?

    Every category of every image counts once. CLIP Surgery is compared with each of its two halves
    alone, the patch similarity of plain CLIP, and chance: the fraction of the image that the
    category covers.
    """

    out: str = "runs/pointing"
    """Folder for results.json, words.csv, pictures and report.html."""
    clip: str = "clip_micro"
    """CLIP to measure: clip_micro, or a model of open_clip (ViT-B-16, ...)."""
    clip_pretrained: str | None = None
    """Weights of the CLIP: a tag of open_clip or a file (bundled for clip_micro)."""
    blocks: Natural | None = None
    """Number of last blocks with a surgical path (None: that of the model)."""
    split: str | None = None
    """Split to measure on (None: the held-out split of the dataset)."""
    images: Count = 512
    """Maximum number of images, from the beginning of the split."""
    device: str = "auto"
    """Device: auto (CUDA, then MPS, then CPU), cpu, mps, cuda, cuda:N."""


def run(config: PointingBenchmarkConfig) -> dict[str, Any]:
    """Run the benchmark and write its report.

    Raises:
        ValueError, FileNotFoundError: an option, the data or the weights are wrong.
    """
    check_settings(config)
    out = report.output_folder(config.out, config.overwrite)
    clip = load_clip(config.clip, config.clip_pretrained, config.device)
    surgery, plain = ClipSurgery(clip, config.blocks), ClipSurgery(clip, 0)
    split = config.split or DATASETS.get(config.dataset).held_out_split
    dataset = config.make_dataset(split)
    surgery.clip.check_known(dataset.categories)
    samples = [dataset[index] for index in range(min(config.images, len(dataset)))]

    ways: dict[str, tuple[ClipSurgery, Redundant]] = {
        "surgery": (surgery, "empty"),
        "surgery, all texts": (surgery, "texts"),
        "architecture surgery only": (surgery, "none"),
        "feature surgery only": (plain, "empty"),
        "plain CLIP": (plain, "none"),
    }
    results = {
        name: pointing_game(how, samples, dataset.categories, redundant)
        for name, (how, redundant) in track(ways.items(), "pointing")
    }
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
        **provenance(config),
    }
    _write(config, summary, surgery, samples, dataset.categories, out)
    return summary


def _write(
    config: PointingBenchmarkConfig,
    summary: dict[str, Any],
    surgery: ClipSurgery,
    samples: list[Sample],
    names: tuple[str, ...],
    out: Path,
) -> None:
    words = summary["by_category"]
    by_word = [
        {"word": word} | {way: words[way][word] for way in words} for word in words["surgery"]
    ]
    files = report.write_results(out, summary, "words.csv", by_word)
    save_image(out / "maps.png", draw_maps(surgery, samples[:_SHOWN], names))

    rows = [
        [name, f"{value:.3f}", f"{summary['ci95'][name]:.3f}"]
        for name, value in summary["accuracy"].items()
    ]
    rows.append(["chance", f"{summary['chance']:.3f}", ""])
    columns = ["map", "pointing accuracy", "± (95%)"]
    title = f"{summary['clip']} on {config.dataset}"
    page = report.Page(
        f"Pointing game of {title}",
        "Does the maximum of a word's map lie on an object of that category? "
        f"{counted(summary['words'], 'word')} in "
        f"{counted(summary['images'], 'image')}.",
    )
    accuracy = summary["accuracy"] | {"chance": summary["chance"]}
    shown = {"CLIP Surgery": "surgery", "plain CLIP": "plain CLIP", "chance": "chance"}
    page.cards({name: f"{accuracy[way]:.3f}" for name, way in shown.items()})
    page.table(columns, rows)
    page.heading("By word")
    page.table(
        ["word", *words], [[row["word"], *(f"{row[way]:.3f}" for way in words)] for row in by_word]
    )
    page.heading("Maps")
    page.plot(out / "maps.png", "Maps of words over the images; a cross marks each maximum.")
    page.finish(files, summary["settings"], f"pointing: {title}", columns, rows)


def draw_maps(
    surgery: ClipSurgery, samples: list[Sample], names: tuple[str, ...], columns: int = 4
) -> np.ndarray:
    """Draw the map of one word per image, uint8 (H, W, 3), with the word's objects outlined."""
    texts, off = surgery.embed_texts(names), redundant_feature(surgery, "empty")
    frames = []
    for number, sample in enumerate(samples):
        present = np.unique(sample.categories)
        category = int(present[number % len(present)])
        heat = min_max(word_maps(surgery, sample.image, texts, off))[category].cpu().numpy()
        mask = sample.category_mask(category)
        frames.append(draw_heat(sample.image, heat, target=mask, caption=names[category]))
    return tile(frames, columns)
