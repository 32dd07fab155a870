"""Annotate a folder of images in everything mode: `python -m agents.annotate --everything`."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import numpy as np
import tyro

from agents.annotation.folder import (
    AnnotatedItem,
    FolderConfig,
    FolderRun,
    Key,
    annotate_folder,
)
from agents.annotation.merging import AnnotationFile
from sam_gym.backbones import load_backbone
from sam_gym.backbones.spec import BACKBONES, backbone_help
from sam_gym.data.coco_writer import mask_annotation
from sam_gym.mask_generation.generator import CROPS_PER_CALL, GeneratorOptions, MaskGenerator
from sam_gym.mask_generation.masks import Masks
from sam_gym.mask_generation.tiles import TiledGenerator, TileOptions
from sam_gym.utils import cli
from sam_gym.utils.digest import text_digest
from sam_gym.utils.fields import documented
from sam_gym.utils.render import draw_masks
from sam_gym.utils.settings import check_settings, whole
from sam_gym.utils.text import counted

#: The only category of a model without a class head.
OBJECT = "object"


@documented
@dataclass(frozen=True)
class Generator(GeneratorOptions):
    """Options of everything mode; masks are collected as COCO RLE."""

    output: tyro.conf.Suppress[Literal["coco_rle"]] = "coco_rle"


@documented
@dataclass(kw_only=True)
class AnnotateEverythingConfig(FolderConfig):
    """Annotate a folder of images with the masks of everything in them and write COCO JSON.

    Prompts SAM with a grid of points, keeps masks of high predicted IoU and stability, and removes
    duplicates. An annotation has the mask, a `score` (SAM's predicted IoU) and a
    `stability_score`. Its category is that of the adapter's class head, with its `category_score`,
    or else "object"; classes that --coco lacks get new ids. Files that cannot be read are reported
    and skipped. Run the same command again to resume an interrupted run.

    --config NAME or --config FILE.yaml gives options, which flags override.
    Names: dense, quick, whole_objects.
    """

    backbone: Annotated[str, tyro.conf.arg(help=backbone_help("SAM to use"))] = "micro"
    checkpoint: str | None = None
    """Weights of the SAM, .safetensors or .pth (None: its own)."""
    adapter: str | None = None
    """Adapter file that adaptation.train wrote."""
    dtype: str = "auto"
    """Precision: auto (bfloat16 on CUDA, else float32), float32, bfloat16, float16."""
    generator: Annotated[Generator, tyro.conf.arg(name="")] = field(default_factory=Generator)
    """Where to prompt and which masks to keep."""
    tiles: Annotated[int, whole(64)] | None = None
    """Side in pixels of overlapping tiles, in which large images are segmented, for small objects;
    masks are joined across borders (None: no tiles)."""


class EverythingAnnotator:
    """Annotates images in everything mode; keys are (file,).

    Args:
        generator: finds the masks.
        description: `info` of the annotation file.
    """

    new_categories = True

    def __init__(self, generator: MaskGenerator | TiledGenerator, description: str) -> None:
        self.generator, self.description = generator, description
        self.backbone = generator.backbone
        self.categories: Sequence[str] = generator.names or (OBJECT,)
        self.settings = {"thresholds": generator.thresholds}
        self.batch_size = CROPS_PER_CALL
        self.identity = text_digest(generator.backbone.identity, *self.categories)

    def keys(self, file: str) -> list[Key]:
        return [(file,)]

    def label(self, key: Key) -> str:
        (file,) = key
        return file

    def stream(self, items: Iterator[tuple[Key, np.ndarray]]) -> Iterator[AnnotatedItem]:
        waiting: deque[tuple[Key, np.ndarray]] = deque()

        def images() -> Iterator[np.ndarray]:
            for item in items:
                waiting.append(item)
                yield item[1]

        for masks in self.generator.stream(images()):
            yield _annotated(*waiting.popleft(), masks)


def _annotated(key: Key, image: np.ndarray, masks: Masks) -> AnnotatedItem:
    (file,) = key

    def draw() -> np.ndarray:
        drawn = map(masks.mask, range(len(masks)))
        return draw_masks(image, drawn, caption=f"{file}  {counted(len(masks), 'mask')}")

    return AnnotatedItem(key, masks.size, list(_annotations(masks)), draw)


def _annotations(masks: Masks) -> Iterator[dict[str, Any]]:
    """Annotations of the masks that have a pixel."""
    for record in masks.records("coco_rle"):
        if not record["area"]:
            continue
        scores = {"category_score": record["category_score"]} if "category" in record else {}
        yield mask_annotation(
            record["segmentation"],
            score=record["predicted_iou"],
            stability_score=record["stability_score"],
            category=record.get("category", OBJECT),
            **scores,
        )


def annotate_everything(config: AnnotateEverythingConfig) -> AnnotationFile:
    """Annotate images and write COCO JSON; returns the file.

    Raises:
        ValueError, FileNotFoundError: an option, the weights or the folder is wrong.
    """
    check_settings(config)
    config.generator.validate()
    if config.tiles is not None and config.generator.crop_n_layers:
        raise ValueError("--tiles replaces crops: leave out --crop-n-layers.")
    run = FolderRun.prepare(config)
    backbone = load_backbone(
        config.backbone, config.checkpoint, config.device, config.dtype, adapter=config.adapter
    )
    generator = MaskGenerator(backbone, config.generator)
    finder: MaskGenerator | TiledGenerator = generator
    if config.tiles is not None:
        finder = TiledGenerator(generator, TileOptions(config.tiles))
    annotator = EverythingAnnotator(finder, f"everything that {config.backbone} finds")
    content = annotate_folder(run, annotator)
    if run.ranks.is_first and content.num_images and not content.num_annotations:
        predicted_iou, stability = generator.thresholds
        print(
            f"No mask has a predicted IoU of {predicted_iou} and a stability of {stability}: lower "
            "--pred-iou-thresh and --stability-score-thresh."
        )
    if config.backbone == "micro" and config.checkpoint is None and config.adapter is None:
        print(
            "micro is a small SAM for CPUs. For photographs, pass a real one: --backbone vit_b "
            f"({BACKBONES.get('vit_b').megabytes} MB to download, 1.5 GB of memory, 100 s per "
            "image and CPU core; docs/guides/annotating_images.md)."
        )
    return content


def main(args: Sequence[str]) -> AnnotationFile:
    """Run the command line, without --everything."""
    prog = "python -m agents.annotate --everything"
    return annotate_everything(cli.parse(AnnotateEverythingConfig, prog, args))
